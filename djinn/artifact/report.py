"""The report of a run, as Markdown and as one HTML page that needs no network: systems, claims, figures, machine."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from djinn.artifact.answer import answer, beside, lines
from djinn.artifact.bundle import write_sums
from djinn.artifact.by_gpu import ABOUT, by_gpu_frame
from djinn.artifact.claims import Outcome, claims_frame, write_claims
from djinn.artifact.closing import counted
from djinn.artifact.notebook import configuration_frame, machine_frame
from djinn.artifact.reference import expected, read_manifest
from djinn.artifact.zoomable import timelines
from djinn.bench.records import Record
from djinn.bench.run import Done, Run
from djinn.bench.statistics import summary_frame, tokens_agree
from djinn.errors import ConfigError
from djinn.figures import frames, per_gpu
from djinn.figures.style import display_name
from djinn.files import write_text
from djinn.hardware import Machine
from djinn.sizes import format_bytes
from djinn.text import markdown, one_line

FIGURES = {
    "headline": "Time per token of each system, and how much faster djinn is",
    "time_per_token": "Time per token of each system",
    "ttft": "Time to first token of each system",
    "bandwidth": "Rates over the link and of weights consumed, of each system, against the link's ceiling",
    "device_memory": "Peak device memory of each system against the model's size and the budget",
    "loading": "Loading time of each system",
    "token_parts": "Where a token's time goes: computing, decoding, waiting",
    "budgets": "Time per token by budget, predicted and measured",
    "predictions": "Predicted times against measured ones",
    "copy_rates": "How fast each copy was",
    "bits_per_weight": "Bits that coded tensors take, by kind of tensor",
    "chunk_sweep": "Rate over the link by chunk size",
    "ring_sweep": "Rate over the link by ring size",
    "budget_sweep": "Hit rate of experts and time per token by budget",
    "batch_sweep": "Tokens per second by batch",
    "prompt_sweep": "Time to first token by length of the prompt",
    "timeline": "Copies, compute and waiting over time",
    "timeline_coded": "Copies, decoding and waiting over time, with coded weights",
    "pcie": "What each GPU counts on its link",
}
"""The figures a report shows, in order, with the words for readers who cannot see them."""

_MEASURES = {
    "time to first token, s": "ttft_s",
    "time per token, s": "token_s",
    "link, GB/s": "link_gbps",
    "ceiling of the link, GB/s": "ceiling_gbps",
    "share of the ceiling": "link_utilisation",
    "share of bare copies": "bare_share",
    "effective, GB/s": "effective_gbps",
}
_OF_MIXTURES = {"picked experts found in the pool": "hit_rate"}
_SIZES = {
    "model": "model_bytes",
    "resident weights": "resident_bytes",
    "peak device memory": "peak_device_bytes",
    "peak host memory": "peak_host_bytes",
    "peak anonymous host memory": "peak_anon_bytes",
}


def write_report(run_dir: Path) -> Path:
    """Evaluate the claims of a run, write ``report.md``, ``index.html`` and checksums; return the page's path.

    Raises:
        ConfigError: no run directory, or a damaged result file.
    """
    run = Run(run_dir)
    if not run.has_profile:
        raise ConfigError(f"{run_dir} is not a run directory: it has no profile.yaml, which the notebooks write")
    context = _context(run)
    # The page's templates escape what they insert. For Markdown nothing does, so that it gets harmless words alone.
    contexts = {"report.md": _each(markdown, context), "index.html": _each(one_line, context)}
    templates = Environment(
        loader=PackageLoader("djinn.artifact"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, words in contexts.items():
        write_text(run_dir / name, templates.get_template(f"{name}.j2").render(words))
    write_sums(run_dir)
    return run_dir / "index.html"


def _context(run: Run) -> dict[str, Any]:
    run_dir, profile, provenance = run.folder, run.profile, run.provenance
    outcomes = write_claims(run_dir)
    counts = Counter(outcome.verdict for outcome in outcomes)
    machine = run.machine
    applied = [outcome for outcome in outcomes if outcome.verdict != "NOT RUN"]
    lacking: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.verdict == "NOT RUN":
            lacking.setdefault(outcome.lacking or "records that this run does not have", []).append(outcome)
    reference = {} if run.replayed else expected(profile.device)
    figures = dict(_names(run_dir))
    drawn = [_figure(run, name, words) for name, words in figures.items() if _png(run_dir, name).is_file()]
    return {
        "title": profile.title,
        "synthetic": profile.synthetic,
        "replayed": run.replayed,
        "when": _when(run),
        "machine_words": _machine_words(machine),
        "answer": answer(run.baselines),
        "beside": beside(run.baselines),
        "headline": next((figure for figure in drawn if figure["name"] == "headline"), None),
        "narrow": _picture(run_dir, "headline_narrow"),
        "counted": counted(outcomes),
        "counts": {verdict: counts[verdict] for verdict in ("PASS", "FAIL")},
        "lines": [asdict(line) for line in lines(run.baselines, list(profile.systems))],
        "notes": _notes(run),
        "systems": _rows(systems_frame(run.baselines, list(profile.systems)).reset_index(names="")),
        "by_gpu": _rows(by_gpu_frame(run.baselines)),
        "about_by_gpu": ABOUT,
        "applied": _rows(claims_frame(applied, reference)),
        "not_run": {what: _rows(claims_frame(own, reference)) for what, own in lacking.items()},
        "has_reference": bool(reference),
        "figures": [figure for figure in drawn if figure["name"] != "headline"],
        "missing_figures": [words for name, words in figures.items() if not _png(run_dir, name).is_file()],
        "timelines": timelines(run_dir, FIGURES),
        "notebooks": [_notebook(run_dir, name, done) for name, done in run.notebooks_done.items()],
        "machine": machine_frame(machine.model_dump(mode="json") if machine else {})["value"].to_dict(),
        "configuration": configuration_frame(profile)["value"].to_dict(),
        "revision": provenance.get("revision"),
        "dirty": provenance.get("dirty"),
    }


def _when(run: Run) -> str:
    """Return the day on which the run's first notebook began; nothing where none has ended."""
    began = [str(done["began_at"]) for done in run.notebooks_done.values() if "began_at" in done]
    return min(began, default="")[:10]


