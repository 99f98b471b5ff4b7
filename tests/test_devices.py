"""What a user calls a device."""

from __future__ import annotations

import pytest
import torch

from djinn.devices import device_of
from djinn.errors import ConfigError


@pytest.mark.parametrize(
    "name", ["", "cpu:5", "cuda:", "cuda:x", "cuda:-1", "cuda:999999", "cuda:²", "tpu", "CPU", " cpu"]
)
def test_what_is_no_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="the devices are cpu and cuda") as caught:
        device_of(name)
    assert repr(name) in str(caught.value)


def test_devices() -> None:
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(None).type in ("cpu", "cuda")
