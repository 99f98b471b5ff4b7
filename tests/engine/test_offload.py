"""Modules that are in memory: streaming equals what they were, and detaching gives back what was there."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, skip_init

import djinn
from djinn.engine import assembly, binding, opened
from djinn.engine import load as engine_model
from djinn.engine import offload as offloading
from djinn.engine.load import engine_of, engines, placement
from djinn.errors import ConfigError, DjinnError, PlanError, UnavailableError
from djinn.planning.placement import Tier
from djinn.planning.workspace import CUDA_CONTEXT_BYTES, CUDA_OVERHEAD_BYTES

WIDTH = 128
BLOCK_BYTES = 8 * WIDTH**2 * 4


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between a tied embedding and output."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, skip: int = -1, depth: int = 99) -> torch.Tensor:
        x = self.embed(ids)
        for number, block in enumerate(self.blocks[:depth]):
            if number != skip:
                x = block(x)
        return self.head(x)


def made(build: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """A module whose weights are all random, in inference mode of its layers."""
    torch.manual_seed(seed)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) / 10)
    return module


def streaming(module: nn.Module, example: Any, share: float = 0.5, **options: Any) -> nn.Module:
    """Offload with room for about ``share`` of the weights beside the workspace."""
    weights = sum(parameter.nbytes for parameter in module.parameters())
    budget = round(share * weights) + 200_000
    arguments: dict[str, Any] = {"budget": budget, "workspace": "100 KB", "device": "cpu", "chunk": "32 KiB"}
    return djinn.offload(module, example=example, **arguments | options)


def names_streamed(module: nn.Module) -> set[str]:
    return {tensor.name for unit in placement(module).streamed for tensor in unit.tensors}


def equal(one: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        return torch.equal(one(*args, **kwargs), other(*args, **kwargs))


IDS = torch.arange(12).view(2, 6)
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread_and_no_garbage(one_thread: None) -> Iterator[None]:
    yield
    gc.collect()


# What goes in comes out


def test_it_streams_bit_for_bit_and_detaching_gives_back_what_was_there() -> None:
    module = made(Net)
    module.blocks[2].up.weight.requires_grad_(False)
    module.blocks[3].norm.train()
    whole = copy.deepcopy(module)
    before = list(module.named_parameters(remove_duplicate=False))
    assert streaming(module, (IDS,)) is module
    assert {Tier.PINNED, Tier.RESIDENT} == set(placement(module).tiers)
    for _ in range(3):
        assert equal(module, whole, IDS)
    stats = djinn.stats(module)
    assert stats.reloads == stats.skips == 0
    assert stats.passes == 4, "three, and the example"
    assert stats.link_bytes == 4 * sum(unit.weight_bytes for unit in placement(module).streamed)
    asking = [[parameter.requires_grad for parameter in each.parameters()] for each in (module, whole)]
    assert asking[0] == asking[1]
    assert djinn.detach(module) is module
    after = list(module.named_parameters(remove_duplicate=False))
    assert [(name, id(parameter)) for name, parameter in after] == [(name, id(each)) for name, each in before]
    for (name, parameter), (_, wanted) in zip(after, whole.named_parameters(remove_duplicate=False), strict=True):
        assert parameter.requires_grad == wanted.requires_grad, name
        assert parameter.dtype == wanted.dtype
        assert parameter.stride() == wanted.stride()
        assert torch.equal(parameter, wanted)
        assert parameter.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
    assert module.head.weight is module.embed.weight
    for part, wanted_part in zip(module.modules(), whole.modules(), strict=True):
        assert vars(part).keys() == vars(wanted_part).keys()
        assert part.training == wanted_part.training
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks
    assert equal(module, whole, IDS)
    for either in (module, whole):
        either(IDS).square().sum().backward()
    grads = [[each.grad for each in either.parameters()] for either in (module, whole)]
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*grads, strict=True))
    copy.deepcopy(module).half()
    with pytest.raises(ConfigError, match="does not stream"):
        djinn.detach(module)
    assert equal(streaming(module, (IDS,)), whole, IDS)


@pytest.mark.parametrize("share", [0.2, 5.0])
def test_little_and_all_on_the_device(share: float) -> None:
    module = made(lambda: nn.Sequential(*[Block() for _ in range(6)]))
    whole = copy.deepcopy(module)
    where = [parameter.data_ptr() for parameter in module.parameters()]
    streaming(module, (X,), share, **({"ring": "300 KB"} if share < 1 else {}))
    assert equal(module, whole, X)
    if share > 1:
        assert djinn.stats(module).link_bytes == 0
        assert [parameter.data_ptr() for parameter in module.parameters()] == where, "nothing is moved"
    djinn.detach(module)
    assert equal(module, whole, X)


class Mixed(nn.Module):
    """Parameters of many dtypes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(WIDTH, dtype=torch.float16))
        self.mask = nn.Parameter(torch.rand(WIDTH) > 0.5, requires_grad=False)
        self.turned = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH).t())
        self.one = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.phase = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ (self.codes * self.scale.float()[:, None]) * self.mask
        x = x @ self.turned.t()[:, :WIDTH] * self.one.float() + self.none.sum()
        return (x * self.phase).real


