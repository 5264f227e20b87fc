"""A replica on the clock: one engine, and one *armed* timer that stands at the end of the engine's run.

An arrival that cuts the run short sets the timer again, so every change of state happens at the clock's ``now``. Ties
at one instant go: step boundaries, changes, arrivals, then planning, once. Where nothing more is due at this instant
the replica plans at once, which spares an event.

A run of decode steps that take 10 ps each, from 0 to 100, and an arrival at 34:

- at 0 the engine begins the run; the timer stands at 100;
- at 34 the request is handed over; the engine cuts the run to its first boundary at or after 34; a second timer stands
  at 40, and the first one will be ignored;
- at 40 the timer rings; the engine settles four steps, and its policy plans with the new request.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from chairlift.policies.base import NoProgress
from chairlift.sim.cluster.clock import BOUNDARY, CHANGE, PLAN, Alarm, Clock
from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import RunRecords

WAKINGS: Final = 100_000  # plans in a row that run nothing: a policy that looks every ms for 100 s whether it should


@dataclass
class Loads:
    """What each replica of a pool holds, by its position there. The replicas keep these numbers true."""

    outstanding: array[int]  # requests waiting or running
    outstanding_tokens: array[int]  # their prompts' tokens


@mypyc_attr(allow_interpreted_subclasses=True)
class Replica:
    """One engine on the clock. ``make_engine`` makes a fresh one, after a failure too: one that goes on with records.

    ``records`` are those of all its engines. ``ended`` is called with each request that ends here, and the time.
    """

    __slots__ = (
        *("_boundary_rank", "_clock", "_done_at_waking", "_ended", "_loads", "_make_engine", "_plan_rank"),
        *("_planning", "_position", "_timer", "_up_since", "_wakings", "draining", "engine", "held"),
        *("held_tokens", "index", "records", "up_ps"),
    )

    def __init__(
        self,
        clock: Clock,
        index: int,
        make_engine: Callable[[Replica], Engine],
        ended: Callable[[Live, int], None],
    ) -> None:
        self.index = index
        self.records = RunRecords()
        self._ended = ended
        self.engine = make_engine(self)
        self.draining = False  # it takes no requests, and goes down once those that it holds have left
        self.held = 0  # requests here
        self.held_tokens = 0  # their prompts' tokens
        self.up_ps = 0  # how long it was up, the time since it last came up not included
        self._up_since: int | None = None  # None while it is down
        self._make_engine = make_engine
        self._loads: Loads | None = None  # of the pool that sends it requests; None while it takes none
        self._position = 0  # in that pool
        self._clock = clock
        self._timer: Alarm | None = None  # at the end of the run under way, or at the time a policy wants to be asked
        self._wakings = 0  # plans in a row that run nothing, and want another one later
        self._done_at_waking = (0, 0)  # steps and requests at the latest of those
        self._planning = False  # it plans at the end of this instant
        self._boundary_rank = BOUNDARY + index
        self._plan_rank = PLAN + index

    @property
    def takes_requests(self) -> bool:
        """Whether a router may choose it."""
        return self._loads is not None

    def enter(self, loads: Loads, position: int) -> None:
        """It stands at ``position`` among the replicas that take requests, and counts there what it holds."""
        self._loads = loads
        self._position = position

    def leave(self) -> None:
        """It takes no requests for now; those that it holds stay."""
        self._loads = None

    def submit(self, request: Live, now: int) -> None:
        """Take a request in; it is planned at once if the replica is idle."""
        self.held += 1
        self.held_tokens += request.prompt
        request.at = self.index
        loads = self._loads
        if loads is not None:
            loads.outstanding[self._position] += 1
            loads.outstanding_tokens[self._position] += request.prompt
        heeds = self.engine.heeds_arrival()
        if self.engine.submit(request, now) and heeds:
            self._replan(now)

    def finish(self, request: Live, now: int) -> None:
        """A request has ended for good."""
        if request.at >= 0:  # else its client gave up in the very step that handed it over
            self.left(request)
        ended = self._ended
        ended(request, now)

    def left(self, request: Live) -> None:
        """A request is here no more: it has ended, or goes on elsewhere."""
        self.held -= 1
        self.held_tokens -= request.prompt
        request.at = -1
        loads = self._loads
        if loads is not None:
            loads.outstanding[self._position] -= 1
            loads.outstanding_tokens[self._position] -= request.prompt
        if self.draining and self.held == 0:
            self._clock.after(0, CHANGE, self._drained)

    def cancel(self, request: Live) -> None:
        """The client of a request that is here has given up."""
        now = self._clock.now
        self.engine.cancel(request, now)
        self._replan(now)

    def nudge(self) -> None:
        """Something has changed that the policy may look at."""
        if self.engine.heeds_arrival():
            self._replan(self._clock.now)

    def boundary(self) -> int | None:
        """When its next engine step ends, at which it then stops to plan again; None if it is idle."""
        now = self._clock.now
        engine = self.engine
        before = engine.end
        if before is None:
            return None
        # Whoever is sent by the plan of a later replica, or this one's, comes when the step from now on is planned.
        end = engine.cut(now + (self._clock.planned_at == now and self.index <= self._clock.planned_upto))
        if end is not None and end != before:  # the timer set before stays in SimPy's heap, and is ignored there
            self._timer = Alarm(self._clock, end, self._boundary_rank, self._ring)
        return end

    def ends_in_plan(self, now: int) -> None:
        """Requests end as it plans: what follows them at this instant finds the plans up to its own made."""
        self._clock.planned_at, self._clock.planned_upto = now, self.index

    def fail(self) -> list[Live]:
        """Lose everything; returns the requests that were here."""
        lost = self.engine.abort(self._clock.now)
        self._timer = None
        self.held = self.held_tokens = 0
        for request in lost:
            request.at = -1
        self.engine = self._make_engine(self)
        return lost

    def go_up(self) -> None:
        """The replica is paid for from now on."""
        if self._up_since is None:
            self._up_since = self._clock.now

    def go_down(self) -> None:
        """The replica is paid for no more."""
        if self._up_since is not None:
            self.up_ps += self._clock.now - self._up_since
            self._up_since = None

    def _replan(self, now: int) -> None:
        """Plan now if idle, else at the first boundary."""
        if self.engine.end is None:
            self._plan_soon(now)
        else:
            self.boundary()

    def _plan_soon(self, now: int) -> None:
        """Plan once all boundaries, changes and arrivals of this instant are in."""
        if self._planning:
            return
        if self._clock.peek() > now:
            self._plan(now)
        else:
            self._planning = True
            Alarm(self._clock, now, self._plan_rank, self._planned)

    def _planned(self, _alarm: Alarm) -> None:
        self._planning = False
        if self.engine.end is None:
            self._plan(self._clock.now)

    def _plan(self, now: int, rung: Alarm | None = None) -> None:
        """Ask what runs next, and set a timer at its end: the one that has ``rung``, if one has."""
        end = self.engine.begin(now)
        if end is None:
            end = self.engine.state.wake
            if end is not None:
                self._check_waking()
        if end is None:
            self._timer = None
        elif rung is None:
            self._timer = Alarm(self._clock, end, self._boundary_rank, self._ring)
        else:
            self._timer = rung
            rung.again(end, self._boundary_rank)

    def _ring(self, alarm: Alarm) -> None:
        if alarm is not self._timer:
            return  # the run was cut after this one had been set
        self._timer = None
        now = self.engine.end
        if now is None:
            now = self._clock.now  # a policy asked to be woken
        else:
            self.engine.settle(now)
        if self._planning or self._clock.peek() <= now:
            self._plan_soon(now)
        else:
            self._plan(now, alarm)

    def _check_waking(self) -> None:
        """Raise `PolicyError` if the policy has asked to be woken `WAKINGS` times in a row, and run nothing ever."""
        done = (self.engine.planner.steps, self.held)
        self._wakings = self._wakings + 1 if done == self._done_at_waking else 0
        self._done_at_waking = done
        if self._wakings >= WAKINGS:
            what = f"it asks to be woken {WAKINGS:,} times in a row, and runs nothing for {self.held} requests"
            self.engine.planner.fail(what, NoProgress)

    def _drained(self) -> None:
        if self.draining and self.held == 0:
            self.draining = False
            self.go_down()
