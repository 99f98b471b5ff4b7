"""Words from files: shown, never obeyed."""

from __future__ import annotations

import pytest

from djinn.text import markdown, one_line, printable, spreadsheet


def test_what_a_terminal_would_obey_is_shown_as_an_escape() -> None:
    assert printable("\x1b[31mred\x07 \u202eright \udcff\x85") == "\\x1b[31mred\\x07 \\u202eright \\udcff\\x85"
    assert printable("two\n\tlines, 5\u202fµs ± 1, ö") == "two\n\tlines, 5\u202fµs ± 1, ö"
    assert one_line(" a\n\r b\u2028c\x1b ") == "a b c\\x1b"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("smoke_tiny <= 5 GB, >= 0.9 & more (90.8%)", "smoke_tiny <= 5 GB, >= 0.9 & more (90.8%)"),
        ("<script>", r"\<script>"),
        ("a|b\\|c", r"a\|b\\\|c"),
        ("[x](javascript:alert) ![y](http://e/y.png)", r"\[x\](javascript:alert) !\[y\](http:\//e/y.png)"),
        ("title\n\n# Claims: 99 PASS", "title # Claims: 99 PASS"),
        ("_a_ *b* `c` &lt; www.e.com @me $x$", r"\_a\_ \*b\* \`c\` \&lt; www\.e.com \@me \$x\$"),
    ],
)
def test_markdown_shows_words_and_does_nothing_else(words: str, shown: str) -> None:
    assert markdown(words) == shown


@pytest.mark.parametrize("words", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "=HYPERLINK(1)"])
def test_a_spreadsheet_computes_no_words(words: str) -> None:
    assert spreadsheet(words) == f"'{words}"


@pytest.mark.parametrize("words", ["-5", "+1.5e3", "chunk=64 MiB", "", "djinn"])
def test_numbers_and_plain_words_stay_as_they_are(words: str) -> None:
    assert spreadsheet(words) == words
