"""Names become paths only where they are names."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.errors import ConfigError
from djinn.names import coding_name, device_name, local_folder, plain_name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/abs", "a/b", "a\nb", "{x}", "-rf", "~", "a\0", "x" * 101, "\x1b[1m"]
)
def test_what_is_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name "):
        plain_name(name)


@pytest.mark.parametrize("name", ["smoke_tiny", "my profile 2", "über", "a", "chunk=64", "v1.5+x"])
def test_a_name_is_a_name(name: str) -> None:
    assert plain_name(name) == name


def test_a_url_is_no_folder() -> None:
    with pytest.raises(ConfigError, match="s3://…: results go to a folder of this machine"):
        local_folder(Path("s3://bucket/run"))
    for path in ("/tmp/run", "runs/a:b", "c:/runs"):
        assert local_folder(Path(path)) == Path(path)


def test_devices_and_codings_are_told_by_their_names() -> None:
    assert [device_name(name) for name in ("cpu", "cuda", "cuda:15")] == ["cpu", "cuda", "cuda:15"]
    assert [coding_name(name) for name in ("none", "lossless")] == ["none", "lossless"]
    for name in ("", "gpu", "cuda:", "cuda:100", "cuda:-1", "CPU"):
        with pytest.raises(ConfigError, match="the devices are cpu and cuda"):
            device_name(name)
    with pytest.raises(ConfigError, match="coding 'zip': it is none or lossless"):
        coding_name("zip")
