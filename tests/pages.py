"""The pages of the repository, taken apart: blocks, spans, links and tables, for the tests of what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Page:
    """One page and what stands on it."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def fenced(self) -> list[tuple[str, str]]:
        """Language and body of every fenced block."""
        return re.findall(r"^```(\w+)\n(.*?)^```", self.text, flags=re.M | re.S)

    @cached_property
    def shell(self) -> list[str]:
        """The lines of its shell blocks, without comments."""
        blocks = [block for kind, block in self.fenced if kind == "bash"]
        return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]

    @cached_property
    def spans(self) -> list[str]:
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.text)

    @cached_property
    def links(self) -> list[str]:
        return re.findall(r"\]\((?!http)([^)]+)\)", self.text)

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name after ``#``: its headings, as GitHub writes them."""
        outside = re.sub(r"^```.*?^```", "", self.text, flags=re.M | re.S)
        headings = re.findall(r"^#+ (.*)", outside, flags=re.M)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def section(self, heading: str) -> str:
        """The text under a heading, to the next of its level or above."""
        match = re.search(rf"^(#+) {re.escape(heading)}\n((?:^```.*?^```|.)*?)(?=^#|\Z)", self.text, flags=re.M | re.S)
        assert match is not None, f"{self.path.name} has no section {heading!r}"
        return match[2]

    def rows(self, heading: str) -> list[list[str]]:
        """The cells of all tables under a heading, without their headers."""
        table = [line for line in self.section(heading).splitlines() if line.startswith("|")]
        heads = {place - 1 for place, line in enumerate(table) if line.startswith("| ---")}
        body = [line for place, line in enumerate(table) if not {place, place - 1} & heads]
        return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body]


PATHS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "artifact").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): Page(path) for path in PATHS}
README = PAGES["README.md"]
REVIEWERS = PAGES["artifact/README.md"]
APPENDIX = PAGES["artifact/APPENDIX.md"]
ARCHITECTURE = PAGES["docs/architecture.md"]
CLI = PAGES["docs/cli.md"]
GENERATED = {"docs/results.md", "docs/claims.md", "docs/compatibility.md"}
