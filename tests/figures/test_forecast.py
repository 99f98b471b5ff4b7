"""The picture of a forecast: the chosen budget is on the curve, and every byte of the model is in the strip."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.colors import to_hex

from djinn.engine.forecast import forecast
from djinn.errors import UnavailableError
from djinn.figures.forecast import COLOURS, budgets_frame, draw
from djinn.planning.outlook import Forecast
from djinn.planning.placement import Tier
from djinn.planning.rates import Rates


@pytest.fixture(scope="module")
def found() -> Forecast:
    return forecast(
        "synthetic:llama-tiny", budget="5 MB", device="cpu", rates=Rates(device="cpu", link=1e9, disk=1e8),
        host_memory="10 MB", prompt_tokens=8, new_tokens=4,
    )  # fmt: skip


def test_the_curve_holds_every_budget_and_marks_the_chosen_one(found: Forecast) -> None:
    frame = budgets_frame(found)
    curve, *limits, mark = draw(found, "llama-tiny").axes[0].get_lines()
    assert list(curve.get_ydata()) == list(frame["token_s"])  # type: ignore[arg-type]
    said = [line.get_label() for line in limits]
    assert said == [f"limited by {limit}" for limit in frame["limit"].unique()]
    assert sum(len(line.get_xdata()) for line in limits) == len(frame)  # type: ignore[arg-type]
    (chosen,) = frame[frame["chosen"]].itertuples()
    assert (*mark.get_xdata(), *mark.get_ydata()) == (chosen.budget_bytes / 1e9, chosen.token_s)  # type: ignore[misc]
    assert chosen.budget_bytes == 5_000_000
    assert chosen.resident_bytes + chosen.pinned_bytes + chosen.disk_bytes >= found.plan.model_bytes


def test_budgets_beyond_the_gpus_memory_are_shaded(found: Forecast) -> None:
    budgets = budgets_frame(found)["budget_bytes"]
    inside = round(budgets.quantile(0.5))
    curve = draw(found, "llama-tiny", inside).axes[0]
    (shaded,) = curve.patches
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (inside / 1e9, curve.get_xlim()[1])  # type: ignore[attr-defined]
    assert curve.get_xlim()[0] == 0
    assert curve.get_xlim()[1] > budgets.max() / 1e9
    legend = curve.get_legend()
    assert legend is not None
    assert legend.get_texts()[-1].get_text().startswith("beyond this GPU's")
    for all_of_it in (None, 2 * budgets.max()):
        assert not draw(found, "llama-tiny", all_of_it).axes[0].patches


def test_the_strip_shows_every_unit_where_it_lies(found: Forecast) -> None:
    strip = draw(found, "llama-tiny").axes[1]
    bars = [(bar.get_width(), to_hex(bar.get_facecolor())) for bar in strip.patches]  # type: ignore[attr-defined]
    assert sum(width for width, _ in bars) == pytest.approx(found.plan.model_bytes / 1e9)
    assert [colour.lower() for _, colour in bars] == [COLOURS[tier].lower() for tier in found.plan.tiers]
    legend = strip.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == len(set(found.plan.tiers)) == len(Tier)


def test_there_is_no_figure_of_what_is_not_known(found: Forecast) -> None:
    with pytest.raises(UnavailableError, match="no rates"):
        draw(replace(found, predicted=None, unknown="no rates"), "llama-tiny")
