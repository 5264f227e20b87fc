"""One replica: what its policy plans, run by run, in integer picoseconds. It knows no event loop.

Three verbs drive it. ``begin(now)`` asks the policy and returns when the run it starts ends (None when idle),
``cut(now)`` shortens that run to its first boundary at or after ``now``, ``settle(now)`` commits the run that ends
now. A *run* is many engine steps of the same members: nothing in it is done per step or per member.

A synchronous engine runs what it has just planned. An asynchronous one (`Scheduler.asynchronous`) plans one step
ahead: at each boundary one step is in flight already, and the plan is for those after it. The policy then sees every
step as done that is planned, except that a request whose last token is in flight keeps its place until it is in.
"""

from __future__ import annotations

from typing import Any

from policies.base import Request
from sim.planner import Planner
from sim.records import PACK_RUN, RunRecords, Status
from sim.runs import NOBODY, Plan, duration, steps_to_reach


class Engine(Planner):
    """A replica's policy, pool and cost model at work.

    ``requests`` is where each request's fate is written. With ``leap=False`` every step is planned and priced on its
    own: slow, and the oracle for leaping. ``records`` continues those of an engine before it.
    """

    def __init__(self, *parts: Any, records: RunRecords | None = None, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.records = records or RunRecords()
        self.steps = 0
        self.end: int | None = None  # of the run under way
        self._start = 0  # of the run under way
        self._count = 0  # steps until its end, one in flight included
        self._plan: Plan | None = None  # what runs; asynchronous: what runs after the step in flight
        self._flight: Plan | None = None  # asynchronous: the step that runs, committed already
        self._landing = 0  # when the step in flight is done
        self._cancelled: list[Request] = []  # to leave at the end of the run
        self._decoded = 0  # asynchronous: when the group emitted last before the step in flight

    def heeds_arrival(self) -> bool:
        """Whether an arrival now calls for a plan: at once if idle, else at the next boundary (ask before `submit`)."""
        return self.end is None or (self._count > 1 and self.scheduler.heeds_arrival(self.state))

    def begin(self, now: int) -> int | None:
        """Ask the policy what runs next; the time at which that run ends, None when it leaves the replica idle."""
        self._start = now
        if not self._ahead:
            plan = self._plan = self._ask_until(now)
            if plan is None:
                return None
            self._count = plan.count
            self.end = now + (plan.first if plan.count == 1 else duration(plan.first, plan.slope, plan.count))
            return self.end
        if self._flight is None:
            plan = self._ask_until(now)
            if plan is None:
                return None
            self.commit(plan, 1)
            self._launch(plan, now)
        flight = self._flight
        assert flight is not None
        plan = self._plan = self.ask(now, self._landing)
        self._count = 1
        self.end = self._landing
        if plan is not None and plan.count > 1 and not flight.ending:
            self._count = plan.count
            self.end += duration(plan.first, plan.slope, plan.count - 1)
        return self.end

    def cut(self, now: int) -> int | None:
        """Shorten the run under way to its first boundary at or after ``now``; its new end."""
        plan = self._plan
        if self._count > 1 and plan is not None:
            if not self._ahead:
                count = steps_to_reach(now - self._start, plan.first, plan.slope)
                begun = self._start
            else:
                begun = self._landing
                count = 1 if now <= begun else 1 + steps_to_reach(now - begun, plan.first, plan.slope)
            if count < self._count:
                self._count = count
                self.end = begun + duration(plan.first, plan.slope, count - 1 if self._ahead else count)
        return self.end

    def settle(self, now: int) -> list[Request]:
        """Commit the run that ends now; the requests that ended with it."""
        plan, count = self._plan, self._count
        self.end = None
        if not self._ahead:
            assert plan is not None
            self.commit(plan, count)
            self._record(plan, self._start, plan.first, count, plan.row)
            self._announce(plan, now)
            self._deliver(plan, now)
            done = self.complete(plan, now) if plan.ending else NOBODY
        else:
            flight, state = self._flight, self.state
            assert flight is not None
            landing = self._landing
            if flight.undelivered or flight.late_gaps:
                self._record(flight, *flight.air)
            else:  # as `_record`, without the detour
                start, first, _, row = flight.air
                self.steps += 1
                self.records.rows.frombytes(PACK_RUN(start, first, flight.slope, 1, *row))
            if flight.emitting:
                self._deliver(flight, landing)
            done = self.complete(flight, landing) if flight.ending or state.parked else NOBODY
            self._flight = None
            if plan is not None:
                self.commit(plan, count)
                if count > 1:
                    self._record(plan, landing, plan.first, count - 1, plan.row)
                    self._launch(plan, now, count - 1)
                elif plan.emitting or not plan.decoding:
                    self._launch(plan, now)
                else:  # as `_launch`, without the detour
                    self._flight = plan
                    self._decoded = state.decoded_at
                    self._landing = state.decoded_at = now + plan.first
                    plan.air = (now, plan.first, 1, plan.row)
        if self._cancelled:
            self._let_go(now)
        return done

    def _let_go(self, now: int) -> None:
        """Those whose client has given up leave, between two steps."""
        cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            self._strike(request, now)

    def cancel(self, request: Request, now: int) -> None:
        """The client has given up on a request that is here; a running one leaves at the next boundary.

        The caller cuts the run, or plans if the replica is idle.
        """
        if request.id in self.state.admitted and self.end is not None:
            self._cancelled.append(request)
        else:
            self._strike(request, now)

    def abort(self, now: int) -> list[Request]:
        """The replica fails: steps done by now count, all else is lost with it. The requests it held, to go elsewhere.

        They keep the tokens that their clients have. The engine is of no use afterwards.
        """
        state, plan = self.state, self._plan
        begun = self._landing if self._ahead else self._start
        cancelled, self._cancelled = self._cancelled, []  # they gave up after the boundary that is settled here
        if self.end is not None and plan is not None and self._count > 1 and now >= begun:
            whole = steps_to_reach(now - begun + 1, plan.first, plan.slope) - 1
            if whole or self._ahead:
                self._count = whole + self._ahead
                self.settle(begun + duration(plan.first, plan.slope, whole))
        for request in cancelled:
            self._strike(request, now)
        state.release()
        self._answer_batch(now)
        flight = self._flight
        decoded = self._decoded if flight is not None and flight.decoding else state.decoded_at
        lost = [*state.admitted.values(), *state.waiting]
        for request in lost:
            flying = self._flies(request)
            decodes = request._counter is not None
            if decodes:
                state.group.leave(request)
            request._emitted -= flying
            if flight is not None and request in flight.emitting:
                request._last -= (flight.gaps or {}).get(request.id, 0)
            elif decodes or flying:  # the time of its latest token was not kept, or is that of the one in flight
                request._last = max(0 if request._last == self._landing else request._last, decoded)
            request.restart()
        self.end = self._flight = self._plan = None
        return lost

    def _ask_until(self, now: int) -> Plan | None:
        """As `ask`, again for as long as all that the policy does is to refuse or to preempt."""
        while True:
            plan = self.ask(now, now)
            if plan is not None or not (self.state.rejected or self.state.preempted):
                return plan

    def _launch(self, plan: Plan, start: int, before: int = 0) -> None:
        """Put the last committed step of ``plan``, which has ``before`` steps before it, in flight."""
        row = plan.row
        first = plan.first + before * plan.slope
        self._flight = plan
        self._landing = start + first
        if plan.decoding:
            self._decoded = start if before else self.state.decoded_at
        if before:
            decodes, padded, context = row[2:5]
            row = (*row[:4], context + before * (decodes + padded), 0, *row[6:9], row[9] + before * decodes, *row[10:])
        plan.air = (start, first, 1, row)
        if plan.emitting:
            self._announce(plan, self._landing)
        elif plan.decoding:
            self.state.decoded_at = self._landing

    def _announce(self, plan: Plan, now: int) -> None:
        """Let planning know when ``plan`` brings its tokens (its last committed step's end)."""
        if plan.decoding:
            self.state.decoded_at = now
        first_token = self._requests.first_token
        for request in plan.emitting:
            if first_token[request.id] >= 0:  # it was preempted: the client waits for this token since its last
                plan.gaps = plan.gaps or {}
                plan.gaps[request.id] = now - request._last
            request._last = now

    def _deliver(self, plan: Plan, now: int) -> None:
        """Write down the tokens that ``plan`` has brought to those whose prompt was done with it."""
        gaps = plan.gaps or {}
        for request in plan.emitting:
            if request.id in gaps:
                self.records.gap_rows.extend((gaps[request.id], 1))
            else:
                self._requests.first_token[request.id] = now

    def _record(self, plan: Plan, start: int, first: int, count: int, row: tuple[int, ...]) -> None:
        self.steps += count
        if plan.undelivered:  # no gap is theirs
            row = (*row[:5], row[5] + plan.undelivered, *row[6:])
        self.records.rows.frombytes(PACK_RUN(start, first, plan.slope, count, *row))
        if plan.late_gaps:
            self.records.gap_rows.extend(plan.late_gaps)
            plan.late_gaps = []

    def _flies(self, request: Request) -> bool:
        """Whether a token of ``request`` is in flight: planned, counted in what policies see, not brought yet."""
        flight = self._flight
        if flight is None:
            return False
        if request in flight.emitting or request in flight.ending:
            return True
        if not flight.decoding:
            return False
        state = self.state
        parked = request.id in state.parked and request._last == self._landing  # by the plan under way
        return request._counter is not None or parked or request in state.evicted

    def _strike(self, request: Request, now: int) -> None:
        """A cancelled request leaves, between two steps."""
        state, flight = self.state, self._flight
        if self._requests.status[request.id] != Status.PENDING:
            return  # its last token came with the very step
        flying = self._flies(request)
        if flying:
            assert flight is not None
            if request in flight.emitting:
                flight.emitting.remove(request)
            else:
                flight.undelivered += 1
            if request in flight.ending:
                flight.ending.remove(request)
        if request.id in state.admitted:
            del state.admitted[request.id]
            state.vacate(request)
        elif request in state.waiting:
            state.withdraw(request)
        request._emitted -= flying
        self.end_request(request, now, Status.TIMED_OUT)
        if request in state.batch:  # it has its whole answer, and pays for a slot until the others have theirs
            self._requests.emitted[request.id] = self._outputs[request.id]
