"""The verdict counts what applies, says why the rest does not, and tells slower from faster."""

from __future__ import annotations

import pytest
from fabricated import fabricated, failed

from djinn.artifact.answer import answer, lines
from djinn.artifact.claims import Outcome, evaluate, load_claims
from djinn.artifact.closing import speed, verdict
from djinn.artifact.metrics import Evidence, read_evidence
from djinn.artifact.reference import runs
from djinn.bench.records import Record
from djinn.bench.run import Run
from djinn.profiles import load_profile

CLAIMS = {claim.id: claim for claim in load_claims()}
SMOKE, TINY = load_profile("smoke_13b"), load_profile("smoke_tiny")


def evidence(*records: Record) -> Evidence:
    return Evidence(profile=SMOKE, records=list(records), proof=None, timelines=[])


def outcome(claim: str, verdict: str, **more: str) -> Outcome:
    return Outcome.model_validate({"claim": CLAIMS[claim], "verdict": verdict, **more})


def test_what_applies_is_counted_and_the_rest_grouped_by_what_it_needs() -> None:
    outcomes = [
        outcome("C1", "PASS"),
        outcome("C3", "PASS"),
        outcome("C2", "NOT RUN", lacking="a larger model"),
        outcome("C6", "NOT RUN", lacking="a GPU"),
        outcome("C7", "NOT RUN", lacking="a GPU"),
        outcome("C9", "NOT RUN", why="no record of djinn"),
    ]
    assert verdict(outcomes, "djinn 2.0x faster than DeepSpeed ZeRO-3, disk") == (
        "2 of 2 claims that apply here pass; 2 need a GPU; 1 needs a larger model; 1 was not measured; "
        "djinn 2.0x faster than DeepSpeed ZeRO-3, disk"
    )


def test_a_failed_claim_is_named_with_its_reason() -> None:
    first, second = verdict([outcome("C1", "PASS"), outcome("C5", "FAIL", why="1.2 is not <= 0.9")]).splitlines()
    assert first == "1 of 2 claims that apply here pass"
    assert second == f"FAIL C5: {CLAIMS['C5'].text}: 1.2 is not <= 0.9"


def test_a_run_without_results_says_so() -> None:
    assert verdict([outcome("C1", "NOT RUN")]) == "no claim applies here; 1 was not measured"


def test_claims_say_in_a_few_words_what_they_lack() -> None:
    small = evidence(fabricated(TINY, "djinn", 0, model_bytes=22_000_000))
    lacking = {claim.id: evaluate(claim, small).lacking for claim in CLAIMS.values()}
    assert (lacking["C1"], lacking["C2"], lacking["C10a"]) == ("", "a larger model", "a GPU")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (5.0, "per token djinn is 2.0x faster than Accelerate, disk"),
        (20.0, "per token djinn is 2.0x slower than Accelerate, disk"),
        (10.1, "per token djinn is as fast as Accelerate, disk"),
    ],
)
def test_speed_is_against_the_best_peer_that_finished(seconds: float, said: str) -> None:
    took = {"djinn": seconds, "accelerate:disk": 10.0, "deepspeed:nvme": 15.0, "resident": 0.1}
    records = [
        fabricated(SMOKE, system, run, ttft_s=time, per_token_s=[time] * (SMOKE.new_tokens - 1))
        for system, time in took.items()
        for run in range(3)
    ]
    assert speed(evidence(*records, failed(SMOKE, "deepspeed:cpu", 0, "oom", "killed"))) == said


def test_speed_is_that_of_the_pages_table_whatever_first_tokens_take() -> None:
    run = Run(next(folder for folder in runs() if Run(folder).profile.name == "compare_70b"))
    (said,) = [line for line in lines(run.baselines, []) if line.system == "Accelerate, pinned"]
    words = next(cell.text for cell in said.cells if cell.column == "djinn is")
    assert speed(read_evidence(run)) == f"per token djinn is {words} than Accelerate, pinned"
    assert words in answer(run.baselines)


def test_no_speed_is_said_without_a_peer() -> None:
    assert speed(evidence(fabricated(SMOKE, "djinn", 0), fabricated(SMOKE, "resident", 0))) == ""
    assert speed(evidence()) == ""
