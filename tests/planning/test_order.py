"""The expected order of visits: the recorded one, until passes take another twice running."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from djinn.planning.order import Order


def passes_of(order: Order, count: int, path: list[int], times: int) -> list[int]:
    """Go ``path`` over and over; return how many steps of each pass were not as expected."""
    surprises, visit = [], 0
    for _ in range(times):
        strays = 0
        for unit in path:
            expected = visit % count == unit
            strays += not expected
            order.follow(unit) if expected else order.stray(unit)
            visit += (unit - visit) % count
            visit = order.after(visit)
        surprises.append(strays)
    return surprises


def test_the_recorded_order_is_expected() -> None:
    assert passes_of(Order(5), 5, [0, 1, 2, 3, 4], 3) == [0, 0, 0]


def test_a_way_taken_once_is_not_learned() -> None:
    order = Order(4)
    order.follow(0)
    assert not order.stray(3)
    order.follow(0)
    order.follow(1)  # as recorded again
    order.follow(0)
    assert not order.stray(3)
    assert order.after(0) == 1


@given(st.sets(st.integers(0, 11), min_size=1).map(sorted))
def test_a_way_taken_twice_running_is_expected_from_then_on(path: list[int]) -> None:
    """Whichever units passes leave out: after three passes nothing surprises any more."""
    assert passes_of(Order(12), 12, path, 6)[3:] == [0, 0, 0]


@given(st.sets(st.integers(0, 7), min_size=1).map(sorted), st.integers(1, 3))
def test_the_recorded_order_is_learned_back(path: list[int], times: int) -> None:
    order = Order(8)
    passes_of(order, 8, path, times)
    assert passes_of(order, 8, list(range(8)), 4)[-1] == 0
    assert [order.after(visit) for visit in range(8)] == list(range(1, 9))


def test_after_a_pass_of_either_order_one_of_the_second_is_expected() -> None:
    order = Order(7, again=4)  # four units, three of them again
    visits = [0]
    for _ in range(12):
        visits.append(order.after(visits[-1]))
    assert [visit % 7 for visit in visits] == [0, 1, 2, 3, *[4, 5, 6] * 3]
