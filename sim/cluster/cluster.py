"""The trace that arrives at the replicas, who waits for whose answer, and who is still inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from chairlift.policies.base import NoProgress
from chairlift.sim.cluster.clock import ARRIVAL, Alarm, Clock
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.request import Live
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.results.records import RequestRecords, Status

EXAMPLES: Final = 5  # requests that an error names
PATIENCE: Final = 1000  # looks at an idle cluster before it counts as stuck
REPORT: Final = 1000  # arrivals between two calls of `progress`
LOOK: Final = 125  # ends a replica between two looks for records to pack


class Scaler(Protocol):
    """What orders replicas and sends them away."""

    def said(self) -> str:
        """What it did, in words."""
        ...


class Cluster:
    """A trace and the replicas that serve it: `sim.cluster.build.build` puts one together, `run` serves the trace.

    ``make_request`` makes the request of a row of the trace, when it is sent. ``progress(arrived)`` is called now and
    then with the number of requests that have arrived. Features plug in through ``clock.after``, ``on_arrival`` (called
    with every request before it is routed) and ``on_end`` (called with every request that has ended for good).
    """

    front: ReplicaPool  # where requests arrive

    def __init__(
        self,
        requests: RequestRecords,
        make_request: Callable[[int], Live],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.clock = Clock()
        self.requests = requests
        self.replicas: list[Replica] = []
        self.pools: list[ReplicaPool] = []
        self.notes: list[str] = []  # what was asked for and could not be done
        self.scalers: list[Scaler] = []  # of groups of replicas that come and go
        self.on_arrival: Callable[[Live], None] | None = None
        self.on_end: Callable[[Live], None] | None = None
        self.left = len(requests.trace)  # requests that have not ended
        self.more_arrivals = True
        self.request_time = 0  # ps, summed over the requests inside
        self._inside = 0  # requests sent that have not ended
        self._since = 0  # when that number last changed
        self._make = make_request
        self._progress = progress
        self._arrived = 0
        self._idle_looks = 0
        self._look = LOOK  # ends, of all replicas
        self._next = 0  # in `_order`
        trace = requests.trace
        follows = trace.follows
        self._followers: dict[int, list[int]] = {}  # row → rows that wait for its end
        self._think: list[int] = []  # by row, ps; empty where nobody follows anybody
        if follows is None:
            self._order: list[int] | None = None  # rows that follow no other, as they come; None: all
        else:
            self._think = [] if trace.think_ps is None else trace.think_ps.tolist()
            for row, before in enumerate(follows.tolist()):
                if before >= 0:
                    self._followers.setdefault(before, []).append(row)
            self._order = [row for row, before in enumerate(follows.tolist()) if before < 0]
        self._first_ones = len(trace) if self._order is None else len(self._order)
        self._times = requests.arrival

    @property
    def engines(self) -> list[Engine]:
        """Each replica's engine: after a failure the last one, whose records are those of all."""
        return [replica.engine for replica in self.replicas]

    def run(self) -> None:
        """Serve the whole trace.

        Raises `NoProgress` if a policy leaves requests unserved although nothing more can happen.
        """
        self._look = LOOK * len(self.replicas)
        Alarm(self.clock, self._times[0 if self._order is None else self._order[0]], ARRIVAL, self._arrive)
        self.clock.serve()
        if self.left:
            raise self._stuck()

    def watch(self) -> None:
        """Raise `NoProgress` if nothing has happened for long but what calls this, again and again."""
        busy = self._arrived < len(self._times) or any(r.engine.end is not None for r in self.replicas)
        self._idle_looks = 0 if busy else self._idle_looks + 1
        if self._idle_looks > PATIENCE:
            raise self._stuck()

    def refuse(self, request: Live, now: int) -> None:
        """End a request that no replica has taken: its queue is full."""
        self.requests.end(request, now, Status.REJECTED)
        self.ended(request, now)

    def ended(self, request: Live, now: int) -> None:
        """A request has ended for good: each request that follows it is sent after its think time."""
        self.request_time += self._inside * (now - self._since)
        self._since = now
        self._inside -= 1
        self.left -= 1
        if self.left % self._look == 0:
            for replica in self.replicas:
                replica.records.pack()
        if not self.left:
            for replica in self.replicas:
                replica.go_down()
        if self.on_end is not None:
            self.on_end(request)
        if self._followers:
            for row in self._followers.pop(request.row, ()):
                self.clock.after(self._think[row], ARRIVAL, partial(self._send_now, row))

    def _arrive(self, alarm: Alarm) -> None:
        """Send the next request that follows no other."""
        i = self._next
        self._next = following = i + 1
        order, times = self._order, self._times
        row = i if order is None else order[i]
        now = times[row]
        if following < self._first_ones:  # at once, so that whoever looks ahead sees an arrival at this same instant
            alarm.again(times[following if order is None else order[following]], ARRIVAL)
        self._send(row, now)

    def _send_now(self, row: int) -> None:
        self._send(row, self.clock.now)

    def _send(self, row: int, now: int) -> None:
        make = self._make
        request = make(row)
        self.request_time += self._inside * (now - self._since)
        self._since = now
        self._inside += 1
        if self._followers or self._think:
            self.requests.arrival[row] = now
            request.send(now)
        self._arrived += 1
        last = self._arrived == len(self._times)
        if last:  # a policy that waits for a fuller batch has waited long enough
            self.more_arrivals = False
            for replica in self.replicas:
                replica.engine.state.expect(False)
        if self.on_arrival is not None:
            self.on_arrival(request)
        self.front.send(request, now)
        if last:
            for replica in self.replicas:
                replica.nudge()
        if self._progress is not None and (last or self._arrived % REPORT == 0):
            self._progress(self._arrived)

    def _stuck(self) -> NoProgress:
        if not all(pool.replicas for pool in self.pools):
            return NoProgress(f"{self.left} requests are never served: no replica takes requests any more")
        left = [i for i, status in enumerate(bytes(self.requests.status)) if status == Status.PENDING]
        engine = self.replicas[max(self.requests.replica[left[0]], 0)].engine
        state = engine.state
        names = ", ".join(map(str, left[:EXAMPLES])) + (", …" if len(left) > EXAMPLES else "")
        what = (
            f"{len(left)} requests are never served ({names}):"
            f" it plans nothing with {len(state.admitted)} running, {len(state.queue)} waiting and"
            f" {engine.pool.free} of {engine.pool.total} blocks free"
        )
        return NoProgress(what, name_of(engine.scheduler))