def test_dtypes_and_layouts() -> None:
    module = made(lambda: nn.Sequential(*[Mixed() for _ in range(5)]))
    module.append(nn.Conv1d(3, 3, 1).to(torch.float64).float())
    whole = copy.deepcopy(module)
    streaming(module, (X,), 0.5)
    assert "1.codes" in names_streamed(module) or "2.codes" in names_streamed(module)
    assert equal(module, whole, X)
    state, wanted = module.state_dict(), whole.state_dict()
    assert list(state) == list(wanted)
    djinn.detach(module)
    for key, parameter in module.named_parameters():
        assert torch.equal(state[key], wanted[key]), key
        assert torch.equal(parameter, wanted[key])
        assert state[key].stride() == parameter.stride() == wanted[key].stride()
        assert state[key].dtype == parameter.dtype == wanted[key].dtype


def test_convolutions_in_channels_last() -> None:
    module = made(lambda: nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)]))
    module.to(memory_format=torch.channels_last)
    whole = copy.deepcopy(module)
    image = torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last)
    streaming(module, (image,))
    assert equal(module, whole, image)
    assert module[3].weight.is_contiguous(memory_format=torch.channels_last)
    djinn.detach(module)
    assert module[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_that_are_views_of_one_storage() -> None:
    """Of the same view, as older code ties weights, they stay so; others get memory of their own."""
    module = made(lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)]))
    flat = torch.randn(2 * WIDTH, WIDTH)
    module[1].weight.data, module[2].weight.data = flat[:WIDTH], flat[WIDTH:]
    module[4].weight.data = module[3].weight.data
    whole = copy.deepcopy(module)
    held = weakref.ref(flat.untyped_storage())
    del flat
    streaming(module, (X,), 0.2)
    assert held() is None or not {"1.weight", "2.weight"} <= names_streamed(module)
    assert equal(module, whole, X)
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.state_dict().items())
    djinn.detach(module)
    assert equal(module, whole, X)
    assert module[4].weight.data_ptr() == module[3].weight.data_ptr()
    assert module[4].weight is not module[3].weight


@pytest.mark.slow
def test_weights_are_in_memory_once() -> None:
    """Each unit's memory is freed before the next is moved, and detaching copies nothing that is in host memory."""
    torch.zeros(31 * 2**18)  # from here on the C library keeps what is freed, unless it is told to give it back
    blocks, width = 24, 1024  # 32 MiB a block
    module = nn.Sequential()
    for _ in range(blocks):
        pair = nn.Sequential(skip_init(nn.Linear, width, 4 * width), skip_init(nn.Linear, 4 * width, width))
        for parameter in pair.parameters():
            nn.init.constant_(parameter, 1e-4)
        module.append(pair)
    x = torch.ones(1, width)
    process = psutil.Process()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    before = process.memory_info().rss
    peaks: list[int] = []
    take = binding.Weights.take

    def watched(*arguments: Any) -> None:
        peaks.append(process.memory_info().rss)
        take(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binding.Weights, "take", watched)
        djinn.offload(module, budget="100 MB", workspace="1 MB", example=(x,), device="cpu")
    assert placement(module).pinned_bytes > 0.8 * weights
    assert max(peaks) - before < 0.15 * weights
    state = module.state_dict()
    djinn.detach(module)
    assert process.memory_info().rss - before < 0.3 * weights, "the ring and little else"
    assert len(state) == 4 * blocks


