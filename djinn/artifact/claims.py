"""Claims as data: ``artifact/claims.yaml`` held against a run's records, as PASS, FAIL or NOT RUN (why).

A claim passes only on numbers that were measured in this run on what the claim is about. Missing inputs, another
device or a smaller model make it NOT RUN; they can never make it pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from djinn.artifact.provenance import REPOSITORY, write_text
from djinn.bench.certify import read_certification
from djinn.bench.proof import Proof
from djinn.bench.records import Record, latest, read_records
from djinn.bench.statistics import reference_label, system_label, tokens_agree
from djinn.config import Profile, load_profile, profile_names
from djinn.errors import ConfigError
from djinn.figures import frames
from djinn.sizes import Bytes, format_bytes

CLAIMS_FILE = REPOSITORY / "artifact" / "claims.yaml"

Verdict = Literal["PASS", "FAIL", "NOT RUN"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Needs(_Frozen):
    """What a claim is about; on anything else it is NOT RUN."""

    device: Literal["cpu", "cuda"] | None = None
    gpu: str | None = None
    """A part of the device's name, such as ``L4``, as a word of its own."""
    model_bytes: Bytes | None = None
    """The smallest model that the claim is about."""


class Claim(_Frozen):
    """One claim, as ``claims.yaml`` states it; that file's head documents the fields."""

    id: str
    text: str
    metric: str
    arguments: dict[str, Any] = {}
    comparison: Literal[">=", "<=", "=="]
    target: float
    tolerance: float = Field(default=0, ge=0, lt=1)
    unit: str
    needs: Needs = Needs()
    notebook: str
    profile: str

    @field_validator("profile")
    @classmethod
    def _there(cls, profile: str) -> str:
        if profile not in profile_names():
            raise ValueError(f"no profile {profile!r}; the profiles are {', '.join(profile_names())}")
        return profile

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"no metric {metric!r}; the metrics are {', '.join(METRICS)}")
        return metric

    def holds(self, measured: float) -> bool:
        """Return whether ``measured`` meets the target, the tolerance granted."""
        if self.comparison == ">=":
            return measured >= self.target * (1 - self.tolerance)
        if self.comparison == "<=":
            return measured <= self.target * (1 + self.tolerance)
        return abs(measured - self.target) <= self.target * self.tolerance


class Outcome(_Frozen):
    """A claim's verdict on one run. ``measured`` is None unless it is PASS or FAIL; ``why`` explains the rest."""

    claim: Claim
    verdict: Verdict
    measured: float | None = None
    why: str = ""


class _NotMeasuredError(Exception):
    """A metric's inputs are missing; the message says which."""


@dataclass(frozen=True)
class Evidence:
    """All that a metric may look at."""

    profile: Profile
    records: list[Record]
    """Of the baselines, the latest of every point."""
    proof: Proof | None
    """Of the certification: whether streamed equals resident."""
    coded_timeline: pd.DataFrame
    """Of the sweep's point with coded weights."""

    def finished(self, system: str = "djinn") -> list[Record]:
        """Return the finished runs of djinn, or of ``djinn:lossless``."""
        ours = [record for record in self.records if system_label(record) == system]
        finished = [record for record in ours if record.status == "ok"]
        if not ours:
            raise _NotMeasuredError(f"no record of {system}")
        if not finished:
            raise _NotMeasuredError(f"{system}: {ours[-1].status}: {ours[-1].reason}")
        return finished

    def values(self, field: str, system: str = "djinn") -> list[float]:
        """Return ``field`` of every finished run of ``system``; each of them must have it."""
        values = [getattr(record, field) for record in self.finished(system)]
        if None in values:
            raise _NotMeasuredError(f"{field} was not measured in every run")
        return values


def streamed_equals_resident(evidence: Evidence) -> float:
    """1 where the certified proof holds, 0 where it does not."""
    if evidence.proof is None:
        raise _NotMeasuredError("the certification holds no proof")
    return float(evidence.proof.holds)


