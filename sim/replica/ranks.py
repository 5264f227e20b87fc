"""Ranks of DP-attention: schedulers, queues and KV pools of their own, whose steps begin and end together.

Each rank has a `Planner`. `Ranks` stands in an engine's loop where one planner does elsewhere: it asks every rank what
it wants next, and what they want is one step, which ends when the slowest rank is done. A rank that wants nothing runs
a token for nothing, since the experts of all ranks are called together. The replica rests once no rank wants anything;
vLLM's ranks look for that at every 32nd step, and run on for nothing until then.

In three steps of two ranks: A decodes on rank 0 and B's prompt arrives at rank 1. Step 1 has A's decode and B's prompt,
and takes as long as the prompt. Step 2 has a decode on each rank, and brings B its last token. In step 3 rank 0 decodes
and rank 1 runs a token for nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.policies.base import NoProgress, PolicyError
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import Live, When
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.results.records import PACK_RUN, RUN_COLUMNS, UNPACK_RUN, RequestRecords, Rows, RunRecords, Status

IDLE = Batch((), 0, 0)
UNPRICED = StepCost(0)  # of a rank's step: all ranks have one price
COUNTS_PS = 100 * 10**9  # vLLM's front end hears so often how many requests each rank has
WAITING_WEIGHT = 4  # running requests that a waiting one counts as, there
TIMES = 4  # columns of a row of runs that say when it was; the others add up over ranks
PATIENCE = 1_000  # plans of a rank in a row that run nothing and want another


class RankBackend(Backend):
    """What a step costs where one rank has a batch and the others have none: what the policy of a rank is told.

    ``latest``: what the rank was to compute when `note` was asked for its price last.
    """

    def __init__(self, backend: Backend, ranks: int) -> None:
        self.name = backend.name
        self.arrival, self.arrival_token = backend.arrival, backend.arrival_token
        self.latest = IDLE
        self._backend = backend
        self._others = (IDLE,) * (ranks - 1)

    def step(self, batch: Batch) -> StepCost:
        """As if the other ranks were idle."""
        return self._backend.together((batch, *self._others))

    def note(self, batch: Batch) -> StepCost:
        """Keep ``batch``, to be priced with those of the other ranks."""
        self.latest = batch
        return UNPRICED


class RankRows(Rows):
    """Where a rank's planner writes its rows of runs: the latest is kept, to be added up with the other ranks'.

    It is as long as ``all_rows``, those of the replica, to which journals refer.
    """

    __slots__ = ("_all_rows", "latest")

    def __init__(self, all_rows: Rows) -> None:
        super().__init__(RUN_COLUMNS)
        self._all_rows = all_rows
        self.latest: tuple[int, ...] = ()
        self.frombytes = self._keep

    def __len__(self) -> int:
        return len(self._all_rows)

    def _keep(self, row: Any) -> None:
        self.latest = UNPACK_RUN(row)


def rank_records(records: RunRecords) -> RunRecords:
    """Where the planner of one rank writes; gaps and events go to the replica's ``records``."""
    own = RunRecords()
    own.rows = RankRows(records.rows)
    own.gap_rows, own.event_rows = records.gap_rows, records.event_rows
    return own


class RanksPlan(Plan):
    """A plan of each rank, for steps that they do together; its tokens are dated by one holder."""

    __slots__ = ("plans",)

    def __init__(self, plans: list[Plan], cost: StepCost, count: int, ahead: bool, beside: bool) -> None:
        """``beside``: what policies pause for, KV that moves, goes on beside a step instead of before it."""
        first, slope = cost.spacing(ahead)
        super().__init__(first, slope, count, [], False, (), [], cost.first, cost.slope, cost.host)
        self.plans = plans
        pause = max(plan.gpu for plan in plans)
        if beside:
            pause = max(0, pause - cost.first)
        self.intake = max(plan.intake for plan in plans)
        self.first += pause + self.intake
        self.gpu += pause
        for plan in plans:
            plan.when = self.when

    def leave_to_last(self, before: When, steps: int) -> None:  # noqa: D102
        for plan in self.plans:
            plan.leave_to_last(before, steps)


