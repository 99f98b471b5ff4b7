"""Tables of notebooks: sizes for people, verdicts in colour, words that are never HTML, what is long folded."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from matplotlib.figure import Figure

from djinn.artifact.notebook import drawn
from djinn.artifact.tables import overview, table
from djinn.figures import frames, plots
from djinn.profiles import load_profile


def test_numbers_are_for_people_and_what_is_missing_is_empty():
    frame = pd.DataFrame({"what": ["disk", None], "chunk_bytes": [16777216.0, math.nan], "gbps": [12.690343, 2.0]})
    shown = table(frame).to_html()
    for words in ("16.8 MB", "12.7", ">chunk<", ">2<"):
        assert words in shown
    for words in ("nan", "None", "chunk_bytes", "12.69"):
        assert words not in shown
    assert "row_heading" not in shown  # an index of plain numbers says nothing


def test_verdicts_have_colours_and_words_are_words():
    frame = pd.DataFrame(
        {"verdict": ["PASS", "fail"], "text": ["<script>alert(1)</script>", "a & b"]}, index=["x", "y"]
    )
    shown = table(frame).to_html()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "#d3ecdf" in shown
    assert "#f9d5c7" in shown
    assert "row_heading" in shown


def test_an_overview_is_six_lines_and_the_rest_folded():
    hostile = pd.DataFrame({"value": ["<b>x</b>"]}, index=["cpu"])
    shown = overview(load_profile("smoke_tiny"), hostile, hostile).data
    above, _, below = shown.partition("<details>")
    assert above.count("<tr>") == 6
    assert "&lt;b&gt;" in below
    assert "<b>" not in shown


def test_a_figure_that_lacks_records_is_said_in_words():
    said = drawn(plots.ttft, frames.runs([]))
    assert said.data == "*Not drawn: no baseline records.*"


def test_other_errors_are_raised():
    def broken() -> Figure:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        drawn(broken)
