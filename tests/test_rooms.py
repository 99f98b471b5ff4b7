"""Rooms in their order: a module imports its own room and those below it, and each room says what lives there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "djinn"
ROOT = ("errors", "sizes", "text", "files", "spill", "reading", "names", "places", "gpus", "hardware", "devices")
"""Files at the package's root that every room may import; among themselves, from left to right."""
ORDER = (
    *ROOT,
    "codec",
    "weights",
    "planning",
    "transport",
    "host",
    "engine",
    "profiles",
    "bench",
    "figures",
    "artifact",
    "cli",
    "__main__",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> Iterator[str]:
    """Every module of djinn that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("djinn."))
        elif isinstance(node, ast.ImportFrom) and node.module == "djinn":
            yield from (f"djinn.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("djinn."):
            yield node.module


def test_every_room_has_its_place_in_the_order() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_imported_from_a_room_above(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    above = ORDER[ORDER.index(own) + 1 :]
    assert [module for module in imported(path) if room_of(module) in above] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_one_thing(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300, "a second thing in it wants a file of its own"
    assert ast.get_docstring(ast.parse(text)), "no words at its head"


@pytest.mark.parametrize("room", [name for name in ORDER if (PACKAGE / name).is_dir() and name != "cli"])
def test_a_room_says_what_it_imports_and_what_to_read_first(room: str) -> None:
    words = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert "Imports:" in words
    first = words.partition("Read ")[2].split(maxsplit=1)[0]
    assert (PACKAGE / room / first).is_file()
