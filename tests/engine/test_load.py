"""A streaming model against the same model loaded whole: equal bits, whatever happens in between."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import TINY
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

import djinn
from djinn.engine import load as engine_model
from djinn.engine import opened
from djinn.engine.load import engine_of, engines, placement
from djinn.errors import CheckpointError, ConfigError, DjinnError, PlanError, UnavailableError
from djinn.planning.placement import Tier
from djinn.weights.architectures import load_architecture
from djinn.weights.models import empty_model
from djinn.weights.synthetic_checkpoint import synthesise

Tiny = Callable[[str], Path]
WORK = {"prompt_tokens": 16, "new_tokens": 16, "device": "cpu"}
STREAMED_SHARE = 0.6
"""Share of the model that a test's budget leaves no room for."""


def budget_for(folder: Path, streamed_share: float = STREAMED_SHARE) -> int:
    """Return a budget that keeps about the rest of the model on the device, ring included."""
    all_of_it = djinn.plan(folder, budget="1 GB", **WORK)
    images = sum(unit.image_bytes for unit in all_of_it.units)
    return all_of_it.workspace_bytes + round((1 - streamed_share) * images)


def streaming(folder: Path, host_memory: int | str = "1 B", **options: object) -> PreTrainedModel:
    arguments: dict[str, object] = {"budget": budget_for(folder), "host_memory": host_memory, "chunk": "32 KiB"}
    return djinn.load(folder, **WORK | arguments | options)  # type: ignore[arg-type]


def resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(model: PreTrainedModel, length: int = 7) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(length)).logits


