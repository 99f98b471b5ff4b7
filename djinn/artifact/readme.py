"""README's tables: results and claims, made from the reference records and ``claims.yaml``, never typed.

python -m djinn.artifact.readme        rewrites the tables in README.md, and the checksums of the records
"""

from __future__ import annotations

import math
from pathlib import Path

from djinn.artifact.bundle import write_sums
from djinn.artifact.claims import load_claims, target_words
from djinn.artifact.reference import expected, folders, read_manifest
from djinn.bench.records import Record, read_records
from djinn.bench.statistics import summary_frame
from djinn.config import load_profile
from djinn.places import REFERENCE_DIR, ROOT
from djinn.sizes import format_bytes

_TABLES = ("baselines.jsonl", "benchmark.jsonl")
"""Files of run records that README shows; the points of a sweep are for its figure."""


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
        "| system | budget | anonymous host memory | first token, s | per token, s | link, GB/s | of ceiling | runs |",
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


def claims_markdown() -> str:
    """Return README's claims: what shows each of them, what that takes, and what the reference runs measured."""
    rows = [
        "| claim | what | target | run | compute | disk | reference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    measured = expected()
    for claim in load_claims():
        profile = load_profile(claim.profile)
        rows.append(
            f"| {claim.id} | {claim.text} | {target_words(claim)} | `{claim.profile}`, `{claim.notebook}` | "
            f"{profile.minutes:g} min | {format_bytes(profile.min_disk)} | {measured.get(claim.id, 'not measured')} |"
        )
    return "\n".join(rows) + "\n"


def rewritten(readme: str) -> str:
    """Return ``readme`` with the parts between the markers made anew."""
    for name, text in (("results", results_markdown()), ("claims", claims_markdown())):
        begin, end = f"<!-- {name}: written by djinn.artifact.readme -->", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n\n{text}\n{end}{after}"
    return readme


def main() -> None:
    """Rewrite the checksums and README's tables."""
    for folder in folders():
        write_sums(folder)
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text()))


if __name__ == "__main__":
    main()
