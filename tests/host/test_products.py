"""Products of the host's processors: against float64, by every kernel that this processor runs, and in trouble."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from djinn.errors import UnavailableError
from djinn.host import build, cores, products
from djinn.host.build import INSTRUCTIONS, Instructions
from djinn.host.products import HostProducts

HERE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module", params=build.runnable(), ids=lambda instructions: instructions.name)
def kernel(request: pytest.FixtureRequest) -> Iterator[HostProducts]:
    """One of the kernels, with three threads, whatever this machine's processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "runnable", lambda: [request.param])
        patch.setattr(products, "choose_cpus", lambda threads, near: (-1,) * (threads or 3))
        made = HostProducts()
    assert made.name == f"djinn {request.param.name}", made.reason
    yield made
    made.close()


def random_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that only a bfloat16 allows."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.copy_(tensor.flatten()).view(tensor.shape)


def check(results: Sequence[Tensor], weights: Sequence[Tensor], vectors: Tensor) -> None:
    """Compare with float64.

    A sum of k terms in float32, in any order, is off by at most k * 2**-24 of the sum of the terms' magnitudes (N. J.
    Higham, Accuracy and Stability of Numerical Algorithms, 4.2), where k * 2**-24 is small; rounding to bfloat16 by at
    most 2**-8 of the result, or half of the least denormal, 2**-134.
    """
    for result, matrix in zip(results, weights, strict=True):
        exact = vectors.double() @ matrix.double().T
        sums = matrix.shape[1] * 2.0**-24 * 1.01 * (vectors.double().abs() @ matrix.double().abs().T)
        most = sums + 2.0**-8 * (exact.abs() + sums) + 2.0**-134
        assert result.dtype == torch.bfloat16
        assert ((result.double() - exact).abs() <= most).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 4096), (3, 31), (33, 33), (64, 512), (95, 1100), (37, 1537), (2, 0), (0, 64)]
)
def test_products_are_within_the_bound_of_float32_sums(
    kernel: HostProducts, rows: int, columns: int, count: int
) -> None:
    weights, vectors = misaligned(random_bf16(rows, columns)), misaligned(random_bf16(count, columns, seed=1))
    check(kernel.multiply([weights], vectors), [weights], vectors)


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    columns=st.integers(1, 700),
    count=st.integers(1, 16),
    seed=st.integers(0, 2**20),
)
def test_several_matrices_of_any_shape_in_one_call(
    kernel: HostProducts, rows: list[int], columns: int, count: int, seed: int
) -> None:
    weights = [random_bf16(each, columns, seed=seed + number) for number, each in enumerate(rows)]
    vectors = random_bf16(count, columns, seed=seed - 1)
    check(kernel.multiply(weights, vectors), weights, vectors)


