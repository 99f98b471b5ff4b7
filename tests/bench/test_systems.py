import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn import hardware
from djinn.bench.harness import run_baselines
from djinn.bench.measure import MemoryPeak, measure
from djinn.bench.sweep import run_sweep
from djinn.bench.systems import accelerate, common, deepspeed, loader, resident
from djinn.bench.systems.base import Job
from djinn.errors import ConfigError, UnavailableError
from djinn.figures import frames
from djinn.profiles import SYSTEM_VARIANTS, load_profile
from djinn.weights.synthetic_checkpoint import synthesise

TINY_BYTES = 21_708_288


def variant(job, name, **changes):
    profile = job.profile.model_copy(update=changes)
    return dataclasses.replace(job, variant=name, profile=profile)


def gpu_job(tmp_path, **changes):
    profile = load_profile("virt_mem_h100").override(**changes)
    return Job(profile=profile, variant="cpu", model=profile.model, scratch=tmp_path)


@pytest.mark.parametrize("name", SYSTEM_VARIANTS)
def test_every_system_has_a_loader(name):
    module = loader(name)
    assert callable(module.check)
    assert callable(module.load)


@pytest.mark.parametrize("variant", ["host", "lossless+host"])
def test_host_compute_is_for_one_gpu_alone(variant: str, tmp_path: Path) -> None:
    module = loader("djinn")
    job = dataclasses.replace(gpu_job(tmp_path), variant=variant)
    module.check(job)
    for name, value in (("gpus", 2), ("dtype", "float16")):
        with pytest.raises(UnavailableError, match=f"{name} {value}"):
            module.check(dataclasses.replace(gpu_job(tmp_path, **{name: value}), variant=variant))
    smoke = load_profile("smoke_tiny")
    with pytest.raises(UnavailableError, match="device cpu"):
        module.check(Job(profile=smoke, variant=variant, model=smoke.model, scratch=tmp_path))


def test_an_unknown_system_lists_those_there_are():
    with pytest.raises(ConfigError, match="accelerate"):
        loader("acelerate")


@pytest.mark.slow
def test_djinn_coded_and_raw_agree_and_say_what_coding_took(codable_checkpoint, tmp_path):
    profile = load_profile("smoke_tiny").override(
        model=str(codable_checkpoint),
        systems=["djinn", "djinn:lossless"],
        budget="25 MB",
        ring="6 MB",
        host_memory="60 MB",
        runs=1,
        warmups=0,
        new_tokens=3,
    )
    raw, coded = run_baselines(profile, tmp_path)
    assert (raw.status, coded.status) == ("ok", "ok"), (raw.reason, coded.reason)
    assert (raw.coding, coded.coding) == ("none", "lossless")
    assert raw.tokens == coded.tokens
    assert coded.link_bytes is not None
    bits = frames.bits([raw, coded])
    assert set(bits["name"]) == {"djinn:lossless"}
    assert {"q_proj", "up_proj", "down_proj"} <= set(bits["kind"])
    assert bits["bits"].between(10, 11.5).all()
    assert run_sweep(profile.override(sweep={"coded": True, "runs": 1}), tmp_path / "sweep")[0].status == "ok"
    assert frames.shares(frames.read_timeline(tmp_path / "sweep", "timeline_coded"))["decode"] > 0


@pytest.mark.slow
def test_systems_agree_and_count_what_they_move(job):
    tokens, moved = {}, {}
    for name, target in (("resident", ""), ("accelerate", "disk"), ("djinn", "")):
        module = loader(name)
        asked = variant(job, target)
        module.check(asked)
        system = module.load(asked)
        result = measure(system, asked, TINY_BYTES, MemoryPeak())
        tokens[name], moved[name] = result["tokens"], system.link_bytes()
        assert len(result["per_token_s"]) == job.profile.new_tokens - 1
        system.close()
    assert tokens["resident"] == tokens["accelerate"] == tokens["djinn"]
    assert moved["resident"] == 0
    assert moved["accelerate"] == TINY_BYTES * job.profile.new_tokens
    assert 0 < moved["djinn"] < moved["accelerate"] + TINY_BYTES


@pytest.mark.slow
def test_what_experts_did_is_counted_run_by_run_and_only_where_they_are_routed(tmp_path):
    profile = load_profile("smoke_moe").override(new_tokens=3)
    folder = synthesise("qwen3-moe-tiny", tmp_path / "qwen3-moe-tiny", progress=False)
    asked = Job(profile=profile, variant="", model=str(folder), scratch=tmp_path)
    system = loader("djinn").load(asked)
    for _ in range(2):
        counts = measure(system, asked, TINY_BYTES, MemoryPeak())
        assert counts["routed_layers"] + counts["whole_layers"] == system.model.config.num_hidden_layers * 3
        assert counts["expert_misses"] > 0
        assert 0 <= counts["index_wait_s"] < counts["wall_s"]
    whole = dataclasses.replace(asked, variant="whole")
    assert "expert_hits" not in measure(loader("djinn").load(whole), whole, TINY_BYTES, MemoryPeak())


