"""Generated faults: hostile words in a run, damaged files, and processes that are killed, then asked again.

By default a few hundred cases in about a minute; ``DJINN_FAULTS_SCALE=10`` makes them ten times as many.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from fabricated import fabricated, failed
from fake_baseline import FAKE, command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from djinn.artifact import provenance, report
from djinn.artifact.bundle import verify
from djinn.artifact.provenance import write_provenance
from djinn.artifact.report import write_report
from djinn.bench.records import append_record, read_records
from djinn.bench.run import Run
from djinn.errors import DjinnError
from djinn.figures import draw, draw_all
from djinn.profiles import Profile, load_profile
from djinn.weights.synthetic_checkpoint import synthesise

pytestmark = pytest.mark.slow

SCALE = float(os.environ.get("DJINN_FAULTS_SCALE", "1"))
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SPACED = r"""
<script>alert(1)</script> <img/src=x/onerror=alert(1)> </td></tr></table> "><b> <!-- &lt; ' ![x](http://e.example/x.png)
[x](javascript:alert(1)) https://e.example www.e.example a_b *b* | \| \ ` ~~ =1+1 +1 -1+1 @SUM(A1) [red] [/x] $x$ $ {x}
{{7}} {%raw%} -- ../../x é 漢
"""
PIECES = [
    *_SPACED.split(),
    "\n\n# Claims: 99 PASS\n",
    "\r",
    "\t",
    " ",
    "\x1b[31m",
    "\x1b]0;x\x07",
    "\u202e",
    "\u2028",
    "\x00",
]
words = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=6).map("".join).filter(str.strip)
slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def cases(number: int) -> Callable[..., Any]:
    return settings(max_examples=max(1, round(number * SCALE)), suppress_health_check=slow, database=None)


def only_the_table(_: Figure, frame: pd.DataFrame, stem: Path, *, paper: bool) -> list[Path]:
    """Stands in for saving a figure, which takes most of a second."""
    stem.parent.mkdir(exist_ok=True)
    frame.map(draw._cell).to_csv(stem.with_suffix(".csv"), index=False)
    stem.with_suffix(".png").write_bytes(b"a picture")
    return []


SAVE = draw.save
EXPECTED = cache(report.expected)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reference runs measured is read once, and git is asked nothing."""
    monkeypatch.setattr(report, "expected", EXPECTED)
    monkeypatch.setattr(provenance, "git_state", lambda: {"revision": None, "dirty": None})


@pytest.fixture
def whole(fabricated_run: Path) -> Path:
    """A run with every file that a report reads."""
    results = fabricated_run / "results"
    (results / "pcie.csv").write_text("time_s,rx_gbps,tx_gbps,source\n0.1,12.5,0.1,nvml\n1,12,,dmon\n")
    (results / "02_baselines.done.json").write_text(json.dumps({"notebook": "02_baselines", "wall_s": 600.5}))
    shutil.copy(Path(__file__).parents[2] / "data/reference/2-cores_2026-11-25/results/certify.json", results)
    write_provenance(fabricated_run, load_profile(fabricated_run / "profile.yaml"))
    (fabricated_run / "replayed.json").write_text(json.dumps({"machine": "two cores", "date": "2026-11-25"}))
    return fabricated_run


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What has reached the terminal so far."""
    return lambda: "".join(capfd.readouterr())


class Page(HTMLParser):
    """The tags of a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def same_shape(page: Page, plain: Page) -> None:
    """Hold a page of hostile words against one of plain words: no tag more, no address elsewhere."""
    assert page.tags == plain.tags
    assert [each for each in page.targets if not each.startswith("data:")] == [
        each for each in plain.targets if not each.startswith("data:")
    ]


