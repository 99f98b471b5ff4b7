"""The picture of several GPUs: a point for each number of them that finished, of runs of the same work alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fabricated import fabricated, failed

from djinn.bench.records import Record, append_record
from djinn.bench.run import Run
from djinn.errors import ConfigError, DjinnError
from djinn.figures.draw import draw_all
from djinn.figures.scaling import by_gpus, draw, links, read_links
from djinn.profiles import Profile, load_profile

TWO = load_profile("ranks_2x24")


def ran(system: str, gpus: int, token_s: float, **changes: object) -> Record:
    times = [token_s] * (TWO.new_tokens - 2) + [2 * token_s]
    return fabricated(TWO, system, 0, gpus=gpus, per_token_s=times, **changes)


RECORDS = [
    ran("resident", 4, 0.02),
    ran("djinn", 4, 0.25),
    ran("djinn", 1, 2.0),
    ran("djinn", 2, 0.9),
    failed(TWO, "deepspeed:cpu", 0, "oom", "killed"),
]


def test_there_is_a_row_for_each_system_and_number_in_order() -> None:
    rows = by_gpus(RECORDS)
    assert list(zip(rows["name"], rows["gpus"], rows["token_s"], strict=True)) == [
        ("djinn", 1, 2.0),
        ("djinn", 2, 0.9),
        ("djinn", 4, 0.25),
        ("resident", 4, 0.02),
    ]
    assert list(rows["high_s"]) == [4.0, 1.8, 0.5, 0.04]


def test_djinns_first_point_is_divided_by_the_gpus() -> None:
    (ax,) = draw(by_gpus(RECORDS)).axes
    (ideal,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert list(ideal.get_ydata()) == [2.0, 1.0, 0.5]
    (alone,) = draw(by_gpus(RECORDS[:2])).axes
    assert not [line for line in alone.lines if line.get_linestyle() == "--"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([*RECORDS, ran("djinn", 2, 1.0, budget_bytes=10**9)], "differ in budget_bytes"),
        ([*RECORDS, ran("djinn", 2, 1.0, model="synthetic:llama-2-13b")], "differ in model"),
        ([RECORDS[-1]], "no finished run with more than one token"),
    ],
)
def test_what_cannot_be_compared_is_not_drawn(records: list[Record], words: str) -> None:
    with pytest.raises(DjinnError, match=words):
        by_gpus(records)


def test_runs_beside_one_give_a_figure_of_all(tmp_path: Path) -> None:
    def measured(profile: Profile, records: list[Record]) -> Path:
        run = Run.open(tmp_path / profile.name, profile)
        for record in records:
            append_record(run.results / "baselines.jsonl", record)
        return run.folder

    two, four = measured(TWO, [RECORDS[3]]), measured(load_profile("virt_mem_4x24"), RECORDS[:2])
    assert two / "figures" / "time_by_gpus.pdf" in draw_all(two, beside=[four])
    assert "resident" in (two / "figures" / "time_by_gpus.csv").read_text()
    assert not [path for path in draw_all(four) if path.stem == "time_by_gpus"]


def sampled(path: Path, ranks: int, token_s: float) -> Path:
    """Write two runs in which each of some ranks streamed 10 GB in every token, over links that carry 20 GB/s."""
    runs = []
    for run, seconds in enumerate((2 * token_s, token_s)):
        by_rank = [{"link_bytes": 40 * 10**9}, *[{"link_bytes": 30 * 10**9}] * (ranks - 1)]
        times = [seconds] * 4
        runs.append(
            {
                "model": "m",
                "ranks": ranks,
                "run": run,
                "times": times,
                "pinned_bytes": [10**10] * ranks,
                "by_rank": by_rank,
            }
        )
    runs[0]["bare_gbps_before"], runs[-1]["bare_gbps_after"] = [18.0] * ranks, [22.0] * ranks
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return path


def test_links_add_up_and_the_bound_is_what_bare_copies_take(tmp_path: Path) -> None:
    paths = [sampled(tmp_path / f"{ranks}.jsonl", ranks, 1.0) for ranks in (1, 2)]
    rows = read_links(paths)
    assert rows["gpus"].tolist() == [1, 1, 2, 2]
    assert rows["token_s"].tolist() == [2.0, 1.0, 2.0, 1.0]
    assert rows["link_gbps"].tolist() == [5.0, 10.0, 8.75, 17.5]
    assert rows["slowest_gbps"].tolist() == [5.0, 10.0, 3.75, 7.5]
    assert rows["bare_gbps"].tolist() == [20.0, 20.0, 40.0, 40.0]
    assert rows["bound_s"].tolist() == [0.5] * 4
    upper, lower = links(rows).axes
    assert upper.get_title(loc="left") == "m over one link per GPU"
    places = [list(line.get_xdata()) for line in lower.lines if line.get_linestyle() == "None"]
    assert len(places) == 2
    assert not set(places[0]) & set(places[1]), "first runs stand beside the others"
    slowest = next(line for line in upper.lines if line.get_marker() == "_")
    assert list(slowest.get_xdata()) == [2]
    for ax, bound in ((upper, [20.0, 40.0]), (lower, [0.5, 0.5])):
        (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert list(line.get_ydata()) == bound


def test_a_file_without_samples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for text in ("", "{}", "words"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"other\.jsonl: no records of benchmarks/ranks\.py"):
            read_links([path])