def _machine_words(machine: Machine | None) -> str:
    if machine is None:
        return ""
    names = [gpu.name for gpu in machine.gpus]
    parts = [f"{len(names)} x {names[0]}" if len(names) > 1 else names[0]] if names else []
    return ", ".join([*parts, *([machine.cpu] if machine.cpu else []), f"{format_bytes(machine.ram_bytes)} of RAM"])


def _notes(run: Run) -> dict[str, list[str]]:
    """Return what a replayed run's manifest says of its records: of the comparison's, and of all others."""
    path = run.folder / "manifest.json"
    files = read_manifest(run.folder).files if run.replayed and path.is_file() else {}
    said = {name: source.notes for name, source in files.items() if source.notes}
    compared = said.pop("results/baselines.jsonl", "")
    return {"compared": [compared] if compared else [], "others": [f"{name}: {note}" for name, note in said.items()]}


def systems_frame(records: list[Record], systems: list[str]) -> pd.DataFrame:
    """Return the systems side by side, in words: one column each, one row per measure.

    A measure is its median with the range of the runs, from five on the interval of the median; one that is missing is
    empty, and a measure that no system has is left out. A system that stays loaded was loaded once, so loading has no
    interval.
    """
    summary = {str(row["label"]): row for row in summary_frame(records).to_dict("records")}
    agree = tokens_agree(records)
    words = frames.gaps(frames.runs(records, systems), "generate_s")
    measures = _MEASURES | (_OF_MIXTURES if any(record.hit_rate is not None for record in records) else {})
    columns = {}
    for name in dict.fromkeys([*systems, *summary]):
        row: Mapping[Any, Any] = summary.get(name, {})
        columns[display_name(name)] = {
            "status": words.get(name, "ok"),
            "reason": row.get("reason", ""),
            "finished runs": str(row.get("runs", 0)),
            "loading, s": _number(row, "load_s_median"),
            **{title: _spread(row, measure) for title, measure in measures.items()},
            **{title: _size(row, size) for title, size in _SIZES.items()},
            "same tokens": {True: "yes", False: "NO", None: "nothing to compare" if row.get("runs") else ""}[
                agree.get(name)
            ],
        }
    frame = pd.DataFrame(columns)
    return frame[(frame != "").any(axis=1)]


def _spread(row: Mapping[Any, Any], measure: str) -> str:
    median, low, high = (row.get(f"{measure}_{part}", math.nan) for part in ("median", "low", "high"))
    if math.isnan(median):
        return ""
    scale, unit = (100, "%") if measure in ("link_utilisation", "bare_share", "hit_rate") else (1, "")
    spread = "" if math.isnan(low) else f" ({scale * low:.3g} to {scale * high:.3g})"
    return f"{scale * median:.3g}{unit}{spread}"


def _number(row: Mapping[Any, Any], column: str) -> str:
    value = row.get(column, math.nan)
    return "" if math.isnan(value) else f"{value:.3g}"


def _size(row: Mapping[Any, Any], column: str) -> str:
    size = row.get(column, math.nan)
    return "" if math.isnan(size) else format_bytes(size)


def _rows(frame: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(column): str(value) for column, value in row.items()} for row in frame.to_dict("records")]


def _png(run_dir: Path, name: str) -> Path:
    return run_dir / "figures" / f"{name}.png"


def _names(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Yield :data:`FIGURES`; behind the first GPU's timelines those of other GPUs that were drawn."""
    for name, words in FIGURES.items():
        yield name, words
        if name in per_gpu.TIMELINES.values():
            gpu = 1
            while _png(run_dir, f"{name}_{gpu}").is_file():
                yield f"{name}_{gpu}", f"{words}, on GPU {gpu}"
                gpu += 1


def _picture(run_dir: Path, name: str) -> str:
    """Return a figure as the page holds it; nothing where it was not drawn."""
    png = _png(run_dir, name)
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}" if png.is_file() else ""


def _figure(run: Run, name: str, words: str) -> dict[str, str]:
    folder = run.folder / "figures"
    trace, caption = f"{name}.trace.json", folder / f"{name}.caption.txt"
    return {
        "name": name,
        "words": words,
        # The page says at its top whose records it shows.
        "caption": caption.read_text().strip().removesuffix(run.replayed) if caption.is_file() else "",
        "png": _picture(run.folder, name),
        "trace": trace if (folder / trace).is_file() else "",
    }


def _each(harmless: Callable[[str], str], value: Any) -> Any:
    """Return ``value`` with every string in it, however deep, made harmless."""
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, Mapping):
        return {harmless(str(key)): _each(harmless, each) for key, each in value.items()}
    return [_each(harmless, each) for each in value] if isinstance(value, list | tuple) else value


def _notebook(run_dir: Path, name: str, done: Done) -> dict[str, str]:
    executed, page = f"notebooks/{name}.ipynb", f"notebooks/{name}.html"
    return {
        "name": name,
        "link": quote(executed) if (run_dir / executed).is_file() else "",
        "page": quote(page) if (run_dir / page).is_file() else "",
        "seconds": f"{done['wall_s']:.0f}",
    }
