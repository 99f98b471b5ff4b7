"""What the tests of the comparison share: a tiny real checkpoint, a profile for it, and a worker that misbehaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from djinn.bench.systems.base import Job
from djinn.profiles import Profile, load_profile
from djinn.weights.synthetic_checkpoint import synthesise


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 22 MB synthetic model of smoke_tiny, as a real checkpoint."""
    return synthesise("llama-tiny", tmp_path_factory.mktemp("checkpoint") / "llama-tiny", progress=False)


@pytest.fixture
def profile(checkpoint: Path) -> Profile:
    """smoke_tiny over that checkpoint, two short runs."""
    return load_profile("smoke_tiny").override(model=str(checkpoint), runs=2, warmups=0, new_tokens=3)


@pytest.fixture
def job(profile: Profile, checkpoint: Path, tmp_path: Path) -> Job:
    """A job for one system; its variant is empty."""
    return Job(profile=profile, variant="", model=str(checkpoint), scratch=tmp_path)