class RanksState:
    """What a loop and its surroundings see of all ranks, added up."""

    def __init__(self, ranks: Sequence[Planner], queue: Callable[[Live], None]) -> None:
        self._states = [rank.state for rank in ranks]
        self.queue = RanksQueue(self._states, queue)

    stages = 1  # a step of all ranks is alone under way

    @property
    def admitted(self) -> dict[int, Live]:
        """Running requests of all ranks."""
        return {i: request for state in self._states for i, request in state.admitted.items()}

    @property
    def parked(self) -> bool:
        """Whether any rank left somebody out of its latest decode step."""
        return any(state.parked for state in self._states)

    @property
    def rejected(self) -> bool:
        """Whether any rank's latest plan refused somebody."""
        return any(state.rejected for state in self._states)

    @property
    def preempted(self) -> int:
        """Preemptions of the latest plans."""
        return sum(state.preempted for state in self._states)

    @property
    def evicted(self) -> bool:
        """Whether a latest plan preempted somebody who decoded."""
        return any(state.evicted for state in self._states)

    @property
    def wake(self) -> int | None:
        """When the first of the policies wants to be asked."""
        return min((state.wake for state in self._states if state.wake is not None), default=None)

    def expect(self, arrivals: bool) -> None:
        """As `ReplicaStep.expect`, of each rank."""
        for state in self._states:
            state.expect(arrivals)

    @property
    def host(self) -> HostMemory:
        """The first rank's part of the host's memory; what holds of all of them: the others' are alike."""
        return next((s.host for s in self._states if s.host.free != s.host.blocks), self._states[0].host)


class RanksQueue:
    """The queues of all ranks; ``queue`` puts a request at the end of the one that was chosen for it."""

    def __init__(self, states: Sequence[ReplicaStep], queue: Callable[[Live], None]) -> None:
        self._states = states
        self.append = queue

    def __len__(self) -> int:
        return sum(len(state.queue) for state in self._states)


class RanksPool:
    """The KV pools of all ranks, added up."""

    def __init__(self, pools: Sequence[CountingPool]) -> None:
        self._pools = pools
        self.total = sum(pool.total for pool in pools)
        self.block_size, self.tables, self.keeps = pools[0].block_size, pools[0].tables, pools[0].keeps

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return sum(pool.free for pool in self._pools)


