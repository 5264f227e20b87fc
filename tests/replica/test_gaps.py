"""Gaps between tokens: all together they are the time from each first token to the last, whatever a policy does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from chairlift.policies.base import Scheduler, Step
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.records import Status
from chairlift.sim.study import Limits
from kit.clusters import group, s, serve, setup_of
from kit.worlds import Affine, World, check_books, play, sorted_gaps, trace_of

Seen = tuple[int, int, int, int]


@dataclass
class OneByOne(Scheduler):
    """Decode all where there is room; else whoever was admitted first and has room, alone, while the others miss out.

    It notes what it sees before and after each `Step.decode_all` that was refused.
    """

    refused: list[tuple[Seen, Seen]] = field(default_factory=list, init=False)

    def schedule(self, step: Step) -> int:
        while step.waiting and step.admit(step.waiting[0], step.waiting[0].remaining):
            pass
        before = _seen(step)
        if step.decode_all():
            return 1
        self.refused.append((before, _seen(step)))
        if not any(step.run(request, 1) for request in step.running if request.decoding):
            step.preempt(next(reversed(step.running)))
        return 1


def _seen(step: Step) -> Seen:
    return step.price(), step.decodes, step.free_blocks, step.decode_steps


def spans(world: World) -> int:
    """From first token to last, summed over requests; all have finished with their last token."""
    r = world.requests
    return sum(last - first for first, last in zip(r.first_token, r.finished, strict=True))


# three requests on 8 blocks of 4 tokens: from some step on not all of them have room for their next token
ROWS = [(0, 5, 14), (0, 6, 12), (0, 3, 9)]


def test_who_misses_steps_for_want_of_room_waits_for_its_token_since_its_own_last() -> None:
    policy = OneByOne()

    world = play(trace_of(ROWS), lambda: policy, Affine, blocks=8, block_size=4)

    check_books(world)
    assert policy.refused
    assert sum(gap * count for gap, count in sorted_gaps(world.engines[0])) == spans(world)


def test_decodes_that_are_refused_change_nothing() -> None:
    policy = OneByOne()

    play(trace_of(ROWS), lambda: policy, Affine, blocks=8, block_size=4)

    assert policy.refused
    assert [after for _, after in policy.refused] == [before for before, _ in policy.refused]


@dataclass
class Turns(Vllm):
    """Requests decode in turns, ``together`` of them at a time, a step each."""

    together: int = 1
    _next: int = field(default=0, init=False)

    def schedule(self, step: Step) -> int:
        while step.waiting and step.admit(step.waiting[0], step.waiting[0].remaining):
            pass
        able = [request for request in step.running if request.decoding]
        for turn in range(min(self.together, len(able))):
            step.run(able[(self._next + turn) % len(able)], 1)
        self._next += self.together
        return 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("patience", [7_300, 11_900, 13_300, 14_500, 15_100])
def test_clients_that_give_up_on_requests_that_decode_in_turns(ahead: bool, together: int, patience: int) -> None:
    # `sim.cluster.audit` adds the gaps up: each client's wait for the tokens that it got, and for no other
    settings = {"async_scheduling": ahead, "enable_prefix_caching": False, "together": together}
    trace = trace_of([(0, 5, 14), (100, 6, 12), (900, 3, 9)])

    served = serve(setup_of(trace, [group(Turns, settings)], limits=Limits(timeout_s=s(patience))))

    assert Status.TIMED_OUT in served.columns()["status"]
    assert served.requests.spoken_ps == sum(gap * count for gap, count in served.gaps()[0])
