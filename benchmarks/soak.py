"""What takes too long for a test: loads without end, passes under random delays, kills, full disks, limits.

    python benchmarks/soak.py [--parts loads passes kills full limits] [--scale 1.0] [--seed 0] [--output soak.jsonl]

- ``loads``: 1,000 loads, passes and detaches in one process after 100; what each adds, against transformers' own loads.
- ``passes``: 10,000 passes while reads end in any order; logits against the resident model's after every one.
- ``kills``: SIGKILL at 50 random moments of synth, pack and reproduce, each time the same command again.
- ``full``: 50 disks that are full at a random byte, then larger, for synth and pack. Needs leave to mount a tmpfs.
- ``limits``: a memlock limit of 64 KiB; a cgroup that is too small for a worker. Needs leave to make a cgroup.

Every case is right, refused in one message, or a fault; a line of JSON for each part says how many, and names faults.
What a machine does not permit is left out, and said.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

import djinn
from djinn.bench.records import read_records
from djinn.engine.heap import trim_heap
from djinn.profiles import load_profile
from djinn.transport.reader import Reader
from djinn.weights.models import quiet

DJINN = (sys.executable, "-c", "from djinn.cli import main; main()")
SMALL, CODABLE = "llama-tiny", "gpt2"
WORK = {"prompt_tokens": 8, "new_tokens": 4, "device": "cpu"}


@dataclass
class Tally:
    """What came of the cases of one part."""

    part: str
    tried: int = 0
    right: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        """Count a case that should be right."""
        self.tried += 1
        self.right += holds
        if not holds:
            self.faults.append(otherwise)


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command of djinn's to its end."""
    return subprocess.run([*DJINN, *arguments], capture_output=True, text=True, timeout=900, check=False, **options)  # type: ignore[call-overload, no-any-return]


def said_clearly(finished: subprocess.CompletedProcess[str]) -> bool:
    """Return whether a command that did not succeed says why, without a traceback."""
    return finished.returncode in (1, 2) and "djinn: " in finished.stderr and "Traceback" not in finished.stderr


def loads(tally: Tally, count: int, chance: random.Random) -> None:
    """See the module's text."""
    folder = djinn.resolve(f"synthetic:{SMALL}")
    ids = torch.arange(4)[None]

    def by_transformers() -> None:
        with quiet(), torch.no_grad():
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids)

    def by_djinn() -> None:
        model = djinn.load(folder, budget="6 MB", coding=chance.choice([None, "lossless"]), **WORK)
        with torch.no_grad():
            model(ids)
        djinn.detach(model)

    theirs, ours = (_growth(load, count) for load in (by_transformers, by_djinn))
    # transformers reads the files by safetensors, which loses two Python ints of 32 bytes for each tensor.
    for what, more in {"files": 0, "threads": 0, "objects": 1, "blocks": 8, "bytes": 1024}.items():
        most = theirs[what] + more
        tally.expect(ours[what] <= most, f"{what}: {ours[what]:.1f} more for each load, at most {most:.1f} expected")
    tally.notes.append(f"{count} loads; more for each, freed memory aside: {ours}; without djinn: {theirs}")