class Ranks:
    """Plans the steps of all ranks together, in the place of one `Planner`.

    ``ranks``: a planner each, whose backend is a `RankBackend`, and which writes to `rank_records` of ``records``, the
    replica's. ``backend`` prices their steps. A request goes to the rank with the least 4 · waiting + running, as
    vLLM's front end counts them: as they were up to 100 ms ago, and each request sent since as one more that waits.
    Policies that say `Scheduler.ranks_in_turn` get requests in turn.
    """

    def __init__(self, ranks: Sequence[Planner], backend: Backend, records: RunRecords) -> None:
        first = ranks[0]
        self.ranks, self.count = ranks, len(ranks)
        self.backend = backend
        self.scheduler, self.index, self.journal = first.scheduler, first.index, first.journal
        self.requests: RequestRecords = first.requests
        self.records = records
        self.state = RanksState(ranks, self._queue)
        self.pool = RanksPool([rank.pool for rank in ranks])
        self.arrival, self.arrival_token = first.arrival, first.arrival_token
        self.steps = 0
        self.remembers = backend.remembers
        self.again = False
        for rank in ranks:
            assert isinstance(rank.backend, RankBackend)
            rank.price = rank.backend.note
        n = len(self.requests.trace)
        self._rank_of = self.requests.extra.setdefault("rank", array("i", [-1]) * n)
        self._ahead = first.scheduler.asynchronous
        self._chosen = first  # for the request that came last
        self._turn = 0
        self._counts: list[list[int]] = []  # waiting and running of each rank, as the front end knows them
        self._counted: int | None = None  # when it heard of them
        self.flight: RanksPlan | None = None  # the step in flight (`fly`)
        self._some_idle = True  # in the plan made last

    @property
    def intake(self) -> int:
        """Host time, ps, to take in those that have come to the rank chosen last."""
        return self._chosen.intake

    @intake.setter
    def intake(self, ps: int) -> None:
        self._chosen.intake = ps

    def takes(self, request: Live, now: int) -> bool:
        """Choose a rank for a request that arrives now; whether that one takes it, as `Planner.takes`."""
        chosen = self._choose(now)
        self._rank_of[request.row] = chosen
        self._chosen = self.ranks[chosen]
        return self._chosen.takes(request, now)

    def _choose(self, now: int) -> int:
        if self.scheduler.ranks_in_turn:
            chosen, self._turn = self._turn, (self._turn + 1) % len(self.ranks)
            return chosen
        if self._counted is None or now >= self._counted + COUNTS_PS:
            self._counted = now
            self._counts = [[len(rank.state.queue), len(rank.state.admitted)] for rank in self.ranks]
        scores = [WAITING_WEIGHT * waiting + running for waiting, running in self._counts]
        chosen = scores.index(min(scores))
        self._counts[chosen][0] += 1
        return chosen

    def _queue(self, request: Live) -> None:
        self._chosen.state.queue.append(request)

    def heeds_arrival(self) -> bool:
        """Whether an arrival, to whichever rank, calls for a plan at the next boundary: of an idle rank it does."""
        return self._some_idle or any(rank.heeds_arrival() for rank in self.ranks)

    def ask(self, now: int, start: When) -> RanksPlan | None:
        """What the ranks' policies want of the steps that start at ``start``; None if none of them wants anything."""
        asked = [self._ask(rank, now, start) for rank in self.ranks]
        self._some_idle = not all(asked)
        if not any(asked):
            self.again = any(rank.again for rank in self.ranks)
            return None
        self.again = False
        plans, batches = [], []
        for rank, plan in zip(self.ranks, asked, strict=True):
            assert isinstance(rank.backend, RankBackend)
            plans.append(plan or rank.idle())
            batches.append(rank.backend.latest if plan else IDLE)
        cost = self.backend.together(batches)
        count = 1  # if an idle rank wants to be asked at a certain time, it is asked at each boundary
        if not self._some_idle or self.state.wake is None:
            count = min(cost.steps_alike(self._ahead), *(plan.count for plan in plans))
        return RanksPlan(plans, cost, count, self._ahead, self.scheduler.overlaps_swaps)

    def _ask(self, rank: Planner, now: int, start: When) -> Plan | None:
        """As `Planner.ask`; while nothing flies again, for as long as all that the policy does is to refuse or preempt.

        With a step in flight the next turn, once that has landed, is soon enough.
        """
        for _ in range(PATIENCE):
            plan = rank.ask(now, start)
            if plan is not None or self.flight is not None:
                return plan
            if not (rank.again or rank.state.rejected or rank.state.preempted):
                return None
        rank.fail(f"nothing runs at {now} ps, however often it is asked", NoProgress)

    def commit(self, plan: Plan, count: int) -> None:
        """As `Planner.commit`, on each rank."""
        assert isinstance(plan, RanksPlan)
        if self.remembers:  # the rank that computes the most makes the GPUs as warm as any
            rows = [own.row for own in plan.plans]
            self.backend.ran(max(row[1] + row[2] if row[0] else 0 for row in rows), plan.gpu, plan.gpu_slope, count)
        for rank, own in zip(self.ranks, plan.plans, strict=True):
            rank.commit(own, count)
        plan.ending = [request for own in plan.plans for request in own.ending]
        plan.emitting = [request for own in plan.plans for request in own.emitting]

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:
        """As `Planner.complete`, rank by rank."""
        assert isinstance(plan, RanksPlan)
        done = []
        for i, rank in enumerate(self.ranks):
            done += rank.complete(plan.plans[i], now, behind.plans[i] if isinstance(behind, RanksPlan) else None)
        return done

    def record(self, plan: Plan, start: int, first: int, count: int) -> None:
        """As `Planner.record`: one row of what all ranks do."""
        assert isinstance(plan, RanksPlan)
        self.steps += count
        parts = []
        for rank, own in zip(self.ranks, plan.plans, strict=True):
            rank.record(own, start, first, count)
            assert isinstance(rank.records.rows, RankRows)
            parts.append(rank.records.rows.latest[TIMES:])
        slope = plan.slope if count > 1 else 0
        self.records.rows.frombytes(PACK_RUN(start, first, slope, count, *map(sum, zip(*parts, strict=True))))

    def record_landed(self, plan: Plan, landing: int) -> None:
        """As `Planner.record_landed`."""
        self.record(plan, plan.begun, landing - plan.begun, 1)

    def fly(self, plan: Plan | None) -> None:
        """As `Planner.fly`, on each rank."""
        assert plan is None or isinstance(plan, RanksPlan)
        self.flight = plan
        for i, rank in enumerate(self.ranks):
            rank.fly(None if plan is None else plan.plans[i])

    def deliver(self, plan: Plan) -> None:
        """As `Planner.deliver`."""
        assert isinstance(plan, RanksPlan)
        for rank, own in zip(self.ranks, plan.plans, strict=True):
            rank.deliver(own)

    def end_request(self, request: Live, now: int, status: Status) -> None:
        """As `Planner.end_request`, on its rank."""
        self._of(request).end_request(request, now, status)

    def strike(self, request: Live, now: int) -> None:
        """As `Planner.strike`, on its rank."""
        self._of(request).strike(request, now)

    def drop_tokens(self) -> None:
        """As `Planner.drop_tokens`, on each rank."""
        for rank in self.ranks:
            rank.drop_tokens()

    def lose(self, now: int) -> list[Live]:
        """All requests of all ranks leave."""
        self.flight = None
        return [request for rank in self.ranks for request in rank.lose(now)]

    def row_to_come(self) -> int:
        """As `Planner.row_to_come`."""
        return self.ranks[0].row_to_come()

    def fail(self, what: str, kind: type[PolicyError] = PolicyError) -> NoReturn:
        """Say what a policy has done wrong."""
        self.ranks[0].fail(what, kind)

    def _of(self, request: Live) -> Planner:
        return self.ranks[self._rank_of[request.row]]
