"""Figures from whole, partial and missing records: legible in print, nothing dropped, nothing invented."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from fabricated import fabricated, failed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from djinn.bench.records import latest, read_records
from djinn.errors import DjinnError
from djinn.figures import draw_all, frames, plots, sweeps, timelines
from djinn.figures.bars import cut_at
from djinn.figures.draw import save
from djinn.figures.style import COLUMN_IN, LOOKS, SMALLEST_PT, canvas, caption_of, house_style, look_of, mark
from djinn.profiles import load_profile, system_names

SYSTEMS = load_profile("smoke_13b").systems


def words_in(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.fixture
def runs(fabricated_run: Path) -> pd.DataFrame:
    return frames.runs(latest(read_records(fabricated_run / "results" / "baselines.jsonl")), SYSTEMS)


@pytest.mark.slow
def test_every_figure_is_written_as_pdf_png_csv_and_caption(fabricated_run: Path, capsys: pytest.CaptureFixture[str]):
    written = draw_all(fabricated_run)
    names = {"headline", "bandwidth", "ttft", "time_per_token", "device_memory", "loading", "bits_per_weight"}
    names |= {"headline_narrow", "chunk_sweep", "budget_sweep", "copy_rates", "timeline", "timeline_coded"}
    expected = {f"{name}.{kind}" for name in names for kind in ("pdf", "png", "csv", "caption.txt")}
    expected |= {"timeline.trace.json", "timeline_coded.trace.json"}
    assert {path.name for path in written} == expected
    assert all(path.stat().st_size for path in written)
    assert set(written) == set((fabricated_run / "figures").iterdir())  # nothing half-written stays
    assert "ring_sweep: not drawn: no sweep records over ring sizes" in capsys.readouterr().out
    for path in (path for path in written if path.suffix == ".pdf"):
        pdf = path.read_bytes()
        assert b"/FontFile2" in pdf, path  # TrueType, embedded
        assert b"/Type3" not in pdf, path
        assert b"/Subtype /Image" not in pdf, path  # lines and letters, no pixels


def test_nothing_measured_draws_nothing_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert draw_all(tmp_path) == []
    said = capsys.readouterr().out
    assert said.count("not drawn: no baseline records") == 6
    assert "timeline: not drawn: no timeline" in said


@pytest.mark.parametrize("plot", [plots.bandwidth, plots.ttft, plots.device_memory])
def test_what_is_missing_is_drawn_as_its_words(runs: pd.DataFrame, plot):
    words = words_in(plot(runs))
    assert {"OOM", "not run"} <= set(words)
    assert {LOOKS[name].label for name in SYSTEMS} <= {line for each in words for line in each.splitlines()}


def test_figures_are_legible_at_column_width(runs: pd.DataFrame):
    figure = plots.bandwidth(runs)
    assert figure.get_size_inches()[0] == COLUMN_IN
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= SMALLEST_PT


def test_bars_are_medians_and_whiskers_the_range_of_few_runs():
    profile = load_profile("smoke_tiny")
    times = [1.0, 2.0, 9.0]
    runs = frames.runs([fabricated(profile, "djinn", run, ttft_s=time) for run, time in enumerate(times)])
    ax = plots.ttft(runs).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [2.0]  # type: ignore[attr-defined]
    assert ax.collections[0].get_segments()[0][:, 0].tolist() == [1.0, 9.0]  # type: ignore[attr-defined]
    assert not plots.ttft(runs[:1]).axes[0].collections


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ([1.0, 2.0, 2.5, 20.0], 2.5 * 1.35),
        ([1.0, 2.0, 2.5, 7.0], float("inf")),
        ([1.0, 10.0], float("inf")),
        ([0.01, 5.0, 6.0, 7.0], float("inf")),
        ([1.0, 1.5, 1.4, 8.0, 30.0], 1.5 * 1.35),
        ([], float("inf")),
    ],
)
def test_bars_are_cut_where_few_dwarf_the_others(lengths: list[float], longest: float):
    assert cut_at(lengths) == pytest.approx(longest)


def test_a_cut_bar_says_so_and_keeps_its_number():
    profile = load_profile("smoke_13b")
    times = {"djinn": 1.0, "djinn:lossless": 0.7, "accelerate:cpu": 30.0}
    records = [
        fabricated(profile, system, 0, variant=variant, ttft_s=time)
        for (system, _, variant), time in ((name.partition(":"), time) for name, time in times.items())
    ]
    figure = plots.ttft(frames.runs(records))
    assert max(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(1.35)  # type: ignore[attr-defined]
    assert "30.0 s" in words_in(figure)
    assert "two white strokes" in caption_of(figure)


def test_an_axes_of_ones_own_is_drawn_into(runs: pd.DataFrame):
    ax = canvas(None, 2.0)
    assert plots.ttft(runs, ax=ax) is ax.figure
    assert ax.patches


def pixels_of(figure: Figure, colour: str) -> tuple[int, int]:
    """Return how many pixels have a colour, and how many columns they lie in."""
    with house_style():
        canvas_of = FigureCanvasAgg(figure)
        canvas_of.draw()
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    found = (np.asarray(canvas_of.buffer_rgba())[:, :, :3] == wanted).all(axis=2)
    return int(found.sum()), int(found.any(axis=0).sum())


def test_two_panels_of_ones_own_figure_keep_to_their_halves(runs: pd.DataFrame):
    figure = Figure(figsize=(2 * COLUMN_IN, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.ttft(runs, ax=left)
    plots.bandwidth(runs, ax=right)
    with house_style():
        FigureCanvasAgg(figure).draw()
    boxes = [ax.get_tightbbox() for ax in (left, right)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0].x1 <= boxes[1].x0
    assert boxes[0].x0 >= 0
    assert boxes[1].x1 <= figure.bbox.x1
    assert left.get_position().width > 0.15  # the layout has not collapsed
    assert "first token" in caption_of(figure)
    assert "consumed" in caption_of(figure)


def test_bars_on_a_logarithmic_axis_are_as_wide_as_they_are_long(runs: pd.DataFrame):
    figure = plots.ttft(runs)
    figure.axes[0].set_xscale("log")
    widths = {name: pixels_of(figure, LOOKS[name].colour)[1] for name in ("djinn", "accelerate:disk")}
    assert 5 < widths["djinn"] < widths["accelerate:disk"]


def test_a_system_of_ones_own_is_drawn_under_its_own_name(runs: pd.DataFrame):
    named = runs.replace({"name": {"accelerate:disk": "flexgen"}})
    for plot in (plots.bandwidth, plots.ttft, plots.device_memory):
        figure = plot(named)
        assert "flexgen" in words_in(figure)
    assert pixels_of(plots.ttft(named), look_of("flexgen").colour)[0] > 500


def test_a_papers_figure_has_no_title_and_a_caption_beside_it(runs: pd.DataFrame, tmp_path: Path):
    figure = plots.ttft(runs)
    mark(figure, "replayed: one machine")
    caption = caption_of(figure)
    assert caption.endswith("replayed: one machine")
    assert tmp_path / "ttft.caption.txt" in save(figure, runs, tmp_path / "ttft", paper=True)
    assert (tmp_path / "ttft.caption.txt").read_text() == f"{caption}\n"
    assert not {"Time to first token", "replayed: one machine"} & set(words_in(figure))


def test_a_timeline_has_the_lanes_that_were_recorded_and_a_part_enlarged(fabricated_run: Path):
    intervals = frames.read_timeline(fabricated_run)
    whole, part = timelines.timeline(intervals).axes
    lanes = [label.get_text() for label in whole.get_yticklabels()]
    assert lanes == ["copy", "compute", "waiting for\nthe link (the bound)"]
    assert part.get_xlim()[1] < whole.get_xlim()[1] / 2
    assert len(timelines.timeline(intervals[:20]).axes) == 1
    alone = canvas(None, 2.0)
    assert timelines.timeline(intervals, ax=alone).axes == [alone]


@pytest.mark.parametrize("name", ["bandwidth", "ttft", "time_per_token", "device_memory"])
def test_words_lie_within_the_figure_and_on_nothing(fabricated_run: Path, name: str):
    """The longest reason there is, and a system with some runs missing."""
    records = latest(read_records(fabricated_run / "results" / "baselines.jsonl"))
    profile = load_profile("smoke_13b")
    reason = "memory: accelerate:cpu, which first loads the whole model, needs 152 GB, 132 GB are free"
    records.append(failed(profile, "resident", 0, "unavailable", reason))
    frame = frames.tokens(records, SYSTEMS) if name == "time_per_token" else frames.runs(records, SYSTEMS)
    figure = getattr(plots, name)(frame)
    with house_style():
        FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    said = {text.get_text(): text.get_window_extent() for text in ax.texts}
    inside = ax.get_window_extent()
    for words in ("OOM", "unavailable: memory"):
        assert inside.x0 < said[words].x0
        assert said[words].x1 < inside.x1
    numbers = [box for words, box in said.items() if words[0].isdigit()]
    assert numbers
    assert all(inside.x1 < box.x0 and box.x1 <= figure.bbox.x1 for box in numbers)
    labels = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
    partial = {"not measured"} if name == "device_memory" else {"DeepSpeed ZeRO-3, disk\ntimed out in 1 of 2"}
    assert partial <= {*said, *(label.get_text() for label in ax.get_yticklabels())}


def test_points_at_the_ceiling_are_within_the_axes():
    profile = load_profile("smoke_13b")
    records = [
        fabricated(profile, "djinn", 0, experiment="sweep", variant=f"chunk={size}", link_bytes=10**10, wall_s=1.0)
        for size in ("4 MiB", "16 MiB", "64 MiB")
    ]
    figure = sweeps.sweep(frames.sweep(records), "chunk")
    assert figure.axes[0].get_ylim()[1] > 10.5
    assert not any("smoke run" in words for words in words_in(figure))
    small = [record.model_copy(update={"model_bytes": 10**7}) for record in records]
    assert any("smoke run" in words for words in words_in(sweeps.sweep(frames.sweep(small), "chunk")))
    with pytest.raises(DjinnError, match="2 chunk sizes"):
        sweeps.sweep(frames.sweep(records[:2]), "chunk")


def test_a_reference_run_is_drawn_over_this_one(runs: pd.DataFrame):
    slower = runs.assign(ttft_s=2 * runs["ttft_s"])
    plain, over = plots.ttft(runs), plots.ttft(runs, reference=slower)
    assert "Diamonds: medians of the reference run." in caption_of(over)
    assert len(over.axes[0].lines) == len(plain.axes[0].lines) + 1
    wanted = slower.groupby("name")["ttft_s"].median().dropna()
    assert sorted(over.axes[0].lines[-1].get_xdata()) == pytest.approx(sorted(wanted))
    assert "Diamonds" not in caption_of(plots.ttft(runs, reference=slower.iloc[:0]))


def test_empty_frames_are_refused():
    with pytest.raises(DjinnError, match="no timeline"):
        timelines.timeline(pd.DataFrame(columns=frames.TIMELINE_COLUMNS))


def test_every_system_that_a_profile_may_list_has_a_look_of_its_own():
    assert list(LOOKS) == system_names()
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
