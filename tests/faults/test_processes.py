"""Processes and threads: forks, failed passes, threads that cannot be started, processes that are killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import djinn
from djinn.errors import CheckpointError, UnavailableError
from djinn.spill import remove_leftovers
from djinn.transport.feeder import Feeder, Fill
from djinn.transport.reader import Reader

Tiny = Callable[[str], Path]
WORK = {"prompt_tokens": 8, "new_tokens": 8, "device": "cpu", "host_memory": "40 KB"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


FORKED = """
import os, sys, torch, djinn, djinn.errors
model = djinn.load(sys.argv[1], budget=int(sys.argv[2]), prompt_tokens=8, new_tokens=8, device="cpu")
ids = torch.arange(5)[None]
wanted = model(ids).logits
reads, writes = os.pipe()
pid = os.fork()
if pid == 0:
    said = []
    for what in (lambda: model(ids), lambda: djinn.cool(model), lambda: djinn.detach(model)):
        try:
            what()
            said.append("no error")
        except djinn.errors.ConfigError as error:
            said.append(str(error))
    said.append(str(djinn.stats(model).passes))
    os.write(writes, "|".join(said).encode())
    os._exit(0)
os.waitpid(pid, 0)
print(os.read(reads, 10000).decode())
assert torch.equal(model(ids).logits, wanted)
"""


def budget_for(folder: Path) -> int:
    """A budget in which half of the weights stream."""
    planned = djinn.plan(folder, budget="1 GB", prompt_tokens=8, new_tokens=8, device="cpu")
    return planned.workspace_bytes + planned.model_bytes * 6 // 10


def test_a_forked_child_is_told_so_at_once(tiny_checkpoint: Tiny) -> None:
    """It has none of the threads that bring weights, and would wait for them for ever."""
    folder = tiny_checkpoint("llama")
    finished = python(FORKED, str(folder), str(budget_for(folder)))
    assert finished.returncode == 0, finished.stderr
    *refusals, passes = finished.stdout.strip().split("|")
    assert len(refusals) == 3
    assert all("streams in the process that loaded it" in said for said in refusals)
    assert passes == "1"


def truncated(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 1000)


def test_failed_passes_leave_nothing(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Three models whose files are cut while they stream: as many files, threads and models as with none."""

    def failing(number: int) -> weakref.ref[torch.nn.Module]:
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in tiny_checkpoint("llama").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        model = djinn.load(folder, budget=budget_for(folder), **WORK)
        model(torch.arange(5)[None])
        truncated(folder)
        djinn.cool(model)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="ends at byte 1000"):
                model(torch.arange(5)[None])
        return weakref.ref(model)

    def held() -> tuple[int, list[str]]:
        gc.collect()
        return psutil.Process().num_fds(), sorted(thread.name for thread in threading.enumerate())

    failing(0)  # what libraries start once for all, such as a progress bar's thread
    before = held()
    models = [failing(number) for number in range(1, 4)]
    files, threads = held()
    assert files <= before[0]  # of earlier tests some may have been closed since
    assert len(threads) <= len(before[1])
    assert [model() for model in models] == [None] * 3


def test_threads_that_cannot_be_started_are_refused_when_a_model_is_loaded(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    before, started = threading.active_count(), []
    really = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("djinn-reader") and len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        really(thread)

    folder = tiny_checkpoint("llama")
    budget = budget_for(folder)
    started.clear()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(UnavailableError, match="the system starts no more"):
        djinn.load(folder, budget=budget, **WORK)
    monkeypatch.undo()
    assert threading.active_count() == before


def test_copies_that_were_given_end_before_their_unit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring starts anew after an error, and a piece that goes on would land in another unit's slot."""
    reader = Reader(4096, threads=2)
    feeder, ended, gate = Feeder(reader), [], threading.Event()
    really = reader.pool.submit

    def submit(move: Callable[[], float]) -> object:
        if len(given) == 2:
            raise RuntimeError("cannot schedule new futures after shutdown")
        given.append(move)
        return really(move)

    def move() -> float:
        gate.wait()
        time.sleep(0.05)
        ended.append(time.perf_counter())
        return ended[-1]

    given: list[object] = []
    monkeypatch.setattr(reader.pool, "submit", submit)
    fill = Fill()
    feeder.begin(fill, [move] * 3)
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(RuntimeError):
        fill.wait()
    assert len(ended) == 2
    monkeypatch.undo()
    feeder.close()
    reader.close()


COLLECTED = """
import gc, sys, threading, time, djinn
from djinn.engine import closing
from djinn.engine.load import engine_of
from djinn.transport.feeder import Fill
closing.PATIENCE_S = 0.1
model = [djinn.load(sys.argv[1], budget=int(sys.argv[2]), prompt_tokens=8, new_tokens=8, device="cpu")]
where = sys.argv[3]
begin = engine_of(model[0]).copier._feeder.begin

def collect():
    model.clear()
    gc.collect()
    return time.perf_counter()

def moves():
    if where == "feeder":
        collect()
    yield collect if where == "reader" else time.perf_counter

if where == "start of a thread":
    with threading._shutdown_locks_lock:
        collect()
else:
    begin(Fill(), moves())
while any(thread.name.startswith("djinn-reader") for thread in threading.enumerate()):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("where", ["reader", "feeder", "start of a thread"])
def test_a_model_may_be_collected_where_threads_cannot_be_waited_for(tiny_checkpoint: Tiny, where: str) -> None:
    """On one that it would wait for itself, or while Python holds a lock that every thread needs to end."""
    folder = tiny_checkpoint("llama")
    finished = python(COLLECTED, str(folder), str(budget_for(folder)), where)
    assert finished.returncode == 0, finished.stderr


KILLED = """
import os, signal, sys
from djinn.spill import spill_folder
with spill_folder() as folder:
    (folder / "experts.safetensors").write_bytes(bytes(1000))
    print(folder, flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_what_a_killed_process_left_is_removed_at_the_next_load(temporary: Path, how: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, how], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -getattr(signal, how)
    left = Path(killed.stdout.strip())
    djinn.plan("synthetic:llama-tiny", budget="6 MB", device="cpu", prompt_tokens=8, new_tokens=4)
    assert left.is_dir()  # a plan does not look for it
    model = djinn.load("synthetic:llama-tiny", budget="6 MB", device="cpu", prompt_tokens=8, new_tokens=4)
    assert left not in temporary.iterdir()
    djinn.detach(model)
    assert list(temporary.iterdir()) == []


def test_what_a_living_process_needs_stays(temporary: Path) -> None:
    command = [sys.executable, "-c", KILLED, "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        folder = Path(living.stdout.readline().strip())
        (temporary / "djinn-of-somebody-else").mkdir()
        (temporary / "djinn-link").symlink_to(folder)
        remove_leftovers()
        assert (folder / "experts.safetensors").is_file()
        assert len(list(temporary.iterdir())) == 3
        living.kill()
    remove_leftovers()
    assert not folder.exists()
    assert (temporary / "djinn-of-somebody-else").is_dir()
