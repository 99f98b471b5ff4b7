"""One measured call of ``generate``, the same for every system: what is timed, counted and sampled, and how.

The run is as cold as a run can be: the checkpoint's pages are dropped from the page cache and nothing is prefetched.
The link is measured before and after, because disks and shared machines drift: its rate for a small buffer, of which
the higher is the ceiling, and where the system can say it, the rate of bare copies of the system's own weights.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, StoppingCriteria

from djinn import gpus
from djinn.bench.rates.disk import read_rate
from djinn.bench.rates.link import pinned_h2d_rate
from djinn.bench.systems.base import Job, System
from djinn.engine.ranks import control_group
from djinn.transport.reader import THREADS

# At these sizes neither link is slowed by its commands. The sample is small, because a full arena is pinned beside it.
_LINK_CHUNK, _LINK_SAMPLE = 64 * 2**20, 512 * 2**20
_DISK_CHUNK, _DISK_SAMPLE = 16 * 2**20, 3 * 10**9
_SAMPLE_S = 0.02


class TokenTimes(StoppingCriteria):
    """Notes when each token is on the host. It stops nothing: the number of tokens is fixed."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """See ``transformers.StoppingCriteria``; ``input_ids`` is [batch, tokens so far], int64."""
        input_ids[:, -1].tolist()  # waits until the token is on the host
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class MemoryPeak:
    """The most host memory this process has held since the peak was made: sampled, in bytes."""

    def __init__(self) -> None:
        self.rss_bytes = 0
        self.anon_bytes = 0
        self.bare_bytes = 0
        self.bare_device_bytes: dict[int, int] = {}
        """By number of each of this process's GPUs."""
        self._looking = True
        threading.Thread(target=self._watch, name="memory-peak", daemon=True).start()

    def mark_bare(self, own: Sequence[int] | None = None) -> None:
        """Call what is held now the baseline: interpreter and libraries, before a system loads.

        Device memory held now is the driver's and other processes': this one has no context there yet.

        Args:
            own: the GPUs of this process, as torch counts; by default its one GPU.
        """
        self.sample()
        self.bare_bytes = self.anon_bytes
        numbers = [gpus.own_gpu()] if own is None else own
        self.bare_device_bytes = {number: gpus.gpu_used_bytes(number) or 0 for number in numbers}

    def sample(self) -> None:
        """Take one more sample. Shared memory counts as anonymous: the kernel cannot take it back either."""
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        size = {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssShmem")}
        self.rss_bytes = max(self.rss_bytes, size["VmRSS"])
        self.anon_bytes = max(self.anon_bytes, size["RssAnon"] + size["RssShmem"])

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Leave out memory that the measurement itself takes and gives back."""
        self._looking = False
        try:
            yield
        finally:
            self._looking = True

    def _watch(self) -> None:
        while True:
            if self._looking:
                self.sample()
            time.sleep(_SAMPLE_S)


def prompt_ids(config: PretrainedConfig, *, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Return the prompt, int64 of [batch, tokens]: seeded, the same for every system, without special ids."""
    text = config.get_text_config()
    special = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        special |= set(value) if isinstance(value, list) else {value}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    chosen = torch.randint(len(ordinary), (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ordinary[chosen]


def measure(system: System, job: Job, model_bytes: int, peak: MemoryPeak) -> dict[str, Any]:
    """Generate the profile's ``new_tokens`` tokens once, greedily; return the fields that a record takes from a run.

    Raises:
        Whatever the system raises.
    """
    profile = job.profile
    prompt = _prompt(system, job)
    files = [] if job.in_memory else sorted(Path(job.model).glob("*.safetensors"))
    link = GpuLink() if job.on_gpu else DiskLink(files)
    gc.collect()
    system.begin()
    drop_pages([*files, *(path for path in job.scratch.rglob("*") if path.is_file())])
    meet()
    with peak.looking_away():
        before = link.ceiling()
        meet()
        bare_before = system.bare_gbps()
    moved, stalled, picked = link.moved(system), system.stall_s(), system.experts()
    meet()
    start = time.perf_counter()
    seconds, tokens = _generate(system, job, prompt, profile.new_tokens)
    wall_s = time.perf_counter() - start
    link_bytes, stalled_s = link.moved(system) - moved, system.stall_s()
    experts = {name: count - picked[name] for name, count in system.experts().items()}
    peak.sample()
    system.cool()  # or what it prefetches for a next token would share the link with the second look at its rate
    meet()
    with peak.looking_away():
        bare_after = system.bare_gbps()
        meet()
        ceiling = max(before, link.ceiling())
    return {
        "ttft_s": seconds[0],
        "per_token_s": seconds[1:],
        "wall_s": wall_s,
        "link": link.name,
        "link_bytes": link_bytes,
        "ceiling_gbps": ceiling / 1e9,
        "bare_gbps_before": bare_before,
        "bare_gbps_after": bare_after,
        "link_utilisation": link_bytes / wall_s / ceiling,
        "stall_s": None if stalled is None or stalled_s is None else stalled_s - stalled,
        "effective_gbps": model_bytes * profile.new_tokens / wall_s / 1e9,
        **experts,
        "peak_device_bytes": peak_device(peak, on_gpu=job.on_gpu, host_bytes=system.host_bytes),
        "peak_host_bytes": peak.rss_bytes,
        "peak_anon_bytes": peak.anon_bytes,
        "tokens": tokens,
    }


def meet() -> None:
    """Wait for the other ranks, where there are any: all begin at once, and look at their links at once.

    So the ceilings of all ranks add up to what the links carry together.
    """
    if dist.is_initialized():
        dist.barrier(control_group())


def warm(system: System, job: Job) -> None:
    """Generate two tokens unmeasured, so that no measured run compiles or allocates what only a first pass does."""
    _generate(system, job, _prompt(system, job), min(2, job.profile.new_tokens))


def _prompt(system: System, job: Job) -> torch.Tensor:
    profile = job.profile
    prompt = prompt_ids(system.model.config, batch=profile.batch, tokens=profile.prompt_tokens, seed=profile.seed)
    return prompt.to(profile.device)


def _generate(system: System, job: Job, prompt: torch.Tensor, new_tokens: int) -> tuple[list[float], list[int]]:
    kept = {} if job.profile.disable_kv_swap else {"cache_implementation": "offloaded"}
    return timed_tokens(system.model, prompt, new_tokens, **kept)


def timed_tokens(model: Any, prompt: torch.Tensor, new_tokens: int, **options: Any) -> tuple[list[float], list[int]]:
    """Generate greedily; return each token's seconds until it is on the host, and the first sequence's new tokens.

    ``prompt`` is int64 of [batch, tokens]; the first token's seconds begin with the call.
    """
    times = TokenTimes()
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=[times],
            pad_token_id=0,
            **options,
        )
    seconds = [late - early for early, late in itertools.pairwise([start, *times.stamps])]
    return seconds, output[0, prompt.shape[1] :].tolist()


class GpuLink:
    """PCIe. Its ceiling is the rate of pinned copies; the system says how many bytes it has copied."""

    name = "pcie"

    def ceiling(self) -> float:
        """Return the raw rate, bytes/s."""
        return pinned_h2d_rate(_LINK_CHUNK, _LINK_SAMPLE)

    def moved(self, system: System) -> int:
        """Return the bytes that have crossed so far."""
        return system.link_bytes()


class DiskLink:
    """The disk. Its ceiling is the rate of parallel direct reads; the kernel says how many bytes were read.

    The kernel's count is the same measure for every system, and leaves out what came from the page cache. Where the
    file system is not a local disk the kernel counts nothing; then the system's own count is taken.
    """

    name = "disk"

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._size = sum(path.stat().st_size for path in files)
        self._counted = False

    def ceiling(self) -> float:
        """Return the raw rate, bytes/s; sees along the way whether the kernel counts these reads."""
        sample = min(_DISK_SAMPLE, self._size)
        chunk = min(_DISK_CHUNK, self._size // (4 * THREADS))
        read = _read_bytes()
        rate = read_rate(self._files, sample, chunk)
        self._counted = _read_bytes() - read > sample // 2
        return rate

    def moved(self, system: System) -> int:
        """Return the bytes that have crossed so far."""
        return _read_bytes() if self._counted else system.link_bytes()


def drop_pages(paths: Iterable[Path]) -> None:
    """Drop these files' pages from the page cache, after writing back what is dirty; needs no privilege.

    Pages that a process has mapped stay.
    """
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes() -> int:
    """Return the bytes this process has fetched from storage so far; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def peak_device(peak: MemoryPeak, *, on_gpu: bool, host_bytes: int) -> int:
    """Return the peak of device memory, bytes; where a process has several GPUs, that of the fullest.

    On a CPU the device is what a system added to the process's anonymous memory, less the ``host_bytes`` of weights
    that it keeps aside in host memory: residents, ring, KV cache, activations and scratch of its libraries.
    """
    if on_gpu:
        return max(_peak_of(gpu, bare) for gpu, bare in peak.bare_device_bytes.items())
    return max(peak.anon_bytes - peak.bare_bytes - host_bytes, 0)


def _peak_of(gpu: int, bare_bytes: int) -> int:
    free, total = torch.cuda.mem_get_info(gpu)
    used = gpus.gpu_used_bytes(gpu) or total - free
    context = used - bare_bytes - torch.cuda.memory_reserved(gpu)
    return torch.cuda.max_memory_reserved(gpu) + max(context, 0)
