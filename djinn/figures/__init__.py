"""Figures of a run, drawn from its result files alone: no device, no model, no kernel state."""

from djinn.figures.draw import draw_all

__all__ = ["draw_all"]
