"""The generated pages: docs/results.md, docs/claims.md and README's picture, from the reference records alone.

python -m djinn.artifact.pages        writes them anew, the verdicts on claims beside the records, and checksums
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from djinn.artifact.bundle import write_sums
from djinn.artifact.claims import Claim, Outcome, evaluate, load_claims, target_words, write_claims
from djinn.artifact.metrics import read_evidence
from djinn.artifact.pictures import models_frame, write_figures, write_picture
from djinn.artifact.reference import Manifest, Source, folders, read_manifest, run_of, runs
from djinn.bench.records import Record, read_records
from djinn.bench.run import Run
from djinn.bench.statistics import summary_frame
from djinn.figures import across, headline
from djinn.figures.style import display_name
from djinn.files import write_text
from djinn.places import REFERENCE_DIR, ROOT
from djinn.profiles import load_profile
from djinn.sizes import format_bytes

DOCS = ROOT / "docs"
_TABLES = ("baselines.jsonl", "benchmark.jsonl")
"""Files of run records that get a table; the points of a sweep are for its figure."""

_WRITTEN = "<!-- Written by `python -m djinn.artifact.pages`; changes by hand are lost. -->"

_RESULTS = f"""# Results

{_WRITTEN}

These tables are made from the records in [data/reference](../data/reference) alone. The newest record of each machine
and model stands first; older and partial records stand below the line. The words are those of the
[glossary](architecture.md#terms).

- Times and rates are medians over the finished runs, memory is the largest peak. A run's time per token is the median
  of its tokens after the first.
- All weights are synthetic: seeded random numbers in the shape of the model.
- Versions of torch and transformers are given where they were recorded. On GPUs they are those of the machine's image,
  older than those of `requirements.lock`.
- **device memory** is the peak of what a system took of its budget. Without a GPU it is what the process grew by, less
  weights kept in host memory. **host memory** is anonymous memory: what the kernel cannot take back by itself.
- **of the ceiling** is the link's rate over its raw rate, which was measured beside each run: pinned copies of a small
  buffer to a GPU, direct reads from a disk. Where a run was faster than the raw rate by more than that itself
  varied, it says so: then it is no ceiling.
- **of bare copies** is the link's rate over that of copies of the same weights with nothing computed, directly before
  and after the run. Only the newest record has it.
- **djinn is** and **djinn, coded is** say how much faster djinn generates a token than the system of that row.
- Rows with different budgets are different settings of a system. They are no comparison.
- "Device memory capped" in the name of a machine means that the budget was smaller than the GPU's memory.

![Time per token of CodeLlama-34B in 11.2 GB of an H200, by system](images/headline.png)

![Time per token of each system over djinn's, for three models](images/models.png)

Right of the line djinn is faster. Each model has a machine and a budget of its own: the tables below. {{unfilled}}

![Time per token of Llama-2-70B by budget, predicted and measured](images/budgets.png)

Lines are what `djinn plan` predicts with the rates that were measured there. Marks are what the systems then took.
Below 16 GB the rest exceeds the 123 GB of pinned memory that the profile allows, and comes from disk.
"""

_CLAIMS = f"""# Claims

{_WRITTEN}

[artifact/claims.yaml](../artifact/claims.yaml) holds every claim as data. Code evaluates it over the records of a run
and says PASS, FAIL or NOT RUN, with the reason. A claim whose inputs are missing never passes. The target itself is the
limit: there is no tolerance. Of C4a and C4b the half is judged that limits the run. The paper is the experiment plan
that this artifact implements ([APPENDIX.md](../artifact/APPENDIX.md#scope)).

To check a claim yourself, run `make reproduce PROFILE=<run>` with the name in the column **run**, and open the page
that it writes. That takes two minutes of your time; **minutes** and **disk** are the machine's. The column
**reference** is what our run of that profile measured, or our newest run that measured it. Another machine may
give other ratios, because link, disk, host and compute differ: each number is known of its own machine alone. A claim
that names a GPU is judged on that GPU alone.
"""

_GROUPS = {
    "Exact": ("streamed_equals_resident", "same_tokens", "coding_changes_no_token"),
    "Memory": ("device_memory_over_budget", "model_over_peak", "host_memory_gib"),
    "Bandwidth": ("disk_share", "compute_share", "link_gbps", "link_over_bare", "link_utilisation", "copy_share"),
    "Speed": ("time_over_best_peer", "ttft_s", "ttft_over_streaming"),
    "Coding": ("bits_per_weight", "decode_share"),
}
"""The groups of claims, by what they measure; a metric that is in none of them comes last."""


@dataclass(frozen=True)
class _Block:
    """One file of records that has a table."""

    folder: Path
    manifest: Manifest
    name: str
    source: Source
    records: list[Record]

    @property
    def subject(self) -> tuple[str, str]:
        """What the file is about: of several about the same machine and model, the newest counts."""
        return self.manifest.machine, self.records[0].model

    @property
    def rank(self) -> tuple[str, int, int]:
        """Newest first, then the largest model, then the most finished runs."""
        finished = [record for record in self.records if record.status == "ok"]
        return self.manifest.date, max((each.model_bytes or 0 for each in finished), default=0), len(finished)


def results_page(root: Path = REFERENCE_DIR) -> str:
    """Return docs/results.md: a section for each file that compares systems, with its command, table and notes."""
    blocks = sorted(_blocks(root), key=lambda block: block.rank, reverse=True)
    newest = {block.subject: block for block in reversed(blocks)}
    front = [block for block in blocks if newest[block.subject] is block]
    older = [block for block in blocks if newest[block.subject] is not block]
    words = "Each has a record above of the same machine and model, which is newer or holds more finished runs."
    sections = [_section(block) for block in front]
    sections += ["---\n", f"## Older and partial records\n\n{words}\n", *map(_section, older)] if older else []
    return "\n".join([_RESULTS.format(unfilled=across.unfilled(models_frame())), *sections])


def table(records: list[Record]) -> str:
    """Return a row per system and variant: medians over the finished runs, or why there is none."""
    head = ["system", "budget", "device memory", "host memory", "first token, s", "per token, s", "link, GB/s"]
    head += ["of the ceiling", "runs"]
    frame = summary_frame(records)
    with_bare = bool(frame["bare_share_n"].any())
    head[-1:-1] = ["of bare copies"] if with_bare else []
    ours = {name: _token_s(frame, name) for name in headline.OURS}
    ours = {name: seconds for name, seconds in ours.items() if seconds and len(frame) > 1}
    head += [f"{display_name(name)} is" for name in ours]
    rows = [_cells(head), _cells(["---"] * len(head))]
    for row in frame.to_dict("records"):
        cells = [display_name(row["label"]), format_bytes(int(row["budget_bytes"]))]
        if not row["runs"]:
            why = ["", "", f"{row['status']}: {row['reason']}", *[""] * (3 + with_bare)]
            rows.append(_cells([*cells, *why, "0", *[""] * len(ours)]))
            continue
        cells += [_size(row[f"peak_{where}_bytes"]) for where in ("device", "anon")]
        cells += [_number(row[f"{column}_median"]) for column in ("ttft_s", "token_s", "link_gbps")]
        exceeded = "" if row["is_ceiling"] else ", no ceiling"
        cells.append(f"{_percent(row['link_utilisation_median'])}{exceeded}")
        cells += [*([_percent(row["bare_share_median"])] if with_bare else []), str(row["runs"])]
        apart = row["label"] not in headline.OURS
        cells += [headline.faster(row["token_s_median"] / seconds) if apart else "" for seconds in ours.values()]
        rows.append(_cells(cells))
    return "\n".join(rows) + "\n"


def claims_page() -> str:
    """Return docs/claims.md: what shows each claim, what that takes, and what every reference run measured."""
    claims = load_claims()
    newest_first = sorted(runs(), key=lambda folder: read_manifest(folder).date, reverse=True)
    measured = {folder: _outcomes(folder, claims) for folder in newest_first}
    groups: dict[str, list[Claim]] = {group: [] for group in [*_GROUPS, "Other"]}
    for claim in claims:
        groups[next((name for name, metrics in _GROUPS.items() if claim.metric in metrics), "Other")].append(claim)
    parts = [_CLAIMS]
    for group, members in groups.items():
        if members:
            parts += [f"## {group}\n", _claims_table(members, measured)]
    parts += ["## What every reference run measured\n", _matrix(claims, measured)]
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Return the text of every generated page, by its path."""
    return {DOCS / "results.md": results_page(), DOCS / "claims.md": claims_page()}


def main() -> None:
    """Write the verdicts on each run's claims, the checksums, the generated pages and their figures."""
    for folder in runs():
        write_claims(folder)
    for folder in folders():
        write_sums(folder)
    for path, text in pages().items():
        write_text(path, text)
    write_picture()
    write_figures()


def _blocks(root: Path) -> Iterator[_Block]:
    for folder in folders(root):
        manifest = read_manifest(folder)
        for name, source in manifest.files.items():
            if Path(name).name in _TABLES:
                yield _Block(folder, manifest, name, source, read_records(folder / name))


def _section(block: _Block) -> str:
    machine, model = block.subject
    path = f"{_from_docs(block.folder)}/{block.name}"
    parts = [
        f"### {model}, {machine}\n",
        f"{block.manifest.date}, [{block.folder.name}/{block.name}]({path}), by `{block.source.command}`"
        f"{_software(block.folder)}.\n",
        table(block.records),
    ]
    return "\n".join([*parts, *([f"{block.source.notes}\n"] if block.source.notes else [])])


def _software(folder: Path) -> str:
    """Return what a run was measured with, in words; nothing for a folder that holds no certified run."""
    machine = Run(folder).machine
    if machine is None or machine.torch is None:
        return ""
    return f", with torch {machine.torch.partition('+')[0]} and transformers {machine.transformers}"


def _token_s(frame: pd.DataFrame, name: str) -> float | None:
    times = frame.loc[frame["label"] == name, "token_s_median"].dropna()
    return float(times.iloc[0]) if len(times) else None


def _outcomes(folder: Path, claims: list[Claim]) -> dict[str, Outcome]:
    evidence = read_evidence(Run(folder))
    return {claim.id: evaluate(claim, evidence) for claim in claims}


def _claims_table(claims: list[Claim], measured: Mapping[Path, Mapping[str, Outcome]]) -> str:
    rows = [
        _cells(["claim", "what", "target", "run", "minutes", "disk", "reference"]),
        _cells(["---"] * 7),
    ]
    for claim in claims:
        profile = load_profile(claim.profile)
        own = run_of(claim.profile)
        places = [*([own] if own else []), *measured]
        at = next((folder for folder in places if measured[folder][claim.id].measured is not None), None)
        reference = "not measured" if at is None else f"{_verdict(measured[at][claim.id])} ({at.name})"
        run = f"`{claim.profile}`, `{claim.notebook}`"
        size = format_bytes(profile.min_disk)
        rows.append(_cells([claim.id, claim.text, target_words(claim), run, f"{profile.minutes:g}", size, reference]))
    return "\n".join(rows) + "\n"


def _matrix(claims: list[Claim], measured: Mapping[Path, Mapping[str, Outcome]]) -> str:
    rows = [_cells(["claim", *(f"[{folder.name}]({_from_docs(folder)})" for folder in measured)])]
    rows.append(_cells(["---"] * (len(measured) + 1)))
    for claim in claims:
        rows.append(_cells([claim.id, *(_verdict(outcomes[claim.id]) for outcomes in measured.values())]))
    counts = [Counter(outcome.verdict for outcome in outcomes.values()) for outcomes in measured.values()]
    rows.append(_cells(["in all", *(f"{each['PASS']} PASS, {each['FAIL']} FAIL" for each in counts)]))
    return "\n".join(rows) + "\n\nAn empty cell is NOT RUN.\n"


def _verdict(outcome: Outcome) -> str:
    if outcome.measured is None:
        return ""
    return f"**{outcome.measured:.4g} FAIL**" if outcome.verdict == "FAIL" else f"{outcome.measured:.3g}"


def _from_docs(path: Path) -> str:
    return Path(os.path.relpath(path, DOCS)).as_posix()


def _number(value: Any) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _size(nbytes: float) -> str:
    return "" if math.isnan(nbytes) else format_bytes(int(nbytes))


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
