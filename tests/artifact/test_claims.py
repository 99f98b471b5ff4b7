"""A claim passes on what was measured, never on what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fabricated import fabricated, failed

from djinn.artifact.claims import Claim, evaluate, load_claims, read_claims, write_claims
from djinn.artifact.metrics import METRICS, Evidence
from djinn.bench.records import Record
from djinn.errors import ConfigError
from djinn.profiles import Profile, load_profile

SMOKE, PAPER, MIXTURE = map(load_profile, ("smoke_13b", "virt_mem_l4", "moe_h100"))
CLAIMS = {claim.id: claim for claim in load_claims()}
SYSTEMS = ("djinn", "accelerate:disk", "deepspeed:nvme")


def evidence(
    records: list[Record],
    profile: Profile = SMOKE,
    timeline: Sequence[tuple[str, float, float]] = (),
    more: Sequence[Sequence[tuple[str, float, float]]] = (),
) -> Evidence:
    """Evidence with the same ``timeline`` of each system; of several GPUs ``more`` are the others'."""
    gpus = [pd.DataFrame(spans, columns=["lane", "start_s", "end_s"]) for spans in (timeline, *more)]
    timelines = [dict.fromkeys(("djinn", "djinn:lossless"), spans) for spans in gpus]
    return Evidence(profile=profile, records=records, proof=None, timelines=timelines)


def smoke(**changes: object) -> list[Record]:
    return [fabricated(SMOKE, system, run, **changes) for run in range(3) for system in SYSTEMS]


@pytest.mark.parametrize("records", [[], [failed(SMOKE, "djinn", 0, "oom", "killed")]], ids=["nothing", "djinn failed"])
@pytest.mark.parametrize("profile", [SMOKE, PAPER], ids=lambda each: each.name)
def test_no_claim_passes_without_its_inputs(records: list[Record], profile: Profile):
    for claim in CLAIMS.values():
        outcome = evaluate(claim, evidence(records, profile))
        assert outcome.verdict == "NOT RUN", claim.id
        assert outcome.measured is None
        assert outcome.why


def test_a_finished_run_that_lacks_the_number_passes_nothing():
    outcome = evaluate(CLAIMS["C2"], evidence([*smoke(), fabricated(SMOKE, "djinn", 3, peak_device_bytes=None)]))
    assert (outcome.verdict, outcome.why) == ("NOT RUN", "peak_device_bytes was not measured in every run")


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS.values() if claim.needs.device == "cuda"], ids=lambda c: c.id
)
def test_what_needs_a_gpu_is_not_run_on_a_cpu(claim: Claim):
    outcome = evaluate(claim, evidence(smoke(ttft_s=0.1, link_utilisation=1.0)))
    assert (outcome.verdict, outcome.why) == ("NOT RUN", "needs device cuda; this run used cpu")


def test_what_is_about_a_large_model_is_not_run_on_a_small_one():
    outcome = evaluate(CLAIMS["C4a"], evidence(smoke(model_bytes=22_000_000, link_utilisation=1.0)))
    assert (outcome.verdict, outcome.why) == ("NOT RUN", "needs a model of 20 GB or more; this run's has 22 MB")


def test_an_absolute_target_is_held_on_the_named_gpu_only():
    def seen_on(device_name: str) -> str:
        size = {"model_bytes": 138 * 10**9, "wall_s": 60.0, "link_bytes": 13 * 10**11, "device_name": device_name}
        return evaluate(CLAIMS["C6"], evidence([fabricated(PAPER, "djinn", 0, **size)], profile=PAPER)).verdict

    assert seen_on("NVIDIA L4") == "PASS"
    assert seen_on("NVIDIA L40S") == "NOT RUN"


