"""What the guide says of measurements is what their samples hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pages import PAGES, ROOT

from djinn.bench.certify.certification import Certification
from djinn.engine import opened
from djinn.engine.forecast import forecast
from djinn.names import Coding

SAMPLES = ROOT / "data" / "benchmarks"
GUIDE = PAGES["docs/guide.md"]
WORDS = " ".join(GUIDE.text.split())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, a line each."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bits_of_trained_weights_are_those_of_the_record() -> None:
    names = {"smollm2": "SmolLM2", "minilm": "MiniLM"}
    rows = []
    for kind in read(SAMPLES / "bits_2026-11-28" / "bits.jsonl"):
        bits = [kind["bits"], kind["exponent"], kind["entropy"], kind["gaussian"]["bits"]]
        sizes = [f"{kind['weights'] / 1e6:.3g} M", *(f"{each:.2f}" for each in bits)]
        rows.append([names[kind["checkpoint"]], kind["kind"], *sizes])
        assert kind["exponent"] < kind["bits"] < 16
    assert GUIDE.rows("Trained weights") == rows


def test_times_of_mixtures_are_those_of_the_records() -> None:
    folder = SAMPLES / "experts_h100_2026-11-27"
    first, second, small = "mixtral-8x7b_1", "mixtral-8x7b_2", "qwen3-30b-a3b"
    even, free, local = "0,0", None, "0.5,0.7"
    expected = [
        (second, "whole", [free]), (second, "routed", [even]), (second, "routed", [free]), (first, "routed", [even]),
        (first, "routed", [free]), (first, "coded", [even]), (first, "coded", [free]), (first, "routed", [local]),
        (first, "coded", [local]), (small, "whole", [free]), (small, "routed", [even]), (small, "routed", [free]),
        (small, "coded", [even]), (small, "coded", [free]), (small, "routed", [local]), (small, "pool", [even]),
        (small, "resident", [free, even, "0.25,0.7", local, "0.75,1.0"]),
    ]  # fmt: skip
    rows = [row for row in GUIDE.rows("Mixtures of experts") if len(row) == 8]
    assert len(rows) == len(expected)
    for row, (file, mode, steers) in zip(rows, expected, strict=True):
        records = read(folder / f"{file}.jsonl")
        runs = [each for each in records if each["mode"] == mode and "times" in each and each["steer"] in steers]
        hits, misses = (sum(run[f"expert_{what}"] for run in runs) for what in ("hits", "misses"))
        times = [time for run in runs for time in run["times"][1:]]
        moved = misses * runs[0]["slot_bytes"] / len(times) if hits else runs[0]["host_bytes"]
        medians = [run["token_s"] for run in runs]
        assert row[2:] == [
            str(len(runs)),
            f"{hits / (hits + misses):.2f}" if hits else "",
            f"{moved / 1e9:.3g}",
            f"{median(times):.3f} ({min(medians):.3f} to {max(medians):.3f})",
            f"{median(run['times'][0] for run in runs):.2f}",
            f"{runs[0]['host_bytes'] / 1e9:.1f}",
        ], row


def test_the_table_of_host_compute_is_what_its_records_say() -> None:
    """The whole model without host compute is of an earlier host."""
    now, before = SAMPLES / "host_twice_h100_2026-11-28", SAMPLES / "host_h100_2026-11-28"
    modes = [("exact", "none"), ("host", "none"), ("exact", "lossless"), ("host", "lossless")]
    expected = []
    for file in ("l16", "70b"):
        for mode in modes:
            folder = before if file == "70b" and mode[0] == "exact" else now
            runs = [each for each in read(folder / f"{file}.jsonl") if (each["mode"], each["coding"]) == mode]
            assert len(runs) == 5
            times, first = [[run[key] for run in runs] for key in ("token_s", "ttft_s")]
            digits = 3 if file == "l16" else 2
            shown = [f"{number:.{digits}f}" for number in (median(times), min(times), max(times))]
            predicted = f"{runs[0]['predicted_token_s']:.{digits}f}"
            expected.append([f"{shown[0]} ({shown[1]} to {shown[2]})", predicted, f"{median(first):.{digits}f}"])
    rows = [row for row in GUIDE.rows("The host's cores beside the link") if len(row) == 5]
    assert [row[2:] for row in rows] == expected


def test_llamacpp_is_slower_by_what_the_guide_says() -> None:
    folder = SAMPLES / "host_ahead_h100_2026-11-28"
    best, runs = read(folder / "l16_llamacpp.jsonl")[-1], read(folder / "l16.jsonl")
    raw, coded = (
        [run for run in runs if (run["mode"], run["coding"]) == ("host", coding)] for coding in ("none", "lossless")
    )
    times, first = (
        [best[theirs], *(median(run[ours] for run in way) for way in (raw, coded))]
        for theirs, ours in (("tokens_seconds", "token_s"), ("prompt_seconds", "ttft_s"))
    )
    assert f"{times[0] / times[1]:.1f}x faster raw and {times[0] / times[2]:.1f}x faster coded" in WORDS
    assert (
        "took {:.3f} s per token of the 16 layers with 16 threads, and djinn {:.3f} s raw and {:.3f} s".format(*times)
        in WORDS
    )
    assert "first token came after {:.3f}, {:.3f} and {:.3f} s".format(*first) in WORDS


def test_predictions_of_host_compute_are_as_good_as_the_guide_says() -> None:
    """Beside what was predicted, and beside that with the cores' rate in the run itself."""
    longer, own = [], []
    for folder, file in itertools.product(("host_twice_h100_2026-11-28", "host_h200_2026-11-28"), ("l16", "70b")):
        for coding in ("none", "lossless"):
            runs = [
                run
                for run in read(SAMPLES / folder / f"{file}.jsonl")
                if (run["mode"], run["coding"]) == ("host", coding)
            ]
            computed = runs[0]["decode_host_computed_bytes"] / runs[0]["decode_passes"] / 1e9
            corrected = [
                run["predicted_token_s"] + computed * (1 / run["cores_busy_gbps"] - 1 / run["planned_cores_gbps"])
                for run in runs
            ]
            longer.append(median(run["token_s"] for run in runs) / runs[0]["predicted_token_s"])
            own.append(median(run["token_s"] / seconds for run, seconds in zip(runs, corrected, strict=True)))
    assert f"{min(longer):.2f} to {max(longer):.2f} times as long as predicted" in WORDS
    assert f"it is {min(own):.2f} to {max(own):.2f}." in WORDS


