"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from architectures import save_architecture
from fabricated import fabricated, failed
from hypothesis import HealthCheck, settings
from tiny_models import MIXTURES, save_config, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from djinn.bench.records import append_record
from djinn.profiles import load_profile

# How long an example takes says how busy the machine is.
settings.register_profile("djinn", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("djinn")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers temporary files of its own: tests count what djinn leaves there.

    Ctrl-C is heard, although a shell has what it starts in the background ignore it, and their children with it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        own = tempfile.TemporaryDirectory(prefix=f"{worker}-", ignore_cleanup_errors=True)
        config.add_cleanup(own.cleanup)
        os.environ["TMPDIR"] = tempfile.tempdir = own.name


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")


@pytest.fixture
def fabricated_run(tmp_path: Path) -> Path:
    """A run directory with invented records: some systems finished, one out of memory, one for want of disk."""
    return fabricate(tmp_path / "run")


def fabricate(run_dir: Path) -> Path:
    """Write such a run directory; return it."""
    profile = load_profile("smoke_13b")
    results = run_dir / "results"
    results.mkdir(parents=True)
    (run_dir / "profile.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False))
    for run in range(3):
        for system in ("djinn", "accelerate:disk"):
            append_record(results / "baselines.jsonl", fabricated(profile, system, run))
        coded = fabricated(profile, "djinn:lossless", run, settings={"bits q_proj": 11.19, "bits lm_head": 11.2})
        append_record(results / "baselines.jsonl", coded)
    append_record(results / "baselines.jsonl", fabricated(profile, "deepspeed:nvme", 0))
    append_record(results / "baselines.jsonl", failed(profile, "deepspeed:nvme", 1, "timeout", "no answer in 900 s"))
    reason = "out of memory: 26 GB of weights, 12 GB of RAM"
    append_record(results / "baselines.jsonl", failed(profile, "deepspeed:cpu", 0, "oom", reason))
    for size, rate in (("4 MiB", 0.9), ("16 MiB", 1.2), ("64 MiB", 1.3)):
        for run in range(2):
            point = fabricated(
                profile, "djinn", run, experiment="sweep", variant=f"chunk={size}", link_bytes=int(rate * 1e10),
                wall_s=10 + 0.1 * run,
            )  # fmt: skip
            append_record(results / "sweep.jsonl", point)
    for size, hits in (("2 GB", 10), ("4300 MB", 40)):
        for run in range(2):
            point = fabricated(
                profile, "djinn", run, experiment="sweep", variant=f"budget={size}", expert_hits=hits,
                expert_misses=50 - hits, settings={"pool_slots": hits, "pool_experts": 100},
            )  # fmt: skip
            append_record(results / "sweep.jsonl", point)
    append_record(
        results / "sweep.jsonl",
        failed(profile, "djinn", 0, "error", "refused").model_copy(
            update={"experiment": "sweep", "variant": "chunk=512 MiB"}
        ),
    )
    for name, reader in (("timeline", "compute"), ("timeline_coded", "decode")):
        with (results / f"{name}.jsonl").open("w") as lines:
            for unit in range(40):
                for lane, offset in (("copy", 0.0), (reader, 0.4), ("stall", 0.32)):
                    start = unit * 0.5 + offset
                    span = {"lane": lane, "unit": f"layers.{unit}", "start_s": start, "nbytes": 600_000_000}
                    length = {"copy": 0.48, reader: 0.1, "stall": 0.05}[lane]
                    lines.write(json.dumps(span | {"end_s": start + length, "cause": ""}) + "\n")
    return run_dir


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by name (see ``tiny_models``), written once; not to be changed."""
    return cache(lambda name: save_tiny(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def mixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny mixture of experts by name (see ``tiny_models``), written once; not to be changed."""
    return cache(lambda name: save_config(MIXTURES[name], name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def architecture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of an architecture (see ``architectures``), written once; not to be changed."""
    return cache(lambda name: save_architecture(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def codable_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose matrices are large enough to be coded, with biases beside them; not to be changed."""
    folder = tmp_path_factory.mktemp("codable")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=1024,
        attention_bias=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