@pytest.fixture
def copy(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A llama checkpoint to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama"))


@pytest.fixture(autouse=True)
def one_thread_and_no_garbage() -> Iterator[None]:
    """Tiny products are quickest on one thread; models hold cycles, and would stay until the next collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.mark.parametrize(
    ("name", "tiers"),
    [(name, "both") for name in TINY] + [(name, tier) for name in ("llama", "gpt2") for tier in ("disk", "pinned")],
)
@pytest.mark.slow
def test_output_is_the_resident_models_bit_for_bit(tiny_checkpoint: Tiny, name: str, tiers: str) -> None:
    """Invariant 7, with less than half of the weights on the device."""
    folder = tiny_checkpoint(name)
    planned = djinn.plan(folder, budget=budget_for(folder), host_memory="1 GB", **WORK)
    host = {"disk": 1, "pinned": 10**9, "both": planned.pinned_bytes // 2}[tiers]
    model, whole = streaming(folder, host), resident(folder)
    made = placement(model)
    wanted = {"disk": {Tier.DISK}, "pinned": {Tier.PINNED}, "both": {Tier.DISK, Tier.PINNED}}[tiers]
    assert {tier for tier in made.tiers if tier is not Tier.RESIDENT} == wanted
    assert made.resident_bytes < sum(unit.image_bytes for unit in made.units) / 2
    for length in (1, 16):
        assert torch.equal(logits(model, length), logits(whole, length))
    if tiers == "both":
        ids, greedy = prompt(5), {"do_sample": False, "max_new_tokens": 5}
        assert torch.equal(model.generate(ids, **greedy), whole.generate(ids, **greedy))
        sampled = []
        for either in (model, whole):
            torch.manual_seed(5)
            sampled.append(either.generate(prompt(4, batch=2), do_sample=True, temperature=0.9, max_new_tokens=4))
        assert torch.equal(*sampled)
    assert djinn.stats(model).reloads <= djinn.stats(model).passes * (
        1 if "2" in name or name in ("opt", "bloom") else 0
    )


def test_float32_and_a_single_unit_in_the_ring(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """The smallest ring there is: nothing overlaps, and everything is right."""
    folder = tmp_path / "float32"
    resident(tiny_checkpoint("llama")).float().save_pretrained(folder)
    with pytest.raises(PlanError) as refusal:
        streaming(folder, ring="1 B")
    ring = int(str(refusal.value).split("a ring of ")[1].split()[0])
    model = streaming(folder, ring=ring)
    assert placement(model).ring_bytes == ring
    assert torch.equal(logits(model), logits(resident(folder)))


def test_a_model_that_fits_is_loaded_whole(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    model = djinn.load(folder, budget="1 GB", **WORK)
    assert torch.equal(logits(model), logits(resident(folder)))
    djinn.cool(model)
    assert torch.equal(logits(model), logits(resident(folder)))
    assert djinn.stats(model).link_bytes == 0
    assert djinn.stats(model).passes == 2


def test_two_models_in_one_process(tiny_checkpoint: Tiny) -> None:
    one, other = streaming(tiny_checkpoint("llama")), streaming(tiny_checkpoint("opt"))
    wanted = [logits(resident(tiny_checkpoint(name))) for name in ("llama", "opt")]
    for _ in range(2):
        assert torch.equal(logits(one), wanted[0])
        assert torch.equal(logits(other), wanted[1])


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_in_a_pass_leaves_a_model_that_works(tiny_checkpoint: Tiny, error: BaseException) -> None:
    model = streaming(tiny_checkpoint("llama"))
    wanted = logits(resident(tiny_checkpoint("llama")))

    def fail(*_: object) -> None:
        raise error

    for name in ("model.embed_tokens", "model.layers.2.mlp", "model.layers.3.mlp.up_proj", "lm_head"):
        handle = model.get_submodule(name).register_forward_hook(fail)
        with pytest.raises(type(error)):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), wanted)


def test_memory_that_runs_out_is_explained_and_the_model_works_again(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"))
    wanted = logits(model)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    handle = model.get_submodule("model.layers.2.mlp").register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        logits(model)
    assert "kept device memory for prompt_tokens=" in caught.value.__notes__[0]
    handle.remove()
    assert torch.equal(logits(model), wanted)


def test_a_workload_that_does_not_fit_is_refused_with_one_that_does(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    budget = budget_for(folder)
    with pytest.raises(PlanError, match=r"it would fit a prompt of \d+ tokens") as caught:
        djinn.plan(folder, budget=budget, prompt_tokens=10**6, new_tokens=1)
    longest = int(str(caught.value).split("a prompt of ")[1].split()[0])
    djinn.plan(folder, budget=budget, prompt_tokens=longest, new_tokens=1)
    with pytest.raises(PlanError):
        djinn.plan(folder, budget=budget, prompt_tokens=longest + 1, new_tokens=1)


def test_modules_called_on_their_own_or_not_at_all(tiny_checkpoint: Tiny) -> None:
    """Invariant 8: slower, counted, never wrong."""
    model, whole = streaming(tiny_checkpoint("llama")), resident(tiny_checkpoint("llama"))
    x = torch.randn(1, 3, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in (4, 0, 0, 3):
            assert torch.equal(model.model.layers[layer].mlp(x), whole.model.layers[layer].mlp(x))
        for either in (model, whole):
            either.model.layers.pop(1)
        assert torch.equal(logits(model), logits(whole))
    stats = djinn.stats(model)
    assert stats.reloads + stats.skips > 0


def test_a_file_that_breaks_is_named_and_the_model_works_again_once_it_is_whole(copy: Path) -> None:
    model = streaming(copy)
    wanted = logits(model)
    for path in sorted(copy.glob("*.safetensors")):
        content = path.read_bytes()
        os.truncate(path, 1000)
        djinn.cool(model)
        if any(path == tensor.entry.source.path for unit in placement(model).streamed for tensor in unit.tensors):
            for _ in range(2):
                with pytest.raises(CheckpointError, match=f"{path}: ends at byte 1000"):
                    logits(model)
        path.write_bytes(content)
        assert torch.equal(logits(model), wanted)


def test_a_file_that_was_deleted_is_still_read_while_it_is_open(copy: Path) -> None:
    model = streaming(copy)
    wanted = logits(model)
    shutil.rmtree(copy)
    djinn.cool(model)
    assert torch.equal(logits(model), wanted)


def test_detaching_gives_an_ordinary_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "mixtral"):
        folder = tiny_checkpoint(name)
        model, whole = streaming(folder), resident(folder)
        logits(model)
        assert djinn.detach(model) is model
        assert torch.equal(logits(model), logits(whole))
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_always_called
        parameters = dict(model.named_parameters())
        assert parameters.keys() == dict(whole.named_parameters()).keys()
        assert all(torch.equal(parameters[key], value) for key, value in whole.named_parameters())
        if name == "gpt2":
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if name == "gpt2":
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model.save_pretrained(tmp_path / name)
            assert torch.equal(logits(resident(tmp_path / name)), logits(whole))
        with pytest.raises(ConfigError, match="does not stream"):
            djinn.stats(model)
        with pytest.raises(ConfigError, match="does not stream"):
            djinn.detach(model)


def test_detaching_is_refused_where_the_model_does_not_fit(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streaming(tiny_checkpoint("llama"))
    wanted = logits(model)
    monkeypatch.setattr(engine_model, "usable_ram", lambda: 1000)
    with pytest.raises(PlanError, match=r"the whole model needs .* it goes on streaming"):
        djinn.detach(model)
    assert torch.equal(logits(model), wanted)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("djinn-reader")]


def open_files() -> set[str]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        if link.exists():
            found.add(str(link.readlink()))
    return {name for name in found if name.endswith(".safetensors")}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes leave in the system's folder meanwhile is none of these tests' business."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def spills() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("djinn-*"))


@pytest.mark.parametrize("how", ["del", "detach"])
def test_nothing_is_left_of_a_model_that_is_gone(tiny_checkpoint: Tiny, how: str) -> None:
    gc.collect()
    before = readers(), open_files(), spills(), len(engines)
    model = streaming(tiny_checkpoint("mixtral"), 10**5)
    logits(model)
    assert len(readers()) > len(before[0])
    assert open_files() > before[1]
    assert len(spills() - before[2]) == 1
    if how == "detach":
        djinn.detach(model)
    else:
        del model
        gc.collect()
    assert (readers(), open_files(), len(engines)) == (before[0], before[1], before[3])
    assert not spills() - before[2]


def test_a_model_may_die_while_torch_registers_a_module(tiny_checkpoint: Tiny) -> None:
    """The garbage collector runs where it likes, also while torch walks the hooks that every module goes through."""
    models = [streaming(tiny_checkpoint("mixtral"), 10**5)]

    def let_it_die(*_: object) -> None:
        models.clear()
        gc.collect()

    hooked = register_module_module_registration_hook
    with hooked(let_it_die), hooked(lambda *_: None):
        nn.Module().part = nn.Module()
    assert not models


def test_nothing_is_left_of_a_model_that_was_refused(tiny_checkpoint: Tiny, copy: Path) -> None:
    gc.collect()
    before = readers(), open_files(), spills()
    with pytest.raises(PlanError):
        djinn.load(tiny_checkpoint("llama"), budget=1000, **WORK)
    budget = budget_for(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError):
        djinn.load(copy, budget=budget, **WORK)
    assert (readers(), open_files()) == before[:2]
    assert not spills() - before[2]


def test_a_read_error_while_loading_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = readers(), open_files(), spills()
    really = opened.find_units

    def truncating(index: object) -> object:
        units = really(index)  # type: ignore[arg-type]
        for path in copy.glob("*.safetensors"):
            os.truncate(path, 1000)
        return units

    budget = budget_for(copy)
    monkeypatch.setattr(opened, "find_units", truncating)
    with pytest.raises(CheckpointError, match="ends at byte 1000"):
        djinn.load(copy, budget=budget, **WORK)
    gc.collect()
    assert (readers(), open_files()) == before[:2]
    assert not spills() - before[2]


def test_cooling_drops_what_was_prefetched(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"))
    wanted = logits(model)
    per_pass = djinn.stats(model).link_bytes
    for passes in (2, 3, 4):
        djinn.cool(model)
        djinn.cool(model)
        assert torch.equal(logits(model), wanted)
        assert djinn.stats(model).link_bytes == passes * per_pass


def test_bytes_and_passes_are_counted(tiny_checkpoint: Tiny) -> None:
    """Every pass moves the streamed weights once; what was prefetched for the next one is not counted yet."""
    model = streaming(tiny_checkpoint("llama"), 10**5)
    made = placement(model)
    streamed = sum(unit.weight_bytes for unit in made.streamed)
    from_disk = sum(unit.weight_bytes for unit in made.at(Tier.DISK))
    for passes in (1, 2, 3):
        logits(model)
        stats = djinn.stats(model)
        assert (stats.passes, stats.visits, stats.reloads, stats.skips) == (passes, passes * len(made.streamed), 0, 0)
        assert (stats.link_bytes, stats.disk_read_bytes) == (passes * streamed, passes * from_disk)
    assert stats.model_bytes == made.model_bytes
    assert (stats.resident_bytes, stats.ring_bytes) == (made.resident_bytes, made.ring_bytes)


def test_the_timeline_is_kept_on_request(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"), trace=True)
    logits(model)
    timeline = djinn.stats(model).timeline
    names = {unit.name for unit in placement(model).streamed}
    for lane in ("copy", "compute"):
        assert {interval.unit for interval in timeline if interval.lane == lane} == names
    assert all(interval.start_s <= interval.end_s for interval in timeline)
    assert all((interval.cause == "disk") == (interval.lane == "stall") for interval in timeline)
    quiet = streaming(tiny_checkpoint("llama"))
    logits(quiet)
    assert djinn.stats(quiet).timeline == []


def test_device_memory_is_within_the_budget_and_weights_are_in_memory_once(tiny_checkpoint: Tiny) -> None:
    """Invariant 9, seen from the addresses: all weights lie in the ring or in the residents' block."""
    folder = tiny_checkpoint("llama")
    model = streaming(folder)
    made = placement(model)
    assert made.device_bytes <= budget_for(folder)
    ring = engine_of(model).copier.ring
    assert ring.nbytes == made.ring_bytes
    streamed = {tensor.name for unit in made.streamed for tensor in unit.tensors}
    with torch._C.DisableTorchFunctionSubclass():  # what lies in a slot, be it there or not
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert len(storages) == 2
        for name, parameter in model.named_parameters():
            in_ring = ring.data_ptr() <= parameter.data_ptr() < ring.data_ptr() + ring.nbytes
            assert in_ring == (name in streamed)


def test_memory_does_not_grow_while_passes_go_by(tiny_checkpoint: Tiny) -> None:
    model = streaming(tiny_checkpoint("llama"))
    for _ in range(5):
        logits(model)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        logits(model)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 8 * 2**20


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "qwen2-tiny"])
def test_weights_made_in_memory_are_those_written_to_disk(tmp_path: Path, name: str) -> None:
    """Mixtral's experts are not: fused, a tensor in memory has another name, and its numbers follow from the name."""
    folder = synthesise(name, tmp_path / name, progress=False)
    model = djinn.load(f"synthetic:{name}", budget=budget_for(folder), host_memory="1 GB", **WORK)
    whole = resident(folder)
    assert set(placement(model).tiers) == {Tier.RESIDENT, Tier.PINNED}
    assert torch.equal(logits(model), logits(whole))
    ids = prompt(5)
    assert torch.equal(model.generate(ids, max_new_tokens=4), whole.generate(ids, max_new_tokens=4))


