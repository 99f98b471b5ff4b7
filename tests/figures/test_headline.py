"""README's picture: medians and speedups as the records give them, every system drawn, the bound a line."""

from __future__ import annotations

import matplotlib.text
import pandas as pd
import pytest
from fabricated import fabricated, failed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from djinn.bench.records import Record
from djinn.errors import UnavailableError
from djinn.figures import frames, headline
from djinn.figures.style import COLUMN_IN, canvas, display_name, house_style
from djinn.profiles import load_profile

PROFILE = load_profile("compare_h100")


def record(name: str, seconds: float, run: int = 0) -> Record:
    system, _, variant = name.partition(":")
    times = [seconds] * (PROFILE.new_tokens - 1)
    return fabricated(
        PROFILE, system, run, variant=variant, per_token_s=times, model_bytes=60 * 10**9, budget_bytes=10 * 10**9,
        ceiling_gbps=50.0, link="pcie",
    )  # fmt: skip


@pytest.fixture
def rows() -> pd.DataFrame:
    times = {"accelerate:cpu": 20.0, "djinn": 2.0, "deepspeed:cpu": 3.0, "djinn:lossless": 1.25}
    return headline.medians([record(name, seconds) for name, seconds in times.items()])


def words_in(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_rows_are_medians_speedups_and_the_bound(rows: pd.DataFrame):
    assert list(rows["label"]) == ["djinn, coded", "djinn", "DeepSpeed ZeRO-3", "Accelerate"]
    assert list(rows["token_s"]) == [1.25, 2.0, 3.0, 20.0]
    assert list(rows["djinn"]) == [0.625, 1.0, 1.5, 10.0]
    assert list(rows["djinn:lossless"]) == [1.0, 1.6, 2.4, 16.0]
    assert set(rows["bound_s"]) == {1.0}, "50 GB beyond the budget at 50 GB/s"


def test_of_several_gpus_all_links_set_the_bound_and_not_the_one_that_one_process_measured():
    each = [{"ceiling_gbps": 25.0}, {"ceiling_gbps": 25.0}]
    ours = record("djinn", 2.0).model_copy(update={"gpus": 2})
    ours = Record.model_validate(ours.model_dump() | {"by_rank": each})
    peers = [
        record("accelerate:cpu", 3.0, run).model_copy(update={"gpus": 2, "ceiling_gbps": 25.0}) for run in range(3)
    ]
    rows = headline.medians([ours, *peers])
    assert set(rows["ceiling_gbps"]) == {50.0}
    assert set(rows["bound_s"]) == {0.8}, "40 GB beyond both budgets at 50 GB/s"
    told = frames.runs([ours, *peers])
    assert told["bound_s"].dropna().tolist() == [0.8]
    assert told["ceiling_gbps"].dropna().tolist() == [50.0]


def test_a_disk_sets_no_bound_since_host_memory_may_keep_a_part():
    rows = headline.medians([record("djinn", 2.0).model_copy(update={"link": "disk"})])
    assert rows["bound_s"].isna().all()
    figure = headline.draw(rows, "", headline.about([record("djinn", 2.0)], rows))
    assert "bound" not in words_in(figure).lower()


def test_systems_that_did_not_finish_are_no_rows():
    missing = failed(PROFILE, "accelerate:cpu", 0, "unavailable", "memory: none")
    assert list(headline.medians([record("djinn", 2.0), missing])["name"]) == ["djinn"]
    with pytest.raises(UnavailableError, match="no finished run of djinn"):
        headline.medians([record("deepspeed:cpu", 3.0)])


def test_every_system_has_its_bar_its_time_and_its_speedups(rows: pd.DataFrame):
    figure = headline.draw(rows, "title", "about")
    (ax,) = figure.axes
    assert len(ax.patches) == len(rows)
    words = words_in(figure)
    for said in ("1.25 s", "2.00 s", "3.00 s", "20.0 s", "djinn 1.5x faster; djinn, coded 2.4x faster", "10x"):
        assert said in words
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[:3] == [1.25, 2.0, 3.0]
    assert 3.0 < widths[3] < 20.0, "the slowest bar is cut, so that the others can be told apart"
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [1.0]


def test_narrow_words_stand_above_their_bars_and_none_leaves_the_picture(rows: pd.DataFrame):
    title = "Time per token: a model of some size in a budget of some gigabytes"
    figure = headline.draw(rows, title, "about", narrow=True)
    with house_style():
        FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    assert figure.get_size_inches()[0] == COLUMN_IN
    bars = [bar.get_window_extent() for bar in ax.patches]
    for row, (label, gains) in enumerate(
        [
            ("djinn, coded", ""),
            ("djinn", ""),
            ("DeepSpeed ZeRO-3", "djinn 1.5x faster; djinn, coded 2.4x faster"),
            ("Accelerate", "djinn 10x faster; djinn, coded 16x faster"),
        ]
    ):
        (words,) = [text for text in ax.texts if text.get_text() == "\n".join(filter(None, (label, gains)))]
        box = words.get_window_extent()
        assert box.y0 >= bars[row].y1
        assert row == 0 or box.y1 <= bars[row - 1].y0
    words_drawn = [each for each in ax.get_children() if isinstance(each, matplotlib.text.Text) and each.get_text()]
    assert len(words_drawn) == 2 * len(rows) + 2  # names, times, the bound and the title
    for box in (each.get_window_extent() for each in words_drawn):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    assert ax.get_title(loc="left").replace("\n", " ") == title


def test_it_draws_into_an_axes_of_ones_own_and_one_system_alone():
    ax = canvas(None, 2.0)
    assert headline.draw(headline.medians([record("djinn", 2.0)]), "", "", ax=ax) is ax.figure


@pytest.mark.parametrize(("ratio", "words"), [(1.288, "1.3x faster"), (12.6, "13x faster"), (0.5, "2.0x slower")])
def test_speedups_are_said_in_one_way(ratio: float, words: str):
    assert headline.faster(ratio) == words


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("djinn", "djinn"),
        ("djinn:lossless", "djinn, coded"),
        ("djinn:24 GB, ring 20 GB", "djinn, 24 GB, ring 20 GB"),
        ("deepspeed:cpu, tuned", "DeepSpeed ZeRO-3, tuned"),
        ("accelerate:cpu-pinned", "Accelerate, pinned"),
        ("accelerate:cpu", "Accelerate"),
    ],
)
def test_names_in_records_have_one_display_name(name: str, shown: str):
    assert display_name(name) == shown
