"""Every figure of a run directory as PDF, PNG, caption and the CSV it was drawn from; timelines for Perfetto."""

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
from djinn.figures import (
    across,
    budgets,
    counters,
    experts,
    frames,
    headline,
    per_gpu,
    plots,
    scaling,
    sweeps,
    timelines,
)
from djinn.figures.perfetto import trace_events
from djinn.figures.style import LOOKS, caption_of, house_style, mark, strip
from djinn.files import write_bytes, write_text
from djinn.text import one_line, spreadsheet

PNG_DPI = 220


def draw_all(
    run_dir: Path, reference: Path | None = None, beside: Sequence[Path] = (), *, paper: bool = False
) -> list[Path]:
    """Draw what the results of ``run_dir`` allow into ``run_dir/figures``; return the files written.

    A figure whose results are missing is not drawn, and a line says why. Medians of another run of the same profile,
    ``reference``, are drawn over this one's. Runs on other numbers of GPUs ``beside`` it give a figure of all of them.
    For a ``paper`` figures have no title and no mark of a replay: their captions say both.

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
        except DjinnError as error:
            print(f"{name}: not drawn: {one_line(error)}")
            continue
        mark(figure, origin)
        written += save(figure, frame, run_dir / "figures" / name, paper=paper)
        if name.startswith("timeline"):
            written.append(_write_trace(frame, run_dir / "figures" / f"{name}.trace.json"))
    if beside:
        rows = scaling.by_gpus([record for each in (run, *map(Run, beside)) for record in each.baselines])
        written += save(scaling.draw(rows), rows, run_dir / "figures" / "time_by_gpus", paper=paper)
    return written


def _write_trace(intervals: pd.DataFrame, path: Path) -> Path:
    write_text(path, json.dumps(trace_events(intervals)))
    return path


@house_style()
def save(figure: Figure, frame: pd.DataFrame, stem: Path, *, paper: bool = False) -> list[Path]:
    """Write ``figure`` to ``stem``.pdf and .png, its caption to .caption.txt, and the frame it shows to .csv.

    Each is written whole or not at all. For a ``paper`` the figure loses its title and its mark.
    """
    caption = one_line(caption_of(figure))
    if paper:
        strip(figure)
    # No date inside, so that the same records give the same bytes.
    writers: dict[str, Callable[[BytesIO], object]] = {
        ".pdf": partial(figure.savefig, format="pdf", metadata={"CreationDate": None}),
        ".png": partial(figure.savefig, format="png", dpi=PNG_DPI),
        ".csv": partial(frame.map(_cell).to_csv, index=False),
        ".caption.txt": lambda out: out.write(f"{caption}\n".encode()),
    }
    paths = []
    for suffix, write in writers.items():
        drawn = BytesIO()
        write(drawn)
        path = stem.with_name(stem.name + suffix)
        write_bytes(path, drawn.getvalue())
        paths.append(path)
    return paths


def _headline_title(run: Run) -> str:
    return f"Time per token: {one_line(run.profile.title)}" if run.has_profile else "Time per token"


def _budgets(run: Run, rows: pd.DataFrame) -> Figure:
    return budgets.draw(budgets.predicted(run), rows, budgets.gpu_bytes(run), one_line(budgets.model_of(run)))


def _cell(value: Any) -> Any:
    return spreadsheet(value) if isinstance(value, str) else value


def _figures(run: Run, reference: Run | None) -> Iterator[tuple[str, pd.DataFrame, Callable[[pd.DataFrame], Figure]]]:
    records = run.baselines
    before = reference.baselines if reference is not None else []
    runs_before, tokens_before = (frames.runs(before), frames.tokens(before)) if before else (None, None)
    # In one order on every page, whatever a profile's.
    systems = [name for name in LOOKS if name in run.profile.systems] if records and run.has_profile else []
    runs, points = frames.runs(records, systems), frames.sweep(run.sweep)
    traced = per_gpu.read_timelines(run.folder)
    ceilings = per_gpu.ceilings([*records, *run.sweep])
    fastest = headline.rows_of(records)
    words = "" if fastest.empty else headline.about(records, fastest)
    picture = partial(headline.draw, title=_headline_title(run), caption=words)
    yield "headline", fastest, picture
    yield "headline_narrow", fastest, partial(picture, narrow=True)
    yield "bandwidth", runs, partial(plots.bandwidth, reference=runs_before)
    yield "ttft", runs, partial(plots.ttft, reference=runs_before)
    yield "time_per_token", frames.tokens(records, systems), partial(plots.time_per_token, reference=tokens_before)
    yield "device_memory", runs, plots.device_memory
    yield "loading", runs, plots.loading
    yield "token_parts", timelines.parts_frame(traced[0]), timelines.where_time_goes
    yield "bits_per_weight", frames.bits(records), plots.bits_per_weight
    yield "chunk_sweep", points[points["axis"] == "chunk"], partial(sweeps.sweep, axis="chunk")
    yield "ring_sweep", points[points["axis"] == "ring"], partial(sweeps.sweep, axis="ring")
    yield "budget_sweep", points[points["axis"] == "budget"], experts.by_budget
    yield "batch_sweep", points[points["axis"] == "batch"], sweeps.by_batch
    yield "prompt_sweep", points[points["axis"] == "prompt"], sweeps.by_prompt
    if not run.replayed:  # what is replayed measures nothing, and a prediction takes as long as all else
        yield "budgets", budgets.measured(run), partial(_budgets, run)
    yield "predictions", across.read_predictions([run.folder]), across.predictions
    yield (
        "copy_rates",
        timelines.rates_frame(*traced),
        partial(timelines.copy_rates, small_gbps=per_gpu.beside_traces(run)),
    )
    for gpu, own in enumerate(traced):
        drawn = partial(timelines.timeline, gpu=gpu if len(traced) > 1 else None)
        for system, name in per_gpu.TIMELINES.items():
            yield f"{name}_{gpu}" if gpu else name, own[system], drawn
    yield "pcie", frames.read_pcie(run.folder), partial(counters.counters, ceilings_gbps=ceilings)
