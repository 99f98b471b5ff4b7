"""The pictures of the generated pages: README's, and those of several runs, from the reference records alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from djinn.artifact.reference import folders, read_manifest, run_of, runs
from djinn.bench.run import Run
from djinn.figures import across, budgets, experts, headline, scaling
from djinn.figures.draw import save
from djinn.places import ROOT
from djinn.sizes import format_bytes

PICTURE = ROOT / "docs" / "images" / "headline"
"""README's picture, without its suffix."""
PICTURED, BY_BUDGET = "compare_h100", "compare_70b"
"""The profiles whose newest reference runs README's picture and the figure over budgets show."""
_RANKS = ROOT / "data" / "benchmarks" / "ranks_h100_2026-11-28"
"""Samples of one host with four GPUs."""
_EXPERTS = ROOT / "data" / "benchmarks" / "experts_h100_2026-11-27"
"""Samples of two mixtures of experts."""


def picture_frame() -> pd.DataFrame:
    """Return the rows of README's picture (see :func:`djinn.figures.headline.medians`)."""
    return headline.medians(_newest(PICTURED).baselines)


def models_frame() -> pd.DataFrame:
    """Return the systems of each model's newest run (see :func:`djinn.figures.across.by_model`)."""
    by_date = sorted(runs(), key=lambda folder: read_manifest(folder).date)
    return across.by_model([Run(folder).baselines for folder in by_date])


def figure_frames() -> dict[str, pd.DataFrame]:
    """Return what the figures of several runs show, by their names: systems over models, predictions, budgets, GPUs,
    experts."""
    return {
        "models": models_frame(),
        "predictions": across.read_predictions(folders()),
        "budgets": budgets.measured(_newest(BY_BUDGET)),
        "gpus": scaling.read_links(_RANKS / f"l16_{count}.jsonl" for count in (1, 2, 4)),
        "experts": experts.read(sorted(_EXPERTS.glob("*.jsonl"))),
    }


def write_picture(stem: Path = PICTURE) -> list[Path]:
    """Draw README's picture as PDF and PNG, with the CSV that it shows; return the paths."""
    run, rows = _newest(PICTURED), picture_frame()
    budget, size = (format_bytes(int(rows[name].iloc[0])) for name in ("budget_bytes", "model_bytes"))
    title = f"Time per token: CodeLlama-34B ({size}) in {budget} of an H200"
    figure = headline.draw(rows, title, headline.about(run.baselines, rows, read_manifest(run.folder).date))
    return save(figure, rows, stem)


def write_figures(folder: Path = PICTURE.parent) -> list[Path]:
    """Draw the figures of several runs that the pages show, in the form of README's picture; return the paths."""
    found, run = figure_frames(), _newest(BY_BUDGET)
    figures = {
        "models": across.models(found["models"]),
        "predictions": across.predictions(found["predictions"]),
        "budgets": budgets.draw(
            budgets.predicted(run), found["budgets"], budgets.gpu_bytes(run), budgets.model_of(run)
        ),
        "gpus": scaling.links(found["gpus"]),
        "experts": experts.draw(found["experts"]),
    }
    return [path for name, figure in figures.items() for path in save(figure, found[name], folder / name)]


def _newest(profile: str) -> Run:
    folder = run_of(profile)
    assert folder is not None, f"no reference run of {profile}"
    return Run(folder)
