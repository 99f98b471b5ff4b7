"""What a person sees while a notebook runs: a bar and the time left on a terminal, two lines anywhere else."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from djinn.text import printable

_TITLE_WIDTH = 13
_BAR_WIDTH = 20


@contextmanager
def shown(title: str, expected_s: float, *, verbose: bool = False) -> Iterator[None]:
    """Show on standard error that papermill executes a notebook inside the ``with``, and how long that took.

    Args:
        title: what the line begins with.
        expected_s: about how many seconds it takes.
        verbose: show all that papermill and the cells print, in place of the bar.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    line = _Line(title, expected_s)
    live = console.is_terminal and not verbose
    if not live:
        console.print(f"{title:{_TITLE_WIDTH}} takes about {tqdm.format_interval(expected_s)}", soft_wrap=True)
    papermill = logging.getLogger("papermill")
    handler = logging.StreamHandler() if verbose else line
    handler.setFormatter(_Printable())
    papermill.addHandler(handler)
    ended = "stopped after"
    try:
        with Live(line, console=console, transient=True, refresh_per_second=2) if live else nullcontext():
            yield
        ended = "done in"
    finally:
        papermill.removeHandler(handler)
        console.print(f"{title:{_TITLE_WIDTH}} {ended} {tqdm.format_interval(line.elapsed_s)}", soft_wrap=True)


class _Printable(logging.Formatter):
    """What cells print, with nothing in it that a terminal would obey; each state of a progress bar is a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of ``record``."""
        return printable(re.sub(r"\r\n?", "\n", super().format(record)))


class _Line(logging.Handler):
    """Title, bar, times and the last line that the cell under way has printed; drawn anew whenever rich asks."""

    def __init__(self, title: str, expected_s: float) -> None:
        super().__init__()
        self._title = title
        self._expected_s = expected_s
        self._began = time.monotonic()
        self._printed = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the last line of what papermill logs: the cells' output, between lines about its own doing."""
        message = self.format(record).strip()
        if message.startswith(("Executing ", "Ending ")):
            self._printed = ""
        elif message:
            self._printed = message.splitlines()[-1]

    def __rich__(self) -> Table:
        """Return the line as of now."""
        elapsed = self.elapsed_s
        left = self._expected_s - elapsed
        said = f"about {tqdm.format_interval(left)} left" if left > 0 else "longer than expected"
        bar = ProgressBar(
            total=self._expected_s, completed=min(elapsed, self._expected_s), width=_BAR_WIDTH, pulse=left <= 0
        )
        row = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            row.add_column(no_wrap=True)  # so that a narrow terminal cuts what was printed, and nothing else
        printed = Text(self._printed, no_wrap=True, overflow="ellipsis")
        row.add_row(f"{self._title:{_TITLE_WIDTH - 1}}", bar, f"{tqdm.format_interval(elapsed)}, {said}", printed)
        return row
