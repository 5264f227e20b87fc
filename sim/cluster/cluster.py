"""Requests arriving at replicas, on SimPy: the only module that knows it.

A replica is one *armed* timer: it stands at the end of the run under way and is set again when an arrival cuts that
run short. Every change of state happens at ``now``. Ties at one instant go: step boundaries, then changes (failures,
repairs, cancellations, control), then arrivals, then planning, once; SimPy's event priorities say just that. Only
callbacks are used, for they cost a tenth of what processes, stores and interrupts do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import simpy
from simpy.events import Event

from chairlift.policies.base import PolicyError, Request
from chairlift.sim.replica.engine import Engine
from chairlift.sim.results.records import RequestRecords, Status

if TYPE_CHECKING:
    from chairlift.sim.cluster.replica_pool import ReplicaPool

BOUNDARY, CHANGE, ARRIVAL, PLAN = -(1 << 24), 1, 2, 3  # SimPy priorities: the tie rule
EXAMPLES = 5  # requests that an error names
PATIENCE = 1000  # looks at an idle cluster before it counts as stuck
REPORT = 1000  # arrivals between two calls of `progress`


class Replica:
    """One engine on the event loop. ``build`` makes a fresh one, after a failure too."""

    def __init__(self, cluster: Cluster, index: int, build: Callable[[Replica], Engine]) -> None:
        self.index = index
        self.engine = build(self)
        self.draining = False
        self.pool: ReplicaPool | None = None  # that sends it requests; None while it takes none
        self.position = 0  # there
        self.held = 0  # requests here
        self.held_tokens = 0  # their prompts'
        self.up_ps = 0  # how long it has been up before
        self._up_since: int | None = None
        self._build = build
        self._cluster = cluster
        self._env = cluster.env
        self._timer: _Alarm | None = None
        self._spare: _Alarm | None = None  # has rung
        self._planning = False
        self._boundary_rank = BOUNDARY + index  # of several replicas at one instant the first in order goes first
        self._plan_rank = PLAN + index

    @property
    def _now(self) -> int:
        return self._env.now  # type: ignore[return-value]  # integers in, integers out

    def submit(self, request: Request, now: int) -> None:
        """Hand a request over; it is planned at once if the replica is idle."""
        self.held += 1
        self.held_tokens += request.prompt_tokens
        request._at = self.index
        pool = self.pool
        if pool is not None:
            pool.outstanding[self.position] += 1
            pool.outstanding_tokens[self.position] += request.prompt_tokens
        heeds = self.engine.heeds_arrival()
        if self.engine.submit(request, now) and heeds:
            self._replan(now)

    def left(self, request: Request) -> None:
        """A request is here no more."""
        self.held -= 1
        self.held_tokens -= request.prompt_tokens
        request._at = -1
        pool = self.pool
        if pool is not None:
            pool.outstanding[self.position] -= 1
            pool.outstanding_tokens[self.position] -= request.prompt_tokens
        if self.draining and self.held == 0:
            self._cluster.after(0, CHANGE, self._drained)

    def cancel(self, request: Request) -> None:
        """The client of a request here has given up."""
        now = self._now
        self.engine.cancel(request, now)
        self._replan(now)

    def nudge(self) -> None:
        """Something that policies may see has changed."""
        if self.engine.heeds_arrival():
            self._replan(self._now)

    def fail(self) -> list[Request]:
        """Lose everything; the requests that were here."""
        lost = self.engine.abort(self._now)
        self._timer = None
        self.held = self.held_tokens = 0
        for request in lost:
            request._at = -1
        records = self.engine.records
        self.engine = self._build(self)
        self.engine.records = records
        return lost

    def go_up(self) -> None:
        """It costs money from now on."""
        if self._up_since is None:
            self._up_since = self._now

    def go_down(self) -> None:
        """It costs none any more."""
        if self._up_since is not None:
            self.up_ps += self._now - self._up_since
            self._up_since = None

    def plan_soon(self, now: int) -> None:
        """Plan once all boundaries and arrivals of this instant are in."""
        if self._planning:
            return
        if self._env.peek() > now:
            self._plan(now)
        else:
            self._planning = True
            _Alarm(self._env, 0, self._plan_rank, self._planned)

    def _replan(self, now: int) -> None:
        """Plan now if idle, else at the first boundary."""
        engine = self.engine
        if engine.end is None:
            self.plan_soon(now)
            return
        before = engine.end
        end = engine.cut(now)
        if end is not None and end != before:  # the timer set before stays in SimPy's heap, and is ignored there
            self._timer = _Alarm(self._env, end - now, self._boundary_rank, self._ring)

    def _planned(self, _event: Event) -> None:
        self._planning = False
        if self.engine.end is None:
            self._plan(self._now)

    def _plan(self, now: int) -> None:
        end = self.engine.begin(now)
        if end is None:
            end = self.engine.state.wake
        if end is None:
            self._timer = None
        elif (spare := self._spare) is not None:
            self._timer, self._spare = spare, None
            spare.again(end - now, self._boundary_rank)
        else:
            self._timer = _Alarm(self._env, end - now, self._boundary_rank, self._ring)

    def _ring(self, event: Event) -> None:
        assert isinstance(event, _Alarm)
        self._spare = event
        if event is not self._timer:
            return
        self._timer = None
        now = self.engine.end
        if now is None:
            now = self._now  # a policy asked to be woken
        else:
            self.engine.settle(now)
        if self._planning or self._env.peek() <= now:
            self.plan_soon(now)
        else:
            self._plan(now)

    def _drained(self) -> None:
        if self.draining and self.held == 0:
            self.draining = False
            self.go_down()


class Cluster:
    """Replicas behind routers, and the trace that feeds them.

    ``progress(arrived)`` is called now and then with the number of requests that have arrived. Features plug in
    through `after`, ``on_end`` (asked of every request that ends; True: it goes on elsewhere) and ``on_arrival``.
    """

    def __init__(
        self,
        requests: RequestRecords,
        make_request: Callable[[int], Request],
        progress: Callable[[int], None] | None = None,
        queue_limit: int | None = None,
    ) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.requests = requests
        self.queue_limit = queue_limit
        self.replicas: list[Replica] = []
        self.pools: list[ReplicaPool] = []
        self.front: ReplicaPool
        self.on_arrival: Callable[[Request], None] | None = None
        self.left = len(requests.trace)  # requests that have not ended
        self.more_arrivals = True
        self.request_time = 0  # ps, summed over the requests inside
        self._inside = 0
        self._since = 0
        self._make = make_request
        self._progress = progress
        self._arrived = 0
        self._idle_looks = 0
        self._next = 0  # in `_order`
        trace = requests.trace
        follows = trace.follows
        self._followers: dict[int, list[int]] = {}
        self._think: list[int] = []
        if follows is None:
            self._order: Sequence[int] = range(len(trace))
        else:
            self._think = [] if trace.think_ps is None else trace.think_ps.tolist()
            for row, before in enumerate(follows.tolist()):
                if before >= 0:
                    self._followers.setdefault(before, []).append(row)
            self._order = [row for row, before in enumerate(follows.tolist()) if before < 0]
        self._times: list[int] = trace.arrival_ps.tolist()

    @property
    def now(self) -> int:
        """The simulated time, ps."""
        return self.env.now  # type: ignore[return-value]

    def after(self, delay: int, priority: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` in ``delay`` ps."""
        _Alarm(self.env, delay, priority, lambda _event: callback())

    def gather(self) -> None:
        """Put planning off until whatever is under way has sent all its requests."""
        self.after(0, PLAN, lambda: None)  # `Replica.plan_soon` sees it in SimPy's heap

    def run(self) -> None:
        """Serve the whole trace.

        Raises `PolicyError` if a policy leaves requests unserved although nothing more can happen.
        """
        _Alarm(self.env, self._times[self._order[0]], ARRIVAL, self._arrive)
        self.env.run()
        if self.left:
            raise PolicyError(self._stuck())

    def watch(self) -> None:
        """Raise `PolicyError` if nothing has happened for long but what calls this, again and again."""
        busy = self._arrived < len(self._times) or any(r.engine.end is not None for r in self.replicas)
        self._idle_looks = 0 if busy else self._idle_looks + 1
        if self._idle_looks > PATIENCE:
            raise PolicyError(self._stuck())

    def refuse(self, request: Request, now: int) -> None:
        """A request that no replica has taken ends, refused."""
        self.requests.end(request, now, Status.REJECTED)
        self.ended(request, now)

    def ended(self, request: Request, now: int) -> None:
        """A request has ended for good: whoever waits for that is sent after its think time."""
        self.request_time += self._inside * (now - self._since)
        self._since = now
        self._inside -= 1
        self.left -= 1
        if not self.left:
            for replica in self.replicas:
                replica.go_down()
        followers = self._followers.pop(request.id, None) if self._followers else None
        for row in followers or ():
            self.after(self._think[row], ARRIVAL, lambda row=row: self._send(row, self.now))  # type: ignore[misc]

    def _arrive(self, event: Event) -> None:
        assert isinstance(event, _Alarm)
        i = self._next
        self._next = i + 1
        order, times = self._order, self._times
        row = order[i]
        if i + 1 < len(order):  # before anything else, so that whoever looks ahead sees an arrival at this same instant
            event.again(times[order[i + 1]] - times[row], ARRIVAL)
        self._send(row, times[row])

    def _send(self, row: int, now: int) -> None:
        request = self._make(row)
        self.request_time += self._inside * (now - self._since)
        self._since = now
        self._inside += 1
        if self._followers or self._think:
            request.arrival = self.requests.arrival[row] = now
        self._arrived += 1
        last = self._arrived == len(self._times)
        if last:  # whoever waits for a fuller batch has waited long enough
            self.more_arrivals = False
            for replica in self.replicas:
                replica.engine.state.more_arrivals = False
        if self.on_arrival is not None:
            self.on_arrival(request)
        self.front.send(request, now)
        if last:
            for replica in self.replicas:
                replica.nudge()
        if self._progress is not None and (last or self._arrived % REPORT == 0):
            self._progress(self._arrived)

    def _stuck(self) -> str:
        if not all(pool.replicas for pool in self.pools):
            return f"{self.left} requests are never served: no replica takes requests any more"
        left = [i for i, status in enumerate(self.requests.status) if status == Status.PENDING]
        engine = self.replicas[max(self.requests.replica[left[0]], 0)].engine
        state = engine.state
        names = ", ".join(map(str, left[:EXAMPLES])) + (", …" if len(left) > EXAMPLES else "")
        return (
            f"policy {type(engine.scheduler).__name__}: {len(left)} requests are never served ({names}):"
            f" it plans nothing with {len(state.admitted)} running, {len(state.waiting)} waiting and"
            f" {engine.pool.free} of {engine.pool.total} blocks free"
        )


class _Alarm(Event):
    """An event that calls one function: a `simpy.Timeout` with a priority."""

    def __init__(self, env: simpy.Environment, delay: int, priority: int, callback: Callable[[Event], None]) -> None:
        self.env = env
        self._calls = [callback]
        self._value = None
        self._ok = True
        self.again(delay, priority)

    def again(self, delay: int, priority: int) -> None:
        """Set it anew, once it has rung: cheaper than a new one."""
        self.callbacks = self._calls
        self.env.schedule(self, priority, delay)  # type: ignore[arg-type]  # SimPy's priorities are a NewType of int


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
