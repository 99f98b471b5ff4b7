"""What GPUs count on their links: cut to the longest stretch of work, a panel for each GPU."""

from __future__ import annotations

import pandas as pd
import pytest

from djinn.errors import DjinnError
from djinn.figures.counters import counters, longest_stretch
from djinn.figures.style import canvas

PCIE = pd.DataFrame(
    {
        "time_s": [0.0, 0.5, 10.0, 10.5, 11.0, 11.5, 30.0, 31.0],
        "rx_gbps": [50.0, 50.0, 40.0, 50.0, 40.0, 50.0, 1.0, 0.0],
        "tx_gbps": 0.1,
        "source": "nvml",
        "gpu": 0,
    }
)


def test_counters_are_cut_to_the_longest_stretch_of_work() -> None:
    assert longest_stretch(PCIE) == (10.0, 11.5)
    (ax,) = counters(PCIE, [55.0]).axes
    assert ax.get_lines()[0].get_xdata().max() == 1.5  # type: ignore[union-attr]
    assert ax.get_lines()[-1].get_label() == "ceiling 55.0 GB/s"
    assert longest_stretch(PCIE.assign(rx_gbps=0.0)) == (0.0, 31.0)
    with pytest.raises(DjinnError, match="no trace"):
        counters(PCIE[:0])


def test_each_gpu_has_a_panel_with_its_own_samples_and_ceiling() -> None:
    both = pd.concat([PCIE, PCIE.assign(gpu=1, rx_gbps=PCIE["rx_gbps"] / 2)], ignore_index=True)
    first, second = counters(both, [55.0, 27.0]).axes
    assert [ax.get_ylabel() for ax in (first, second)] == ["GPU 0 (GB/s)", "GPU 1 (GB/s)"]
    assert [max(ax.get_lines()[0].get_ydata()) for ax in (first, second)] == [50.0, 25.0]  # type: ignore[arg-type]
    assert [ax.get_lines()[-1].get_ydata()[0] for ax in (first, second)] == [55.0, 27.0]  # type: ignore[index]
    assert [len(ax.get_lines()) for ax in counters(both, [55.0]).axes] == [3, 2]
    own = canvas(None, 2.0)
    assert counters(both, ax=own).axes == [own]
    assert len(own.get_lines()) == 2
