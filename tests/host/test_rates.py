"""What the host's cores multiply, alone and beside a link."""

import itertools

import pytest
import torch
from torch import Tensor

from djinn.host import rates as host
from djinn.host.rates import HostCores, ProductRate, by_one_token, calls_in_memory, knee, rate
from djinn.planning.rates import Rates

CPU = torch.device("cpu")


def rates(*found: tuple[int, float]) -> list[ProductRate]:
    return [ProductRate(tokens=tokens, gbps=gbps) for tokens, gbps in found]


def test_the_knee_is_where_a_product_takes_longer_than_with_one_token() -> None:
    assert knee(rates((1, 50.0))) == 1
    assert knee(rates((1, 50.0), (2, 52.0), (4, 40.0), (8, 20.0))) == 4
    assert knee(rates((1, 131.0), (2, 144.0), (4, 145.0), (8, 141.0), (16, 110.0))) == 8
    assert knee(rates((1, 50.0), (2, 30.0), (4, 50.0))) == 1
    assert knee(rates((1, 50.0), (16, 38.5))) == 16
    assert knee(rates((1, 50.0), (16, 38.4))) == 1


def test_what_cores_do_by_few_tokens_they_do_by_one() -> None:
    cold, warm = (
        ProductRate(tokens=tokens, gbps=gbps, link_gbps=link)
        for tokens, gbps, link in ((1, 131.0, 39.9), (2, 143.0, 45.0))
    )
    beyond = ProductRate(tokens=8, gbps=90.0, link_gbps=52.0)
    assert by_one_token([cold, warm, beyond]) == warm
    assert by_one_token([warm, cold.model_copy(update={"tokens": 2})]) == warm
    found = HostCores(kernel="torch", threads=1, alone=(cold,), beside_link=(cold, warm, beyond))
    assert (found.host_gbps_beside_link, found.link_gbps_beside_host) == (143.0, 45.0)
    known = found.added_to(Rates(device="cuda", link=55e9)).host
    assert known is not None
    assert (known.cores, known.link, known.alone) == (143e9, 45e9, 55e9)


def test_calls_lie_one_behind_the_other_and_fill_the_memory() -> None:
    with calls_in_memory([(3, 8), (5, 8)], CPU, 1000) as calls:
        assert [[tuple(matrix.shape) for matrix in call] for call in calls] == [[(3, 8), (5, 8)]] * 7
        places = [(matrix.data_ptr(), matrix.data_ptr() + matrix.nbytes) for call in calls for matrix in call]
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(places))
        assert all(matrix.is_contiguous() and matrix.isfinite().all() for call in calls for matrix in call)
    with calls_in_memory([(3, 8)], CPU) as calls:
        assert len(calls) == 1


def test_bytes_over_seconds_are_counted_for_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by a millisecond for each call."""
    now = [0.0]
    seen = []

    def multiply(weights: object, vectors: Tensor) -> None:
        now[0] += 1e-3
        seen.append((id(weights), tuple(vectors.shape)))

    monkeypatch.setattr(host.time, "perf_counter", lambda: now[0])
    with calls_in_memory([(10, 50)], CPU, 3000) as calls:
        found = rate(multiply, calls, 4)
    assert (found.tokens, found.gbps, found.link_gbps) == (4, pytest.approx(1000 / 1e-3 / 1e9), None)
    assert {shape for _, shape in seen} == {(4, 50)}
    assert len({call for call, _ in seen}) == 3  # all of them, in turn


def test_a_host_without_a_gpu_has_rates_of_its_cores_alone() -> None:
    found = host.measure(CPU, (64, 128))
    assert [each.tokens for each in found.alone] == list(host.TOKENS)
    assert found.host_gbps == found.alone[0].gbps > 0
    assert (found.host_gbps_beside_link, found.link_gbps_beside_host, found.round_trip_s) == (None, None, None)
    assert knee(found.alone) in host.TOKENS
    assert HostCores.model_validate_json(found.model_dump_json()) == found


@pytest.mark.gpu
def test_beside_a_gpus_link_both_are_measured() -> None:
    before = torch.cuda.memory_allocated()
    found = host.measure(torch.device("cuda"), (2048, 4096))
    assert [each.tokens for each in found.beside_link] == list(host.TOKENS)
    assert all(each.link_gbps is not None and each.gbps > 0 for each in found.beside_link)
    assert found.round_trip_s is not None
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_what_a_load_measures_is_of_cores_and_link_at_once() -> None:
    before = torch.cuda.memory_allocated()
    found = host.beside_link(torch.device("cuda"), 2, (2048, 4096))
    assert not found.assumed
    assert min(found.link, found.cores, found.wait_s) > 0
    assert found.tokens in host.TOKENS
    assert torch.cuda.memory_allocated() == before