def test_sums_are_rounded_once_to_nearest_and_ties_to_even(kernel: HostProducts) -> None:
    """Of integers whose sums are exact in float32, so that only the last rounding is left."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randint(-128, 129, (2000, 70), generator=generator).to(torch.bfloat16)
    vectors = torch.randint(-128, 129, (4, 70), generator=generator).to(torch.bfloat16)
    (result,) = kernel.multiply([weights], vectors)
    exact = vectors.double() @ weights.double().T
    assert torch.equal(result, exact.to(torch.bfloat16))
    halves = exact.long().bitwise_and(0xFF)
    assert ((exact.abs() >= 256) & (exact.abs() < 512) & (halves % 2 == 1)).any()  # ties were among them


def test_a_result_depends_on_its_row_and_its_vector_alone(kernel: HostProducts) -> None:
    weights, vectors = random_bf16(101, 3000), random_bf16(16, 3000, seed=1)
    (together,) = kernel.multiply([weights], vectors)
    for number in range(16):
        (alone,) = kernel.multiply([weights[: 40 + number]], vectors[number : number + 1])
        assert torch.equal(alone[0, :36], together[number, :36])


@pytest.mark.parametrize("place", [0, 63, 64, 66])
def test_nan_and_infinities_stay_in_their_row(kernel: HostProducts, place: int) -> None:
    weights, vectors = random_bf16(6, 67), random_bf16(2, 67, seed=1)
    clean = kernel.multiply([weights], vectors)[0]
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        weights[row, place] = value
    vectors[:, place] = torch.tensor([1.0, 0.0])
    (result,) = kernel.multiply([weights], vectors)
    assert result[0, 0].view(torch.int16) == 0x7FC0  # as torch writes it, whatever its sign and payload
    assert result[0, 1:3].tolist() == [float("inf"), -float("inf")]
    assert (result[1, :3].view(torch.int16) == 0x7FC0).all()  # an infinity times nothing
    vectors[0, place] = random_bf16(2, 67, seed=1)[0, place]
    assert torch.equal(kernel.multiply([weights], vectors)[0][0, 3:], clean[0, 3:])


def test_what_overflows_bfloat16_becomes_infinite(kernel: HostProducts) -> None:
    most = torch.finfo(torch.bfloat16).max
    weights, vectors = torch.full((5, 40), most, dtype=torch.bfloat16), torch.zeros(1, 40, dtype=torch.bfloat16)
    vectors[0, 3] = 1.0
    assert kernel.multiply([weights], vectors)[0].tolist() == [[most] * 5]
    vectors[0, 39] = 2**-8  # half of a unit in the last place
    assert kernel.multiply([weights], vectors)[0].tolist() == [[float("inf")] * 5]


@pytest.mark.parametrize("flushed", [False, True])
def test_denormals_count_whatever_the_caller_asked_torch_for(kernel: HostProducts, flushed: bool) -> None:
    weights = torch.full((300, 65), 2.0**-130, dtype=torch.bfloat16)
    vectors = torch.ones(1, 65, dtype=torch.bfloat16)
    torch.set_flush_denormal(flushed)
    try:
        (result,) = kernel.multiply([weights], vectors)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(result, torch.full((1, 300), 65 * 2.0**-130, dtype=torch.float64).to(torch.bfloat16))
    least = torch.full((300, 65), 2.0**-133, dtype=torch.bfloat16)
    assert (kernel.multiply([least], vectors)[0].double() == 65 * 2.0**-133).all()


def test_nothing_times_minus_one_sums_to_nothing(kernel: HostProducts) -> None:
    weights, vectors = torch.zeros(5, 70, dtype=torch.bfloat16), -torch.ones(1, 70, dtype=torch.bfloat16)
    assert torch.equal(kernel.multiply([-weights], vectors)[0], torch.zeros(1, 5, dtype=torch.bfloat16))


def test_results_go_where_they_are_wanted(kernel: HostProducts) -> None:
    weights, vectors = [random_bf16(40, 64), random_bf16(7, 64, seed=1)], random_bf16(2, 64, seed=2)
    out = [torch.empty(2, 40, dtype=torch.bfloat16), torch.empty(2, 7, dtype=torch.bfloat16)]
    assert [result.data_ptr() for result in kernel.multiply(weights, vectors, out)] == [o.data_ptr() for o in out]
    check(out, weights, vectors)


def test_two_threads_get_their_own_results(kernel: HostProducts) -> None:
    weights = [random_bf16(200, 300, seed=number) for number in range(2)]
    vectors = [random_bf16(3, 300, seed=10 + number) for number in range(2)]
    expected = [kernel.multiply([weights[number]], vectors[number])[0] for number in range(2)]
    wrong = []

    def repeat(number: int) -> None:
        for _ in range(300):
            if not torch.equal(kernel.multiply([weights[number]], vectors[number])[0], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_returns_when_the_last_block_is_done(kernel: HostProducts) -> None:
    weights, vectors = torch.ones(160, 20_000, dtype=torch.bfloat16), torch.zeros(1, 20_000, dtype=torch.bfloat16)
    out = torch.empty(1, 160, dtype=torch.bfloat16)
    for _ in range(50):
        kernel.multiply([weights], vectors, [out.fill_(1)])
        assert not out.any()


def test_results_are_right_whether_or_not_threads_have_slept(kernel: HostProducts) -> None:
    weights, vectors = random_bf16(2000, 256), random_bf16(1, 256, seed=1)
    for pause in (0.0, 0.04, 0.06, 0.12):
        threading.Event().wait(pause)
        check(kernel.multiply([weights], vectors), [weights], vectors)


def test_threads_that_have_slept_take_part_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = threads_of_process()
    monkeypatch.setattr(products, "choose_cpus", lambda threads, near: (-1,) * 2)
    made = HostProducts()
    (worker,) = threads_of_process() - known

    def ticks() -> int:
        """Of processor time that the worker has had."""
        after_name = Path(f"/proc/self/task/{worker}/stat").read_text().rpartition(")")[2].split()
        return int(after_name[11]) + int(after_name[12])

    threading.Event().wait(0.2)
    asleep, begun = ticks(), time.monotonic()
    weights, vectors = random_bf16(500, 4000), random_bf16(1, 4000, seed=1)
    while ticks() <= asleep and time.monotonic() < begun + 20:
        made.multiply([weights], vectors)
    assert ticks() > asleep
    made.close()


def test_a_forked_child_multiplies_with_threads_of_its_own(kernel: HostProducts) -> None:
    weights, vectors = random_bf16(500, 64), random_bf16(1, 64, seed=1)
    (expected,) = kernel.multiply([weights], vectors)
    child = os.fork()
    if child == 0:
        good = torch.equal(kernel.multiply([weights], vectors)[0], expected) and len(threads_of_process()) == 3
        kernel.close()
        os._exit(0 if good and len(threads_of_process()) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(kernel.multiply([weights], vectors)[0], expected)


def threads_of_process() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def test_threads_end_when_it_is_closed_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "choose_cpus", lambda threads, near: (-1,) * 5)
    before = len(threads_of_process())
    made, dropped = HostProducts(), HostProducts()
    assert len(threads_of_process()) == before + 2 * 4
    made.close()
    made.close()
    with pytest.raises(ValueError, match="closed"):
        made.multiply([random_bf16(1, 1)], random_bf16(1, 1))
    assert len(threads_of_process()) == before + 4
    del dropped
    gc.collect()
    assert len(threads_of_process()) == before


def test_an_idle_one_costs_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "choose_cpus", lambda threads, near: (-1,) * 2)
    made = HostProducts()
    threading.Event().wait(0.2)
    begun = os.times()
    threading.Event().wait(0.3)
    ended = os.times()
    made.close()
    assert ended.user + ended.system - begun.user - begun.system < 0.1


@pytest.mark.skipif(len(HERE) < 2, reason="this process may use one processor only")
def test_each_thread_stays_on_its_processor() -> None:
    known = threads_of_process()
    made = HostProducts(threads=2)
    (worker,) = threads_of_process() - known
    assert os.sched_getaffinity(worker) == {cores.choose_cpus(2)[1]}
    assert os.sched_getaffinity(0) == HERE  # the caller's thread is left alone
    made.close()


_INTERRUPTED = """
import _thread, signal, sys, threading, torch
from djinn.host import products
products.choose_cpus = lambda threads, near: (-1,) * 3
made = products.HostProducts()
weights, vector = torch.ones(4096, 4096, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bfloat16)
made.multiply([weights], vector)
threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
try:
    while True:
        made.multiply([weights], vector)
