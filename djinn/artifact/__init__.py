"""What a reviewer receives: executed notebooks, claims with their verdicts, a run's page and provenance.

Imports: figures, bench and all below them. runner executes the notebooks, report writes the page.
Read claims.py first, then runner.py.
"""

import warnings

# Libraries look for notebook widgets when they are imported; text is what an executed notebook keeps.
warnings.filterwarnings("ignore", message="IProgress not found")
