"""The journal says who did what in each step: against grids drawn by hand, and against the records of every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.policies.base import Scheduler
from chairlift.policies.orca import Orca
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.sim.report.slots import Slots, seat
from chairlift.sim.results.records import Kind, Status
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Failures, Limits, Outage
from kit.clusters import group, link, s, setup_of
from kit.journals import Steady, check_slots, seats
from kit.leaping import POLICIES, backends, rows
from kit.worlds import Affine, play, trace_of


def drawn(outputs: Sequence[int], policy: Callable[[], Scheduler], **world: Any) -> list[str]:
    """The grid of requests of two prompt tokens that all arrive at once."""
    trace = trace_of([(0, 2, n) for n in outputs], max_tokens=list(outputs))
    return seats(play(trace, policy, Steady, journal=True, **world).engines[0]).grid()


# The textbook picture: eight requests, four slots. A to H have these answers; the step of the prompt brings the first.
TEXTBOOK = [7, 2, 4, 3, 2, 4, 3, 3]


def test_static_batching_as_drawn_by_hand() -> None:
    #    A B C D run to A's end, then E F G H to F's; whoever has its answer keeps an idle slot
    assert drawn(TEXTBOOK, lambda: Static(batch=4), block_size=1) == [
        "PDDDDDD" + "PD##",  # A, E
        "PD#####" + "PDDD",  # B, F
        "PDDD###" + "PDD#",  # C, G
        "PDD####" + "PDD#",  # D, H
    ]


@pytest.mark.parametrize(
    "policy",
    [
        lambda: Orca(max_batch=4, reserve="oracle"),
        lambda: Vllm(max_num_seqs=4, async_scheduling=False, enable_prefix_caching=False),
    ],
    ids=["orca", "vllm"],
)
def test_continuous_batching_as_drawn_by_hand(policy: Callable[[], Scheduler]) -> None:
    # E takes B's slot after two steps, F D's after three, G E's and H C's after four: no cell is idle
    grid = drawn(TEXTBOOK, policy)

    assert grid == [
        "PDDDDDD",  # A
        "PD" + "PD" + "PDD",  # B, E, G
        "PDDD" + "PDD",  # C, H
        "PDD" + "PDDD",  # D, F
    ]
    assert "." not in "".join(grid)


def test_decodes_stall_while_a_prompt_runs_alone() -> None:
    # TGI prefills on its own: B has arrived with A's first decode step and joins after the next, and A waits for it
    trace = trace_of([(0, 2, 5), (1500, 2, 2)], max_tokens=[5, 2])
    world = play(trace, lambda: Tgi(max_waiting_tokens=1), Steady, block_size=1, journal=True)

    assert seats(world.engines[0]).grid() == [
        "PD~DDD",
        "..PD..",
    ]


def test_a_preempted_request_leaves_its_slot_and_computes_all_again() -> None:
    # 4 blocks of 2 tokens: a block each for the prompts of A and B, and one each for their first two tokens. For the
    # third there is none: B goes, A runs to its end, and B takes A's slot and computes its 2 + 3 tokens again
    trace = trace_of([(0, 2, 6), (0, 2, 6)])
    policy = lambda: Vllm(async_scheduling=False, enable_prefix_caching=False)  # noqa: E731
    world = play(trace, policy, Steady, blocks=4, block_size=2, journal=True)
    engine = world.engines[0]
    found = seats(engine)
    events = engine.records.events()
    preempted = events["kind"] == Kind.PREEMPT

    assert found.grid() == [
        "PDDDDD" + "PDD",  # A, then B again
        "PDD......",
    ]
    assert found.why.tolist() == [Kind.END, Kind.PREEMPT, Kind.END]
    assert [events[name][preempted].tolist() for name in ("time_ps", "run", "request", "other", "value")] == [
        [3000],
        [found.begin[0] + _row_of_step(found, 3)],
        [1],
        [-1],  # for all decodes
        [4],  # its prompt and two of its three tokens: the last one's KV is not computed yet
    ]


def _row_of_step(slots: Slots, step: int) -> int:
    return int(np.searchsorted(slots.first_step, step, side="right")) - 1


def test_a_request_that_its_replica_loses_begins_again_on_another() -> None:
    trace = trace_of([(0, 2, 5), (0, 2, 5)])
    setup = setup_of(
        trace,
        [group(Vllm, count=2, cost=Steady())],
        failures=Failures(schedule=[Outage(replica=1, at_s=s(2500), for_s=None)]),
    )
    outcome = simulate(setup, journal=True)
    one, other = (seat(each.events(), each.runs()) for each in outcome.runs)

    # at 2500 replica 1 has done two steps; the third is lost. Replica 0 hears of it at its next boundary, 3000
    assert other.grid() == ["PD"]
    assert other.why.tolist() == [Kind.LOST]
    assert one.grid() == ["PDDDD" + ".", "...PDD"]


def test_a_handed_over_request_has_a_slot_on_either_side() -> None:
    trace = trace_of([(0, 2, 3)])
    groups = [group(Vllm, role="prefill", cost=Steady()), group(Vllm, role="decode", cost=Steady())]
    outcome = simulate(setup_of(trace, groups, link=link(100)), journal=True)
    here, there = (seat(each.events(), each.runs()) for each in outcome.runs)

    assert (here.grid(), here.why.tolist()) == (["P"], [Kind.HANDOVER])
    assert (there.grid(), there.why.tolist()) == (["PD"], [Kind.END])


def test_a_client_that_gives_up_frees_its_slot() -> None:
    trace = trace_of([(0, 2, 9)])
    setup = setup_of(trace, [group(Vllm, cost=Steady())], limits=Limits(timeout_s=s(2500)))
    records = simulate(setup, journal=True).runs[0]

    assert seat(records.events(), records.runs()).grid() == ["PDD"]


def test_a_client_that_gives_up_on_a_batch_leaves_a_slot_that_is_paid_for() -> None:
    # both run from 1000 on; A has its answer at 2000 and gives up at 2500. So does B at 3500, with the boundary at 4000
    # the batch returns
    trace = trace_of([(0, 2, 1), (1000, 2, 3)], max_tokens=[1, 3])
    limits = Limits(timeout_s=s(2500))
    setup = setup_of(trace, [group(Static, {"batch": 2}, cost=Steady())], limits=limits)
    outcome = simulate(setup, journal=True)
    events = outcome.runs[0].events()
    ended = events["kind"] == Kind.END

    assert seat(events, outcome.runs[0].runs()).grid() == ["P##", "PDD"]
    assert events["time_ps"][ended].tolist() == outcome.requests.finished.tolist()
    assert events["value"][ended].tolist() == [Status.TIMED_OUT, Status.TIMED_OUT]


def test_without_a_journal_there_is_none() -> None:
    outcome = simulate(setup_of(trace_of([(0, 2, 9)]), [group(Vllm)]))

    assert not outcome.runs[0].event_rows


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=30)
@given(
    table=rows,
    backend=backends,
    size=st.integers(1, 6),
    blocks=st.integers(8, 40),
    block_size=st.sampled_from([4, 16]),
    replicas=st.integers(1, 3),
    leap=st.booleans(),
)
def test_a_journal_changes_nothing_and_counting_its_cells_gives_the_records(
    name: str,
    table: list[tuple[int, int, int]],
    backend: Affine,
    size: int,
    blocks: int,
    block_size: int,
    replicas: int,
    leap: bool,
) -> None:
    table = sorted(table)
    priority = [(7 * i) % 3 for i in range(len(table))] if "priority" in name else None
    trace = trace_of(table, max_tokens=[o for _, _, o in table], priority=priority)
    policy = lambda: POLICIES[name](size)  # noqa: E731
    if policy().block_tokens == 1:
        blocks, block_size = blocks * block_size, 1
    plain, kept = (
        play(trace, policy, lambda: backend, blocks, block_size, replicas, leap, 2000, journal=journal)
        for journal in (False, True)
    )

    assert kept.outcome() == plain.outcome()
    for one, other in zip(plain.engines, kept.engines, strict=True):
        assert other.records.rows == one.records.rows
        check_slots(seats(other), other.records.runs(), other.scheduler.asynchronous)
