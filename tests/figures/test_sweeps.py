"""Batches and prompts: a line for each system, a mark for each point, and nothing where only one was measured."""

from __future__ import annotations

import pytest
from fabricated import fabricated

from djinn.errors import DjinnError
from djinn.figures import frames, sweeps
from djinn.profiles import load_profile

PROFILE = load_profile("smoke_13b")


def test_tokens_per_second_are_those_of_all_sequences():
    records = [
        fabricated(PROFILE, system, run, batch=batch, per_token_s=[time * (run + 1)] * (PROFILE.new_tokens - 1))
        for system, time in (("djinn", 1.0), ("deepspeed", 2.0))
        for batch in (1, 4, 16)
        for run in range(2)
    ]
    (ax,) = sweeps.by_batch(frames.runs(records)).axes
    ours, theirs = (container.lines[0].get_ydata().tolist() for container in ax.containers)  # type: ignore[attr-defined]
    assert ours == pytest.approx([0.75, 3.0, 12.0])
    assert theirs == pytest.approx([0.375, 1.5, 6.0])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "16"]


def test_times_to_first_token_stand_over_prompts():
    records = [fabricated(PROFILE, "djinn", 0, prompt_tokens=tokens, ttft_s=tokens / 128) for tokens in (512, 128)]
    (ax,) = sweeps.by_prompt(frames.runs(records)).axes
    line = ax.containers[0].lines[0]  # type: ignore[attr-defined]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([128, 512], [1, 4])


@pytest.mark.parametrize("plot", [sweeps.by_batch, sweeps.by_prompt])
def test_one_point_is_no_figure(plot):
    for records in ([], [fabricated(PROFILE, "djinn", 0)]):
        with pytest.raises(DjinnError, match="no records over"):
            plot(frames.runs(records))


@pytest.mark.parametrize(("variant", "point"), [("batch=16", ("batch", 16)), ("prompt=2048", ("prompt", 2048))])
def test_batches_and_prompts_are_points_of_a_sweep(variant: str, point: tuple[str, float]):
    record = fabricated(PROFILE, "djinn", 0, experiment="sweep", variant=variant)
    assert tuple(frames.sweep([record])[["axis", "size_bytes"]].iloc[0]) == point