def test_cores_tokens_and_first_tokens_are_as_the_guide_says() -> None:
    def runs(folder: str, mode: str, coding: str) -> list[dict[str, Any]]:
        found = read(SAMPLES / folder / "l16.jsonl")
        return [run for run in found if (run["mode"], run["coding"]) == (mode, coding)]

    raw, coded = (
        sorted(run["cores_busy_gbps"] for run in runs("host_h200_2026-11-28", "host", coding))
        for coding in ("none", "lossless")
    )
    before = json.loads((SAMPLES / "host_h200_2026-11-28" / "l16_rates.json").read_text())["beside_link"][0]["gbps"]
    assert f"multiplied {raw[0]:.0f} to {raw[-1]:.0f} GB/s in the runs of 16 layers raw" in WORDS
    assert f"and {coded[0]:.0f} to {coded[-1]:.0f} GB/s in those of 16 layers coded" in WORDS
    assert f"{before:.0f} GB/s had been measured before both" in WORDS
    differ = []
    for coding in ("none", "lossless"):
        exact, host = (runs("host_twice_h100_2026-11-28", mode, coding) for mode in ("exact", "host"))
        longer = median(run["ttft_s"] for run in host) / median(run["ttft_s"] for run in exact)
        assert 0.988 < longer < 1.012
        assert {run["tokens_equal"] for run in host} == {12}
        differ += [run["logits_differ"] for run in host]
    assert f"Logits differed by up to {max(differ):.2f} of 10" in WORDS


def test_a_run_within_its_budget_is_as_the_guide_says() -> None:
    (run,) = read(SAMPLES / "ranks_peers_h200_2026-11-28" / "djinn_in_budget.jsonl")
    assert f"peaked at {run['peak_device_bytes'] / 1e9:.1f} GB" in WORDS
    assert f"{median(run['per_token_s'][1:]):.2f} s per token and {run['ttft_s']:.2f} s to the first" in WORDS