def device_memory_over_budget(evidence: Evidence, system: str = "djinn") -> float:
    """The largest peak of device memory over the budget of the same run."""
    peaks = evidence.values("peak_device_bytes", system)
    return max(peak / record.budget_bytes for peak, record in zip(peaks, evidence.finished(system), strict=True))


def same_tokens(evidence: Evidence) -> float:
    """1 if every run of djinn generated the tokens of the reference system, else 0."""
    reference = reference_label(evidence.records)
    agree = tokens_agree(evidence.records).get("djinn")
    if agree is None or reference is None or reference.startswith("djinn"):
        raise _NotMeasuredError("nothing to compare: needs djinn and another system, with the same tokens in all runs")
    return float(agree)


def coding_changes_no_token(evidence: Evidence) -> float:
    """1 if every run with coded weights generated the tokens of every run with raw ones, else 0."""
    runs = [*evidence.finished("djinn"), *evidence.finished("djinn:lossless")]
    return float(len({tuple(record.tokens) for record in runs}) == 1)


def bits_per_weight(evidence: Evidence) -> float:
    """The most bits that a kind of coded tensor takes for every 16 of its weights."""
    bits = frames.bits(evidence.finished("djinn:lossless"))["bits"]
    if bits.empty:
        raise _NotMeasuredError("no tensor was coded")
    return float(bits.max())


def decode_share(evidence: Evidence) -> float:
    """The share of the traced run's time in which the device decodes."""
    if evidence.coded_timeline.empty:
        raise _NotMeasuredError("no timeline of a run with coded weights")
    return float(frames.shares(evidence.coded_timeline).get("decode", 0.0))


def link_utilisation(evidence: Evidence) -> float:
    """The median run's link utilisation."""
    return median(evidence.values("link_utilisation"))


def disk_or_compute_bound(evidence: Evidence) -> float:
    """The median run's link utilisation, or the share of it in which compute did not wait, whichever is larger."""
    walls, stalls = evidence.values("wall_s"), evidence.values("stall_s")
    running = [1 - stall / wall for stall, wall in zip(stalls, walls, strict=True)]
    return max(link_utilisation(evidence), median(running))


def link_gbps(evidence: Evidence) -> float:
    """The median run's bytes over the link per second of wall time, 10^9 bytes/s."""
    walls = evidence.values("wall_s")
    return median(crossed / wall / 1e9 for crossed, wall in zip(evidence.values("link_bytes"), walls, strict=True))


def ttft_s(evidence: Evidence) -> float:
    """The median run's time to first token, seconds."""
    return median(evidence.values("ttft_s"))


def oversubscription(evidence: Evidence) -> float:
    """Model bytes over budget, in the run where it is smallest."""
    sizes = evidence.values("model_bytes")
    return min(size / record.budget_bytes for size, record in zip(sizes, evidence.finished(), strict=True))


def host_memory_gib(evidence: Evidence) -> float:
    """The largest peak of djinn's anonymous host memory, 2^30 bytes."""
    return max(evidence.values("peak_anon_bytes")) / 2**30


def time_over_best_peer(evidence: Evidence, peers: list[str], system: str = "djinn") -> float:
    """The system's time over the fastest peer's in the same run, the median of the runs that it and all peers finished.

    The time is TTFT plus every per-token time. A peer that finished no run is left out; the runs are paired, because
    the machine drifts between them.
    """
    runs = frames.runs(evidence.records)
    table = runs.dropna(subset=["generate_s"]).pivot_table(index="run", columns="name", values="generate_s")
    finished = [peer for peer in peers if peer in table]
    if system not in table or not finished:
        raise _NotMeasuredError(f"{system} did not finish" if finished else f"none of {', '.join(peers)} finished")
    paired = table[[system, *finished]].dropna()
    if paired.empty:
        raise _NotMeasuredError(f"no run that {system} and {', '.join(finished)} all finished")
    return float((paired[system] / paired[finished].min(axis=1)).median())