def test_djinn_is_held_to_the_tokens_of_a_steady_reference():
    records = smoke()
    assert evaluate(CLAIMS["C3"], evidence(records)).verdict == "PASS"
    unsteady_peer = fabricated(SMOKE, "deepspeed:nvme", 2, tokens=[1, 2, 3])
    assert evaluate(CLAIMS["C3"], evidence([*records, unsteady_peer])).verdict == "PASS"
    wrong = fabricated(SMOKE, "djinn", 2, tokens=[1, 2, 3])
    outcome = evaluate(CLAIMS["C3"], evidence([*records, wrong]))
    assert (outcome.verdict, outcome.measured) == ("FAIL", 0)
    alone = evaluate(CLAIMS["C3"], evidence(records[:1]))
    assert alone.verdict == "NOT RUN"
    assert "needs djinn and another system" in alone.why


def coded(**changes: object) -> list[Record]:
    """Return a run with raw weights, and one with coded ones in 0.7 of its time."""
    size = {"model_bytes": 138 * 10**9}
    raw = fabricated(PAPER, "djinn", 0, **size)
    assert raw.ttft_s is not None
    faster = {"ttft_s": 0.7 * raw.ttft_s, "per_token_s": [0.7 * each for each in raw.per_token_s]}
    settings = {"settings": {"bits q_proj": 11.2, "bits lm_head": 11.3, "chunk": 4}}
    return [raw, fabricated(PAPER, "djinn:lossless", 0, **size, **faster | settings | changes)]


@pytest.mark.parametrize(
    ("claim", "measured", "verdict", "changes"),
    [
        ("C12", 1.0, "PASS", {}),
        ("C12", 0.0, "FAIL", {"tokens": [1, 2, 3]}),
        ("C13", 0.7, "PASS", {}),
        ("C13", None, "FAIL", {"ttft_s": 500.0}),
        ("C14", None, "PASS", {"peak_device_bytes": 23 * 10**9}),
        ("C14", None, "FAIL", {"peak_device_bytes": 25 * 10**9}),
        ("C15", 11.3, "FAIL", {}),
        ("C15", None, "NOT RUN", {"settings": {}}),
    ],
)
def test_coded_weights_are_held_to_raw_ones(
    claim: str, measured: float | None, verdict: str, changes: dict[str, object]
) -> None:
    outcome = evaluate(CLAIMS[claim], evidence(coded(**changes), profile=PAPER))
    assert outcome.verdict == verdict, outcome
    if measured is not None:
        assert outcome.measured == pytest.approx(measured)


def mixture(routed_share: float, **changes: object) -> list[Record]:
    """Return runs of a mixture of 93 GB: experts fetched as picked, in a share of the time of whole layers."""
    whole = fabricated(MIXTURE, "djinn:whole", 0, model_bytes=93 * 10**9)
    assert whole.ttft_s is not None
    times = {"ttft_s": routed_share * whole.ttft_s, "per_token_s": [routed_share * each for each in whole.per_token_s]}
    counts = {"expert_hits": 10, "expert_misses": 40, "link_utilisation": 0.8}
    return [whole, fabricated(MIXTURE, "djinn", 0, model_bytes=93 * 10**9, **times | counts | changes)]


@pytest.mark.parametrize(("share", "verdict"), [(0.3, "PASS"), (0.6, "FAIL")])
def test_routed_experts_are_held_to_whole_layers_of_the_same_run(share: float, verdict: str) -> None:
    outcome = evaluate(CLAIMS["C17"], evidence(mixture(share), profile=MIXTURE))
    assert (outcome.verdict, outcome.measured) == (verdict, pytest.approx(share))


def test_what_is_about_routed_experts_is_not_run_without_them_and_the_other_way_round() -> None:
    dense = evaluate(CLAIMS["C17"], evidence(mixture(0.3, expert_hits=None), profile=MIXTURE))
    assert (dense.verdict, dense.lacking) == ("NOT RUN", "a mixture of experts")
    for claim, profile in (("C4a", SMOKE), ("C10a", MIXTURE), ("C10b", MIXTURE)):
        routed = evaluate(CLAIMS[claim], evidence(mixture(0.3), profile=profile))
        assert (routed.verdict, routed.lacking) == ("NOT RUN", "a model without routed experts")
    alone = evaluate(CLAIMS["C17"], evidence(mixture(0.3)[1:], profile=MIXTURE))
    assert (alone.verdict, alone.why) == ("NOT RUN", "none of djinn:whole finished")