def with_words(run: Path, profile: Profile, say: Callable[[str], str]) -> tuple[Page, Page]:
    """Write a run whose every free word is what ``say`` makes of a plain one; return its page and its Markdown."""
    results = run / "results"
    document = profile.model_dump(mode="json") | {"title": say("title"), "systems": ["djinn", "djinn:lossless"]}
    (run / "profile.yaml").write_text(yaml.safe_dump(document))
    for path in results.glob("*.jsonl"):
        path.unlink()
    gpu, model, reason = say("GPU"), say("model"), say("reason")
    append_record(results / "baselines.jsonl", fabricated(profile, "djinn", 0, device_name=gpu, model=model))
    coded = fabricated(profile, "djinn:lossless", 0, settings={f"bits {say('kind')}": 11.2, say("key"): say("value")})
    append_record(results / "baselines.jsonl", coded)
    append_record(results / "baselines.jsonl", failed(profile, "accelerate:disk", 0, "error", reason))
    append_record(results / "baselines.jsonl", failed(profile, "resident", 0, "unavailable", reason))
    unit, cause = say("unit"), say("cause")
    for lane in ("copy", "compute"):
        span = {"lane": lane, "unit": unit, "start_s": 0.0, "end_s": 1.0, "nbytes": 5, "cause": cause}
        with (results / "timeline.jsonl").open("a") as file:
            file.write(json.dumps(span) + "\n")
    (run / "replayed.json").write_text(json.dumps({"machine": say("machine"), "date": say("date")}))
    origin = json.loads((run / "provenance.json").read_text())
    origin["machine"] |= {"cpu": say("cpu"), "gpus": [{"index": 0, "name": gpu, "memory_bytes": 5}]}
    (run / "provenance.json").write_text(json.dumps(origin | {"revision": say("revision")}))
    draw_all(run)
    page = Page(write_report(run).read_text())
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return page, Page(markdown.render((run / "report.md").read_text()))


@cases(20)
@given(data=st.data(), drawn=st.integers(0, 19))
def test_hostile_words_are_words_wherever_they_are_shown(
    whole: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, data: st.DataObject, drawn: int
) -> None:
    profile = load_profile("smoke_13b")
    monkeypatch.setattr(draw, "save", only_the_table)
    plain_page, plain_text = with_words(whole, profile, lambda word: word)
    said()
    if drawn == 7:
        monkeypatch.setattr(draw, "save", SAVE)
    page, text = with_words(whole, profile, lambda word: data.draw(words, label=word))
    same_shape(page, plain_page)
    same_shape(text, plain_text)
    for path in (whole / "report.md", whole / "index.html", *(whole / "figures").glob("*.csv")):
        assert not CONTROLS.search(path.read_text()), path.name
    for path in (whole / "figures").glob("*.csv"):
        for row in csv.reader(io.StringIO(path.read_text())):
            assert not [cell for cell in row if re.match(r"[=+@-](?![\d.]+(e[+-]?\d+)?$)", cell)], path.name
    assert not CONTROLS.search(said().replace("\r\n", "\n"))
    assert verify(whole) > 0


READ = (
    *("profile.yaml", "provenance.json", "replayed.json", "SHA256SUMS", "results/certify.json", "results/pcie.csv"),
    *("results/baselines.jsonl", "results/sweep.jsonl", "results/timeline.jsonl", "results/timeline_coded.jsonl"),
    *("results/02_baselines.done.json", "results/claims.json"),
)
VALUES = [b"9" * 400, *b'null -1 1e999 NaN "x" [] {} true 0 "\\ud800" 1e308 5e-324'.split()]


def damaged(before: bytes, chance: random.Random) -> bytes:
    """Return a file with a few bytes changed, cut off, put in, or a value in the place of another."""
    kind = chance.choice(("flip", "cut", "put", "value", "value", "value", "empty", "deep"))
    place = chance.randrange(len(before) + 1)
    if kind == "flip":
        changed = bytearray(before)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(before))] = chance.randrange(256)
        return bytes(changed)
    if kind == "cut":
        return before[:place]
    if kind == "put":
        return before[:place] + chance.randbytes(chance.randint(1, 8)) + before[place:]
    if kind == "value":
        found = list(re.finditer(rb'(?<=[:,\[ ])("[^"\n]*"|-?[0-9][0-9.e+-]*|null|true|false)(?=[,}\]\n])', before))
        if found:
            match = chance.choice(found)
            return before[: match.start()] + chance.choice(VALUES) + before[match.end() :]
    return b"" if kind == "empty" else b"[" * 50_000