def test_resident_owes_nothing_to_the_page_cache(job):
    model = common.host_model(job)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(".safetensors")]
    ranges = [(int(low, 16), int(high, 16)) for low, high in spans]
    for parameter in model.parameters():
        assert not any(low <= parameter.data_ptr() < high for low, high in ranges)


def test_weights_made_in_memory_are_those_of_the_checkpoint(job, tmp_path):
    from_disk = common.host_model(job).state_dict()
    profile = load_profile("virt_mem_h100").override(model="synthetic:llama-tiny")
    made = Job(profile=profile, variant="", model="synthetic:llama-tiny", scratch=tmp_path)
    in_memory = common.host_model(made)
    assert common.weight_bytes(in_memory) == TINY_BYTES
    for name, weights in in_memory.state_dict().items():
        assert torch.equal(weights, from_disk[name]), name


@pytest.mark.parametrize("name", ["resident", "deepspeed"])
def test_too_little_memory_is_refused_with_numbers(job, monkeypatch, name):
    monkeypatch.setattr(hardware, "usable_ram", lambda: 20_000_000)
    with pytest.raises(UnavailableError, match=r"needs \d+ MB, 20 MB are free"):
        loader(name).check(variant(job, "cpu"))


def test_weights_that_deepspeed_is_still_given_need_room_too(job, monkeypatch, tmp_path):
    made = load_profile("virt_mem_h100").override(model="synthetic:llama-tiny")
    needed = []
    monkeypatch.setattr(deepspeed, "require_ram", lambda size, what: needed.append(size))
    monkeypatch.setattr(deepspeed, "_set_environment", lambda job: None)
    monkeypatch.setattr(deepspeed, "_build", lambda job: None)
    for profile, model in ((made, made.model), (made.override(weights="disk"), job.model)):
        deepspeed.check(Job(profile=profile, variant="cpu", model=model, scratch=tmp_path))
    assert needed[0] > needed[1] > TINY_BYTES


def test_too_little_disk_for_a_second_copy_is_refused_with_numbers(job, monkeypatch):
    monkeypatch.setattr(hardware, "free_disk", lambda path: 10_000_000)
    with pytest.raises(UnavailableError, match=r"disk: .*second copy.* 10 MB are free"):
        deepspeed.check(variant(job, "nvme"))


@pytest.mark.parametrize("target", ["cpu", "cpu-pinned"])
def test_offloading_from_a_cpu_to_itself_is_refused(job, target):
    with pytest.raises(UnavailableError, match="already there"):
        accelerate.check(variant(job, target))


def test_disk_offload_needs_a_checkpoint(tmp_path):
    asked = dataclasses.replace(gpu_job(tmp_path), variant="disk")
    with pytest.raises(UnavailableError, match="reads a checkpoint"):
        accelerate.check(asked)


@mock.patch.dict(os.environ)
def test_what_deepspeed_lacks_is_named(job, monkeypatch):
    asked = variant(job, "nvme")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match=r"C\+\+ compiler"):
        deepspeed.check(asked)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with mock.patch.dict(sys.modules, {"deepspeed": None}), pytest.raises(UnavailableError, match="cannot be imported"):
        deepspeed.check(asked)
    monkeypatch.setattr(hardware, "installed", lambda package: None)
    with pytest.raises(UnavailableError, match="not installed"):
        deepspeed.check(asked)


@mock.patch.dict(os.environ)
@pytest.mark.skipif(hardware.installed("deepspeed") is None, reason="needs DeepSpeed")
def test_missing_libaio_headers_are_named(job, monkeypatch):
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(UnavailableError, match="libaio-dev"):
        deepspeed.check(variant(job, "nvme"))