def _growth(load: Callable[[], None], count: int) -> dict[str, float]:
    """Load ``count`` times; after a tenth as many; return what each load has added for good."""
    process = psutil.Process()

    def held() -> dict[str, int]:
        gc.collect()
        trim_heap()
        return {
            "files": process.num_fds(),
            "threads": threading.active_count(),
            "objects": len(gc.get_objects()),
            "blocks": sys.getallocatedblocks(),  # Python's own: all of them, while objects are those that refer
            "bytes": process.memory_info().rss,
        }

    for _ in range(count // 10 + 1):
        load()
    before = held()
    for _ in range(count):
        load()
    return {what: round((now - before[what]) / count, 1) for what, now in held().items()}


def passes(tally: Tally, count: int, chance: random.Random) -> None:
    """See the module's text."""
    folder = djinn.resolve(f"synthetic:{SMALL}")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = djinn.load(folder, budget="5 MB", host_memory="1 MB", **WORK)
    really = Reader.read

    def late(self: Reader, *arguments: object) -> int:
        if chance.random() < 0.2:
            time.sleep(chance.random() * 2e-3)
        return really(self, *arguments)  # type: ignore[arg-type]

    Reader.read = late  # type: ignore[assignment, method-assign]
    try:
        with torch.no_grad():
            for number in range(count):
                ids = torch.randint(whole.config.vocab_size, (1, 4))
                if chance.random() < 0.05:
                    djinn.cool(model)
                tally.expect(torch.equal(model(ids).logits, whole(ids).logits), f"pass {number}: other logits")
    finally:
        Reader.read = really  # type: ignore[method-assign]
    tally.notes.append(f"{djinn.stats(model).link_bytes} bytes streamed")


def kills(tally: Tally, count: int, chance: random.Random) -> None:
    """See the module's text."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        profile = work / "soak.yaml"
        text = load_profile("smoke_tiny").override(name="soak", systems=["djinn"], runs=2)
        profile.write_text(text.model_dump_json())
        commands = {
            "synth": ("synth", CODABLE, "--output-dir", str(work / "checkpoint")),
            "pack": ("pack", str(work / "checkpoint"), str(work / "packed"), "--device", "cpu"),
            "reproduce": ("reproduce", "--profile", str(profile), "--run-dir", str(work / "run")),
        }
        for command, arguments in commands.items():
            seconds = 30.0
            for _ in range(count // len(commands)):
                begun = time.perf_counter()
                finished = _killed(arguments, chance.random() * seconds)
                if finished is not None:
                    seconds = time.perf_counter() - begun
                    tally.expect(finished == 0, f"{command} ended with {finished}")
                    _begin_again(command, work)
                else:
                    tally.expect(True, "")
            last = run(*arguments)
            tally.expect(last.returncode == 0, f"{command} after its kills: {last.stderr[-500:]}")
        points = [record.point for record in read_records(work / "run" / "results" / "baselines.jsonl")]
        tally.expect(len(points) == len(set(points)), "a record twice")
        verified = run("verify", str(work / "run"))
        tally.expect(verified.returncode == 0, verified.stderr)
        back = run("unpack", str(work / "packed"), str(work / "back"), "--device", "cpu")
        tally.expect(back.returncode == 0, back.stderr)
        for path in (work / "checkpoint").glob("*.safetensors"):
            tally.expect(
                (work / "back" / path.name).read_bytes() == path.read_bytes(), f"{path.name} came back changed"
            )


def _killed(arguments: tuple[str, ...], after_s: float) -> int | None:
    """Kill a command and all that it started after some time; return its exit code if it was faster."""
    with subprocess.Popen(
        [*DJINN, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def _begin_again(command: str, work: Path) -> None:
    if command == "pack":
        shutil.rmtree(work / "packed")
    elif command == "reproduce":
        shutil.rmtree(work / "run")


@contextmanager
def disk_of(size: int) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes.

    Raises:
        PermissionError: this user may not.
    """
    folder = Path(tempfile.mkdtemp())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        folder.rmdir()
        raise PermissionError("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def full(tally: Tally, count: int, chance: random.Random) -> None:
    """See the module's text."""
    source = djinn.resolve(f"synthetic:{CODABLE}")
    needed = sum(path.stat().st_size for path in source.iterdir())
    for number in range(count):
        with disk_of(chance.randrange(2**20, needed)) as disk:
            if number % 2:
                arguments = ("synth", CODABLE, "--output-dir", str(disk / "out"))
            else:
                arguments = ("pack", str(source), str(disk / "out"), "--device", "cpu")
            first = run(*arguments)
            tally.tried += 1
            if first.returncode == 0:
                tally.right += 1
            elif said_clearly(first):
                tally.refused += 1
            else:
                tally.faults.append(f"{arguments[0]}: exit {first.returncode}: {first.stderr[-300:]}")
            subprocess.run(["mount", "-o", f"remount,size={4 * needed}", disk], check=True)
            again = run(*arguments)
            tally.expect(again.returncode == 0, f"{arguments[0]} again: {again.stderr[-300:]}")


def limits(tally: Tally, _: int, __: random.Random) -> None:
    """See the module's text."""
    arguments = ("generate", f"synthetic:{SMALL}", "--prompt", "x", "--budget", "5 MB", "--device", "cpu")
    lock = (64 * 1024, 64 * 1024)
    locked = run(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, lock))
    tally.expect(locked.returncode == 0, f"memlock of 64 KiB: {locked.stderr[-300:]}")
    root = Path("/sys/fs/cgroup")
    limit = "memory.max" if (root / "cgroup.controllers").is_file() else "memory/memory.limit_in_bytes"
    group = (root / limit).parent / f"djinn-soak-{os.getpid()}"
    try:
        if not (root / limit).parent.joinpath("cgroup.procs").is_file():
            raise PermissionError("no memory controller")
        group.mkdir()
        (group / Path(limit).name).write_text("450M")
    except OSError as error:
        tally.notes.append(f"no cgroup could be made: {error}")
        return
    with tempfile.TemporaryDirectory() as name:
        command = ("baseline", "djinn", "--profile", "smoke_tiny", "--runs", "1", "--output-dir", f"{name}/run")
        # The harness alone fits; its worker and itself do not, and the kernel ends one of the two.
        inside = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        ended = run(*command, preexec_fn=inside)
        records = read_records(Path(name) / "run" / "results" / "baselines.jsonl")
        recorded = [record.status for record in records]
        tally.notes.append(f"a cgroup of 450 MB: exit {ended.returncode}, records {recorded}")
        tally.expect("Traceback" not in ended.stderr, ended.stderr[-300:])
        again = run(*command)
        tally.expect(again.returncode == 0, again.stderr[-300:])
    group.rmdir()


PARTS: dict[str, tuple[Callable[[Tally, int, random.Random], None], int]] = {
    "loads": (loads, 1000),
    "passes": (passes, 10_000),
    "kills": (kills, 50),
    "full": (full, 50),
    "limits": (limits, 1),
}


def main() -> None:
    """Run the parts that were asked for, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tallies = []
    for part in arguments.parts:
        measure, count = PARTS[part]
        tally = Tally(part)
        try:
            measure(tally, max(round(count * arguments.scale), 1), random.Random(f"{arguments.seed} {part}"))
        except PermissionError as error:
            tally.notes.append(str(error))
        tallies.append(tally)
        print(json.dumps(asdict(tally)), flush=True)
        if arguments.output:
            with arguments.output.open("a") as lines:
                lines.write(json.dumps(asdict(tally)) + "\n")
    sys.exit(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    main()