def test_synthetic_experts_stream(tmp_path: Path) -> None:
    model = djinn.load("synthetic:mixtral-tiny", budget="2 MB", host_memory="1 GB", seed=3, **WORK)
    assert placement(model).away
    streamed = logits(model)
    assert torch.equal(logits(djinn.detach(model)), streamed)


def test_a_seed_gives_other_weights() -> None:
    outputs = [
        logits(djinn.load("synthetic:llama-tiny", budget="1 GB", seed=seed, **WORK))  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_plan_is_what_loading_follows(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("llama")
    planned = djinn.plan(folder, budget=budget_for(folder), host_memory="100 KB", **WORK)
    made = placement(streaming(folder, "100 KB"))
    assert (planned.tiers, planned.slots, planned.ring_bytes) == (made.tiers, made.slots, made.ring_bytes)


def test_a_gpu_can_be_planned_for_without_one() -> None:
    planned = djinn.plan("synthetic:llama-tiny", budget="2 GB", host_memory="1 GB", device="cuda")
    assert planned.workspace_bytes > 10**8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnavailableError, match="no CUDA device that torch can use; device='cpu' works"):
        djinn.load("synthetic:llama-tiny", budget="1 GB", device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "12"}, "size '12' is not a positive number with a unit"),
        ({"budget": -1}, "size -1 is not positive"),
        ({"device": "tpu"}, "device 'tpu': the devices are cpu and cuda"),
        ({"device": "mps"}, "device 'mps': the devices are cpu and cuda"),
        ({"chunk": "many"}, "size 'many'"),
        ({"host_memory": "0 B"}, "size '0 B' is not positive"),
        ({"ring": "100 KiB", "budget": "1 MB"}, "ring: unit "),
        ({"budget": "100 KB"}, "budget: 100 KB is too small"),
        ({"budget": "3 MB", "host_memory": "100 KB"}, "host memory: streamed weights that are made"),
        ({"model": "synthetic:nothing"}, "no architecture 'nothing'"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"model": "synthetic:llama-tiny", "budget": "1 GB", **WORK} | changes
    with pytest.raises(DjinnError) as refusal:
        djinn.load(arguments.pop("model"), **arguments)  # type: ignore[arg-type]
    assert message in str(refusal.value)


