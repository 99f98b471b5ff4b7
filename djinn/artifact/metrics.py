"""The evidence that claims are judged on, and one function for each number that they are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import pandas as pd

from djinn.bench.certify.proof import Proof
from djinn.bench.records import Record, bare_looks, system_label
from djinn.bench.run import Run
from djinn.bench.statistics import is_exceeded, tokens_agree
from djinn.figures import frames
from djinn.figures.per_gpu import read_timelines
from djinn.profiles import Profile

_WORDS = {"bare_share": "the rate of bare copies of the same weights"}
"""What measures are called, where their names do not say it."""


class NotMeasuredError(Exception):
    """A metric's inputs are missing; the message says which.

    ``lacking`` says in a few words what a claim needs that this run is not about, such as "a GPU".
    """

    def __init__(self, message: str, lacking: str = "") -> None:
        super().__init__(message)
        self.lacking = lacking


@dataclass(frozen=True)
class Evidence:
    """All that a metric may look at."""

    profile: Profile
    records: list[Record]
    """Records of the baselines: the latest of every point."""
    proof: Proof | None
    """The certification's proof that streamed output equals resident output; None where there is none."""
    timelines: list[dict[str, pd.DataFrame]]
    """Those of each GPU by system, from the sweep's points with the profile's own settings and with coded weights (see
    :func:`djinn.figures.per_gpu.read_timelines`)."""

    def finished(self, system: str = "djinn") -> list[Record]:
        """Return the finished runs of djinn, or of ``djinn:lossless``."""
        ours = [record for record in self.records if system_label(record) == system]
        finished = [record for record in ours if record.status == "ok"]
        if not ours:
            raise NotMeasuredError(f"no record of {system}")
        if not finished:
            raise NotMeasuredError(f"{system}: {ours[-1].status}: {ours[-1].reason}")
        return finished

    @property
    def of_full_length(self) -> list[Record]:
        """The records of runs with as many new tokens as the profile asks for: those whose times can be compared."""
        return [record for record in self.records if record.new_tokens == self.profile.new_tokens]

    @property
    def routed(self) -> bool:
        """Whether djinn fetched experts as routers picked them."""
        return any(record.expert_hits is not None for record in self.finished())

    def shares(self, lane: str, system: str) -> list[float]:
        """Return the share of the traced run's time in which ``lane`` is busy, on each GPU that has a timeline."""
        found = [own[system] for own in self.timelines if not own[system].empty]
        return [float(frames.shares(timeline).get(lane, 0.0)) for timeline in found]

    def values(self, field: str, system: str = "djinn") -> list[float]:
        """Return ``field`` of every finished run of ``system``; each of them must have it."""
        values = [getattr(record, field) for record in self.finished(system)]
        if None in values:
            raise NotMeasuredError(f"{_WORDS.get(field, field)} was not measured in every run")
        return values


def streamed_equals_resident(evidence: Evidence) -> float:
    """1 where the certified proof holds, 0 where it does not."""
    if evidence.proof is None:
        raise NotMeasuredError("the certification holds no proof")
    return float(evidence.proof.holds)


def device_memory_over_budget(evidence: Evidence, system: str = "djinn") -> float:
    """The largest peak of device memory over the budget of the same run."""
    peaks = evidence.values("peak_device_bytes", system)
    return max(peak / record.budget_bytes for peak, record in zip(peaks, evidence.finished(system), strict=True))


def same_tokens(evidence: Evidence) -> float:
    """1 if every run of djinn generated the tokens of the reference system, else 0."""
    agree = tokens_agree(evidence.records).get("djinn")
    if agree is None:
        other = "another system" if evidence.profile.gpus == 1 else "the resident model on the same GPUs"
        raise NotMeasuredError(f"nothing to compare: needs djinn and {other}, with the same tokens in all runs")
    return float(agree)


def coding_changes_no_token(evidence: Evidence) -> float:
    """1 if every run with coded weights generated the tokens of every run with raw ones, else 0."""
    runs = [*evidence.finished("djinn"), *evidence.finished("djinn:lossless")]
    return float(len({tuple(record.tokens) for record in runs}) == 1)


def bits_per_weight(evidence: Evidence) -> float:
    """Bits per coded weight, of the kind of tensor that takes most."""
    bits = frames.bits(evidence.finished("djinn:lossless"))["bits"]
    if bits.empty:
        raise NotMeasuredError("no tensor was coded")
    return float(bits.max())


def decode_share(evidence: Evidence) -> float:
    """The share of the traced run's time in which the device decodes; of several, that of the one that decodes most."""
    if not (shares := evidence.shares("decode", "djinn:lossless")):
        raise NotMeasuredError("no timeline of a run with coded weights")
    return max(shares)


