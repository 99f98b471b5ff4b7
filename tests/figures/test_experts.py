"""The pictures of a mixture of experts: over hit rates every steered run is a mark, what has no pool is a line; over
budgets hit rates stand above times, where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fabricated import fabricated, failed
from matplotlib.axes import Axes

from djinn.bench.records import Record
from djinn.errors import ConfigError, DjinnError
from djinn.figures import frames
from djinn.figures.experts import by_budget, draw, read
from djinn.profiles import load_profile

PROFILE = load_profile("smoke_moe")


def record(mode: str, steer: str | None, hits: int, misses: int, token_s: float) -> str:
    counts = {"expert_hits": hits, "expert_misses": misses, "link_bytes": 4 * 10**9}
    times = [1.0, token_s, token_s, token_s]
    return json.dumps(
        {"model": "m", "mode": mode, "budget": 24 * 10**9, "steer": steer, "token_s": token_s, "times": times, **counts}
    )


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
    assert ax.get_title(loc="left") == "m in 24 GB"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.2", "0.5", "1", "2"]


def test_runs_without_a_pool_are_a_band_of_their_range(runs: pd.DataFrame) -> None:
    slower = runs.iloc[[0]].assign(token_s=2.0)
    (ax,) = draw(pd.concat([runs, slower])).axes
    (band,) = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((1.6, 2.0))  # type: ignore[attr-defined]
    assert set(ax.get_lines()[2].get_ydata()) == {1.8}  # type: ignore[arg-type]


def test_without_steered_runs_there_is_no_figure(runs: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="--steer"):
        draw(runs[runs["mode"] == "whole"])


def test_a_file_of_other_things_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"times": 3}')
    with pytest.raises(ConfigError, match=r"other\.jsonl"):
        read([tmp_path / "other.jsonl"])


def at(budget: str, run: int = 0, **changes: object) -> Record:
    pool = {"pool_slots": 32, "pool_experts": 128}
    fields: dict[str, object] = {"expert_hits": 30, "expert_misses": 70, "settings": pool, "per_token_s": [0.5] * 7}
    return fabricated(
        PROFILE, "djinn", run, experiment="sweep", variant=f"budget={budget}", **fields | changes, new_tokens=8
    )


def lines(ax: Axes, style: str) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.get_lines() if line.get_linestyle() == style]  # type: ignore[arg-type]


def test_hit_rates_and_times_are_drawn_over_budgets_in_order_of_size() -> None:
    whole = {"expert_hits": None, "expert_misses": None, "settings": {}, "per_token_s": [0.1] * 7}
    records = [at("8 MB", expert_hits=60, expert_misses=40), at("3 MB"), at("12 MB", **whole)]
    records.append(at("3 MB").model_copy(update={"variant": "chunk=3 MB"}))
    hits, times = by_budget(frames.sweep(records)).axes
    (shares,) = lines(hits, "--")
    assert next(line for line in lines(hits, "None") if len(line) == 3)[:2] == pytest.approx([0.3, 0.6])
    assert shares[:2] == pytest.approx([0.25, 0.25])
    assert [label.get_text() for label in times.get_xticklabels()] == ["3 MB", "8 MB", "12 MB"]
    assert "no pool" in [text.get_text() for text in hits.texts]
    assert next(line for line in lines(times, "None") if len(line) == 3) == pytest.approx([0.5, 0.5, 0.1])


def test_a_model_without_experts_has_times_alone_and_failures_their_words() -> None:
    dense = at("3 MB", expert_hits=None, expert_misses=None, settings={})
    lost = failed(PROFILE, "djinn", 0, "oom", "killed").model_copy(
        update={"experiment": "sweep", "variant": "budget=2 MB"}
    )
    (times,) = by_budget(frames.sweep([dense, lost])).axes
    assert times.get_ylabel() == "time per token (s)"
    assert "OOM" in [text.get_text() for text in times.texts]


def test_without_records_over_budgets_there_is_no_figure() -> None:
    with pytest.raises(DjinnError, match="no sweep records over budgets"):
        by_budget(frames.sweep([]))
