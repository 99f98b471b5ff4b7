"""Figures of several runs: tested predictions, systems over models, time over budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from fabricated import fabricated

from djinn.artifact.reference import runs
from djinn.bench.records import Record, append_record
from djinn.bench.run import Run
from djinn.errors import ConfigError, DjinnError
from djinn.figures import across, budgets
from djinn.figures.style import caption_of
from djinn.profiles import load_profile

PROFILE = load_profile("compare_h100")


def case(name: str, predicted: float) -> dict[str, object]:
    times = {"ttft_s": 2.0, "predicted_ttft_s": 2.0 * predicted, "token_s": 1.0, "predicted_token_s": predicted}
    return {"case": name, "limit": "link", **times, "rates": {}}


def test_every_tested_prediction_is_a_mark_and_those_within_a_tenth_are_counted(tmp_path: Path):
    (tmp_path / "predictions.json").write_text(json.dumps([case("a", 1.05), case("b", 0.95), case("c", 1.2)]))
    rows = across.read_predictions([tmp_path, tmp_path / "nowhere"])
    assert len(rows) == 6
    figure = across.predictions(rows)
    assert "4 of 6 times lie within 10%" in caption_of(figure)
    (ax,) = figure.axes
    assert sum(len(line.get_xdata()) for line in ax.get_lines() if line.get_marker() != "None") == 6  # type: ignore[arg-type]
    with pytest.raises(DjinnError, match="2 tested predictions: fewer than 3"):
        across.predictions(rows[rows["case"] != "a"])


def test_a_damaged_file_of_predictions_is_named(tmp_path: Path):
    (tmp_path / "predictions.json").write_text('[{"case": "a"}]')
    with pytest.raises(ConfigError, match=r"predictions\.json"):
        across.read_predictions([tmp_path])


def of_model(model: str, size: int, times: dict[str, float]) -> list[Record]:
    return [
        fabricated(
            PROFILE, name.partition(":")[0], 0, variant=name.partition(":")[2], model=f"synthetic:{model}",
            model_bytes=size, per_token_s=[seconds] * (PROFILE.new_tokens - 1),
        )
        for name, seconds in times.items()
    ]  # fmt: skip


def test_systems_stand_over_models_by_how_much_longer_they_take():
    large = of_model("large", 100, {"djinn": 2.0, "deepspeed:cpu": 3.0, "accelerate:cpu": 20.0})
    small = of_model("small", 10, {"djinn": 1.0, "accelerate:cpu": 5.0})
    alone = of_model("alone", 50, {"djinn": 1.0, "djinn:lossless": 0.7})
    rows = across.by_model([large, small, alone, []])
    assert list(dict.fromkeys(rows["model"])) == ["small", "large"]
    assert dict(zip(rows["name"], rows["djinn"], strict=False))["deepspeed:cpu"] == pytest.approx(1.5)
    (ax,) = across.models(rows).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.5x", "1x", "2x", "5x", "10x", "20x"]
    with pytest.raises(DjinnError, match="no runs of djinn beside"):
        across.models(across.by_model([alone]))


def test_systems_that_left_much_of_their_budget_empty_are_hollow_and_named():
    records = of_model("m", 100, {"djinn": 2.0, "deepspeed:cpu": 3.0, "accelerate:cpu": 4.0})
    peaks = dict(zip(("djinn", "deepspeed", "accelerate"), (0.99, 0.81, 0.79), strict=True))
    sized = [each.model_copy(update={"peak_device_bytes": peaks[each.system] * PROFILE.budget}) for each in records]
    rows = across.by_model([sized])
    assert across.unfilled(rows) == (
        "Memory is not equal. These systems took less than 80% of their budget: Accelerate 8.85 GB of 11.2 GB (m)."
    )
    figure = across.models(rows)
    assert across.unfilled(rows) in caption_of(figure)
    marks = {
        line.get_marker(): line.get_markerfacecolor()
        for line in figure.axes[0].get_lines()
        if len(line.get_xdata()) == 1
    }  # type: ignore[arg-type]
    assert [marker for marker, face in marks.items() if face == "white"] == ["D"]
    assert across.unfilled(rows[rows["name"] != "accelerate:cpu"]) == ""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = Run.open(tmp_path / "run", PROFILE)
    for record in of_model("m", 10**11, {"djinn": 2.0, "deepspeed:cpu": 3.0, "accelerate:cpu": 30.0}):
        append_record(found.results / "baselines.jsonl", record)
    return found


def test_measured_points_are_medians_by_system_and_budget(run: Run):
    swept = [
        fabricated(PROFILE, "djinn", k, experiment="sweep", variant="budget=20 GB", budget_bytes=20 * 10**9,
                   per_token_s=[time] * (PROFILE.new_tokens - 1))
        for k, time in enumerate((1.0, 1.2))
    ]  # fmt: skip
    for record in swept:
        append_record(run.results / "sweep.jsonl", record)
    points = budgets.measured(Run(run.folder)).set_index(["name", "budget_bytes"])["token_s"]
    assert points["djinn", PROFILE.budget] == 2.0
    assert points["djinn", 20 * 10**9] == pytest.approx(1.1)


def test_a_line_is_drawn_under_the_points_and_one_budget_alone_is_no_figure(run: Run):
    points = budgets.measured(run)
    assert budgets.predicted(run).empty  # nothing was certified
    with pytest.raises(DjinnError, match="one budget alone"):
        budgets.draw(budgets.predicted(run), points)
    line = pd.DataFrame({"name": "djinn", "budget_bytes": [10**10, 2 * 10**10], "token_s": [2.0, 1.0]})
    (ax,) = budgets.draw(line, points, model="m").axes
    assert ax.get_title(loc="left") == "m: time per token by budget"
    assert not ax.patches
    (ax,) = budgets.draw(line, points, round(line["budget_bytes"].max() / 2)).axes
    assert [patch.get_x() for patch in ax.patches] == [line["budget_bytes"].max() / 2e9]  # type: ignore[attr-defined]
    assert ax.get_lines()[0].get_ydata().tolist() == [2.0, 1.0]  # type: ignore[union-attr]
    assert "Accelerate: 30.0 s" in [text.get_text() for text in ax.texts]


@pytest.mark.slow
def test_the_line_is_what_the_plans_of_a_certified_machine_come_to():
    line = budgets.predicted(Run(next(folder for folder in runs() if Run(folder).profile.name == "smoke_13b")))
    assert set(line["name"]) == {"djinn"}
    assert line.sort_values("budget_bytes")["token_s"].is_monotonic_decreasing