# Where the order comes from


class Odd(nn.Module):
    """Its control flow depends on values, so that the meta device cannot run it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else -layer(x)
        return x


def test_the_order_is_recorded_without_computing() -> None:
    module = made(Net)
    devices = []
    module.blocks[0].register_forward_hook(lambda _module, _args, output: devices.append(output.device.type))
    whole = copy.deepcopy(made(Net))
    streaming(module, {"ids": IDS})
    assert devices == ["meta", "cpu"]
    assert equal(module, whole, IDS)
    assert [unit.name for unit in placement(module).units][1:4] == ["blocks.0.norm", "blocks.0.up", "blocks.0.down"]


def test_what_the_meta_device_cannot_run_is_run_where_it_lies() -> None:
    module = made(Odd)
    whole = copy.deepcopy(module)
    streaming(module, (X,))
    assert module.seen == 0, "neither pass leaves a trace"
    assert equal(module, whole, X)
    assert djinn.stats(module).reloads == 0


def test_a_recurrent_module_whose_weights_are_in_a_list_too() -> None:
    module = made(lambda: nn.LSTM(32, 32, num_layers=2))
    whole = copy.deepcopy(module)
    x = torch.randn(4, 2, 32)
    djinn.offload(module, budget="1 MB", example=(x,), device="cpu")
    with torch.no_grad():
        assert torch.equal(module(x)[0], whole(x)[0])
    djinn.detach(module)
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))


class ByParent(nn.Module):
    """The parent reads the weights of layers that it never calls, or is handed a view of them."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))

        def forward(self) -> torch.Tensor:
            return self.weight[:WIDTH]

    def __init__(self) -> None:
        super().__init__()
        self.lent = nn.Linear(WIDTH, WIDTH)
        self.tables = nn.ModuleList(self.Table() for _ in range(5))
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, table in zip(self.blocks, [table() for table in self.tables], strict=True):
            x = block(x) + functional.linear(x, self.lent.weight + table, self.lent.bias)
        return x


def test_weights_that_a_parent_reads_are_there_when_it_does() -> None:
    module = made(ByParent)
    whole = copy.deepcopy(module)
    streaming(module, (X,), 0.7)
    assert names_streamed(module)
    assert all(name.startswith("blocks.") for name in names_streamed(module))
    for _ in range(2):
        assert equal(module, whole, X)