def test_locks_of_killed_builds_are_taken_away(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, foreign = tmp_path / "py311_cpu" / "async_io" / "lock", tmp_path / "py311_cpu" / "mine" / "lock"
    for lock in (stale, foreign):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with deepspeed._only_builder():
        assert not stale.exists()
        assert foreign.exists()


def test_deepspeeds_configuration_starts_from_the_artifacts_file(job, tmp_path, monkeypatch):
    template = json.loads(deepspeed.TEMPLATE.read_text())
    template["aio"]["queue_depth"] = 3
    changed = tmp_path / "ds_config.json"
    changed.write_text(json.dumps(template))
    monkeypatch.setattr(deepspeed, "TEMPLATE", changed)
    settings = deepspeed.configuration([50, 1000, 200], 300, variant(job, "nvme"))
    assert settings["aio"]["queue_depth"] == 3
    offload = settings["zero_optimization"]["offload_param"]
    assert offload == {
        "device": "nvme",
        "pin_memory": False,
        "buffer_count": template["zero_optimization"]["offload_param"]["buffer_count"],
        "buffer_size": 1000,
        "nvme_path": str(job.scratch),
    }
    assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000
    on_cpu = deepspeed.configuration([50, 1000, 200], 300, variant(job, "cpu"))
    assert on_cpu["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert deepspeed.configuration([1], 1, variant(job, "cpu", dtype="float16"))["fp16"]["enabled"]


@given(sizes=st.lists(st.integers(1, 300_000_000), min_size=1, max_size=30), budget=st.integers(3, 80))
def test_deepspeeds_persistent_and_live_parameters_fill_the_budget_and_no_more(tmp_path_factory, sizes, budget):
    job = gpu_job(tmp_path_factory.getbasetemp(), budget=f"{budget} GB", ring=None)
    settings = deepspeed.tuned_settings(sizes, max(sizes), job)
    persistent, live = settings["stage3_model_persistence_threshold"], settings["stage3_max_live_parameters"]
    assert settings["stage3_param_persistence_threshold"] == max(sizes), "any parameter may be one"
    assert live >= settings["stage3_prefetch_bucket_size"] >= max(sizes)
    left = job.profile.budget - 2 * persistent - 3 * live
    if persistent:
        assert 2 * 10**9 < left < 3.5 * 10**9  # workspace, context and allocator
    else:
        assert left < 3.5 * 10**9


def test_seventy_billion_parameters_fill_24_gb_of_deepspeeds(tmp_path):
    """Two runs on an H100 held 11.49 GB beside 2.69 GB of persistent parameters, at the same limits."""
    job = gpu_job(tmp_path)
    empty = common.skeleton(job)
    settings = deepspeed.tuned_settings([p.numel() for p in empty.parameters()], deepspeed._layer_elements(empty), job)
    assert settings["stage3_prefetch_bucket_size"] == pytest.approx(855_654_400, rel=0.01)
    filled = 2 * settings["stage3_model_persistence_threshold"] + 11.49e9
    assert 23.5e9 < filled < 24e9


def test_a_profile_can_name_deepspeeds_limits(job, tmp_path):
    named = load_profile("virt_mem_h100").override(deepspeed={"stage3_model_persistence_threshold": 5_000_000_000})
    tuning = named.tuning("deepspeed:cpu")
    assert tuning == (("stage3_model_persistence_threshold", 5_000_000_000),)
    assert named.tuning("accelerate:cpu") == load_profile("virt_mem_h100").tuning("deepspeed:cpu") == ()
    tuned = dataclasses.replace(gpu_job(tmp_path), tuning=dict(tuning))
    zero = deepspeed.configuration([50, 1000], 300, tuned)["zero_optimization"]
    assert zero["stage3_model_persistence_threshold"] == 5_000_000_000
    assert zero["stage3_param_persistence_threshold"] == 1000


def test_accelerate_puts_as_many_layers_on_a_gpu_as_fit(tmp_path):
    job = gpu_job(tmp_path)
    places = accelerate.map_blocks(job)
    on_gpu = [name for name, place in places.items() if place == 0]
    layer = 1_711_309_000
    assert set(places.values()) == {0, "cpu"}
    assert 8 <= len([name for name in on_gpu if ".layers." in name]) <= (24e9 - layer) // layer
    assert accelerate.place_of("model.layers.79.mlp.up_proj.weight", places) == "cpu"
    assert accelerate.place_of("model.layers.0.mlp.up_proj.weight", places) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_resident_on_a_gpu_needs_one(tmp_path):
    with pytest.raises(UnavailableError):
        resident.check(gpu_job(tmp_path, model="synthetic:llama-2-70b"))


def test_deepspeeds_ranks_have_a_part_of_every_parameter(job, tmp_path, monkeypatch):
    needed = {}
    monkeypatch.setattr(deepspeed, "_set_environment", lambda job: None)
    monkeypatch.setattr(deepspeed, "_build", lambda job: None)
    for gpus in (1, 3):
        monkeypatch.setattr(deepspeed, "require_ram", lambda size, what, gpus=gpus: needed.update({gpus: size}))
        asked = variant(job, "cpu", gpus=gpus)
        deepspeed.check(asked)
        offload = deepspeed.configuration([50, 1000], 300, variant(job, "nvme", gpus=gpus))["zero_optimization"]
        assert offload["offload_param"]["buffer_size"] == {1: 1000, 3: 334}[gpus]
    assert needed[1] <= needed[3] < 1.01 * needed[1]  # together they hold one copy


def test_a_single_process_of_deepspeeds_calls_itself_a_rank(job):
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29"}):
        deepspeed._set_environment(variant(job, "cpu", gpus=2))
        assert (os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["MASTER_PORT"]) == ("2", "1", "29")
        deepspeed._set_environment(job)
        assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("1", "0")


def test_accelerate_holds_several_gpus_in_one_process(job, tmp_path):
    two = gpu_job(tmp_path, gpus=2)
    places = accelerate.map_blocks(two)
    assert set(places.values()) == {0, 1, "cpu"}
    assert [*two.own_gpus] == [0, 1]
    with pytest.raises(UnavailableError, match="on a CPU there is only one device"):
        accelerate.check(variant(job, "disk", gpus=2))


def test_a_rank_has_one_gpu_of_its_own(tmp_path):
    two = gpu_job(tmp_path, gpus=2)
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
        assert [*two.own_gpus] == [1]
