"""What a model may be called is told from its name alone, and from whether there is such a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.errors import CheckpointError, ConfigError
from djinn.weights.called import require_known


@pytest.mark.parametrize(
    "model", ["synthetic:llama-tiny", "org/name", "org/name@main", "org/name@refs/pr/1", "/tmp", "~"]
)
def test_architectures_hub_ids_and_folders_are_known(model: str) -> None:
    require_known(model)


def test_a_folder_that_holds_no_checkpoint_is_left_to_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder 'mine'"):
        require_known("mine")
    (tmp_path / "mine").mkdir()
    require_known("mine")


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "org/name@", "org name/x", "https://host/org/name"])
def test_what_is_neither_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="a model is a checkpoint folder, org/name@revision, or synthetic:"):
        require_known(model)


def test_an_architecture_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no architecture 'llama-9'.*llama-2-13b"):
        require_known("synthetic:llama-9")