def test_the_tokens_of_routed_experts_are_held_to_those_of_systems_that_move_whole_layers() -> None:
    peer = fabricated(MIXTURE, "accelerate:cpu-pinned", 0)
    assert evaluate(CLAIMS["C3"], evidence([*mixture(0.3), peer], profile=MIXTURE)).verdict == "PASS"
    other = [*mixture(0.3, tokens=[1, 2, 3]), peer]
    assert evaluate(CLAIMS["C3"], evidence(other, profile=MIXTURE)).verdict == "FAIL"


def test_the_share_of_decoding_is_that_of_the_traced_time() -> None:
    spans = [("copy", 0.0, 8.0), ("decode", 1.0, 1.3), ("decode", 9.8, 10.0)]
    outcome = evaluate(CLAIMS["C16"], evidence(coded(), profile=PAPER, timeline=spans))
    assert (outcome.verdict, outcome.measured) == ("PASS", pytest.approx(0.05))


def test_djinn_with_coded_weights_is_no_independent_reference() -> None:
    raw, lossless = coded()
    outcome = evaluate(CLAIMS["C3"], evidence([raw, lossless], profile=PAPER))
    assert outcome.verdict == "NOT RUN"


def test_the_best_peer_is_chosen_run_by_run():
    def took(system: str, run: int, seconds: float) -> Record:
        return fabricated(SMOKE, system, run, ttft_s=seconds, per_token_s=[0.0] * (SMOKE.new_tokens - 1))

    records = [took("djinn", 0, 8), took("accelerate:disk", 0, 10), took("deepspeed:nvme", 0, 40)]
    records += [took("djinn", 1, 18), took("accelerate:disk", 1, 40), took("deepspeed:nvme", 1, 20)]
    records += [took("djinn", 2, 1), took("accelerate:disk", 2, 40)]  # DeepSpeed is missing: the run is no pair
    outcome = evaluate(CLAIMS["C5"], evidence(records))
    assert outcome.verdict == "PASS"
    assert outcome.measured == pytest.approx(0.85)
    no_peer = evaluate(CLAIMS["C5"], evidence([took("djinn", 0, 1)]))
    assert (no_peer.verdict, no_peer.why) == ("NOT RUN", "none of accelerate:disk, deepspeed:nvme finished")


def test_a_peer_with_fewer_tokens_is_not_compared_by_its_time():
    short = fabricated(SMOKE, "accelerate:disk", 0, ttft_s=1.0, per_token_s=[], new_tokens=1, tokens=[7])
    assert evaluate(CLAIMS["C5"], evidence([fabricated(SMOKE, "djinn", 0), short])).verdict == "NOT RUN"
    outcome = evaluate(CLAIMS["C5"], evidence([*smoke()[:1], *smoke()[2:3], short]))
    assert outcome.measured == pytest.approx(1 / 1.8, rel=0.05), "of DeepSpeed's"


@pytest.mark.parametrize(
    ("comparison", "measured", "holds"),
    [
        (">=", 10, True),
        (">=", 9.9, False),
        ("<=", 10, True),
        ("<=", 10.1, False),
        ("==", 10, True),
        ("==", 10.1, False),
    ],
)
def test_the_target_itself_is_the_limit(comparison: str, measured: float, holds: bool):
    claim = CLAIMS["C2"].model_copy(update={"comparison": comparison, "target": 10.0})
    assert claim.holds(measured) is holds


