"""One replica: what its policy plans, run by run, in integer picoseconds. It knows no event loop.

Three verbs drive it. ``begin(now)`` asks the policy and returns when the run it starts ends (None when idle),
``cut(now)`` shortens that run to its first boundary at or after ``now``, ``settle(now)`` commits the run that ends
now. A *run* is many engine steps of the same members: nothing in it is done per step or per member.

A synchronous engine runs what it has just planned. An asynchronous one (`Scheduler.asynchronous`) plans one step
ahead: at each boundary one step is in flight already, and the plan is for those after it. The policy then sees every
step as done that is planned, except that a request whose last token is in flight keeps its place until it is in.

Where the cost model knows of host time, an asynchronous engine's loop is vLLM's: take arrivals in, schedule and launch
step n+1, wait for step n, process its output. With the GPU's clock g and the boundary b(n) when n's output is in::

    launched(n+1) = b(n-1) + intake + schedule + launch
    b(n)          = max(g(n), launched(n+1)) + update
    g(n+1)        = max(g(n), launched(n+1)) + gpu                                      one CUDA graph
                  = max(max(g(n), launched(n+1) - launch) + gpu, launched(n+1) + tail)  kernel by kernel

So when n lands is known only once n+1 is planned. Each plan therefore owns a holder of that time (`When`), which its
tokens refer to. Until n+1 is planned it says a time later than now, exact where the host takes no time.
"""

from __future__ import annotations

from typing import Any

from chairlift.backend.base import NO_HOST, WHOLE
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import AWAY, HELD, NEVER, Live, When, at
from chairlift.sim.replica.step_plan import NOBODY, Plan, duration, steps_to_reach
from chairlift.sim.results.records import PACK_RUN, RunRecords, Status

PATIENCE = 1_000  # plans in a row that run nothing and want another
_SILENCE = at(-1)  # ends of no run: whoever decodes behind it is late


