"""How the commands print: tables for people, JSON for scripts, an exit code for both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from djinn.sizes import format_bytes
from djinn.text import one_line, printable

if TYPE_CHECKING:
    from djinn.bench.generation import Generated
    from djinn.bench.records import Record
    from djinn.weights.pack import TensorSize

_VERDICTS = {"PASS": "green", "FAIL": "bold red", "WARN": "yellow", "NOT RUN": "dim"}
"""Of claims and, in small letters, of certification."""


def working(on: str) -> Status:
    """Return a line that says on standard error, on a terminal alone, what goes on inside its ``with``.

    Until it is stopped, what is printed to standard output would go there too.
    """
    return Console(stderr=True).status(on, refresh_per_second=4)


def say(words: object, *, err: bool = False) -> None:
    """Print words that may come from a file: what a terminal would obey is shown as an escape."""
    typer.echo(printable(words), err=err)


def exit_unless(fine: bool) -> None:
    """End the command with code 1 unless ``fine``."""
    if not fine:
        raise typer.Exit(1)


def print_records(records: Sequence[Record], as_json: bool, hide: Sequence[str] = ()) -> None:
    """Print the records, as JSON or summarised, and exit with 1 unless every one is ok."""
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
    else:
        from djinn.bench.statistics import summary_frame

        columns = {
            "system": "label",
            "status": "status",
            "runs": "runs",
            "load s": "load_s_median",
            "TTFT s": "ttft_s_median",
            "s/token": "token_s_median",
            "effective GB/s": "effective_gbps_median",
            "of ceiling": "link_utilisation_median",
        }
        shown = [name for name in columns if name not in hide]
        frame = summary_frame(records)
        frame["link_utilisation_median"] = frame["link_utilisation_median"].map(percent)
        print_table(shown, frame[[columns[name] for name in shown]].to_numpy().tolist())
        for row in frame[frame["reason"] != ""].itertuples():
            say(one_line(f"{row.label}: {row.status}: {row.reason}"))
    exit_unless(all(record.status == "ok" for record in records))


def print_tensor_sizes(sizes: Sequence[TensorSize], as_json: bool) -> None:
    """Print what coding does: every tensor as JSON, or a line for each kind of tensor, each rank and one for all."""
    if as_json:
        print_json([asdict(size) | {"kind": size.kind, "bits": size.bits} for size in sizes])
        return
    kinds: dict[tuple[str, str, bool], list[TensorSize]] = {}
    for size in sizes:
        kinds.setdefault((size.kind, size.dtype, size.coded), []).append(size)
    rows = [_size_row(f"{kind} x {len(members)}", dtype, members) for (kind, dtype, _), members in kinds.items()]
    ranks: dict[str, list[TensorSize]] = {}
    for size in sizes:
        if size.rank:
            ranks.setdefault(size.rank, []).append(size)
    rows += [_size_row(f"{rank}, all {len(held)}", "", held) for rank, held in ranks.items()]
    rows.append(_size_row(f"all {len(sizes)}", "", sizes))
    print_table(["tensors", "dtype", "stored", "bytes", "as stored", "bits of 16"], rows)


def print_generated(made: Generated, budget: int, gpus: int = 1) -> None:
    """Say on standard error how a text was generated within ``budget`` bytes; it is on standard output already.

    Of several ``gpus`` the figures are the first one's, which has as much to do as any.
    """
    exceeded = ""
    if made.peak_device_bytes > budget:
        exceeded = f", above the budget of {format_bytes(budget)}: without a GPU the process's own growth counts"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(made.shares.items(), key=lambda kv: -kv[1]))
    typer.echo(
        f"{made.new_tokens} tokens in {made.wall_s:.3g} s: {made.tokens_per_s:.3g} tokens/s, effective bandwidth "
        f"{made.effective_gbps:.3g} GB/s, of which {made.link_gbps:.3g} GB/s were streamed\n"
        f"peak device memory {format_bytes(made.peak_device_bytes)}{exceeded}\n"
        f"limited by: {made.limit}; shares of the time: {shares}"
        + (f"\nbytes and shares are those of the first of {gpus} GPUs" if gpus > 1 else ""),
        err=True,
    )


def _size_row(tensors: str, dtype: str, sizes: Sequence[TensorSize]) -> list[str]:
    raw, stored = sum(size.raw_bytes for size in sizes), sum(size.stored_bytes for size in sizes)
    how = "coded" if all(size.coded for size in sizes) else "" if any(size.coded for size in sizes) else "as it was"
    return [tensors, dtype, how, format_bytes(raw), format_bytes(stored), f"{16 * stored / raw:.2f}" if raw else ""]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table for people; a missing number is an empty cell, and a verdict has its colour on a terminal."""
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        cells = [_cell(value) for value in row]
        for name, cell in zip(columns, cells, strict=True):
            if name == "verdict":
                cell.stylize(_VERDICTS.get(cell.plain.upper(), ""))
        table.add_row(*cells)
    Console().print(table)


def percent(share: float) -> str:
    """Return a share as people read it; nothing for one that is missing."""
    return "" if math.isnan(share) else f"{100 * share:.3g}%"


def _cell(value: Any) -> Text:
    # Text, since rich would take "[red]" in a plain string for markup.
    if isinstance(value, float):
        return Text("" if math.isnan(value) else f"{value:.3g}")
    return Text("" if value is None else one_line(value))


def print_json(value: Any) -> None:
    """Print ``value`` for a script."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_paths(paths: Iterable[Path]) -> None:
    """Print one path a line."""
    for path in paths:
        say(path)
