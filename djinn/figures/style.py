"""How every figure looks: USENIX column widths, one font, one colour and one mark per system.

A figure has a title, a key where it needs one, and no prose: what a caption has to say is kept with the axes
(:func:`explain`, :func:`caption_of`) and written beside the figure.

Colours are Okabe and Ito's colour-blind safe set ("Color Universal Design", 2008); a variant keeps its system's
colour. Bars stand beside their names and lines have a marker for each variant, so that a grey print can be read too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from djinn.sizes import format_bytes

COLUMN_IN = 3.33
"""Width of one USENIX column, in inches."""
PAGE_IN = 7.0
"""Width of both columns, in inches."""

SMALLEST_PT = 7
LABEL_PT = 8
_KEY_LINE_PT = 9.5
GREY = "#555555"


@dataclass(frozen=True)
class Look:
    """How one system is called and drawn. ``label`` is its display name: what people read, wherever they read it."""

    label: str
    colour: str
    marker: str


LOOKS = {
    "djinn": Look("djinn", "#0072B2", "o"),
    "djinn:lossless": Look("djinn, coded", "#56B4E9", "*"),
    "djinn:whole": Look("djinn, whole layers", "#999999", "p"),
    "djinn:host": Look("djinn, host computes (not exact)", "#D55E00", "h"),
    "djinn:lossless+host": Look("djinn, coded, host computes (not exact)", "#F0E442", "H"),
    "accelerate:disk": Look("Accelerate, disk", "#E69F00", "s"),
    "accelerate:cpu": Look("Accelerate", "#E69F00", "D"),
    "accelerate:cpu-pinned": Look("Accelerate, pinned", "#E69F00", "P"),
    "deepspeed:cpu": Look("DeepSpeed ZeRO-3", "#009E73", "^"),
    "deepspeed:nvme": Look("DeepSpeed ZeRO-3, disk", "#009E73", "v"),
    "resident": Look("resident", "#CC79A7", "X"),
}
"""Every system that a profile may list, as ``system`` or ``system:variant``. Profiles, records and commands keep these
names; pages, tables and figures show the labels."""


def look_of(name: str) -> Look:
    """Return how a system is drawn; one that is not in :data:`LOOKS` is grey, under its own name."""
    return LOOKS.get(name) or Look(display_name(name), "#777777", "h")


def display_name(name: str) -> str:
    """Return what people read for a name in a record, such as "djinn, coded" for ``djinn:lossless``.

    A benchmark's variant follows its system's label: ``deepspeed:cpu, tuned`` is "DeepSpeed ZeRO-3, tuned". A system
    that is not in :data:`LOOKS` keeps its own name.
    """
    matches = [each for each in LOOKS if name == each or name.startswith((f"{each}:", f"{each},"))]
    if not matches:
        return name
    known = max(matches, key=len)
    variant = name.removeprefix(known).lstrip(":, ")
    return f"{LOOKS[known].label}, {variant}" if variant else LOOKS[known].label


LANES = {"copy": "#332288", "decode": "#AA4499", "compute": "#117733", "stall": "#BBBBBB", "host": "#DDCC77"}
"""The lanes of the timeline, top to bottom: no system's colours. Paul Tol's colour-blind safe "muted" set (technical
note SRON/EPS/TN/09-002, 2021); waiting is grey, because where the link limits it is what has to be."""

LIMITS = {"disk": "#EE7733", "link": "#0077BB", "compute": "#009988", "host": "#CC3311"}
"""What limits a pass, as predictions say it. Paul Tol's "vibrant" set."""

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    # It comes with matplotlib, so that figures are the same on every machine.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": LABEL_PT,
    "axes.titlesize": LABEL_PT,
    "axes.labelsize": LABEL_PT,
    "xtick.labelsize": SMALLEST_PT,
    "ytick.labelsize": SMALLEST_PT,
    "legend.fontsize": SMALLEST_PT,
    "legend.title_fontsize": SMALLEST_PT,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
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


def explain(ax: Axes, title: str, caption: str, key: Sequence[Artist] = (), columns: int = 2) -> None:
    """Give axes their title, a key above them, and the words that a caption under the figure needs.

    Args:
        caption: what is drawn and what whiskers mean; kept as the axes' label, which nothing draws.
        key: what has to be told apart, each with its label.
        columns: of the key.
    """
    # Axes that were made elsewhere have sizes of their own.
    ax.tick_params(labelsize=SMALLEST_PT)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_fontsize(LABEL_PT)
    lines = math.ceil(len(key) / columns)
    ax.set_title(title, loc="left", fontsize=LABEL_PT, fontweight="bold", pad=5 + _KEY_LINE_PT * lines)
    if key:
        # Its right edge is the axes': to their left is room, above the names of the rows.
        ax.legend(
            handles=list(key), loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.1,
            borderpad=0.1, fontsize=SMALLEST_PT, frameon=False, handlelength=1.6, handletextpad=0.5, columnspacing=1,
            labelspacing=0.2,
        )  # fmt: skip
    ax.set_label(caption)


def beyond(ax: Axes, gpu_bytes: int | None) -> list[Artist]:
    """Shade what lies beyond a GPU's memory on an axis of budgets in GB; return it for the key, or nothing."""
    most = ax.get_xlim()[1]
    if gpu_bytes is None or gpu_bytes / 1e9 >= most:
        return []
    words = f"beyond this GPU's {format_bytes(gpu_bytes)}"
    return [ax.axvspan(gpu_bytes / 1e9, most, color="#E8E8E8", linewidth=0, zorder=0, label=words)]


def caption_of(figure: Figure) -> str:
    """Return what a caption has to say of a figure: the words of all its axes, and its mark's."""
    words = [str(ax.get_label()) for ax in figure.axes if str(ax.get_label()).strip()]
    return " ".join([*words, figure.get_supxlabel().replace("\n", " ").strip()]).strip()


def strip(figure: Figure) -> None:
    """Take title and mark off a figure, for a paper whose caption says both."""
    for ax in figure.axes:
        ax.set_title("", loc="left")
    figure.supxlabel("")


def mark(figure: Figure, words: str) -> None:
    """Write ``words`` below a figure, so that it cannot be taken for one of this machine."""
    if words:
        lines = "\n".join(textwrap.wrap(words, width=int(figure.get_size_inches()[0] * 18)))
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=SMALLEST_PT, color=GREY, style="italic")


def words_at(ax: Axes, words: str, place: float, *, up: bool = False) -> None:
    """Write ``words`` where a number is missing, over the grid and lines: from the axes' left edge at row ``place``.

    ``up`` writes them upwards from its lower edge at column ``place``.
    """
    ax.annotate(
        words,
        (place, 0) if up else (0, place),
        xycoords=("data", "axes fraction") if up else ("axes fraction", "data"),
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
