"""auto takes the largest profile whose needs are met, and gives the reason for every other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djinn.artifact.auto import Resources, choose, choose_from
from djinn.errors import UnavailableError
from djinn.profiles import load_profile, profile_names

PROFILES = [load_profile(name) for name in profile_names()]
H100, L4 = ("NVIDIA H100 80GB HBM3", 85 * 10**9), ("NVIDIA L4", 23_600_000_000)


@pytest.mark.parametrize(
    ("ram_gib", "disk_gb", "gpus", "name"),
    [
        (2, 1, (), "smoke_tiny"),
        (16, 40, (), "smoke_13b"),
        (16, 30, (), "smoke_tiny"),
        (8, 500, (), "smoke_tiny"),
        (256, 500, (), "smoke_13b"),
        (256, 500, (L4,), "virt_mem_l4"),
        (64, 500, (L4,), "compare_13b"),
        (22, 500, (L4,), "smoke_gpu"),
        (64, 500, (("GeForce RTX 4090", 25_300_000_000),), "compare_13b"),
        (32, 20, (("GeForce RTX 3070", 8_300_000_000),), "smoke_gpu"),
        (128, 500, (("A100-PCIE-40GB", 42_000_000_000),), "compare_34b"),
        (16, 500, (L4,), "smoke_13b"),
        (125, 500, (H100,), "virt_mem_h100"),
        (256, 500, (L4, H100), "compare_70b"),
        (180, 500, (H100, H100), "virt_mem_h100"),
        (195, 500, (H100,), "virt_mem_h100"),  # 209 GB
        (195, 500, (H100, H100), "ranks_2x24"),
        (195, 500, (L4, L4, H100), "virt_mem_h100"),
        (110, 500, (H100,), "compare_h100"),
        (195, 500, (H100,) * 4, "ranks_2x24"),
    ],
)
def test_the_largest_that_fits(ram_gib: int, disk_gb: int, gpus: tuple[tuple[str, int], ...], name: str):
    choice = choose_from(PROFILES, Resources(ram_gib * 2**30, disk_gb * 10**9, gpus), {})
    assert choice.profile.name == name
    assert set(choice.reasons) == {profile.name for profile in PROFILES}
    assert f"{name}: taken" in choice.text()


def test_reasons_have_numbers():
    choice = choose_from(PROFILES, Resources(8 * 2**30, 30 * 10**9, (L4,)), {})
    assert choice.reasons["smoke_13b"] == (
        "not taken: needs 12.9 GB of RAM; 8.59 GB can be used; needs 34 GB of free disk; 30 GB are free"
    )
    assert "needs a GPU with 75 GB; found NVIDIA L4 with 23.6 GB" in choice.reasons["virt_mem_h100"]
    assert "needs 2 GPUs with 75 GB; found NVIDIA L4 with 23.6 GB" in choice.reasons["ranks_2x24"]


def test_a_checkpoint_on_disk_needs_no_room():
    resources = Resources(16 * 2**30, 10 * 10**9)
    assert choose_from(PROFILES, resources, {"smoke_13b": 26 * 10**9}).profile.name == "smoke_13b"
    short = choose_from(PROFILES, Resources(16 * 2**30, 10**9), {"smoke_13b": 26 * 10**9})
    assert "needs 8 GB of free disk besides the 26 GB already there; 1 GB are free" in short.reasons["smoke_13b"]


def test_a_machine_too_small_for_all_is_told_what_it_lacks():
    with pytest.raises(UnavailableError, match=r"smoke_tiny: not taken: needs 2\.15 GB of RAM; 1 GB can be used"):
        choose_from(PROFILES, Resources(10**9, 10**12), {})


@given(ram=st.integers(0, 2**39), disk=st.integers(0, 10**12), more=st.integers(0, 10**12), gpu=st.integers(0, 10**11))
def test_more_room_never_gives_a_smaller_profile(ram: int, disk: int, more: int, gpu: int):
    def rank(resources: Resources) -> tuple[int, int]:
        try:
            profile = choose_from(PROFILES, resources, {}).profile
        except UnavailableError:
            return (-1, -1)
        return (profile.min_device or 0, profile.min_ram)

    gpus = (("a GPU", gpu),)
    assert rank(Resources(ram, disk, gpus)) <= rank(Resources(ram + more, disk + more, gpus))


def test_this_machine_can_hold_something():
    assert choose().profile.name in profile_names()