class Engine(Planner):
    """A replica's policy, pool and cost model at work.

    ``requests`` is where each request's fate is written. With ``leap=False`` every step is planned and priced on its
    own: slow, and the oracle for leaping. ``records`` continues those of an engine before it.
    """

    __slots__ = (
        *("_cancelled", "_count", "_flight", "_gpu_end", "_gpu_next", "_latest", "_plan", "_start"),
        *("end", "records", "steps"),
    )

    def __init__(self, *parts: Any, records: RunRecords | None = None, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.records = records or RunRecords()
        self.steps = 0
        self.end: int | None = None  # of the run under way
        self._start = 0  # of the run under way
        self._count = 0  # steps until its end, one in flight included
        self._plan: Plan | None = None  # what runs; asynchronous: what runs after the step in flight
        self._flight: Plan | None = None  # asynchronous: the step that runs, committed already
        self._latest = NEVER  # when the latest step that is done brought its tokens
        self._gpu_end = 0  # when the GPU is done with it
        self._gpu_next = 0  # likewise the first step of `_plan`
        self._cancelled: list[Live] = []  # to leave at the end of the run

    def heeds_arrival(self) -> bool:
        """Whether an arrival now calls for a plan: at once if idle, else at the next boundary (ask before `submit`)."""
        if self.end is None:
            return True
        return self._count > 1 and (
            self._arrival > 0 or self._arrival_token > 0 or self.scheduler.heeds_arrival(self.state)
        )

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
            if plan.host is not NO_HOST or plan.intake:  # the boundary at which it is launched
                self._plan, self._count = plan, 1
                self.end = now + plan.intake + plan.host.schedule + plan.host.launch
                return self.end
            self.commit(plan, 1)
            self._launch(plan, now, now + plan.gpu, now)
        flight = self._flight
        assert flight is not None
        plan = self._plan = self.ask(now, flight.when)
        if self.state.evicted and self.scheduler.drops_flight:
            self.lose()
        alike = True
        if plan is None or plan.host is not NO_HOST or flight.host is not NO_HOST or plan.intake:
            alike = self._overlap(flight, plan, now)
        else:
            self._gpu_next = flight.when.ps + plan.gpu
        self._count = 1
        self.end = flight.when.ps
        if plan is not None and plan.count > 1 and alike and not flight.ending:
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
                assert self._flight is not None
                begun = self._flight.when.ps
                count = 1 if now <= begun else 1 + steps_to_reach(now - begun, plan.first, plan.slope)
            if count < self._count:
                self._count = count
                self.end = begun + duration(plan.first, plan.slope, count - 1 if self._ahead else count)
        return self.end

    def settle(self, now: int) -> list[Live]:
        """Commit the run that ends now; the requests that ended with it."""
        plan, count = self._plan, self._count
        self.end = None
        if self._ahead and self._flight is None:
            assert plan is not None
            self.commit(plan, 1)
            launched = now - plan.host.launch if plan.host.tail != WHOLE else now
            self._launch(plan, self._start, max(launched + plan.gpu, now + max(0, plan.host.tail)), now)
            done = NOBODY
        elif not self._ahead:
            assert plan is not None
            self.commit(plan, count)
            self._record(plan, self._start, plan.first, count, plan.row)
            plan.when.ps = now
            self._latest = plan.when
            self._deliver(plan, now)
            done = self.complete(plan, now) if plan.ending or (plan.emitting and self.pool.keeps) else NOBODY
        else:
            flight, state = self._flight, self.state
            assert flight is not None
            landing = flight.when.ps
            start, row = flight.air
            if flight.undelivered or flight.late_gaps:
                self._record(flight, start, landing - start, 1, row)
            else:
                self.steps += 1
                self.records.rows.frombytes(PACK_RUN(start, landing - start, 0, 1, *row))
            if flight.emitting:
                self._deliver(flight, landing)
            if flight.ending or state.parked or (flight.emitting and self.pool.keeps):
                done = self.complete(flight, landing, plan)
            else:
                done = NOBODY
            self._flight = None
            self._latest = flight.when
            if plan is not None:
                self.commit(plan, count)
                if count > 1:
                    self._record(plan, landing, plan.first, count - 1, plan.row)
                    gpu = plan.gpu + (count - 1) * plan.gpu_slope
                    self._launch(plan, now, now - plan.host.update + gpu, now, at(now))
                elif plan.host is not NO_HOST or self._gpu_next <= now:
                    self._launch(plan, now, self._gpu_next, now)
                else:  # as `_launch`, without the detour
                    self._flight = plan
                    self._gpu_end = plan.when.ps = self._gpu_next
                    plan.air = (now, plan.row)
        if self._cancelled:
            self._let_go(now)
        return done

    def _let_go(self, now: int) -> None:
        """Those whose client has given up leave, between two steps."""
        cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            self._strike(request, now)

    def cancel(self, request: Live, now: int) -> None:
        """The client has given up on a request that is here; a running one leaves at the next boundary.

        The caller cuts the run, or plans if the replica is idle.
        """
        if request.id in self.state.admitted and self.end is not None:
            self._cancelled.append(request)
        else:
            self._strike(request, now)

    def abort(self, now: int) -> list[Live]:
        """The replica fails: steps done by now count, all else is lost with it. The requests it held, to go elsewhere.

        They keep the tokens that their clients have. The engine is of no use afterwards.
        """
        state, plan = self.state, self._plan
        begun = self._flight.when.ps if self._flight is not None else self._start
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
        lost = [*state.admitted.values(), *state.waiting]
        for request in lost:
            flying = self._flies(request)
            if request.group is not None:
                state.part(request, AWAY)
            if flying:
                assert flight is not None
                self._unsay(flight, request)
            request.depart()
        self.end = self._flight = self._plan = None
        return lost

    def _ask_until(self, now: int) -> Plan | None:
        """As `ask`, again for as long as all that the policy does is to refuse or to preempt."""
        state, again = self.state, 0
        while True:
            plan = self.ask(now, self._latest if self._latest.ps == now else _SILENCE)
            if plan is not None:
                return plan
            if not (state.rejected or state.preempted):
                again += 1
                if not self._again:
                    return None
                if again > PATIENCE:
                    self._fail("it runs nothing, however often it is asked")

    def _overlap(self, flight: Plan, plan: Plan | None, now: int) -> bool:
        """See when the step in flight lands and the GPU is done with the one after it, ``plan`` being what follows.

        Whether further steps of ``plan`` then come at its pace, as if the step before had been like them.
        """
        gpu_end, launched, alike = self._gpu_end, now, True
        if plan is not None:
            host, gpu = plan.host, plan.gpu
            work = host.schedule + host.launch
            launched = now + plan.intake + work
            if host.tail == WHOLE:
                self._gpu_next = max(gpu_end, launched) + gpu
                alike = max(gpu - flight.host.update, work) == max(gpu - host.update, work)
            else:
                self._gpu_next = max(max(gpu_end, launched - host.launch) + gpu, launched + host.tail)
                busy = gpu_end >= launched and gpu >= max(work + host.update, host.launch + host.tail)
                alike = busy and flight.host.update == host.update
        landing = max(gpu_end, launched) + flight.host.update
        if landing <= now:  # no two boundaries at once
            landing, alike = now + 1, False
        flight.when.ps = landing
        return alike

    def _launch(self, plan: Plan, start: int, gpu_end: int, now: int, before: When | None = None) -> None:
        """Put the last committed step of ``plan`` in flight; the steps before it, if any, end at ``before``."""
        row = plan.row
        self._flight = plan
        self._gpu_end = gpu_end
        landing = gpu_end + plan.host.update
        plan.when.ps = landing if landing > now else now + 1
        if before is not None:
            plan.decoded_before, plan.fresh = before, {}
            more = self._count - 1
            decodes, padded, context = row[2:5]
            row = (*row[:4], context + more * (decodes + padded), 0, *row[6:9], row[9] + more * decodes, *row[10:])
        plan.air = (start, row)

    def _deliver(self, plan: Plan, now: int) -> None:
        """Write down the tokens that ``plan`` has brought to those whose prompt was done with it."""
        first_token = self._requests.first_token
        for request in plan.emitting:
            if first_token[request.id] >= 0:  # it was preempted: its client waits for this token since the one before
                self.records.gap_rows.extend((now - request.before.ps, 1))
            else:
                first_token[request.id] = now

    def _record(self, plan: Plan, start: int, first: int, count: int, row: tuple[int, ...]) -> None:
        self.steps += count
        if plan.undelivered:  # no gap is theirs
            row = (*row[:5], row[5] + plan.undelivered, *row[6:])
        self.records.rows.frombytes(PACK_RUN(start, first, plan.slope, count, *row))
        if plan.late_gaps:
            end = start + first
            for i in range(0, len(plan.late_gaps), 2):
                self.records.gap_rows.extend((end - plan.late_gaps[i], plan.late_gaps[i + 1]))
            plan.late_gaps = []

    def _flies(self, request: Live) -> bool:
        """Whether a token of ``request`` is in flight: planned, counted in what policies see, not brought yet."""
        flight = self._flight
        if flight is None:
            return False
        if request in flight.emitting or request in flight.ending:
            return True
        if not flight.decoding:
            return False
        if request.group is not None:  # who joined since the flight was committed is in `emitting`, or was parked
            return request.id not in self.state.fresh
        return request.last is flight.when  # parked or preempted by the plan under way

    def lose(self) -> None:
        """Those whom the plan at hand has preempted lose their tokens in flight (`Scheduler.drops_flight`)."""
        flight = self._flight
        assert flight is not None
        for request in self.state.evicted:
            if self._flies(request):
                self._unsay(flight, request)
                self._miss(flight, request)
                self.drop(request)

    def _miss(self, flight: Plan, request: Live) -> None:
        """The token in flight of a request goes to nobody."""
        if request in flight.emitting:
            flight.emitting.remove(request)
        else:
            flight.lose_gap(request.last.ps)
        if request in flight.ending:
            flight.ending.remove(request)

    def _unsay(self, flight: Plan, request: Live) -> None:
        """The token in flight of a request will not come. The request has left the group by now, if it was in it."""
        own = request in flight.emitting or request.id in flight.fresh  # it was not in the group the step before
        request.unsay(request.before if own else flight.decoded_before)

    def _strike(self, request: Live, now: int) -> None:
        """A cancelled request leaves, between two steps."""
        state, flight = self.state, self._flight
        if self._requests.status[request.id] != Status.PENDING:
            return  # its last token came with the very step
        flying = self._flies(request)
        if request.id in state.admitted:
            del state.admitted[request.id]
            state.vacate(request, AWAY)
            self.scheduler.ended(request)
        elif request.phase is not HELD and request.phase is not AWAY:
            state.withdraw(
                request
            )  # one that is held pays for its slot until the others of its batch have their answers
        if flying:
            assert flight is not None
            self._unsay(flight, request)
            self._miss(flight, request)
        self.end_request(request, now, Status.TIMED_OUT)
