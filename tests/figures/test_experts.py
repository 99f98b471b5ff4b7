"""The picture of a mixture of experts: every steered run is a mark, what has no pool is a line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from djinn.errors import ConfigError
from djinn.figures.experts import draw, read


def record(mode: str, steer: str | None, hits: int, misses: int, token_s: float) -> str:
    counts = {"expert_hits": hits, "expert_misses": misses, "link_bytes": 4 * 10**9}
    times = [1.0, token_s, token_s, token_s]
    return json.dumps({"model": "m", "mode": mode, "steer": steer, "token_s": token_s, "times": times, **counts})


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    lines = [
        record("whole", None, 0, 0, 1.6),
        record("routed", "0,0", 1, 3, 0.4),
        record("routed", "0.5,0.7", 3, 1, 0.2),
        record("coded", "0,0", 2, 2, 0.3),
        record("routed", None, 4, 0, 0.1),
        json.dumps({"model": "m", "mode": "routed", "traced_copy_gbps": 54.0}),
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    return read([tmp_path / "runs.jsonl"])


def test_a_row_is_a_run(runs: pd.DataFrame) -> None:
    assert runs["hit_rate"].tolist()[1:] == [0.25, 0.75, 0.5, 1.0]
    assert runs["moved_gb"].tolist() == [1.0] * 5


def test_marks_are_steered_runs_and_whole_layers_a_line(runs: pd.DataFrame) -> None:
    (ax,) = draw(runs).axes
    routed, coded, whole = ax.get_lines()
    assert list(zip(routed.get_xdata(), routed.get_ydata(), strict=True)) == [(0.25, 0.4), (0.75, 0.2)]  # type: ignore[arg-type]
    assert list(zip(coded.get_xdata(), coded.get_ydata(), strict=True)) == [(0.5, 0.3)]  # type: ignore[arg-type]
    assert set(whole.get_ydata()) == {1.6}  # type: ignore[arg-type]


def test_without_steered_runs_there_is_no_figure(runs: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="--steer"):
        draw(runs[runs["mode"] == "whole"])


def test_a_file_of_other_things_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"times": 3}')
    with pytest.raises(ConfigError, match=r"other\.jsonl"):
        read([tmp_path / "other.jsonl"])
