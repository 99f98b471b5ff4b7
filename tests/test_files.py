"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from djinn.files import remedy, unfinished, write_text


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with unfinished(path) as part:
        part.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_file_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def interrupted() -> None:
        with unfinished(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_one_file_leave_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with unfinished(path) as part:
        part.write_text("half")
        code = f"from pathlib import Path; from djinn.files import write_text; write_text(Path({str(path)!r}), 'other')"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert path.read_text() == "other"
        part.write_text("whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_the_disk_refuses_names_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")

    def refused(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        write_text(path, "after")
    assert caught.value.filename == str(path)
    assert remedy(caught.value)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_an_error_about_the_file(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    with pytest.raises(OSError, match="in the way") as caught:
        write_text(tmp_path / "in the way" / "file.txt", "x")
    assert ".part" not in str(caught.value)
