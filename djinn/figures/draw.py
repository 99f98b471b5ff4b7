"""Every figure of a run directory, written as PDF, PNG and the CSV it was drawn from; timelines for Perfetto too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from djinn.bench.run import Run
from djinn.errors import DjinnError
from djinn.figures import experts, frames, plots, scaling
from djinn.figures.perfetto import trace_events
from djinn.figures.style import house_style, mark
from djinn.files import write_bytes, write_text
from djinn.text import one_line, spreadsheet

PNG_DPI = 220


def draw_all(run_dir: Path, reference: Path | None = None, beside: Sequence[Path] = ()) -> list[Path]:
    """Draw what the results of ``run_dir`` allow into ``run_dir/figures``; return the files written.

    A figure whose results are missing is not drawn, and a line says why. Means of another run of the same profile,
    ``reference``, are drawn over this one's. Runs on other numbers of GPUs ``beside`` it give a figure of all of them.

    Raises:
        DjinnError: runs beside it that are not of the same work.
        ConfigError: a result file that is damaged.
    """
    written: list[Path] = []
    run = Run(run_dir)
    origin = run.replayed
    for name, frame, plot in _figures(run, None if origin or reference is None else Run(reference)):
        try:
            figure = plot(frame)
            mark(figure, origin)
        except DjinnError as error:
            print(f"{name}: not drawn: {one_line(error)}")
            continue
        written += save(figure, frame, run_dir / "figures" / name)
        if name.startswith("timeline"):
            written.append(_write_trace(frame, run_dir / "figures" / f"{name}.trace.json"))
    if beside:
        rows = scaling.by_gpus([record for each in (run, *map(Run, beside)) for record in each.baselines])
        written += save(scaling.draw(rows), rows, run_dir / "figures" / "time_by_gpus")
    return written


def _write_trace(intervals: pd.DataFrame, path: Path) -> Path:
    write_text(path, json.dumps(trace_events(intervals)))
    return path


@house_style()
def save(figure: Figure, frame: pd.DataFrame, stem: Path) -> list[Path]:
    """Write ``figure`` to ``stem``.pdf and .png, and the frame it shows to ``stem``.csv, each whole or not at all."""
    # No date inside, so that the same records give the same bytes.
    writers: dict[str, Callable[[BytesIO], object]] = {
        ".pdf": partial(figure.savefig, format="pdf", metadata={"CreationDate": None}),
        ".png": partial(figure.savefig, format="png", dpi=PNG_DPI),
        ".csv": partial(frame.map(_cell).to_csv, index=False),
    }
    paths = []
    for suffix, write in writers.items():
        drawn = BytesIO()
        write(drawn)
        path = stem.with_name(stem.name + suffix)
        write_bytes(path, drawn.getvalue())
        paths.append(path)
    return paths


def _cell(value: Any) -> Any:
    return spreadsheet(value) if isinstance(value, str) else value


def _figures(run: Run, reference: Run | None) -> Iterator[tuple[str, pd.DataFrame, Callable[[pd.DataFrame], Figure]]]:
    records = run.baselines
    before = reference.baselines if reference is not None else []
    runs_before, tokens_before = (frames.runs(before), frames.tokens(before)) if before else (None, None)
    systems = run.profile.systems if records and run.has_profile else ()
    runs = frames.runs(records, systems)
    yield "bandwidth", runs, partial(plots.bandwidth, reference=runs_before)
    yield "ttft", runs, partial(plots.ttft, reference=runs_before)
    yield "time_per_token", frames.tokens(records, systems), partial(plots.time_per_token, reference=tokens_before)
    yield "device_memory", runs, plots.device_memory
    points = frames.sweep(run.sweep)
    yield "bits_per_weight", frames.bits(records), plots.bits_per_weight
    yield "chunk_sweep", points[points["axis"] == "chunk"], partial(plots.sweep, axis="chunk")
    yield "ring_sweep", points[points["axis"] == "ring"], partial(plots.sweep, axis="ring")
    yield "budget_sweep", points[points["axis"] == "budget"], experts.by_budget
    pcie = frames.read_pcie(run.folder)
    yield "timeline", frames.read_timeline(run.folder), partial(plots.timeline, pcie=pcie)
    yield "timeline_coded", frames.read_timeline(run.folder, "timeline_coded"), plots.timeline