class TwoFaced(nn.Module):
    """Reads another way on the real device than on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if x.is_meta else functional.linear(block(x), block.up.weight[:WIDTH])
        return x


def test_a_read_that_was_not_recorded_is_refused_and_the_module_is_as_it_was() -> None:
    module = made(TwoFaced)
    whole = copy.deepcopy(module)
    with pytest.raises(ConfigError, match=r"parameter blocks\.\d\.up\.weight is read while blocks\.\d\.up is not run"):
        streaming(module, (X,), 0.3)
    as_it_was(module, whole)
    assert equal(module, whole, X)


def as_it_was(module: nn.Module, whole: nn.Module) -> None:
    for (name, parameter), (_, wanted) in zip(module.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(parameter, wanted), name
        assert parameter.requires_grad == wanted.requires_grad
    for part in module.modules():
        assert "_apply" not in vars(part)
        assert not part._forward_hooks
    copy.deepcopy(module).double()


def test_an_encoder_with_a_fast_path_for_modules_without_hooks() -> None:
    build: Callable[[], nn.Module] = lambda: nn.TransformerEncoder(  # noqa: E731
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 4, enable_nested_tensor=False
    )
    module = made(build)
    whole = copy.deepcopy(module)
    x = torch.randn(2, 5, 64)
    streaming(module, (x,))
    for layer in whole.layers:
        layer.register_forward_hook(lambda *_: None)  # as with any hook, torch takes the same path
    assert names_streamed(module)
    assert equal(module, whole, x)


# Other orders


def test_skipped_modules_early_exits_and_other_orders_are_right_and_counted() -> None:
    module = made(Net)
    whole = copy.deepcopy(module)
    streaming(module, (IDS,), 0.3)
    for options in ({"skip": 2}, {"depth": 3}, {}, {"depth": 0}, {"skip": 0}, {}):
        assert equal(module, whole, IDS, **options)
    stats = djinn.stats(module)
    assert stats.skips > 0
    assert equal(module.blocks[4], whole.blocks[4], X)
    assert equal(module.blocks[1], whole.blocks[1], X)
    assert djinn.stats(module).reloads > 0
    assert equal(module, whole, IDS)


def test_a_module_that_is_called_twice_in_a_pass() -> None:
    blocks = [Block() for _ in range(4)]
    module = made(lambda: nn.Sequential(*blocks, blocks[1], blocks[0], blocks[3]))
    whole = copy.deepcopy(module)
    streaming(module, (X,), 0.3)
    for _ in range(3):
        assert equal(module, whole, X)
    assert djinn.stats(module).reloads > 0


def test_weights_that_no_example_reads_stay_on_the_device() -> None:
    module = made(Net)
    whole = copy.deepcopy(module)
    streaming(module, {"ids": IDS, "skip": 4})
    assert not any(name.startswith("blocks.4.") for name in names_streamed(module))
    assert names_streamed(module)
    assert equal(module, whole, IDS)
    djinn.detach(module)
    with pytest.raises(
        PlanError, match=r"that no example reads stay on the device \(blocks\.2\.norm\.weight, \.\.\.\)"
    ):
        streaming(module, {"ids": IDS, "depth": 2}, 0.3)
    streaming(module, [{"ids": IDS, "depth": 2}, (IDS,)], 0.3)
    assert equal(module, whole, IDS)


# State of a module's own


def test_hooks_of_the_modules_own_see_its_weights_and_stay() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(*[Block() for _ in range(5)])
        module[1].up.register_forward_pre_hook(lambda linear, args: (args[0] + linear.weight.mean(),))
        module[2].register_forward_hook(lambda block, _args, output: output * block.down.weight.mean())
        parametrizations.weight_norm(module[3].up)
        nn.utils.spectral_norm(module[4].down)
        return module

    module, whole = made(build), made(build)
    whole.load_state_dict(module.state_dict())
    streaming(module, (X,), 0.4)
    assert names_streamed(module)
    for _ in range(2):
        assert equal(module, whole, X)
    djinn.detach(module)
    assert len(module[2]._forward_hooks) == 1
    assert len(module[1].up._forward_pre_hooks) == 1
    assert equal(module, whole, X)


def test_buffers_that_a_pass_changes() -> None:
    """Batch norm's running statistics are those of the passes that were asked for; tied buffers stay one."""
    module = made(lambda: nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(5)]))
    module[4][1]._buffers["running_mean"] = module[3][1].running_mean
    module.train()
    whole = copy.deepcopy(module)
    x = torch.randn(8, 64)
    streaming(module, (x,))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), whole.buffers(), strict=True))
    for _ in range(2):
        assert equal(module, whole, x)
    djinn.detach(module)
    assert int(module[0][1].num_batches_tracked) == 2
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), whole.buffers(), strict=True))
    assert module[4][1].running_mean is module[3][1].running_mean
    assert module.training


def test_random_numbers_go_on_as_if_nothing_had_run() -> None:
    module = made(lambda: nn.Sequential(*[nn.Sequential(Block(), nn.Dropout(0.5)) for _ in range(4)]))
    module.train()
    whole = copy.deepcopy(module)
    torch.manual_seed(7)
    wanted = whole(X)
    torch.manual_seed(7)
    streaming(module, (X,))
    with torch.no_grad():
        assert torch.equal(module(X), wanted)


# Gradients


def test_gradients_through_weights_that_stream_are_refused() -> None:
    """Never made with weights that have been overwritten, whichever part of the module was called."""
    module = made(lambda: nn.Sequential(*[Block() for _ in range(6)]))
    whole = copy.deepcopy(module)
    streaming(module, (X,), 0.3)
    x = X.clone().requires_grad_()
    with pytest.raises(ConfigError, match=r"gradients cannot be computed through weights that stream"):
        module(x).sum().backward()
    for part in module:
        streams = any(name.startswith(f"{list(module).index(part)}.") for name in names_streamed(module))
        if streams:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                part(x).sum().backward()
    assert equal(module, whole, X)
    djinn.detach(module)
    for either in (module, whole):
        x.grad = None
        either(x).sum().backward()
        assert x.grad is not None
    assert torch.equal(module[0].up.weight.grad, whole[0].up.weight.grad)