def test_every_claim_names_a_notebook_that_is_there():
    notebooks = {path.stem for path in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb")}
    assert {claim.notebook for claim in CLAIMS.values()} <= notebooks


@pytest.mark.parametrize(
    ("change", "message"),
    [({"metric": "speed"}, "no metric 'speed'; the metrics are"), ({"traget": 1}, "traget"), ({"id": "C2"}, "C2")],
)
def test_a_claim_that_cannot_be_read_is_refused(tmp_path: Path, change: dict[str, object], message: str):
    claims = [CLAIMS[key].model_dump(mode="json") for key in ("C1", "C2")]
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump([claims[0] | change, claims[1]]))
    with pytest.raises(ConfigError, match=message):
        load_claims(path)


def test_outcomes_are_written_and_read_back(fabricated_run: Path):
    outcomes = write_claims(fabricated_run)
    assert [outcome.claim.id for outcome in outcomes] == list(CLAIMS)
    assert (fabricated_run / "results" / "claims.json").read_text().count('"verdict"') == len(CLAIMS)
    assert read_claims(fabricated_run) == outcomes


def test_what_the_paper_says_of_one_gpu_is_not_held_against_several():
    two = load_profile("ranks_2x24")
    size = {"model_bytes": 138 * 10**9, "gpus": 2, "ttft_s": 1.0, "peak_device_bytes": 23 * 10**9}
    found = evidence([fabricated(two, "djinn", 0, **size)], profile=two)
    for name in ("C6", "C7", "C8"):
        outcome = evaluate(CLAIMS[name], found)
        assert (outcome.verdict, outcome.why) == ("NOT RUN", "needs a run on one GPU; this one used 2")
    assert METRICS["model_over_peak"](found) == pytest.approx(138 / 46)
    assert evaluate(CLAIMS["C2"], found).verdict == "PASS"


def test_on_several_gpus_tokens_are_those_of_the_model_resident_on_them():
    two = load_profile("ranks_2x24")

    def ran(system: str, **changes: object) -> Record:
        return fabricated(two, system, 0, gpus=2, **changes)

    others = [ran("djinn"), ran("deepspeed:cpu", tokens=[1] * 16), ran("accelerate:cpu", tokens=[1] * 16)]
    outcome = evaluate(CLAIMS["C3"], evidence(others, profile=two))
    assert outcome.verdict == "NOT RUN"
    assert "needs djinn and the resident model on the same GPUs" in outcome.why
    assert evaluate(CLAIMS["C3"], evidence([*others, ran("resident")], profile=two)).verdict == "PASS"
    wrong = ran("resident", tokens=[1] * 16)
    assert evaluate(CLAIMS["C3"], evidence([*others, wrong], profile=two)).verdict == "FAIL"


def streamed(*runs: tuple[float, float, float], **changes: object) -> list[Record]:
    """Return runs of 138 GB on a GPU, each with its link's rate and those of bare copies before and after it."""
    size = {"model_bytes": 138 * 10**9, "wall_s": 40.0, "ceiling_gbps": 55.0}
    return [
        fabricated(
            PAPER, "djinn", run, **size, link_bytes=round(40e9 * rate), bare_gbps_before=before, bare_gbps_after=after,
            link_utilisation=rate / 55, **changes,
        )
        for run, (rate, before, after) in enumerate(runs)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "verdict", "measured"),
    [
        # The link is slower in the second run, and so are the copies beside it.
        ([(50, 50.5, 50), (46, 46.2, 46.4), (54, 54.1, 54.2)], "PASS", 46 / 46.4),
        ([(50, 52, 50), (46, 46.2, 48)], "FAIL", (50 / 52 + 46 / 48) / 2),
        # Faster than both, but by less than they differ; then by more.
        ([(52.5, 52, 51)], "PASS", 52.5 / 52),
        ([(50, 50.5, 50), (53.5, 52, 51)], "NOT RUN", None),
    ],
)
def test_a_run_is_held_to_bare_copies_beside_it(
    runs: list[tuple[float, float, float]], verdict: str, measured: float | None
) -> None:
    outcome = evaluate(CLAIMS["C10a"], evidence(streamed(*runs), profile=PAPER))
    assert outcome.verdict == verdict, outcome
    assert outcome.measured == (None if measured is None else pytest.approx(measured))


