"""What a copy engine did: shares of every moment, a pass's time by state, rates of copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.errors import DjinnError
from djinn.figures import timelines
from djinn.figures.frames import TIMELINE_COLUMNS
from djinn.figures.style import LANES, LOOKS


def spans(*rows: tuple[str, str, float, float], nbytes: int = 10**8) -> pd.DataFrame:
    cause = {"stall": "link"}
    full = [(lane, unit, begin, end, nbytes, cause.get(lane, "")) for lane, unit, begin, end in rows]
    return pd.DataFrame(full, columns=TIMELINE_COLUMNS)


PASSES = spans(
    ("copy", "a", 0.0, 4.0), ("stall", "a", 0.0, 4.0), ("compute", "a", 4.0, 4.5),
    ("copy", "a", 4.0, 8.0), ("stall", "a", 5.0, 8.0), ("compute", "a", 8.0, 8.5),
)  # fmt: skip


def test_each_stretch_has_its_share_and_overlapping_spans_count_once():
    rows = spans(("copy", "a", 0.0, 2.0), ("copy", "b", 1.0, 3.0), ("copy", "c", 1.5, 1.6), ("copy", "d", 3.5, 4.0))
    shares = timelines.occupancy(rows, np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    assert shares == pytest.approx([1, 1, 1, 0.5, 0])


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 5)), min_size=1, max_size=20),
    st.integers(1, 50),
)
def test_columns_add_up_to_the_time_that_is_covered(found: list[tuple[float, float]], columns: int):
    rows = spans(*(("copy", str(k), begin, begin + length) for k, (begin, length) in enumerate(found)))
    edges = np.linspace(0, 20, columns + 1)
    shares = timelines.occupancy(rows, edges)
    moments = np.linspace(0, 20, 20001)
    covered = np.zeros(len(moments), dtype=bool)
    for begin, length in found:
        covered |= (moments >= begin) & (moments < begin + length)
    assert (shares >= -1e-9).all()
    assert (shares <= 1 + 1e-9).all()
    assert (shares * np.diff(edges)).sum() == pytest.approx(20 * covered.mean(), abs=0.05)


def test_a_token_is_the_last_pass_and_its_parts_add_up():
    parts = timelines.token_parts(PASSES)
    assert parts == pytest.approx({"compute": 0.5, "decode": 0.0, "stall": 3.0, "rest": 0.5})
    with pytest.raises(DjinnError, match="fewer than two passes"):
        timelines.token_parts(PASSES[:3])
    frame = timelines.parts_frame({"djinn": PASSES, "djinn:lossless": PASSES[:0]})
    assert set(frame["name"]) == {"djinn"}
    (ax,) = timelines.where_time_goes(frame).axes
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(4.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (PASSES, "waiting for\nthe link (the bound)"),
        (PASSES.replace({"cause": {"link": "disk"}}), "waiting for\nthe disk (the bound)"),
        (PASSES[PASSES["lane"] != "copy"], "waiting for\nthe link"),
    ],
)
def test_waiting_says_for_what_and_whether_that_is_the_bound(rows: pd.DataFrame, said: str):
    assert timelines.waiting(rows) == said


def test_a_lane_that_is_seldom_busy_is_low():
    busy = spans(*(("copy", str(k), k, k + 1.0) for k in range(100)))
    seldom = spans(*(("compute", str(k), k, k + 0.03) for k in range(100)))
    (ax,) = timelines.timeline(pd.concat([busy, seldom]), ax=timelines.canvas(None, 1.0)).axes
    heights = [patch.get_extents().height for patch in ax.patches]
    areas = dict(zip(("copy", "compute"), ax.patches, strict=True))
    assert len(heights) == 2
    values = areas["compute"].get_data()  # type: ignore[attr-defined]
    assert np.mean(values.baseline - values.values) == pytest.approx(0.8 * 0.03, abs=0.01)
    assert [patch.get_facecolor() for patch in ax.patches] != [LANES["copy"], LANES["compute"]]


def test_every_larger_copy_has_its_rate_and_copies_that_overlap_have_none():
    rates = timelines.rates_frame({"djinn": PASSES, "djinn:lossless": PASSES.assign(nbytes=10**6)})
    assert rates["name"].tolist() == ["djinn"] * 2
    assert rates["gbps"].tolist() == pytest.approx([0.025, 0.025])
    overlapping = spans(("copy", "a", 0.0, 2.0), ("copy", "b", 1.0, 3.0))
    assert timelines.rates_frame({"djinn": overlapping}).empty
    assert len(timelines.rates_frame({"djinn": PASSES}, {"djinn": PASSES})) == 4  # of two GPUs, whose copies overlap
    with pytest.raises(DjinnError, match="no timeline of copies"):
        timelines.copy_rates(timelines.rates_frame({}))
    both = pd.concat([rates, rates.assign(name="djinn:lossless")])
    (ax,) = timelines.copy_rates(both, {"djinn": 0.03, "djinn:lossless": 0.05}).axes
    dashed = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_label() for line in dashed] == [
        "djinn: a small buffer beside this run, 0.0300 GB/s",
        "djinn, coded: a small buffer beside this run, 0.0500 GB/s",
    ]
    assert [line.get_color() for line in dashed] == [LOOKS[name].colour for name in ("djinn", "djinn:lossless")]
    assert ax.get_ylim() == (0, 1) or ax.get_ylim()[1] >= 1
