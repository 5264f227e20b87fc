"""The clock of a cluster, on SimPy: integer picoseconds, callbacks, and the order of what falls on one instant.

No other module imports SimPy. Only callbacks are used, never processes, stores or interrupts: a timeout with a callback
costs a tenth of what those cost (measured; 0.5 µs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from heapq import heappop, heappush
from typing import Any, Final

import simpy
from simpy.events import Event

# SimPy's priorities: at one instant the smaller number goes first. Replica i settles at BOUNDARY + i and plans at
# PLAN + i, so that of several replicas the first in order goes first.
BOUNDARY: Final = -(1 << 24)  # an engine step ends
CHANGE: Final = 1  # a failure, a repair, a client that gives up, a look of the autoscaler, KV that has come
ARRIVAL: Final = 2  # a request arrives
PLAN: Final = 3  # a replica asks its policy, once all of the above is in


class Clock(simpy.Environment):
    """SimPy's event loop, counting integer picoseconds from 0."""

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.planned_at = -1  # the latest instant at which requests ended as a replica planned
        self.planned_upto = -1  # that replica: those before it have planned by then as well

    @property
    def now(self) -> int:
        """The simulated time, ps."""
        return self._now  # type: ignore[return-value]  # SimPy allows float; integers in, integers out

    def serve(self) -> None:
        """Ring all alarms, until none is set.

        As SimPy's `run`, without a call, a list of callbacks and a look for failures at each event: alarms are all that
        stands in its heap, and an alarm does not fail. That is a tenth of a run's time.
        """
        heap: list[Any] = self._queue
        while True:  # Python 3.11 adapts such a loop to its types; one that tests its condition at its end it does not
            if not heap:
                return
            self._now, _, _, alarm = heappop(heap)
            ring = alarm.ring
            ring(alarm)

    def after(self, delay: int, priority: int, call: Callable[[], object]) -> None:
        """Call ``call`` in ``delay`` ps; ``priority`` is its place among what falls on that instant."""
        Alarm(self, self.now + delay, priority, lambda _alarm: call())

    def hold_plans(self) -> None:
        """Let no replica plan before all callbacks of this instant are done.

        A replica plans at once where SimPy's heap holds nothing more for this instant. So whoever is about to send
        several requests, one after the other, calls this first: a mark in the heap makes every replica wait for the
        last of them.
        """
        self.after(0, PLAN, lambda: None)


class Alarm:
    """What stands in SimPy's heap in place of its events: it calls ``ring`` with itself at a time, ps.

    It can be set again after it rang, which is cheaper than a new one.
    """

    __slots__ = ("_clock", "ring")

    def __init__(self, clock: Clock, at: int, priority: int, ring: Callable[[Alarm], object]) -> None:
        self._clock = clock
        self.ring = ring
        self.again(at, priority)

    def again(self, at: int, priority: int) -> None:
        """Set it once more."""
        clock: Any = self._clock  # what follows is its `schedule`, without the call
        heappush(clock._queue, (at, priority, next(clock._eid), self))


def time_bare_timeouts(count: int) -> float:
    """Seconds that SimPy takes for ``count`` timeouts of one process, which `sim.cli.bench` compares with."""

    def wait() -> Generator[Event, None, None]:
        for _ in range(count):
            yield env.timeout(1)

    env = simpy.Environment()
    env.process(wait())
    started = time.perf_counter()
    env.run()
    return time.perf_counter() - started
