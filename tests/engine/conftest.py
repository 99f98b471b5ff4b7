"""Tiny mixtures of experts that stream by expert (see ``routed_models``), and their resident models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from routed_models import ROUTED
from tiny_models import save_config
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a mixture by name; not to be changed."""
    return cache(lambda name: save_config(ROUTED[name], name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def residents(folders: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The model of a folder, as transformers loads it."""
    return cache(lambda name: AutoModelForCausalLM.from_pretrained(folders(name), dtype="auto").eval())


@pytest.fixture(scope="module")
def folder(folders: Callable[[str], Path]) -> Path:
    """Where one mixture will do."""
    return folders("mixtral")


@pytest.fixture(scope="module")
def resident(residents: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Of that one."""
    return residents("mixtral")
