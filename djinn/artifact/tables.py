"""Frames and settings as notebooks show them: aligned to the left, sizes for people, verdicts in colour."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from djinn.profiles import Profile
from djinn.sizes import format_bytes
from djinn.text import one_line

_VERDICTS = {
    "PASS": "background-color: #d3ecdf; color: #004d38",
    "FAIL": "background-color: #f9d5c7; color: #7a2500",
    "NOT RUN": "background-color: #e6e6e6; color: #3c3c3c",
    "WARN": "background-color: #fdebc8; color: #5c3d00",
}
"""As on a run's page; certification says its verdicts in small letters."""
_CELLS = {"text-align": "left", "vertical-align": "top", "white-space": "normal", "max-width": "34em"}


def table(frame: pd.DataFrame) -> Styler:
    """Return a frame as a table: columns of bytes as sizes, numbers with three digits, what is missing empty.

    A column ``verdict`` is coloured. An index of plain numbers is hidden. Words are shown as they are, never as HTML.
    """
    shown = frame.rename(columns=lambda name: str(name).removesuffix("_bytes").replace("_", " "))
    sizes = [column for column, name in zip(shown, frame, strict=True) if str(name).endswith("_bytes")]
    shown = shown.astype(object)
    for column in shown:
        shown[column] = [_size(value) if column in sizes else _words(value) for value in shown[column]]
    styler = shown.style.set_properties(**_CELLS).format(escape="html")  # type: ignore[arg-type]
    styler = styler.set_table_styles([{"selector": "th", "props": "text-align: left; vertical-align: top"}])
    if isinstance(frame.index, pd.RangeIndex):
        styler = styler.hide(axis="index")
    if "verdict" in shown:
        styler = styler.map(lambda value: _VERDICTS.get(str(value).upper(), ""), subset=["verdict"])
    return styler


def overview(profile: Profile, settings: pd.DataFrame, machine: pd.DataFrame) -> HTML:
    """Return a profile in six lines, with all of its ``settings`` and the ``machine`` folded below.

    Both have a column ``value`` and a row for each fact.
    """
    lines = {
        "model": profile.model,
        "budget": f"{format_bytes(profile.budget)} {_place(profile)}",
        "host memory": f"{format_bytes(profile.host_memory)} for streamed weights",
        "systems": ", ".join(profile.systems),
        "prompt": f"{profile.prompt_tokens} tokens, {profile.new_tokens} new ones, batch {profile.batch}",
        "runs": f"{profile.runs}, after {profile.warmups} to warm up",
    }
    folded = "".join(
        f"<details><summary>{title}</summary>{_list(facts['value'].to_dict())}</details>"
        for title, facts in (("All settings", settings), ("This machine", machine))
    )
    return HTML(_list(lines) + folded)


def _place(profile: Profile) -> str:
    if profile.device == "cpu":
        return "of host memory, in the place of a GPU's"
    return "of GPU memory" if profile.gpus == 1 else f"of each of {profile.gpus} GPUs' memory"


def _list(facts: Mapping[Any, str]) -> str:
    rows = "".join(
        f'<tr><td style="text-align: left">{html.escape(one_line(name))}</td>'
        f'<td style="text-align: left">{html.escape(one_line(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _size(value: Any) -> str:
    return "" if _missing(value) else format_bytes(int(value))


def _words(value: Any) -> str:
    if _missing(value):
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return one_line(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
