"""Reference records: what was measured on real machines, kept in ``data/reference``, and README's table of it.

    python -m djinn.artifact.reference        rewrites the table in README.md and the checksums

Each folder holds records as they were written, a ``manifest.json`` that says where each file comes from, and
``SHA256SUMS``; one that holds a whole run has its ``profile.yaml``, ``results`` and ``notebooks``. The table is made
from the records alone.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from djinn.artifact.bundle import write_sums
from djinn.bench.records import Record, read_records
from djinn.bench.statistics import summary_frame
from djinn.sizes import format_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCE_DIR = ROOT / "data" / "reference"
_TABLES = ("baselines.jsonl", "benchmark.jsonl")
"""Files of run records that README shows; the points of a sweep are for its figure."""
BEGIN, END = "<!-- reference records: written by djinn.artifact.reference -->", "<!-- end of reference records -->"


class Source(BaseModel):
    """Where a file, or all files of a folder, come from: the command, its revision, and what a reader has to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    revision: str
    notes: str = ""


class Manifest(BaseModel):
    """What a folder of reference records holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    date: str
    files: dict[str, Source]


def folders(root: Path = REFERENCE_DIR) -> list[Path]:
    """Return the folders of reference records, in order of name."""
    return sorted(path.parent for path in root.glob("*/manifest.json"))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        pydantic.ValidationError: it is not a manifest.
    """
    return Manifest.model_validate_json((folder / "manifest.json").read_text())


def results_markdown(root: Path = REFERENCE_DIR) -> str:
    """Return README's results: for each file that compares systems its machine, a table, the command and the notes."""
    blocks = []
    for folder in folders(root):
        manifest = read_manifest(folder)
        for name, source in manifest.files.items():
            if Path(name).name not in _TABLES:
                continue
            records = read_records(folder / name)
            blocks.append(
                f"**{records[0].model}, {manifest.machine}**, {manifest.date}, "
                f"[{name}]({folder.relative_to(root.parent.parent)}/{name}): `{source.command}`\n\n{table(records)}"
                + (f"\n{source.notes}\n" if source.notes else "")
            )
    return "\n".join(blocks)


def table(records: list[Record]) -> str:
    """Return a row per system and variant: medians over the finished runs, or why there is none."""
    rows = [
        "| system | budget | host memory | first token, s | per token, s | link, GB/s | of the ceiling | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary_frame(records).to_dict("records"):
        first = f"| {row['label']} | {format_bytes(int(row['budget_bytes']))} |"
        if row["runs"]:
            columns = ("ttft_s_median", "token_s_median", "link_gbps_median", "link_utilisation_median")
            numbers = ("" if math.isnan(row[column]) else f"{row[column]:.3g}" for column in columns)
            host = format_bytes(int(row["peak_anon_bytes"]))
            rows.append(f"{first} {host} | {' | '.join(numbers)} | {row['runs']} |")
        else:
            rows.append(f"{first} | {row['status']}: {row['reason']} | | | | 0 |")
    return "\n".join(rows) + "\n"


def with_results(readme: str, results: str) -> str:
    """Return ``readme`` with the part between the markers replaced."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", flags=re.S)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{results}\n{END}", readme)


def main() -> None:
    """Rewrite the checksums and README's table."""
    for folder in folders():
        write_sums(folder)
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(), results_markdown()))


if __name__ == "__main__":
    main()
