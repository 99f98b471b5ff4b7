"""Records in, figures out: pure functions from a DataFrame to a matplotlib Figure, in one style.

Imports: bench and all below it. frames makes the tables, plots draws them, draw writes a run's files.
Read frames.py first: every column, its unit, and what a missing value means.
"""

from djinn.figures.draw import draw_all

__all__ = ["draw_all"]
