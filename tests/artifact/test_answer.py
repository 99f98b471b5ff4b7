"""The sentences at the top of a page: what the records say, with the numbers that they have, and no more."""

from __future__ import annotations

import pytest
from fabricated import fabricated, failed

from djinn.artifact.answer import answer, beside, best_rate, lines, meaning, smoke
from djinn.bench.records import Record
from djinn.profiles import load_profile

PROFILE = load_profile("compare_h100")


def ran(name: str, seconds: float, run: int = 0, **changes: object) -> Record:
    system, _, variant = name.partition(":")
    times = {"per_token_s": [seconds] * (PROFILE.new_tokens - 1), "ttft_s": seconds, "model_bytes": 60 * 10**9}
    return fabricated(PROFILE, system, run, **{"variant": variant, "peak_device_bytes": 10**10, **times, **changes})


RECORDS = [
    ran("djinn", 2.0), ran("djinn:lossless", 1.25), ran("deepspeed:cpu", 3.0), ran("accelerate:cpu-pinned", 2.5),
    ran("accelerate:cpu", 20.0),
]  # fmt: skip


def test_the_answer_is_times_and_how_much_faster_than_the_two_best_peers():
    assert answer(RECORDS) == (
        "djinn takes 2.00 s per token: 1.2x faster than Accelerate, pinned and 1.5x faster than DeepSpeed ZeRO-3; with "
        "weights coded without loss 1.25 s: 2.0x faster and 2.4x faster."
    )
    assert "djinn took 10 GB of its 11.2 GB of device memory" in beside(RECORDS)
    assert "tokens are those of the systems beside it" in beside(RECORDS)


def test_djinn_that_is_slower_or_alone_says_so():
    assert "1.5x slower than DeepSpeed ZeRO-3" in answer([ran("djinn", 3.0), ran("deepspeed:cpu", 2.0)])
    assert answer(RECORDS[:1]) == "djinn takes 2.00 s per token."
    assert "No other system finished" in beside(RECORDS[:1])


def test_other_tokens_are_said_loudly():
    other = ran("djinn", 2.0, tokens=[9] * PROFILE.new_tokens)
    assert "NOT those" in beside([other, ran("deepspeed:cpu", 3.0)])


def test_a_resident_model_that_fits_is_named_and_no_peer():
    records = [ran("djinn", 2.0), ran("resident", 0.1)]
    assert "faster" not in answer(records)
    assert "slower" not in answer(records)
    assert "Resident, the model takes 0.100 s per token" in beside(records)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "djinn has not run here yet."),
        ([failed(PROFILE, "djinn", 0, "oom", "killed at 11 GB")], "djinn did not finish: killed at 11 GB."),
        ([ran("djinn", 1.0, new_tokens=1, per_token_s=[], tokens=[1])], "djinn generated one token alone."),
    ],
)
def test_without_times_the_answer_is_why(records: list[Record], words: str):
    assert answer(records) == words
    assert beside(records) == ""


def test_a_smoke_run_says_what_it_can_mean():
    small = [record.model_copy(update={"model_bytes": 10**7}) for record in RECORDS]
    assert answer(small) == smoke(10**7)
    assert "mean nothing" in smoke(10**7)
    assert meaning(load_profile("smoke_tiny")) == smoke()
    assert "synthetic" in meaning(PROFILE)
    assert "GB of its" not in beside(small)


def test_a_sweep_says_whether_its_sizes_matter():
    def swept(*shares: float) -> list[Record]:
        return [
            ran("djinn", 1.0, experiment="sweep", variant=f"chunk={4 * 2**k} MiB", link_utilisation=share)
            for k, share in enumerate(shares)
        ]

    assert best_rate(swept(0.95, 0.96, 0.97)).endswith("carried 95% to 97% of its ceiling (medians): neither needs "
                                                       "tuning here.")  # fmt: skip
    assert "their choice matters here" in best_rate(swept(0.5, 0.96))
    assert best_rate([]) == "No point of the sweep over chunks and rings finished."


def test_the_table_has_a_line_for_each_system_the_best_marked_and_reasons_for_gaps():
    table = {line.system: line for line in lines([*RECORDS, failed(PROFILE, "resident", 0, "oom", "80 GB")], ["djinn"])}
    assert next(iter(table)) == "djinn"
    cells = {name: {cell.column: cell for cell in line.cells} for name, line in table.items()}
    assert cells["DeepSpeed ZeRO-3"]["djinn is"].text == "1.5x faster"
    assert cells["DeepSpeed ZeRO-3"]["djinn, coded is"].text == "2.4x faster"
    assert cells["djinn"]["djinn is"].text == ""
    assert [name for name, own in cells.items() if own and own["time per token"].best] == ["djinn, coded"]
    assert table["resident"].reason == "oom: 80 GB"
    assert lines([], ["djinn"])[0].reason == "not run"