except KeyboardInterrupt:
    print(made.multiply([weights], vector)[0].eq(4096).all().item())
"""


def test_ctrl_c_in_the_middle_of_a_product() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("weights", "vectors", "message"),
    [
        (torch.ones(4, 8), random_bf16(1, 8), "weights: torch.float32"),
        (random_bf16(8, 4).T, random_bf16(1, 8), "strides"),
        (random_bf16(4, 9), random_bf16(1, 8), r"weights: shape \(4, 9\)"),
        (random_bf16(4, 8), torch.ones(1, 8), "vectors: torch.float32"),
        (random_bf16(4, 8), random_bf16(17, 8), "between 1 and 16"),
        (random_bf16(4, 8), random_bf16(0, 8), "between 1 and 16"),
    ],
)
def test_tensors_that_cannot_be_multiplied_are_refused(
    kernel: HostProducts, weights: Tensor, vectors: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.multiply([weights], vectors)


@pytest.fixture
def uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No kernel has been compiled yet, and compiled ones go to this folder."""
    monkeypatch.setattr(build, "KERNEL_DIR", tmp_path / "kernels")
    build.load.cache_clear()
    yield tmp_path / "kernels"
    build.load.cache_clear()


def a_compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "no C\\+\\+ compiler '.*compiler'; install"), ("echo 'no such flag' >&2; exit 1", "no such flag")],
)
def test_pytorch_multiplies_where_the_kernel_cannot_be_compiled(
    uncompiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    monkeypatch.setenv("CXX", a_compiler(tmp_path, script) if script else str(tmp_path / "compiler"))
    made = HostProducts(threads=1)
    assert made.name == "torch"
    with pytest.raises(UnavailableError, match=reason):
        build.load(INSTRUCTIONS[-1])
    assert made.reason
    weights, vectors = [random_bf16(40, 64), random_bf16(7, 64, seed=1)], random_bf16(2, 64, seed=2)
    out = [torch.empty(2, 40, dtype=torch.bfloat16), torch.empty(2, 7, dtype=torch.bfloat16)]
    assert made.multiply(weights, vectors, out)[1] is out[1]
    check(out, weights, vectors)
    assert not list(uncompiled.glob("*"))
    made.close()


def test_a_kernel_that_cannot_be_loaded_is_named(
    uncompiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", a_compiler(tmp_path, 'for last; do :; done; echo damaged > "$last"'))
    with pytest.raises(UnavailableError, match=r"delete .*kernels/products-.*-plain-.*\.so"):
        build.load(INSTRUCTIONS[-1])


def test_a_kernel_is_compiled_once(uncompiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", a_compiler(tmp_path, f'echo run >> {log}; exec c++ "$@"'))
    build.load(INSTRUCTIONS[-1])
    build.load.cache_clear()
    build.load(INSTRUCTIONS[-1])
    assert log.read_text().split() == ["run"]
    assert [path.name.split("-")[2] for path in uncompiled.iterdir()] == ["plain"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"sse2"}, ["plain"]),
        ({"sse2", "avx2"}, ["plain"]),
        ({"avx2", "fma"}, ["avx2", "plain"]),
        ({"avx2", "fma", "avx512f", "avx512bw"}, ["avx512", "avx2", "plain"]),
        ({"asimd"}, ["neon", "plain"]),
    ],
)
def test_only_instructions_that_the_processor_has_are_run(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], names: list[str]
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags))
    found: list[Instructions] = build.runnable()
    assert [instructions.name for instructions in found] == names