def test_host_memory_that_is_not_there_is_refused(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint("llama")
    budget = budget_for(folder)
    monkeypatch.setattr(engine_model, "usable_ram", lambda: 10**6)
    with pytest.raises(
        PlanError, match=r"host memory: the plan needs .* but 1 MB are free; lower host_memory or budget"
    ):
        djinn.load(folder, budget=budget, host_memory="1 GB", **WORK)


def test_a_forked_child_takes_nothing_from_its_parent(tiny_checkpoint: Tiny) -> None:
    """A child has none of the threads, and leaves the files that weights were converted into to its parent."""
    model = streaming(tiny_checkpoint("mixtral"))
    wanted = logits(model)
    child = os.fork()
    if child == 0:
        del model
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    djinn.cool(model)
    assert torch.equal(logits(model), wanted)


@pytest.mark.slow
def test_a_process_ends_while_its_model_is_prefetching(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = tiny_checkpoint("mixtral")
    script = f"""
import sys, djinn, torch
model = djinn.load({str(folder)!r}, budget={budget_for(folder)}, host_memory="1 B", device="cpu",
                   prompt_tokens=16, new_tokens=16)
model(torch.ones(1, 3, dtype=torch.long))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.glob("djinn-*")) == []


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_tensors_that_are_freed_leave_no_holes(tiny_checkpoint: Tiny) -> None:
    """A cache that grows between activations: what is freed beneath its last tensor goes back to the system."""
    folder = tiny_checkpoint("llama")
    script = f"""
import djinn, psutil, torch
model = djinn.load({str(folder)!r}, budget={budget_for(folder)}, device="cpu", prompt_tokens=16, new_tokens=16)
torch.zeros(6 * 2**20)  # 24 MB: from here on glibc would keep tensors of that size in its heap
held = psutil.Process().memory_info().rss
tensors = [torch.ones(2**19) for _ in range(64)]
del tensors[:-1]
print(psutil.Process().memory_info().rss - held)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 2**24


class Odd(nn.Module):
    """Not a model of djinn's."""


@pytest.mark.parametrize("call", [djinn.stats, djinn.cool, djinn.detach])
def test_other_models_are_refused(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ConfigError, match=r"this Odd does not stream; djinn.load returns models that do"):
        call(Odd())


def test_no_copy_of_the_architecture_is_needed() -> None:
    """The plan of a 70B model reads no weights and allocates none."""
    config = load_architecture("llama-2-70b")
    assert sum(p.nbytes for p in empty_model(config, torch.bfloat16).parameters()) == 137_953_296_384