METRICS: Mapping[str, Callable[..., float]] = {
    metric.__name__: metric
    for metric in (
        streamed_equals_resident,
        device_memory_over_budget,
        same_tokens,
        coding_changes_no_token,
        bits_per_weight,
        decode_share,
        link_utilisation,
        disk_or_compute_bound,
        link_gbps,
        ttft_s,
        oversubscription,
        host_memory_gib,
        time_over_best_peer,
    )
}


def load_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """Read the claims.

    Raises:
        ConfigError: an unknown field or metric, or an id used twice; each is named.
    """
    try:
        claims = TypeAdapter(list[Claim]).validate_python(yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name}: {error}") from None
    ids = [claim.id for claim in claims]
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise ConfigError(f"{path.name}: more than one claim is called {', '.join(sorted(twice))}")
    return claims


def read_evidence(run_dir: Path) -> Evidence:
    """Read what the claims are held against from a run directory; missing files hold nothing."""
    certification = read_certification(run_dir)
    return Evidence(
        profile=load_profile(run_dir / "profile.yaml"),
        records=latest(read_records(run_dir / "results" / "baselines.jsonl")),
        proof=certification.proof if certification else None,
        coded_timeline=frames.read_timeline(run_dir, "timeline_coded"),
    )


def evaluate(claim: Claim, evidence: Evidence) -> Outcome:
    """Return the verdict of one claim."""
    try:
        _require(claim.needs, evidence)
        measured = METRICS[claim.metric](evidence, **claim.arguments)
    except _NotMeasuredError as missing:
        return Outcome(claim=claim, verdict="NOT RUN", why=str(missing))
    return Outcome(claim=claim, verdict="PASS" if claim.holds(measured) else "FAIL", measured=measured)


def write_claims(run_dir: Path) -> list[Outcome]:
    """Evaluate every claim on a run, write ``results/claims.json`` and return the outcomes in order."""
    evidence = read_evidence(run_dir)
    outcomes = [evaluate(claim, evidence) for claim in load_claims()]
    document = [outcome.model_dump(mode="json") for outcome in outcomes]
    write_text(run_dir / "results" / "claims.json", json.dumps(document, indent=2) + "\n")
    return outcomes


def claims_frame(outcomes: list[Outcome], expected: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Return one row per claim, in words: claim, verdict, text, target, measured, reference, why.

    ``expected`` says by claim what reference runs measured.
    """
    return pd.DataFrame(
        [
            {
                "claim": outcome.claim.id,
                "verdict": outcome.verdict,
                "text": outcome.claim.text,
                "target": target_words(outcome.claim),
                "measured": "" if outcome.measured is None else f"{outcome.measured:.4g}",
                "reference": (expected or {}).get(outcome.claim.id, ""),
                "why": outcome.why,
            }
            for outcome in outcomes
        ]
    )


def target_words(claim: Claim) -> str:
    """Return a claim's target as people read it."""
    tolerance = f", tolerance {claim.tolerance:.0%}" if claim.tolerance else ""
    return f"{claim.comparison} {claim.target:g} {claim.unit}{tolerance}"


def _require(needs: Needs, evidence: Evidence) -> None:
    device = evidence.profile.device
    if needs.device is not None and needs.device != device:
        raise _NotMeasuredError(f"needs device {needs.device}; this run used {device}")
    if needs.gpu is None and needs.model_bytes is None:
        return
    names = {record.device_name for record in evidence.finished()}
    if needs.gpu is not None and not all(needs.gpu in name.split() for name in names):
        raise _NotMeasuredError(f"needs an {needs.gpu}; this run used {', '.join(sorted(names))}")
    if needs.model_bytes is not None and (smallest := min(evidence.values("model_bytes"))) < needs.model_bytes:
        raise _NotMeasuredError(
            f"needs a model of {format_bytes(needs.model_bytes)} or more; this run's has {format_bytes(smallest)}"
        )
