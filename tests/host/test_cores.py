"""Which processors multiply."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.errors import ConfigError
from djinn.host import cores
from djinn.host.cores import choose, siblings

SIXTEEN = [[cpu] for cpu in range(16)]
PAIRED = [[cpu, cpu + 8] for cpu in range(8)]


def test_two_processors_are_kept_and_one_thread_is_made_for_a_core() -> None:
    assert choose(SIXTEEN, None, None) == tuple(range(14))
    assert choose(PAIRED, None, None) == tuple(range(8))
    assert choose([[0], [1]], None, None) == (0,)
    assert choose([[0]], None, None) == (0,)


def test_second_processors_of_cores_come_last() -> None:
    assert choose(PAIRED, None, 10) == (*range(8), 8, 9)


def test_a_quota_counts_as_fewer_processors() -> None:
    assert choose(SIXTEEN, 6.5, None) == tuple(range(4))
    assert choose(SIXTEEN, 0.5, None) == (0,)
    with pytest.raises(ConfigError, match=r"host_threads: 7 .* between 1 and 6.*quota of 6.5"):
        choose(SIXTEEN, 6.5, 7)


@pytest.mark.parametrize("threads", [0, -1, 17])
def test_more_threads_than_processors_are_refused_by_name(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"host_threads: {threads} is not between 1 and 16"):
        choose(SIXTEEN, None, threads)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.none() | st.floats(0.1, 40), st.none() | st.integers(1))
def test_processors_are_chosen_once_and_are_as_many_as_asked(
    sizes: list[int], quota: float | None, threads: int | None
) -> None:
    named = iter(range(sum(sizes)))
    groups = [[next(named) for _ in range(size)] for size in sizes]
    most = max(1, min(sum(sizes), int(quota or 1000)))
    if threads is not None and threads > most:
        with pytest.raises(ConfigError):
            choose(groups, quota, threads)
        return
    chosen = choose(groups, quota, threads)
    assert len(chosen) == len(set(chosen)) <= most
    assert threads is None or len(chosen) == threads


def test_processors_of_one_core_are_found(tmp_path: Path) -> None:
    for cpu, listed in ((0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{listed}\n")
    assert siblings({0, 1, 2, 3, 7}, tmp_path) == [[0, 2], [1, 3], [7]]
    assert siblings({2, 3}, tmp_path) == [[2], [3]]


def test_processors_near_the_memory_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: {4, 5, 6, 7})
    monkeypatch.setattr(cores, "cgroup_cpus", lambda: None)
    monkeypatch.setattr(cores, "siblings", lambda cpus: [[cpu] for cpu in sorted(cpus)])
    assert cores.choose_cpus(2, near={6, 7, 8}) == (6, 7)
    assert cores.choose_cpus(3, near={0}) == (4, 5, 6)  # none of the allowed ones is near
    with pytest.raises(ConfigError, match="between 1 and 2"):
        cores.choose_cpus(3, near={6, 7})


def test_a_system_that_does_not_tell_processors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: None)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cores, "cgroup_cpus", lambda: None)
    assert cores.choose_cpus() == (-1, -1)
