"""How every figure looks: USENIX column widths, fonts that survive print, one colour and one mark per system.

Colours are Okabe and Ito's colour-blind safe set ("Color Universal Design", 2008); a variant keeps its system's
colour and has a hatch and a marker of its own, so that a grey print can be read too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN_IN = 3.33
"""Width of one USENIX column, in inches."""
PAGE_IN = 7.0
"""Width of both columns, in inches."""

SMALLEST_PT = 7
GREY = "#555555"


@dataclass(frozen=True)
class Look:
    """How one system is called and drawn. ``label`` is its display name: what people read, wherever they read it."""

    label: str
    colour: str
    hatch: str
    marker: str


LOOKS = {
    "djinn": Look("djinn", "#0072B2", "", "o"),
    "djinn:lossless": Look("djinn, coded", "#56B4E9", "++", "*"),
    "djinn:whole": Look("djinn, whole layers", "#999999", "oo", "p"),
    "djinn:host": Look("djinn, host computes (not exact)", "#D55E00", "xx", "h"),
    "djinn:lossless+host": Look("djinn, coded, host computes (not exact)", "#F0E442", "..", "H"),
    "accelerate:disk": Look("Accelerate, disk", "#E69F00", "///", "s"),
    "accelerate:cpu": Look("Accelerate", "#E69F00", "|||", "D"),
    "accelerate:cpu-pinned": Look("Accelerate, pinned", "#E69F00", "---", "P"),
    "deepspeed:cpu": Look("DeepSpeed ZeRO-3", "#009E73", "...", "^"),
    "deepspeed:nvme": Look("DeepSpeed ZeRO-3, disk", "#009E73", "xxx", "v"),
    "resident": Look("resident", "#CC79A7", "\\\\\\", "X"),
}
"""Every system that a profile may list, as ``system`` or ``system:variant``. Profiles, records and commands keep these
names; pages, tables and figures show the labels."""


def display_name(name: str) -> str:
    """Return what people read for a name in a record, such as "djinn, coded" for ``djinn:lossless``.

    A benchmark's variant follows its system's label: ``deepspeed:cpu, tuned`` is "DeepSpeed ZeRO-3, tuned".
    """
    known = max((each for each in LOOKS if name == each or name.startswith((f"{each}:", f"{each},"))), key=len)
    variant = name.removeprefix(known).lstrip(":, ")
    return f"{LOOKS[known].label}, {variant}" if variant else LOOKS[known].label


LANES = {"copy": "#0072B2", "decode": "#CC79A7", "compute": "#009E73", "stall": "#D55E00", "host": "#E69F00"}
"""The lanes of the timeline, top to bottom."""

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALLEST_PT,
    "ytick.labelsize": SMALLEST_PT,
    "legend.fontsize": SMALLEST_PT,
    "legend.title_fontsize": SMALLEST_PT,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.0,
    # TrueType fonts embedded whole: what publishers ask for, and text stays text.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    # A dollar sign in a name is a dollar sign.
    "text.parse_math": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style inside a ``with``, or to a function as a decorator; nothing outside is changed."""
    with sns.axes_style("whitegrid"), mpl.rc_context(_RC):
        yield


def canvas(ax: Axes | None, height_in: float, width_in: float = COLUMN_IN) -> Axes:
    """Return ``ax``, or the axes of a new figure that belongs to nobody else (no pyplot state)."""
    return ax if ax is not None else Figure(figsize=(width_in, height_in), layout="constrained").add_subplot()


def figure_of(ax: Axes) -> Figure:
    """Return the whole figure that ``ax`` is in."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def explain(ax: Axes, title: str, definition: str) -> None:
    """Write the title, and under it what is drawn and what the error bars mean, from the figure's left edge."""
    figure = figure_of(ax)
    lines = textwrap.wrap(definition, width=int(figure.get_size_inches()[0] * 19))
    write = partial(ax.annotate, xycoords=("figure fraction", "axes fraction"), textcoords="offset points")
    write("\n".join(lines), (0.01, 1), xytext=(0, 4), fontsize=SMALLEST_PT, color=GREY)
    write(title, (0.01, 1), xytext=(0, 6 + 8.5 * len(lines)), fontweight="bold")


def mark(figure: Figure, words: str) -> None:
    """Write ``words`` below a figure, so that it cannot be taken for one of this machine."""
    if words:
        lines = "\n".join(textwrap.wrap(words, width=int(figure.get_size_inches()[0] * 19)))
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALLEST_PT, color=GREY, style="italic")


def words_at(ax: Axes, words: str, x: float, y: float, *, up: bool = False) -> None:
    """Write ``words`` where a number is missing, over the grid and lines; ``up`` turns them by a right angle."""
    ax.annotate(
        words,
        (x, y),
        xytext=(0, 3) if up else (3, 0),
        textcoords="offset points",
        rotation=90 if up else 0,
        ha="center" if up else "left",
        va="bottom" if up else "center",
        fontsize=SMALLEST_PT,
        style="italic",
        color=GREY,
        zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        in_layout=False,
    )


def beside(ax: Axes, words: str, row: float) -> None:
    """Write ``words`` right of the axes at a row of it, where they cover nothing that is drawn."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    ax.annotate(words, (1, row), xytext=(3, 0), va="center", fontsize=SMALLEST_PT, **place)
