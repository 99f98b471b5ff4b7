"""Data sheets of cards: a plan's rates, and never mistaken for measured ones."""

from __future__ import annotations

import pytest

from djinn.bench.data_sheets import DATA_SHEETS, sheet_of
from djinn.bench.machines import machine_names


@pytest.mark.parametrize("card", DATA_SHEETS)
def test_a_sheet_gives_rates_in_order_and_nothing_that_it_does_not_say(card: str) -> None:
    sheet = DATA_SHEETS[card]
    rates = sheet.rates()
    one, many = rates.compute
    assert (rates.device, rates.link, rates.disk, rates.module_s) == ("cuda", sheet.link, None, 0.0)
    assert one.rate == sheet.memory
    assert many.tokens > one.tokens
    assert many.rate * many.tokens == pytest.approx(sheet.flops)
    assert sheet.link < sheet.memory < sheet.flops
    assert 10**10 < sheet.memory_bytes < sheet.memory


def test_a_card_is_found_however_it_is_written_and_is_no_machine_that_was_measured() -> None:
    assert sheet_of("l4") is sheet_of("L4") is DATA_SHEETS["L4"]
    assert sheet_of("h100") is None
    assert not set(machine_names()) & set(DATA_SHEETS)
