"""Files that anyone may have changed: right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from djinn.errors import ConfigError
from djinn.reading import read_csv, read_json, read_json_lines, read_text, read_yaml


class Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    rate: float | None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe{}",
        b"9" * 5000,
        b'{"name": 5}',
        b'{"name": "x", "rate": 1, "more": 1}',
        b'"\\ud800"',
    ],
)
def test_damaged_json_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.json: damaged") as caught:
        read_json(path, Row)
    assert "\n" not in str(caught.value)


def test_lines_are_numbered_and_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"name": "a\u2028b", "rate": 1}\n{"name": "c", "rate": null}\n')
    assert [row.name for row in read_json_lines(path, Row)] == ["a\u2028b", "c"]
    path.write_text('{"name": "a", "rate": 1}\n\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 2"):
        read_json_lines(path, Row)
    path.write_text("")
    assert read_json_lines(path, Row) == []


@pytest.mark.parametrize(
    "text", ["name,rate\na\n", "name\na\n", "name,rate\na,fast\n", 'name,rate\n"a\n', "name,rate\na,1,2\n"]
)
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text("name,rate\na,1.5\nb,\n")
    assert [(row.name, row.rate) for row in read_csv(path, Row)] == [("a", 1.5), ("b", None)]
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.csv"):
        read_csv(path, Row)


@pytest.mark.parametrize("data", [b"a: \xff", b"a: [", b"[" * 20_000, b"a: 2020-99-99", b"a: " + b"9" * 5000])
def test_damaged_yaml_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.yaml: not"):
        read_yaml(path)


def test_a_folder_in_the_place_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