def test_times_beside_deepspeed_on_two_gpus_are_those_of_the_records() -> None:
    folder, expected, tokens = SAMPLES / "ranks_peers_h200_2026-11-28", [], []
    for file, coding in (("djinn", "none"), ("djinn", "lossless"), ("deepspeed", "none")):
        runs = [run for run in read(folder / f"{file}.jsonl") if run["coding"] == coding]
        tokens.append(median(time for run in runs for time in run["per_token_s"][1:]))
        first, peak = median(run["ttft_s"] for run in runs), max(run["peak_device_bytes"] for run in runs)
        expected.append([str(len(runs)), f"{first:.2f}", f"{tokens[-1]:.2f}", f"{peak / 1e9:.1f}"])
    assert [row[1:] for row in GUIDE.rows("Several GPUs") if len(row) == 5] == expected
    raw, coded, theirs = tokens
    assert f"{theirs / raw:.1f}x faster than DeepSpeed's raw, and {theirs / coded:.1f}x faster coded" in GUIDE.text


def test_times_of_mixtures_in_turns_are_those_of_the_records() -> None:
    expected = []
    for host, file, steer, mode in (
        ("h200", "", "0,0", "routed"), ("h200", "", "0.5,0.7", "routed"), ("h200", "", None, "routed"),
        ("h200", "_pool", None, "pool"), ("h200_again", "", "0,0", "routed"), ("h200_again", "", "0.5,0.7", "routed"),
        ("h200_again", "", None, "routed"), ("h200_again", "_pool", None, "pool"),
        ("h200_again", "_pool", "0,0", "pool"),
    ):  # fmt: skip
        records = read(SAMPLES / f"experts_{host}_2026-11-28" / f"qwen3-30b-a3b{file}.jsonl")
        runs = {(run["mode"], run["run"]): run for run in records if "times" in run and run["steer"] == steer}
        streaming = [run for (way, _), run in sorted(runs.items()) if way == mode]
        pairs = [(runs["resident", run["run"]], run) for run in streaming]
        assert all(one["tokens"] == other["tokens"] for one, other in pairs)
        hits, misses = (median([run[f"expert_{what}"] for run in streaming]) for what in ("hits", "misses"))
        times = [[time for run in side for time in run["times"][1:]] for side in zip(*pairs, strict=True)]
        longer = [other["token_s"] / one["token_s"] for one, other in pairs]
        expected.append(
            [
                str(len(pairs)),
                f"{hits / (hits + misses):.2f}",
                *(f"{median(side):.3f}" for side in times),
                f"{median(longer):.2f} ({min(longer):.2f} to {max(longer):.2f})",
            ]
        )
    rows = [row for row in GUIDE.rows("Mixtures of experts") if len(row) == 6]
    assert [row[1:] for row in rows] == expected


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["none", "lossless"])
def test_two_gpus_are_predicted_within_a_hundredth(coding: Coding, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what was certified there, with what was kept for NCCL then."""
    monkeypatch.setattr(opened, "COLLECTIVES_BYTES", 1340 * 10**6)
    folder = SAMPLES / "ranks_peers_h200_2026-11-28"
    rates = Certification.model_validate_json((folder / "certify.json").read_text()).rates
    foreseen = forecast(
        "synthetic:llama-2-70b", budget="24 GB", device="cuda", rates=rates, free=268 * 10**9, host_memory="123 GB",
        prompt_tokens=512, new_tokens=16, coding=coding, gpus=2,
    ).predicted  # fmt: skip
    runs = [run for run in read(folder / "djinn.jsonl") if run["coding"] == coding]
    assert foreseen is not None
    assert foreseen.token_s == pytest.approx(median(time for run in runs for time in run["per_token_s"][1:]), rel=0.01)
    assert foreseen.ttft_s == pytest.approx(median(run["ttft_s"] for run in runs), rel=0.01)


def test_the_clean_run_took_as_long_as_its_plans_said() -> None:
    records = read(ROOT / "data" / "reference" / "h200-34b_2026-11-28" / "results" / "baselines.jsonl")
    for variant, planned_s in (("", "1.07"), ("lossless", "0.71")):
        runs = [run for run in records if (run["system"], run["variant"]) == ("djinn", variant)]
        assert len(runs) == 5
        for run in runs:
            assert f"{run['settings']['planned_pass_s']:.2f}" == planned_s
            assert median(run["per_token_s"]) == pytest.approx(run["settings"]["planned_pass_s"], rel=0.01)


def test_folders_of_samples_say_what_they_hold() -> None:
    """Machine, date, command, and each file by its name."""
    for folder in SAMPLES.iterdir():
        text = (folder / "README.md").read_text()
        for heading in ("- Machine: ", "- Date: ", "- Command: "):
            assert heading in text, folder.name
        assert [
            path.name for path in folder.iterdir() if f"`{path.name}`" not in text and path.name != "README.md"
        ] == []
