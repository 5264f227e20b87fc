"""The order of what falls on one instant, and alarms that are set again."""

from __future__ import annotations

from functools import partial

from chairlift.sim.cluster.clock import ARRIVAL, BOUNDARY, CHANGE, PLAN, Alarm, Clock


def test_at_one_instant_boundaries_go_first_then_changes_then_arrivals_then_plans() -> None:
    clock = Clock()
    order: list[tuple[int, str]] = []

    def note(what: str) -> None:
        order.append((clock.now, what))

    ranks = {"plan of 1": PLAN + 1, "plan of 0": PLAN, "arrival": ARRIVAL, "change": CHANGE}
    ranks |= {"boundary of 1": BOUNDARY + 1, "boundary of 0": BOUNDARY}
    for what, rank in ranks.items():
        clock.after(7, rank, partial(note, what))
    clock.after(6, PLAN, partial(note, "earlier"))
    clock.serve()

    assert order == [(6, "earlier"), *((7, what) for what in reversed(ranks))]
    assert type(clock.now) is int


def test_of_equal_rank_the_first_set_goes_first() -> None:
    clock = Clock()
    order: list[int] = []
    for i in range(5):
        clock.after(3, CHANGE, partial(order.append, i))
    clock.serve()

    assert order == [0, 1, 2, 3, 4]


def test_an_alarm_rings_again_when_it_is_set_again() -> None:
    clock = Clock()
    rung: list[int] = []

    def ring(alarm: Alarm) -> None:
        rung.append(clock.now)
        if len(rung) < 3:
            alarm.again(clock.now + 10, CHANGE)

    Alarm(clock, 5, CHANGE, ring)
    clock.serve()

    assert rung == [5, 15, 25]


def test_plans_held_leave_a_mark_at_this_instant() -> None:
    clock = Clock()
    assert clock.peek() > clock.now

    clock.hold_plans()

    assert clock.peek() == clock.now