def copy_share(evidence: Evidence) -> float:
    """The share of the traced run's time in which the copy engine is busy; of several, that of the least busy one."""
    if not (shares := evidence.shares("copy", "djinn")):
        raise NotMeasuredError("no timeline of a run with raw weights")
    return min(shares)


def link_utilisation(evidence: Evidence) -> float:
    """The median run's rate over the link's for a small buffer, or the disk's, of which the higher look counts."""
    looks = evidence.values("ceiling_gbps")
    if any(is_exceeded(rate, looks) for rate in evidence.values("link_gbps")):
        raise NotMeasuredError("a run was faster than the raw rate beside it, which therefore is no ceiling")
    return median(evidence.values("link_utilisation"))


def link_over_bare(evidence: Evidence) -> float:
    """The median run's rate over that of bare copies of the same weights, the higher of those before and after it."""
    for record in evidence.finished():
        for each in record.each_rank:
            looks = bare_looks(each)
            if looks and each.link_gbps is not None and is_exceeded(each.link_gbps, looks):
                raise NotMeasuredError(
                    "a run was faster than the bare copies beside it, which therefore are no ceiling"
                )
    return median(evidence.values("bare_share"))


def disk_share(evidence: Evidence) -> float:
    """The median run's share of the disk's raw rate, where the disk is what limits."""
    if (running := _compute_share(evidence)) > (share := link_utilisation(evidence)):
        raise NotMeasuredError(
            f"compute is the limit here: it runs {running:.2f} of the time", "a run that the disk limits"
        )
    return share


def compute_share(evidence: Evidence) -> float:
    """The median share of time in which compute did not wait, where compute is what limits."""
    if (share := link_utilisation(evidence)) >= (running := _compute_share(evidence)):
        raise NotMeasuredError(f"the disk is the limit here: {share:.2f} of its raw rate", "a run that compute limits")
    return running


def _compute_share(evidence: Evidence) -> float:
    walls, stalls = evidence.values("wall_s"), evidence.values("stall_s")
    return median(1 - stall / wall for stall, wall in zip(stalls, walls, strict=True))


def link_gbps(evidence: Evidence) -> float:
    """The median run's bytes over the link per second of wall time, 10^9 bytes/s."""
    walls = evidence.values("wall_s")
    return median(crossed / wall / 1e9 for crossed, wall in zip(evidence.values("link_bytes"), walls, strict=True))


def ttft_s(evidence: Evidence) -> float:
    """The median run's time to first token, seconds."""
    return median(evidence.values("ttft_s"))


def ttft_over_streaming(evidence: Evidence) -> float:
    """The median run's time to first token over what bare copies of the bytes of one pass take."""
    columns = [evidence.values(name) for name in ("ttft_s", "bare_gbps", "link_bytes", "new_tokens")]
    return median(ttft * 1e9 * bare / (crossed / passes) for ttft, bare, crossed, passes in zip(*columns, strict=True))


def model_over_peak(evidence: Evidence) -> float:
    """Model bytes over the largest peak of device memory of all GPUs together, in the run where that is smallest."""
    peaks = [
        gpus * peak for gpus, peak in zip(evidence.values("gpus"), evidence.values("peak_device_bytes"), strict=True)
    ]
    return min(size / peak for size, peak in zip(evidence.values("model_bytes"), peaks, strict=True))


def host_memory_gib(evidence: Evidence) -> float:
    """The largest peak of djinn's anonymous host memory, 2^30 bytes."""
    return max(evidence.values("peak_anon_bytes")) / 2**30


def time_over_best_peer(evidence: Evidence, peers: list[str], system: str = "djinn") -> float:
    """The system's time over the fastest peer's in the same run: the median over the runs that all of them finished.

    The time is TTFT plus every per-token time. A peer that finished no run is left out, as are runs with fewer tokens.
    Runs are paired, because the machine drifts between them.
    """
    runs = frames.runs(evidence.of_full_length)
    table = runs.dropna(subset=["generate_s"]).pivot_table(index="run", columns="name", values="generate_s")
    finished = [peer for peer in peers if peer in table]
    if system not in table or not finished:
        raise NotMeasuredError(f"{system} did not finish" if finished else f"none of {', '.join(peers)} finished")
    paired = table[[system, *finished]].dropna()
    if paired.empty:
        raise NotMeasuredError(f"no run that {system} and {', '.join(finished)} all finished")
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
        copy_share,
        link_utilisation,
        link_over_bare,
        disk_share,
        compute_share,
        link_gbps,
        ttft_s,
        ttft_over_streaming,
        model_over_peak,
        host_memory_gib,
        time_over_best_peer,
    )
}


def read_evidence(run: Run) -> Evidence:
    """Read the evidence of a run; what has no file there is empty."""
    return Evidence(
        profile=run.profile,
        records=run.baselines,
        proof=run.certification.proof if run.certification else None,
        timelines=read_timelines(run.folder),
    )
