"""Claims as data: ``artifact/claims.yaml`` evaluated over a run's records into PASS, FAIL or NOT RUN, with why.

A claim passes only on numbers that were measured in this run on what the claim is about. Missing inputs, another
device or a smaller model make it NOT RUN; they can never make it pass.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from djinn.artifact.metrics import METRICS, Evidence, NotMeasuredError, read_evidence
from djinn.bench.run import Run
from djinn.errors import ConfigError
from djinn.files import write_text
from djinn.places import CLAIMS_FILE
from djinn.profiles import profile_names
from djinn.reading import problems, read_json, read_yaml
from djinn.sizes import Bytes, format_bytes

Verdict = Literal["PASS", "FAIL", "NOT RUN"]
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Needs(_Frozen):
    """What a claim is about; on anything else it is NOT RUN."""

    device: Literal["cpu", "cuda"] | None = None
    gpu: str | None = None
    """A part of the device's name, such as ``L4``, as a word of its own."""
    gpus: int | None = None
    """How many GPUs hold the model."""
    model_bytes: Bytes | None = None
    """The smallest model that the claim is about."""
    experts: bool | None = None
    """Whether the claim is about runs in which djinn fetches experts as routers pick them, or about those without."""


class Claim(_Frozen):
    """One claim, as ``claims.yaml`` states it; that file's head documents the fields."""

    id: str
    text: str
    metric: str
    arguments: dict[str, Any] = {}
    comparison: Literal[">=", "<=", "=="]
    target: float
    unit: str
    needs: Needs = Needs()
    notebook: str
    profile: str
    known: str = ""
    """What our own records show of its failures: shown beside a failure, and changes nothing."""

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
        """Return whether ``measured`` meets the target."""
        return _COMPARISONS[self.comparison](measured, self.target)


class Outcome(_Frozen):
    """A claim's verdict on one run. ``measured`` is None unless it is PASS or FAIL; ``why`` explains all but PASS."""

    claim: Claim
    verdict: Verdict
    measured: float | None = None
    why: str = ""
    lacking: str = ""
    """Where the run is not about what the claim needs: that, in a few words, such as "a GPU"."""


def load_claims(path: Path = CLAIMS_FILE) -> list[Claim]:
    """Read the claims.

    Raises:
        ConfigError: an unknown field or metric, or an id used twice; each is named.
    """
    try:
        claims = TypeAdapter(list[Claim]).validate_python(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {problems(error)}") from None
    ids = [claim.id for claim in claims]
    if twice := {each for each in ids if ids.count(each) > 1}:
        raise ConfigError(f"{path.name}: more than one claim is called {', '.join(sorted(twice))}")
    return claims


def evaluate(claim: Claim, evidence: Evidence) -> Outcome:
    """Return the verdict of one claim."""
    try:
        _require(claim.needs, evidence)
        measured = METRICS[claim.metric](evidence, **claim.arguments)
    except NotMeasuredError as missing:
        return Outcome(claim=claim, verdict="NOT RUN", why=str(missing), lacking=missing.lacking)
    if claim.holds(measured):
        return Outcome(claim=claim, verdict="PASS", measured=measured)
    known = f"; of our own runs: {claim.known}" if claim.known else ""
    why = f"{measured:.4g} is not {target_words(claim)}{known}"
    return Outcome(claim=claim, verdict="FAIL", measured=measured, why=why)


def write_claims(run_dir: Path) -> list[Outcome]:
    """Evaluate every claim on a run, write ``results/claims.json`` and return the outcomes in order."""
    evidence = read_evidence(Run(run_dir))
    outcomes = [evaluate(claim, evidence) for claim in load_claims()]
    document = [outcome.model_dump(mode="json") for outcome in outcomes]
    write_text(run_dir / "results" / "claims.json", json.dumps(document, indent=2) + "\n")
    return outcomes


def read_claims(run_dir: Path) -> list[Outcome]:
    """Return the outcomes that :func:`write_claims` wrote last.

    Raises:
        ConfigError: there are none, or the file is damaged.
    """
    return read_json(run_dir / "results" / "claims.json", list[Outcome])


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
    return f"{claim.comparison} {claim.target:g} {claim.unit}"


def _require(needs: Needs, evidence: Evidence) -> None:
    device = evidence.profile.device
    if needs.device is not None and needs.device != device:
        lacking = "a GPU" if needs.device == "cuda" else "a run without a GPU"
        raise NotMeasuredError(f"needs device {needs.device}; this run used {device}", lacking)
    if needs.gpus is not None and needs.gpus != evidence.profile.gpus:
        lacking = "a run on one GPU" if needs.gpus == 1 else f"a run on {needs.gpus} GPUs"
        raise NotMeasuredError(f"needs {lacking}; this one used {evidence.profile.gpus}", lacking)
    if needs.experts is not None and needs.experts != evidence.routed:
        lacking = "a mixture of experts" if needs.experts else "a model without routed experts"
        raise NotMeasuredError(f"needs {lacking}", lacking)
    if needs.gpu is None and needs.model_bytes is None:
        return
    names = {record.device_name for record in evidence.finished()}
    if needs.gpu is not None and not all(needs.gpu in name.split() for name in names):
        raise NotMeasuredError(f"needs an {needs.gpu}; this run used {', '.join(sorted(names))}", "another GPU")
    if needs.model_bytes is not None and (smallest := min(evidence.values("model_bytes"))) < needs.model_bytes:
        raise NotMeasuredError(
            f"needs a model of {format_bytes(needs.model_bytes)} or more; this run's has {format_bytes(smallest)}",
            "a larger model",
        )
