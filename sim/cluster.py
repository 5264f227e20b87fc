"""Requests arriving at replicas: the only module that knows SimPy.

A replica is one *armed* timer: it stands at the end of the run under way and is set again when an arrival cuts that
run short. Every change of state happens at ``env.now``. Ties at one instant go: step boundaries, then arrivals, then
planning, once; SimPy's event priorities say just that. Only callbacks are used here, for they cost a tenth of what
processes, stores and interrupts do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy
from simpy.events import Event

from policies.base import PolicyError, ReplicaView, Request, Router
from sim.engine import Engine
from sim.records import RequestRecords, Status

BOUNDARY, ARRIVAL, PLAN = 0, 1, 2  # SimPy priorities: the tie rule
EXAMPLES = 5  # requests that an error names
REPORT = 1000  # arrivals between two calls of `progress`


class Replica(ReplicaView):
    """One engine on the event loop."""

    def __init__(self, env: simpy.Environment, engine: Engine) -> None:
        self._env = env
        self.engine = engine
        self.index = engine.index
        self._timer: Event | None = None
        self._planning = False

    @property
    def outstanding(self) -> int:  # noqa: D102 - documented in the contract
        return self.engine.outstanding

    @property
    def outstanding_tokens(self) -> int:  # noqa: D102
        state = self.engine.state
        return sum(r.prompt_tokens for r in state.waiting) + sum(r.prompt_tokens for r in state.running)

    @property
    def _now(self) -> int:
        return self._env.now  # type: ignore[return-value]  # integers in, integers out

    def submit(self, request: Request) -> None:
        """Hand a request over; it is planned at once if the replica is idle."""
        heeds = self.engine.heeds_arrival()
        if self.engine.submit(request, self._now) and heeds:
            self._replan()

    def nudge(self) -> None:
        """Something that policies may see has changed."""
        if self.engine.heeds_arrival():
            self._replan()

    def _replan(self) -> None:
        """Plan now if idle, else at the first boundary."""
        engine = self.engine
        if engine.end is None:
            self.plan_soon()
            return
        before = engine.end
        end = engine.cut(self._now)
        if end != before:
            self._arm(end)

    def plan_soon(self) -> None:
        """Plan once all boundaries and arrivals of this instant are in."""
        if self._planning:
            return
        env = self._env
        now = self._now
        if env.peek() > now:
            self._plan(now)
        else:
            self._planning = True
            _Alarm(env, 0, PLAN, self._planned)

    def _planned(self, _event: Event) -> None:
        self._planning = False
        self._plan(self._now)

    def _plan(self, now: int) -> None:
        end = self.engine.begin(now)
        if end is None:
            end = self.engine.state.wake
        self._timer = None if end is None else _Alarm(self._env, end - now, BOUNDARY, self._ring)

    def _arm(self, end: int | None) -> None:
        """Set the timer to ``end``; a timer set before stays in SimPy's heap and is ignored when it fires."""
        self._timer = None if end is None else _Alarm(self._env, end - self._now, BOUNDARY, self._ring)

    def _ring(self, event: Event) -> None:
        if event is not self._timer:
            return
        self._timer = None
        if self.engine.end is not None:
            self.engine.settle(self._now)
        self.plan_soon()


class Cluster:
    """Replicas behind a router, and the trace that feeds them.

    ``progress(arrived)`` is called now and then with the number of requests that have arrived.
    """

    def __init__(
        self,
        requests: RequestRecords,
        engines: Sequence[Engine],
        router: Router,
        make_request: Callable[[int], Request],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.env = simpy.Environment(initial_time=0)
        self.replicas = [Replica(self.env, engine) for engine in engines]
        self._requests = requests
        self._router = router
        self._make = make_request
        self._progress = progress
        self._arrivals: list[int] = requests.trace.arrival_ps.tolist()
        self._next = 0

    def run(self) -> None:
        """Serve the whole trace.

        Raises `PolicyError` if a policy leaves requests unserved although nothing more can happen.
        """
        _Alarm(self.env, self._arrivals[0], ARRIVAL, self._arrive)
        self.env.run()
        left = [i for i, status in enumerate(self._requests.status) if status == Status.PENDING]
        if left:
            engine = self.replicas[max(self._requests.replica[left[0]], 0)].engine
            state = engine.state
            names = ", ".join(map(str, left[:EXAMPLES])) + (", …" if len(left) > EXAMPLES else "")
            raise PolicyError(
                f"policy {type(engine.scheduler).__name__}: {len(left)} requests are never served ({names}):"
                f" it plans nothing with {len(state.admitted)} running, {len(state.waiting)} waiting and"
                f" {engine.pool.free} of {engine.pool.total} blocks free"
            )

    def _arrive(self, _event: Event) -> None:
        i = self._next
        self._next = i + 1
        arrivals = self._arrivals
        last = i + 1 == len(arrivals)
        if not last:  # before anything else, so that whoever looks ahead sees an arrival at this same instant
            _Alarm(self.env, arrivals[i + 1] - arrivals[i], ARRIVAL, self._arrive)
        request = self._make(i)
        replicas = self.replicas
        chosen = replicas[0] if len(replicas) == 1 else replicas[self._router.route(request, replicas)]
        if last:  # whoever waits for a fuller batch has waited long enough
            for replica in self.replicas:
                replica.engine.state.more_arrivals = False
        chosen.submit(request)
        if last:
            for replica in self.replicas:
                replica.nudge()
        if self._progress is not None and (last or i % REPORT == 0):
            self._progress(i + 1)


class _Alarm(Event):
    """An event that calls one function: a `simpy.Timeout` with a priority."""

    def __init__(self, env: simpy.Environment, delay: int, priority: int, callback: Callable[[Event], None]) -> None:
        self.env = env
        self.callbacks = [callback]
        self._value = None
        self._ok = True
        env.schedule(self, priority, delay)  # type: ignore[arg-type]  # SimPy's priorities are a NewType of int