def test_older_records_are_judged_by_the_small_buffer_alone() -> None:
    unknown = {"bare_gbps_before": None, "bare_gbps_after": None}
    older = [each.model_copy(update=unknown) for each in streamed((51, 52, 52))]
    assert evaluate(CLAIMS["C10a"], evidence(older, profile=PAPER)).verdict == "NOT RUN"
    assert evaluate(CLAIMS["C19"], evidence(older, profile=PAPER)).verdict == "NOT RUN"
    outcome = evaluate(CLAIMS["C10b"], evidence(older, profile=PAPER))
    assert (outcome.verdict, outcome.measured) == ("FAIL", pytest.approx(51 / 55))
    assert "; of our own runs: the cause is not known" in outcome.why
    faster = [each.model_copy(update={"ceiling_gbps": 50.0}) for each in older]
    assert "no ceiling" in evaluate(CLAIMS["C10b"], evidence(faster, profile=PAPER)).why


def test_of_several_gpus_the_one_that_used_its_link_least_counts() -> None:
    (run,) = streamed((100, 105, 105))
    ranks = [
        {"wall_s": 40.0, "link_bytes": round(40e9 * rate), "bare_gbps_before": 52.0, "bare_gbps_after": 51.0}
        for rate in (51.5, 48.5)
    ]
    split = Record.model_validate(run.model_dump() | {"gpus": 2, "by_rank": ranks})
    assert METRICS["link_over_bare"](evidence([split], profile=PAPER)) == pytest.approx(48.5 / 52)


@pytest.mark.parametrize(("ttft_s", "verdict"), [(2.6, "PASS"), (2.8, "FAIL")])
def test_the_first_token_is_held_to_the_bytes_of_one_pass(ttft_s: float, verdict: str) -> None:
    """2 TB in 16 passes are 125 GB each, which copies at 50 GB/s take 2.5 s for."""
    outcome = evaluate(CLAIMS["C19"], evidence(streamed((50, 50, 49), ttft_s=ttft_s), profile=PAPER))
    assert (outcome.verdict, outcome.measured) == (verdict, pytest.approx(ttft_s / 2.5))


def test_the_half_of_c4_that_limits_is_judged() -> None:
    disk = evidence(smoke(link_utilisation=0.95, ceiling_gbps=9.0, stall_s=40.0))
    compute = evidence(smoke(link_utilisation=0.4, ceiling_gbps=9.0, stall_s=1.0))
    for claim, judged, other, limit in (("C4a", disk, compute, "compute"), ("C4b", compute, disk, "the disk")):
        assert evaluate(CLAIMS[claim], judged).verdict == "PASS"
        outcome = evaluate(CLAIMS[claim], other)
        assert outcome.verdict == "NOT RUN"
        assert outcome.why.startswith(f"{limit} is the limit here")


@pytest.mark.parametrize(("gap_s", "verdict"), [(0.05, "PASS"), (0.3, "FAIL")])
def test_the_copy_engines_share_is_that_of_the_traced_time(gap_s: float, verdict: str) -> None:
    spans = [("copy", 0.0, 5.0), ("compute", 1.0, 5.2), ("copy", 5.0 + gap_s, 10.0)]
    outcome = evaluate(CLAIMS["C18"], evidence(streamed((50, 50, 49)), profile=PAPER, timeline=spans))
    assert (outcome.verdict, outcome.measured) == (verdict, pytest.approx(1 - gap_s / 10))


def test_of_several_gpus_the_least_busy_copies_and_the_one_that_decodes_most_count() -> None:
    busy = [("copy", 0.0, 10.0), ("decode", 0.0, 0.1)]
    idle = [("copy", 0.0, 9.0), ("decode", 8.0, 10.0)]
    for first, other in ((busy, idle), (idle, busy)):
        found = evidence([], timeline=first, more=[other, ()])
        assert METRICS["copy_share"](found) == pytest.approx(0.9)
        assert METRICS["decode_share"](found) == pytest.approx(0.2)