def test_gradients_that_were_there_are_there_again() -> None:
    module = made(Net)
    module(IDS).sum().backward()
    before = [parameter.grad for parameter in module.parameters()]
    djinn.detach(streaming(module, (IDS,)))
    assert all(parameter.grad is grad for parameter, grad in zip(module.parameters(), before, strict=True))


# Coding


def test_coded_weights_come_back_as_they_were(codable_module: nn.Module) -> None:
    module = codable_module
    whole = copy.deepcopy(module)
    x = torch.randn(2, 768, dtype=torch.bfloat16)
    streaming(module, (x,), 0.6, coding="lossless")
    assert placement(module).is_coded
    assert placement(module).streamed
    assert equal(module, whole, x)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in module.state_dict().items())
    djinn.detach(module)
    as_it_was(module, whole)


def test_coded_weights_come_back_when_something_fails(
    codable_module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = codable_module
    whole = copy.deepcopy(module)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offloading, "_check_reads", fail)
    with pytest.raises(KeyboardInterrupt):
        streaming(module, (torch.randn(2, 768, dtype=torch.bfloat16),), 0.6, coding="lossless")
    as_it_was(module, whole)


@pytest.fixture
def codable_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(768, 768) for _ in range(6)]).to(torch.bfloat16).eval()


# What is refused, and what is left behind


@pytest.mark.parametrize("step", ["taking", "ring", "hooks"])
def test_a_failure_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    module = made(Net)
    whole = copy.deepcopy(module)
    if step == "taking":
        take, taken = binding.Weights.take, iter(range(100))

        def failing(*arguments: Any) -> None:
            take(*arguments)
            if next(taken) == 3:
                raise MemoryError("no more")

        monkeypatch.setattr(binding.Weights, "take", failing)
    else:
        where = {"ring": "CpuCopier", "hooks": "guard"}[step]

        def broken(*_: object) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(assembly, where, broken)
    with pytest.raises(MemoryError):
        streaming(module, (IDS,))
    as_it_was(module, whole)
    assert equal(module, whole, IDS)
    assert module.head.weight is module.embed.weight
    monkeypatch.undo()
    assert equal(streaming(module, (IDS,)), whole, IDS)


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))


def with_gaps() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight.data = torch.randn(4, 8)[:, :4]
    return module


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


def hooked_by_accelerate() -> nn.Module:
    module = nn.Linear(4, 4)
    module._hf_hook = object()
    return module


def compiled_in_place() -> nn.Module:
    module = nn.Linear(4, 4)
    module.compile()
    return module


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (compiled_in_place, "Linear is compiled"),
        (lazy, "parameter 1.weight cannot be streamed: it has no shape yet"),
        (with_gaps, "parameter 0.weight cannot be streamed: it is a view with gaps"),
        (on_meta, "parameter weight cannot be streamed: it is a torch.strided tensor on meta"),
        (in_inference_mode, r"parameter weight cannot be streamed: it was made in torch.inference_mode"),
        (hooked_by_accelerate, "Linear has a hook of accelerate's"),
        (lambda: nn.Sequential(nn.ReLU()), "this Sequential has no parameters"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "compiled: its hooks would not run"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(4, 4))), "0 is compiled"),
    ],
)
def test_modules_that_cannot_stream_are_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        djinn.offload(build(), budget="1 MB", example=(torch.randn(2, 4),), device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "12"}, "size '12' is not a positive number with a unit"),
        ({"budget": "100 KB", "workspace": "1 KB"}, "budget: 100 KB is too small"),
        ({"ring": "10 KB"}, "ring: unit "),
        ({"host_memory": "10 KB"}, "host memory: streamed weights that are made, converted or coded in memory"),
        ({"device": "tpu"}, "device 'tpu': the devices are cpu and cuda"),
        ({"example": X}, "example: Tensor is neither a tuple of positional nor a mapping of keyword arguments"),
        ({"example": []}, "example: an empty list"),
        ({"example": (torch.randn(3, 5),)}, "example: this Sequential cannot run with it: RuntimeError"),
        ({"coding": "zip"}, "coding 'zip'"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_moved(changes: dict[str, Any], message: str) -> None:
    module = made(lambda: nn.Sequential(*[Block() for _ in range(6)]))
    where = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(DjinnError, match=message):
        streaming(module, changes.pop("example", (X,)), 0.3, **changes)
    assert [parameter.data_ptr() for parameter in module.parameters()] == where
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnavailableError, match="no CUDA device"):
        djinn.offload(nn.Linear(4, 4), budget="1 GB", example=(torch.randn(2, 4),), device="cuda")


