"""What a rank holds: the parts of all ranks are every byte of a tensor once, and those that torch would give it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import djinn
from djinn.engine.coding import Coder
from djinn.engine.opened import outlined
from djinn.engine.sharding import LEAST, _stretches, pretended
from djinn.errors import ConfigError, UnavailableError
from djinn.planning.placement import Tier
from djinn.planning.request import Request
from djinn.planning.workspace import Workload
from djinn.transport.reader import allocate, settle
from djinn.weights.shards import read_shard
from djinn.weights.tensors import FileSpan, Seeded, Sliced, TensorEntry
from djinn.weights.units import PlacedTensor, Unit


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[DeviceMesh]:
    """As if this process were one of several: torch's fake group sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def read(entry: TensorEntry) -> torch.Tensor:
    """Return a tensor's weights as loading makes them."""
    unit = Unit("unit", (), (PlacedTensor("weight", entry, 0),))
    image = allocate(max(unit.image_bytes, 1))
    with ExitStack() as undo:
        coder = Coder.on(torch.device("cpu"), 4096, undo)
        settle(coder.fill(unit, image))
    return entry.view(torch.from_numpy(image)).clone()


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    dim=st.integers(0, 2),
    ranks=st.integers(2, 4),
    packed=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_shards_of_all_ranks_are_all_of_a_tensor(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    dim: int,
    ranks: int,
    packed: int,
    dtype: torch.dtype,
) -> None:
    """In rows, in columns, in rows of each of two that are stacked; uneven and empty ones too; read from a file."""
    dim = min(dim, len(shape) - 1)
    # torch divides stacked ones evenly.
    shape = (*shape[:dim], shape[dim] * (packed * ranks if packed > 1 else 1), *shape[dim + 1 :])
    placement = _StridedShard(dim, split_factor=packed) if packed > 1 else Shard(dim)
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file({"weight": whole}, path)
    entry = read_shard(path)["weight"]
    held: list[int] = []
    for rank in range(ranks):
        with rank_of(rank, ranks) as mesh:
            stretches = _stretches(shape[dim], placement, mesh, 0)
            wanted = distribute_tensor(whole, mesh, [placement], src_data_rank=None).to_local()
        part = entry.kept(dim, stretches)
        assert part.shape == tuple(wanted.shape)
        if wanted.numel():
            assert torch.equal(read(part), wanted)
        held += [index for begin, end in stretches for index in range(begin, end)]
    assert sorted(held) == list(range(shape[dim]))


def test_what_lies_in_one_stretch_stays_where_it_is() -> None:
    """Rows are read straight from the file or made from the seed; columns are not."""
    stored = TensorEntry(torch.bfloat16, (8, 6), FileSpan(Path("file"), 100))
    rows, columns = stored.kept(0, [(2, 4)]), stored.kept(1, [(3, 6)])
    assert rows.source == FileSpan(Path("file"), 100 + 2 * 6 * 2)
    assert isinstance(columns.source, Sliced)
    made = TensorEntry(torch.bfloat16, (9, 6), Seeded("weight", 3))
    assert torch.equal(read(made.kept(0, [(4, 6)])), read(made)[4:6])
    assert torch.equal(read(made.kept(1, [(1, 3)])), read(made)[:, 1:3])
    assert torch.equal(read(made.to(torch.float32).kept(0, [(4, 6)])), read(made)[4:6].float())
    bias = TensorEntry(torch.bfloat16, (8,), Seeded("norm.weight", 3))
    assert torch.equal(read(bias.kept(0, [(4, 8)])), torch.ones(4, dtype=torch.bfloat16))


def request(**options: object) -> Request:
    work = Workload(prompt_tokens=16, new_tokens=8, batch=1)
    return Request.of(**{"budget": "24 GB", "keep": work, "device": "cuda", "host_memory": "100 GB"} | options)  # type: ignore[arg-type]


needs_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < LEAST, reason=f"ranks need transformers {LEAST}"
)


@needs_transformers
@pytest.mark.parametrize("gpus", [2, 4])
def test_a_plan_for_several_gpus_is_made_in_one_process(gpus: int) -> None:
    """Every weight but the norms is divided; the KV cache and the host's memory are, too."""
    alone = outlined("synthetic:llama-2-70b", request()).on_disk()
    found = outlined("synthetic:llama-2-70b", request(), gpus).on_disk()
    assert not dist.is_initialized()
    assert found.index.nbytes == pytest.approx(alone.index.nbytes / gpus, rel=0.001)
    assert found.request.host_memory == 100 * 10**9 // gpus
    assert found.index.sums == 161
    room = 10**12
    one, each = alone.plan(room), found.plan(room)
    assert each.budget == one.budget
    assert sum(unit.raw_bytes for unit in each.away) < sum(unit.raw_bytes for unit in one.away) / gpus
    assert Tier.PINNED in each.tiers


def test_gpus_are_a_whole_number() -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=f"gpus {wrong!r}"):
            djinn.plan("synthetic:llama-tiny", budget="1 GB", gpus=wrong)  # type: ignore[arg-type]


@needs_transformers
def test_a_model_that_cannot_be_split_is_not_planned_for() -> None:
    with pytest.raises(ConfigError, match="has no `tp_plan`"):
        djinn.plan("synthetic:gpt2-tiny", budget="1 GB", gpus=2)
    with pytest.raises(ConfigError, match=r"num_attention_heads 64 .* by 3 ranks"):
        djinn.plan("synthetic:llama-2-70b", budget="24 GB", device="cuda", gpus=3)
    assert not dist.is_initialized()


def test_earlier_transformers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(UnavailableError, match=r"transformers 5\.23 or later .* 5\.17\.0 is installed"):
        djinn.plan("synthetic:llama-tiny", budget="1 GB", gpus=2)
    assert not dist.is_initialized()


def test_a_rank_does_not_plan_for_others() -> None:
    with pretended(2), pytest.raises(ConfigError, match="4 GPUs are planned for in a process that is no rank itself"):
        djinn.plan("synthetic:llama-tiny", budget="1 GB", gpus=4)
