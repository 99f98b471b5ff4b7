"""What a run comes to, in a few words: which claims hold, what the others need, how fast djinn is beside its peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from djinn.artifact.claims import Outcome, load_claims, read_claims
from djinn.artifact.metrics import Evidence, read_evidence, time_over_best_peer
from djinn.bench.run import Run
from djinn.figures import headline
from djinn.figures.headline import SMALL_BYTES


def verdict_of(run_dir: Path) -> str:
    """Return the verdict on a run that has its report."""
    return verdict(read_claims(run_dir), speed(read_evidence(Run(run_dir))))


def counted(outcomes: Sequence[Outcome]) -> str:
    """Return how many claims that apply pass, and what the others need."""
    return verdict(outcomes).partition("\n")[0]


def verdict(outcomes: Sequence[Outcome], speed: str = "") -> str:
    """Return one line over all claims, ``speed`` at its end, and one line for each claim that failed."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    applied = counts["PASS"] + counts["FAIL"]
    parts = [f"{counts['PASS']} of {applied} claims that apply here pass" if applied else "no claim applies here"]
    lacking = Counter(outcome.lacking for outcome in outcomes if outcome.verdict == "NOT RUN")
    parts += [_not_run(count, what) for what, count in lacking.most_common()]
    failed = [outcome for outcome in outcomes if outcome.verdict == "FAIL"]
    lines = [f"FAIL {outcome.claim.id}: {outcome.claim.text}: {outcome.why}" for outcome in failed]
    return "\n".join(["; ".join([*parts, speed] if speed else parts), *lines])


def speed(evidence: Evidence) -> str:
    """Return how djinn's time per token compares with that of the fastest other system that streams; nothing where
    there is none.

    The others are those of the claim about speed on the run's device. The number is that of the page, its table and its
    figure: medians of the runs' times per token. Of a smoke run it says that times mean nothing.
    """
    peers = next(
        claim.arguments["peers"]
        for claim in load_claims()
        if claim.metric == time_over_best_peer.__name__ and claim.needs.device == evidence.profile.device
    )
    if any((record.model_bytes or 0) < SMALL_BYTES for record in evidence.records if record.status == "ok"):
        return "its times mean nothing, since this is a smoke run"
    rows = headline.rows_of(evidence.records)
    others = [row for row in rows.to_dict("records") if row["name"] in peers]
    if not others:
        return ""
    fastest = others[0]
    words = headline.faster(fastest["djinn"])
    how = f"as fast as {fastest['label']}" if words.startswith("1.0x") else f"{words} than {fastest['label']}"
    return f"per token djinn is {how}"


def _not_run(count: int, lacking: str) -> str:
    if not lacking:
        return f"{count} {'was' if count == 1 else 'were'} not measured"
    return f"{count} {'needs' if count == 1 else 'need'} {lacking}"
