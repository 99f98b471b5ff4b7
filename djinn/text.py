"""Words that came from a file, made harmless for where people read them: a terminal, a Markdown page, a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN = re.compile(
    r"""[\\`*\[\]|~$@]            # code, emphasis, links, table borders, mathematics, mentions
    | (?<![^\W_])_|_(?![^\W_])    # emphasis, but not the underscore inside a word
    | <(?=[A-Za-z/!?])            # HTML and links in angle brackets, but not "<="
    | &(?=\#?\w+;)                # entities
    | (?<=:)/(?=/)|(?<=www)\.     # addresses, which GitHub turns into links by themselves
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FORMULA = ("=", "+", "-", "@")
"""How a cell begins that spreadsheets compute."""


def printable(text: object) -> str:
    """Return the words with each character that a terminal would obey, or not show, as its escape; lines stay lines."""
    words = str(text)
    return words if words.isprintable() else "".join(map(_shown, words))


def one_line(text: object) -> str:
    """Return the words as one line that a terminal can print: :func:`printable`, all space between them single."""
    return printable(" ".join(str(text).split()))


def markdown(text: str) -> str:
    """Return the words as one line of Markdown that shows them and does nothing else."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def spreadsheet(text: str) -> str:
    """Return a cell's words, with an apostrophe before what a spreadsheet would compute; numbers are not computed."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) and not _is_number(shown) else shown


def _shown(character: str) -> str:
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