def use(run: Path, *, drawn: bool = True) -> None:
    """Do all that a person does with a finished run; ``drawn`` or not, everything that is drawn is read."""
    with contextlib.suppress(DjinnError):
        verify(run)
    draw_all(run) if drawn else list(draw._figures(Run(run), None))
    write_report(run)
    write_provenance(run, load_profile(run / "profile.yaml"))


def test_damaged_files_are_right_or_refused_by_name(
    whole: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(whole)
    monkeypatch.setattr(draw, "save", only_the_table)
    chance = random.Random(1)
    kept = {name: (whole / name).read_bytes() for name in READ}
    outcomes: Counter[str] = Counter()
    for case in range(round(180 * SCALE)):
        name = READ[case % len(READ)]
        wrong = damaged(kept[name], chance)
        (whole / name).write_bytes(wrong)
        try:
            use(whole, drawn=case % 31 == 30)
            outcomes["right"] += 1
        except DjinnError as error:
            outcomes["refused" if Path(name).name in str(error) else f"{name}: {error}"] += 1
        except Exception as error:
            outcomes[f"{name}: {type(error).__name__}: {error}: {wrong[:300]!r}"] += 1
        for each, data in kept.items():
            (whole / each).write_bytes(data)
    assert not CONTROLS.search(said().replace("\r\n", "\n"))
    print(f"damaged files: {outcomes['right']} right, {outcomes['refused']} refused")
    assert set(outcomes) == {"right", "refused"}
    assert outcomes["refused"] > outcomes.total() / 4


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Start ``djinn`` in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["djinn.bench.harness", "djinn.bench.statistics", "djinn.cli", "fake_baseline"])

    def begin(arguments: list[str], log: Path) -> Any:
        process = context.Process(target=command, args=(arguments, str(log)))
        process.start()
        return process

    return begin


def workers_in(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if FAKE[1] in (process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                if any(file.path.startswith(f"{run}/") for file in process.open_files()):  # its log
                    found.append(process)
    return found


def lines_in(path: Path) -> int:
    """Return how many lines are whole; one that is being written need not be."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_baseline_that_is_ended_goes_on_where_it_was(start: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    synthesise("llama-tiny", checkpoint, progress=False)
    chance = random.Random(1)
    log = tmp_path / "log"
    outcomes: Counter[str] = Counter()
    for case in range(round(6 * SCALE)):
        run = tmp_path / f"run{case}"
        profile = tmp_path / "mine.yaml"
        document = load_profile("smoke_tiny").override(
            model=str(checkpoint), runs=4, new_tokens=3, systems=["djinn", "accelerate:disk", "resident"],
            interleave=bool(case % 2),
        )  # fmt: skip
        profile.write_text(yaml.safe_dump(document.model_dump(mode="json")))
        arguments = ["baseline", "all", "--profile", str(profile), "--output-dir", str(run), "--json"]
        records = run / "results" / "baselines.jsonl"
        number = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process = start(arguments, log)
        measured = chance.randrange(12)  # by records, since how long they take says how busy the machine is
        while process.is_alive() and lines_in(records) < measured:
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.02 if measured else 0.5))
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(30)
        told = {signal.SIGTERM: 143, signal.SIGINT: 130}
        assert process.exitcode in (0, -number, told.get(number)), (case, number, log.read_text()[-2000:])
        outcomes["finished first" if process.exitcode == 0 else number.name] += 1
        before = read_records(records)
        if process.exitcode in told.values() and len(before) < 12:  # else it was cleaning up already
            assert not (run / "scratch").exists()
        deadline = time.monotonic() + 10
        while workers_in(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not workers_in(run)
        process = start(arguments, log)
        process.join(60)
        assert process.exitcode == 0, log.read_text()[-2000:]
        after = read_records(records)
        assert after[: len(before)] == before
        points = [record.point for record in after]
        assert len(points) == len(set(points)) == 12
        assert {record.status for record in after} == {"ok"}
        assert not (run / "scratch").exists()
        assert not list(run.rglob("*.part"))
        assert not workers_in(run)
    print(f"ended: {dict(outcomes)}")
