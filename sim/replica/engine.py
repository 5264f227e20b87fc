"""One replica: what its policy plans, run by run, in integer picoseconds. It knows no event loop.

Three verbs drive it. ``begin(now)`` asks the policy and returns when the run it starts ends (None when idle),
``cut(now)`` shortens that run to its first boundary at or after ``now``, ``settle(now)`` commits the run that ends
now. A *run* is many engine steps of the same members: nothing in it is done per step or per member.

There are two loops. `Synchronous` runs what it has just planned. `Ahead` (`Scheduler.asynchronous`) plans one step
ahead: at each boundary one step is in flight already, and the plan is for those after it. The policy then sees every
step as done that is planned, except that a request whose last token is in flight keeps its place until it is in. Both
own a `Planner`, which does to the requests what either loop decides, and knows no time but what it is told. When a
step lands is told by its price, or, where steps really run, by the wall clock (`Execution`).

Where the cost model knows of host time, the loop of `Ahead` is vLLM's: take arrivals in, schedule and launch step n+1,
wait for step n, process its output. With the GPU's clock g and the boundary b(n) when n's output is in::

    launched(n+1) = b(n-1) + intake + schedule + launch
    b(n)          = max(g(n), launched(n+1)) + update
    g(n+1)        = max(g(n), launched(n+1)) + gpu                                      one CUDA graph
                  = max(max(g(n), launched(n+1) - launch) + gpu, launched(n+1) + tail)  kernel by kernel

So when n lands is known only once n+1 is planned. Each plan therefore owns a holder of that time (`When`), which its
tokens refer to. Until n+1 is planned it says a time later than now, exact where the host takes no time.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from mypy_extensions import mypyc_attr

from chairlift.backend.base import NO_HOST, WHOLE
from chairlift.policies.base import NoProgress
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.executing import Execution
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.ranks import Ranks, RanksPool, RanksState
from chairlift.sim.replica.request import NEVER, WAITING, Live, at
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import NOBODY, Plan
from chairlift.sim.results.records import Kind, Status

PATIENCE: Final = 1_000  # plans in a row that run nothing and want another
_SILENCE: Final = at(-1)  # ends of no run: whoever decodes behind it is late


@mypyc_attr(allow_interpreted_subclasses=True)
class Engine:
    """A replica's loop over the steps that its ``planner`` plans. ``execution``: its steps really run.

    With DP-attention the planner is that of all its ranks, whose steps are one.
    """

    __slots__ = (  # without them a run takes 2 % longer
        *("_ask", "_cancelled", "_count", "_execution", "_latest", "_plan", "_rested", "_start", "backend", "end"),
        *("index", "planner", "pool", "records", "scheduler", "state"),
    )

    def __init__(self, planner: Planner | Ranks, execution: Execution | None = None) -> None:
        self.planner: Planner | Ranks = planner
        self.index = planner.index
        self.scheduler = planner.scheduler
        self.backend = planner.backend
        self.pool: CountingPool | RanksPool = planner.pool
        self.state: ReplicaStep | RanksState = planner.state
        self.records = planner.records
        self.end: int | None = None  # of the run under way
        self._execution = execution
        self._ask = planner.ask if execution is None else execution.ask
        self._plan: Plan | None = None  # what runs; of `Ahead`: what runs after the step in flight
        self._start = 0  # of the run under way
        self._count = 0  # steps until its end, one in flight included
        self._latest = NEVER  # when the latest step that is done brought its tokens
        self._rested = 0  # until when the backend knows of rests
        self._cancelled: list[Live] = []  # to leave at the end of the run

    @abstractmethod
    def begin(self, now: int) -> int | None:
        """Ask the policy what runs next; the time at which that run ends, None when it leaves the replica idle."""

    @abstractmethod
    def cut(self, now: int) -> int | None:
        """Shorten the run under way to its first boundary at or after ``now``; its new end."""

    @abstractmethod
    def settle(self, now: int) -> list[Live]:
        """Commit the run that ends now; the requests that ended with it."""

    @abstractmethod
    def _settle_done(self, now: int, plan: Plan) -> None:
        """Commit what is done by ``now`` of a run of several steps, if a step of ``plan`` is."""

    def submit(self, request: Live, now: int) -> bool:
        """Take a request in; False if it can never fit, or the policy turns it away (it has then ended, rejected).

        The caller plans if the replica is idle, else cuts the run if `heeds_arrival` said so.
        """
        planner = self.planner
        if planner.journal is not None:
            planned = self.end is not None and self._plan is not None  # without it
            row = planner.row_to_come() + planned
            planner.journal.write(now, row, Kind.ARRIVE, request.row, -1, len(self.state.queue))
        if self._execution is not None:
            self._execution.arrived(request)
        planner.requests.replica[request.row] = self.index
        if not planner.takes(request, now):
            planner.end_request(request, now, Status.REJECTED)
            return False
        if request.phase is not WAITING:
            request.queue()
        self.state.queue.append(request)
        if planner.arrival or planner.arrival_token:
            planner.intake += planner.arrival + planner.arrival_token * request.prompt
        return True

    def heeds_arrival(self) -> bool:
        """Whether an arrival now calls for a plan: at once if idle, else at the next boundary (ask before `submit`)."""
        if self.end is None:
            return True
        return self._count > 1 and self.planner.heeds_arrival()

    def cancel(self, request: Live, now: int) -> None:
        """The client has given up on a request that is here; a running one leaves at the next boundary.

        The caller cuts the run, or plans if the replica is idle.
        """
        if request.row in self.state.admitted and self.end is not None:
            self._cancelled.append(request)
        else:
            self.planner.strike(request, now)

    def abort(self, now: int) -> list[Live]:
        """The replica fails: steps done by now count, all else is lost with it. The requests it held, to go elsewhere.

        They keep the tokens that their clients have. The engine is of no use afterwards.
        """
        cancelled, self._cancelled = self._cancelled, []  # they gave up after the boundary that is settled here
        if self.end is not None and self._plan is not None and self._count > 1:
            self._settle_done(now, self._plan)
        for request in cancelled:
            self.planner.strike(request, now)
        self.end = self._plan = None
        return self.planner.lose(now)

    def _ask_until(self, now: int) -> Plan | None:
        """As `Planner.ask`, again for as long as all that the policy does is to refuse or to preempt."""
        if self.planner.remembers:
            self._rest(now)
        idle = 0  # asks that changed nothing, not even who waits
        while idle < PATIENCE:
            plan = self._ask(now, self._latest if self._latest.ps == now else _SILENCE)
            changed = bool(self.state.rejected or self.state.preempted)
            if plan is not None or not (changed or self.planner.again):
                return plan
            idle += not changed
        self.planner.fail(f"nothing runs at {now} ps, however often it is asked", NoProgress)

    def _rest(self, now: int) -> None:
        """Nothing has run until now since the latest step; tell the backend, which remembers what ran, once."""
        since = max(self._latest.ps, self._rested)
        if now > since:
            self.backend.ran(0, now - since, 0, 1)
            self._rested = now

    def _let_go(self, now: int) -> None:
        """Those whose client has given up leave, between two steps."""
        cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            self.planner.strike(request, now)


@mypyc_attr(allow_interpreted_subclasses=True)
class Synchronous(Engine):
    """Plan, run, take in, one after the other::

    begin    plan ← what the policy wants; the run lasts as long as policy, price, pool and answers vouch
    settle   the plan is committed and recorded; its tokens go to the clients; who has the last one leaves
    """

    def begin(self, now: int) -> int | None:  # noqa: D102 - as all below
        execution = self._execution
        if execution is not None:
            execution.wake()
        self._start = now
        plan = self._plan = self._ask_until(now)
        if plan is None:
            if execution is not None:
                execution.rest()
            return None
        if execution is not None:
            plan.first += execution.wait(plan)
        self._count = plan.count
        self.end = now + (plan.first if plan.count == 1 else plan.span(plan.count))
        return self.end

    def cut(self, now: int) -> int | None:  # noqa: D102
        plan = self._plan
        if self._count > 1 and plan is not None:
            count = plan.reaching(now - self._start)
            if count < self._count:
                self._count = count
                self.end = self._start + plan.span(count)
        return self.end

    def settle(self, now: int) -> list[Live]:  # noqa: D102
        execution, planner, plan = self._execution, self.planner, self._plan
        assert plan is not None
        if execution is not None:
            execution.settling()
        self.end = None
        planner.commit(plan, self._count)
        planner.record(plan, self._start, plan.first, self._count)
        plan.when.ps = now
        self._latest = plan.when
        planner.deliver(plan)
        ends = plan.ending or self.state.parked or (plan.emitting and self.pool.keeps)
        done = planner.complete(plan, now) if ends else NOBODY
        if self._cancelled:
            self._let_go(now)
        if execution is not None:
            execution.settled()
        return done

    def _settle_done(self, now: int, plan: Plan) -> None:
        whole = plan.reaching(now - self._start + 1) - 1
        if whole:
            self._count = whole
            self.settle(self._start + plan.span(whole))


@mypyc_attr(allow_interpreted_subclasses=True)
class Ahead(Engine):
    """Plan a step while the one before is in flight::

        begin    nothing flies?  plan ← what the policy wants; it is committed, and flies
                 plan ← what the policy wants after the step in flight, which it sees as done
                 now it is known when the step in flight lands
                 the run: that landing, and the steps of the plan that follow at the plan's own pace
        settle   the step in flight has landed: it is recorded, its tokens go to the clients, who has all leaves
                 the plan is committed; its last step flies

    One step flies at a time (`Planner.flight`); several, as stages of a pipeline have, in `sim.replica.stages`.
    """

    __slots__ = ("_gpu_end", "_gpu_next")

    def __init__(self, planner: Planner | Ranks, execution: Execution | None = None) -> None:
        super().__init__(planner, execution)
        self._gpu_end = 0  # when the GPU is done with the step in flight
        self._gpu_next = 0  # likewise with the first step of the plan after it

    def begin(self, now: int) -> int | None:  # noqa: D102
        execution, planner = self._execution, self.planner
        if execution is not None:
            execution.wake()
        self._start = now
        flight = planner.flight
        if flight is None:
            plan = self._ask_until(now)
            if plan is None:
                if execution is not None:
                    execution.rest()
                return None
            if execution is None and (plan.host is not NO_HOST or plan.intake):
                self._plan, self._count = plan, 1
                self.end = now + plan.intake + plan.host.schedule + plan.host.launch  # then it flies
                return self.end
            planner.commit(plan, 1)
            flight = plan
            self._fly(plan, now, now + 1 if execution is not None else now + plan.gpu, now)
        ask = self._ask  # looked up first: Python is slow to call what is not a method
        plan = self._plan = ask(now, flight.when)
        if self.state.evicted and self.scheduler.drops_flight:
            planner.drop_tokens()
        if execution is not None:
            self._gpu_next = execution.land(flight, now)
            alike = False
        elif plan is None or plan.host is not NO_HOST or flight.host is not NO_HOST or plan.intake:
            alike = self._overlap(flight, plan, now)
        else:
            self._gpu_next = flight.when.ps + plan.gpu
            alike = True
        self._count = 1
        self.end = flight.when.ps
        if alike and plan is not None and plan.count > 1 and not flight.ending:
            self._count = plan.count
            self.end += plan.span(plan.count - 1)
        return self.end

    def cut(self, now: int) -> int | None:  # noqa: D102
        plan, flight = self._plan, self.planner.flight
        if self._count > 1 and plan is not None and flight is not None:
            landing = flight.when.ps
            count = 1 if now <= landing else 1 + plan.reaching(now - landing)
            if count < self._count:
                self._count = count
                self.end = landing + plan.span(count - 1)
        return self.end

    def settle(self, now: int) -> list[Live]:  # noqa: D102
        execution, planner, plan, flight = self._execution, self.planner, self._plan, self.planner.flight
        if execution is not None:
            execution.settling()
        self.end = None
        if flight is None:  # the launch is over of the first step
            assert plan is not None
            planner.commit(plan, 1)
            host = plan.host
            begun = now - host.launch + host.head if host.tail != WHOLE else now
            self._fly(plan, self._start, max(begun + plan.gpu, now + max(0, host.tail)), now)
            done = NOBODY
        else:
            landing = flight.when.ps
            planner.record_landed(flight, landing)
            if flight.emitting:
                planner.deliver(flight)
            if flight.ending or self.state.parked or (flight.emitting and self.pool.keeps):
                done = planner.complete(flight, landing, plan)
            else:
                done = NOBODY
            self._latest = flight.when
            if plan is None:
                planner.fly(None)
            else:
                count = self._count
                planner.commit(plan, count)
                if count > 1:
                    planner.record(plan, landing, plan.first, count - 1)
                    plan.leave_to_last(at(now), count - 1)
                    self._gpu_next = now - plan.host.update + plan.gpu + (count - 1) * plan.gpu_slope
                if plan.host is not NO_HOST or self._gpu_next <= now:
                    self._fly(plan, now, self._gpu_next, now)
                else:  # as `_fly`, without the detour
                    planner.fly(plan)
                    plan.begun = now
                    self._gpu_end = plan.when.ps = self._gpu_next
        if self._cancelled:
            self._let_go(now)
        if execution is not None:
            execution.settled()
        return done

    def _settle_done(self, now: int, plan: Plan) -> None:
        flight = self.planner.flight
        assert flight is not None
        landing = flight.when.ps
        if now >= landing:
            whole = plan.reaching(now - landing + 1) - 1
            self._count = whole + 1
            self.settle(landing + plan.span(whole))

    def _fly(self, plan: Plan, begun: int, gpu_end: int, now: int) -> None:
        """The last committed step of ``plan`` is in flight; the records let it begin at ``begun``.

        It lands later than now: no two boundaries at once. `_overlap` may yet learn that it lands later than said here.
        """
        self.planner.fly(plan)
        self._gpu_end = gpu_end
        plan.begun = begun
        landing = gpu_end + plan.host.update
        plan.when.ps = landing if landing > now else now + 1

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
                begun = launched - host.launch + host.head
                self._gpu_next = max(max(gpu_end, begun) + gpu, launched + host.tail)
                busy = gpu_end >= max(launched, begun) and gpu >= max(work + host.update, host.launch + host.tail)
                alike = busy and flight.host.update == host.update
        landing = max(gpu_end, launched) + flight.host.update
        if landing <= now:  # no two boundaries at once
            landing, alike = now + 1, False
        flight.when.ps = landing
        return alike


def make_engine(planner: Planner | Ranks, execution: Execution | None = None) -> Engine:
    """The loop that the planner's policy asks for."""
    return (Ahead if planner.scheduler.asynchronous else Synchronous)(planner, execution)
