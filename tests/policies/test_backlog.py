"""Many that wait: what a policy knows of its queue is right, and a long queue costs no more per request."""

from __future__ import annotations

import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.policies.backlog import Backlog
from chairlift.policies.base import Request
from chairlift.sim.replica.request import Live
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.places import TESTS

ALL = sorted(plugins.available(plugins.POLICY)[0])


@given(st.lists(st.sampled_from(["arrive", "preempt", "admit first", "admit last", "give up", "look"]), max_size=60))
def test_a_backlog_is_what_the_queue_is(deeds: list[str]) -> None:
    queue: deque[Request] = deque()
    mirror: deque[Request] = deque()
    backlog = Backlog()

    def look() -> None:
        head, tail, left = backlog.look(queue)
        for request in left:
            mirror.remove(request)
        mirror.extendleft(reversed(head))
        mirror.extend(tail)
        assert list(mirror) == list(queue)
        assert len(backlog) == len(queue)
        assert all(request in backlog for request in queue)

    for number, deed in enumerate(deeds):
        request = Live(number, number, 10, 10)
        if deed == "arrive":
            queue.append(request)
        elif deed == "preempt":
            queue.appendleft(request)
        elif deed.startswith("admit"):
            look()  # a policy looks before it admits
            if queue:
                taken = queue.popleft() if deed == "admit first" else queue.pop()
                backlog.take(taken)
                mirror.remove(taken)
        elif deed == "give up" and queue:
            del queue[len(queue) // 2]
        elif deed == "look":
            look()
    look()


def seconds(policy: str, requests: int) -> float:
    """CPU time of a report's run, a night's batch at once, of so many requests."""
    [setup] = load(TESTS / "data" / "case_25_scenario.yaml", [f"workload.requests={requests}"], [policy]).setups
    begin = time.process_time()
    simulate(setup)
    return time.process_time() - begin


@pytest.mark.parametrize("policy", ALL)
def test_a_request_costs_at_most_twice_as_much_with_20000_waiting_as_with_5000(policy: str) -> None:
    # Noise only adds, and a quadratic queue would make it 4 times as much.
    short = min(seconds(policy, 5_000) for _ in range(2)) / 5_000
    long = seconds(policy, 20_000) / 20_000
    if long > 2 * short:
        long = min(long, seconds(policy, 20_000) / 20_000)

    assert long <= 2 * short