def test_the_whole_of_a_module_that_streams_in_part_and_its_parts_are_refused() -> None:
    module = streaming(made(Net), (IDS,))
    for other, name in ((module, "Net"), (nn.Sequential(module), "0"), (module.blocks[2], "Block")):
        with pytest.raises(ConfigError, match=f"{name} streams already"):
            djinn.offload(other, budget="1 GB", example=(IDS,), device="cpu")


def test_memory_is_planned_for_what_moving_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(Net)
    for room in (opened, engine_model):
        monkeypatch.setattr(room, "usable_ram", lambda: 10**6)
    assert placement(streaming(module, (IDS,))).pinned_bytes > 10**6
    djinn.detach(module)


def test_two_modules_at_once_and_nothing_left_of_one_that_is_gone() -> None:
    gc.collect()
    before = len(engines)
    one, other = made(Net), made(lambda: nn.Sequential(*[Block() for _ in range(5)]), seed=1)
    whole_one, whole_other = copy.deepcopy(one), copy.deepcopy(other)
    streaming(one, (IDS,))
    streaming(other, (X,))
    for _ in range(2):
        assert equal(one, whole_one, IDS)
        assert equal(other, whole_other, X)
    engine = engine_of(one)
    arena, ring = (weakref.ref(each) for each in (engine.weights, engine.copier))
    del one, engine
    gc.collect()
    assert arena() is None
    assert ring() is None
    assert len(engines) == before + 1
    assert equal(other, whole_other, X)


def test_what_a_pass_ran_into_leaves_a_module_that_works() -> None:
    module = made(Net)
    whole = copy.deepcopy(module)
    streaming(module, (IDS,), 0.3)
    for error in (RuntimeError("boom"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        handle = module.blocks[3].register_forward_hook(fail)
        with pytest.raises(type(error)):
            module(IDS)
        handle.remove()
        assert equal(module, whole, IDS)


def test_memory_that_runs_out_is_explained_with_the_workspace() -> None:
    module = streaming(made(Net), (IDS,))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    module.blocks[3].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        module(IDS)
    assert "kept device memory for a workspace of 100 KB" in caught.value.__notes__[0]


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_on_a_gpu_from_host_memory_and_from_the_gpu_itself(home: str) -> None:
    module = made(Net, seed=3).to(home)
    whole = copy.deepcopy(module).to("cuda")
    budget = CUDA_OVERHEAD_BYTES + 61_800_000
    djinn.offload(module, budget=budget, workspace="60 MB", ring="1 MB", example=(IDS,), device="cuda")
    assert names_streamed(module)
    whole_ids = IDS.cuda()
    for _ in range(3):
        assert equal(module, whole, whole_ids)
    assert all(parameter.is_cuda for parameter in module.parameters())
    assert all(torch.equal(value.cpu(), whole.state_dict()[key].cpu()) for key, value in module.state_dict().items())
    state = module.state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    djinn.detach(module)
    assert {parameter.device.type for parameter in module.parameters()} == {home}
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(module.parameters(), whole.parameters(), strict=True))


@pytest.mark.gpu
def test_offloading_from_the_gpu_gives_its_memory_back() -> None:
    """Also what torch keeps of it: a budget is not what is in use, but what is taken."""
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved()
    module = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(12)]).cuda()
    x = torch.zeros(1, 4096)
    budget = CUDA_OVERHEAD_BYTES + 10**8 + 4 * 4096 * 4096 * 5
    djinn.offload(module, budget=budget, workspace="100 MB", ring=4 * 4096 * 4096, example=(x,), device="cuda")
    module(x.cuda())
    assert torch.cuda.memory_reserved() - begun <= budget - CUDA_CONTEXT_BYTES


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_a_plan_error_and_the_module_stays() -> None:
    module = made(Net)
    whole = copy.deepcopy(module)
    with pytest.raises(PlanError, match="device memory: the plan needs 10 TB"):
        djinn.offload(module, budget="11 TB", workspace="10 TB", example=(IDS,), device="cuda")
    assert equal(module, whole, IDS)
