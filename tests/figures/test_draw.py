"""Figures from whole, partial and missing records: legible in print, nothing dropped, nothing invented."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.text
import pandas as pd
import pytest
from fabricated import fabricated, failed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from djinn.bench.records import latest, read_records
from djinn.errors import DjinnError
from djinn.figures import draw_all, frames, plots
from djinn.figures.style import COLUMN_IN, LOOKS, SMALLEST_PT, canvas, house_style
from djinn.profiles import load_profile, system_names

SYSTEMS = load_profile("smoke_13b").systems


def words_in(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.fixture
def runs(fabricated_run: Path) -> pd.DataFrame:
    return frames.runs(latest(read_records(fabricated_run / "results" / "baselines.jsonl")), SYSTEMS)


@pytest.mark.slow
def test_every_figure_is_written_as_pdf_png_and_csv(fabricated_run: Path, capsys: pytest.CaptureFixture[str]):
    written = draw_all(fabricated_run)
    names = {"bandwidth", "ttft", "time_per_token", "device_memory", "bits_per_weight", "chunk_sweep"}
    names |= {"budget_sweep", "timeline", "timeline_coded"}
    expected = {f"{name}.{kind}" for name in names for kind in ("pdf", "png", "csv")}
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
    assert said.count("not drawn: no baseline records") == 4
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


def test_a_single_run_has_no_whiskers():
    profile = load_profile("smoke_tiny")
    few = ([fabricated(profile, "djinn", run) for run in range(count)] for count in (1, 2))
    whiskers = [len(plots.ttft(frames.runs(records)).axes[0].collections) for records in few]
    assert whiskers[0] == 0 < whiskers[1]


def test_an_axes_of_ones_own_is_drawn_into(runs: pd.DataFrame):
    ax = canvas(None, 2.0)
    assert plots.ttft(runs, ax=ax) is ax.figure
    assert ax.patches


def test_the_pcie_trace_gets_its_own_axes(fabricated_run: Path):
    pcie = pd.DataFrame(
        {"time_s": [0.0, 1.0], "rx_gbps": [20.0, 21.0], "tx_gbps": [0.1, 0.1], "source": ["nvml", "nvml"]}
    )
    intervals = frames.read_timeline(fabricated_run)
    assert len(plots.timeline(intervals).axes) == 2
    assert len(plots.timeline(intervals, pcie).axes) == 3


def test_a_timeline_has_the_lanes_that_were_recorded_and_a_part_enlarged(fabricated_run: Path):
    intervals = frames.read_timeline(fabricated_run)
    whole, part = plots.timeline(intervals).axes
    assert [label.get_text() for label in whole.get_yticklabels()] == ["copy", "compute", "stall"]
    assert part.get_xlim()[1] < whole.get_xlim()[1] / 2
    assert len(plots.timeline(intervals[:20]).axes) == 1
    alone = canvas(None, 2.0)
    assert plots.timeline(intervals, ax=alone).axes == [alone]


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
        for size in ("4 MiB", "16 MiB")
    ]
    (ax,) = plots.sweep(frames.sweep(records), "chunk").axes
    assert ax.get_ylim()[1] > 10.5


def test_a_reference_run_is_drawn_over_this_one(runs: pd.DataFrame):
    slower = runs.assign(ttft_s=2 * runs["ttft_s"])
    plain, over = plots.ttft(runs), plots.ttft(runs, reference=slower)
    assert "Diamonds: medians of the reference run." in " ".join(words_in(over)).replace("\n", " ")
    assert len(over.axes[0].lines) == len(plain.axes[0].lines) + 1
    wanted = slower.groupby("name")["ttft_s"].median().dropna()
    assert sorted(over.axes[0].lines[-1].get_xdata()) == pytest.approx(sorted(wanted))
    assert "Diamonds" not in " ".join(words_in(plots.ttft(runs, reference=slower.iloc[:0])))


def test_empty_frames_are_refused():
    with pytest.raises(DjinnError, match="no timeline"):
        plots.timeline(pd.DataFrame(columns=frames.TIMELINE_COLUMNS))


def test_every_system_that_a_profile_may_list_has_a_look_of_its_own():
    assert list(LOOKS) == system_names()
    assert len({look.hatch for look in LOOKS.values()}) == len({look.marker for look in LOOKS.values()}) == len(LOOKS)
