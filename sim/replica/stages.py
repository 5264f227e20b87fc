"""A replica whose GPUs are stages of a pipeline: several steps run at a time, each in another stage.

Source: vLLM 0.33, `step_with_batch_queue` of `vllm/v1/engine/core.py`: plan batch after batch until the queue holds as
many as there are stages, one more where planning is asynchronous; wait for the oldest; take it in; plan the next. A
batch is planned, and queued, though nobody could be in it. Who may be planned meanwhile is told by
`sim.replica.pipeline`.

With s stages that take equal times, a step of cost c passes each in c / s. It enters a stage once it has left the one
before and the step before it has left this one. So a step takes c if it is alone, and s of them, planned one after the
other, come out c / s apart: a token of each every c. Alone, a request leaves s - 1 of s stages idle.

The passes that draft are the last stage's, which samples and then drafts (`sample_tokens` of
`vllm/v1/worker/gpu/model_runner.py`); a decode enters the first stage once its drafts have come from there
(`broadcast_drafts`). With s requests in steps of their own, of which p ps are such passes, the last stage sets the
pace: steps come out (c - p) / s + p apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence

from chairlift.backend.base import Batch, StepCost
from chairlift.policies.base import NoProgress, PolicyError
from chairlift.sim.replica.drafts import DraftedStep
from chairlift.sim.replica.engine import PATIENCE, Engine
from chairlift.sim.replica.executing import Execution
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import AWAY, HELD, NEVER, Live, When, at
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.replica.verifying import VerifyingPlanner
from chairlift.sim.results.records import Status

_SILENCE = at(-1)  # ends no step: whoever decodes is late, and their gap is counted from their latest token


class StagedPlanner(Planner):
    """As `Planner`, where several steps fly: who leaves meanwhile loses all their tokens in flight.

    It has no slots of its own: with them no class could be this and a `VerifyingPlanner`.
    """

    def __init__(self, *parts: object, **more: object) -> None:
        super().__init__(*parts, **more)  # type: ignore[arg-type]
        if self.state.flights is None:
            raise PolicyError("a pipeline has several stages", name_of(self.scheduler))
        self._leaps = False  # steps of others fly meanwhile
        self.flying: list[Plan] = []  # those whose output is not in, the oldest first
        self.delivered: dict[int, When] = {}  # request → when the latest of its tokens that is in came
        self.passes = 0  # ps that the plan at hand takes in the last stage beside its share

    def decoding(self) -> Container[int]:
        """Who decodes in the plan at hand."""
        return self.state.ran

    def row_to_come(self) -> int:  # noqa: D102 - documented in `Planner`, as all below
        assert self.journal is not None
        return self.journal.row + len(self.flying)

    def launch(self, plan: Plan) -> None:
        """A step is launched."""
        self.commit(plan, 1)
        self.flying.append(plan)
        for request in plan.emitting:
            self.delivered.setdefault(request.row, request.before)

    def deliver(self, plan: Plan) -> None:  # noqa: D102
        now, first_token = plan.when.ps, self.requests.first_token
        for request in plan.emitting:
            if first_token[request.row] >= 0:
                self.records.gap_rows.extend((now - self.delivered[request.row].ps, 1))
            else:
                first_token[request.row] = now

    def land(self, plan: Plan, now: int) -> list[Live]:
        """The oldest step is done: its tokens are delivered; the requests whose last token it brought leave."""
        assert self.flying[0] is plan
        del self.flying[0]
        self.deliver(plan)
        for request in self.emitting(plan):
            self.delivered[request.row] = plan.when
        return self.complete(plan, now)

    def strike(self, request: Live, now: int) -> None:  # noqa: D102
        state = self.state
        if self.requests.status[request.row] != Status.PENDING:
            return
        if state.admitted.pop(request.row, None) is not None:
            state.vacate(request, AWAY)
            self.scheduler.ended(request)
        elif request.phase is not HELD and request.phase is not AWAY:
            state.withdraw(request)
        self._lose_tokens(request)
        self.end_request(request, now, Status.TIMED_OUT)

    def lose(self, now: int) -> list[Live]:  # noqa: D102
        for request in [*self.state.admitted.values(), *self.state.queue]:
            if request.group is not None:
                self.state.part(request, AWAY)
            self._lose_tokens(request)
        return super().lose(now)

    def end_request(self, request: Live, now: int, status: Status) -> None:  # noqa: D102
        assert self.state.flights is not None
        if request.row in self.state.flights.strays:
            self._lose_tokens(request)
        super().end_request(request, now, status)
        self.delivered.pop(request.row, None)

    def emitting(self, plan: Plan) -> Sequence[Live]:
        """Whose token a step in flight brings."""
        assert self.state.flights is not None
        return self.state.flights.emitting(plan)

    def _lose_tokens(self, request: Live) -> None:
        """The tokens in flight of a request that has left the group will not come."""
        before = last = self.delivered.get(request.row, NEVER)
        for plan in self.flying:
            if request not in self.emitting(plan):
                continue
            if request in plan.emitting:
                plan.emitting.remove(request)
            else:
                plan.lose_gap(last.ps)
            if request in plan.ending:
                plan.ending.remove(request)
            last = plan.when
            request.unsay(before)
            self.backend.drop(request.row)
        assert self.state.flights is not None
        self.state.flights.settle(request, before)


class StagedVerifyingPlanner(StagedPlanner, VerifyingPlanner):
    """As `StagedPlanner`, where decodes verify drafts. Each step is planned on its own."""

    state: DraftedStep

    def __init__(self, *parts: object, **more: object) -> None:
        super().__init__(*parts, **more)
        self.price = self._price
        self._left_out: list[int] = []  # who decodes, but not in the latest step with decodes; for the journal

    def ask(self, now: int, start: When) -> Plan | None:  # noqa: D102
        plan = super().ask(now, start)
        if self.journal is not None and plan is not None and plan.decoding:
            parked, decoding = self.state.parked, self.decoding()
            before = [row for row in self._left_out if row in parked]
            self._left_out = [row for row in parked if row not in decoding]
            self.journal.arranged(now, self.row_to_come(), before, self._left_out)
        return plan

    def decoding(self) -> Container[int]:  # noqa: D102
        return {row for row, chosen in self.state.chosen.items() if chosen.decodes}

    def _price(self, batch: Batch) -> StepCost:
        """The cost of a step, of which `passes` is for the drafts that it proposes."""
        cost, self.passes = self.backend.step(batch), 0
        if batch.proposes:
            self.passes = max(0, cost.first - self.backend.step(batch._replace(proposes=0)).first)
        return cost


class Staged(Engine):
    """Plan until the pipeline is full, take the oldest step in::

        begin    plan ← what the policy wants; it is committed, enters the first stage, and lands when it has left the
                 last; again, until as many are in flight as the engine keeps, or nobody is left to be planned
                 the run: until the oldest lands
        settle   it is recorded, its tokens go to the clients, and who has all leaves

    Steps are planned one at a time: a run is never of several.
    """

    __slots__ = (
        *("_depth", "_done", "_free", "_host", "_landed", "_left", "_passed", "_queue", "_stages", "_unknown"),
    )
    planner: StagedPlanner
    state: ReplicaStep

    def __init__(self, planner: StagedPlanner, execution: Execution | None = None) -> None:
        super().__init__(planner, execution)
        self._stages = planner.state.stages
        self._depth = self._stages + self.scheduler.asynchronous
        self._queue: deque[Plan | None] = deque()  # None: a batch with nobody in it
        self._host = 0  # until when the host launches what it has planned
        self._done: dict[Plan, int] = {}  # of each step in flight: when it has left the last stage
        self._passed: dict[Plan, tuple[int, int]] = {}  # likewise: when it entered the first, its mean time in each
        self._left = 0  # when the latest step that is taken in had left the last stage
        self._free = [0] * self._stages  # when each stage has done all that has been planned
        self._landed = 0  # when the latest step landed, or is to
        self._unknown = -1  # stands for when a step lands that really runs, until it has; each has one of its own

    def begin(self, now: int) -> int | None:  # noqa: D102 - documented in `Engine`, as all below
        execution, planner, queue, state = self._execution, self.planner, self._queue, self.state
        if execution is not None:
            execution.wake()
        self._count = 1
        self._host = now
        idle = 0  # turns in a row that plan nothing, with nothing in flight
        while True:
            if state.queue or state.admitted:
                plan = self._ask(now, _SILENCE)
                queue.append(plan)
                if plan is not None:
                    self._launch(plan, now)
                if not planner.flying:
                    idle += 1
                    changed = bool(state.rejected or state.preempted) or planner.again
                    if idle > PATIENCE and changed:
                        planner.fail(f"nothing runs at {now} ps, however often it is asked", NoProgress)
                    if idle > self._depth and not changed:
                        queue.clear()
                if queue and len(queue) < self._depth:
                    continue
            if not queue:
                if execution is not None:
                    execution.rest()
                return None
            if queue[0] is not None:
                break
            queue.popleft()
        oldest = queue[0]
        if execution is not None:
            self._wait(oldest, execution, now)
        self.end = oldest.when.ps
        return self.end

    def cut(self, now: int) -> int | None:  # noqa: D102
        return self.end

    def settle(self, now: int) -> list[Live]:  # noqa: D102
        execution, planner, plan = self._execution, self.planner, self._queue.popleft()
        assert plan is not None
        if execution is not None:
            execution.settling()
        self.end = None
        left = self._done.pop(plan)
        if execution is None:
            entered, each = self._passed.pop(plan)
            self.records.stage_ps += each
            self.records.piped_ps += left - max(entered, self._left)
            self._left = left
        planner.record(plan, plan.begun, now - plan.begun, 1)
        self._latest = plan.when
        done = planner.land(plan, now)
        if self._cancelled:
            self._let_go(now)
        if execution is not None:
            execution.settled()
        return done

    def _settle_done(self, now: int, plan: Plan) -> None:
        raise AssertionError("a run is of one step")

    def _wait(self, oldest: Plan, execution: Execution, now: int) -> None:
        """Wait for the oldest step, which really runs, and date its tokens wherever steps behind it go on from them."""
        unknown = oldest.when.ps
        oldest.begun = max(oldest.begun, self._landed)
        execution.land(oldest, now)
        self._landed = landing = oldest.when.ps
        for plan in self.planner.flying:
            plan.late_gaps = [landing if ps == unknown else ps for ps in plan.late_gaps]

    def _sampled(self, plan: Plan) -> int:
        """When the last of the tokens that ``plan`` decodes from, and that are in flight, is sampled; 0: none is."""
        planner = self.planner
        if not (plan.decoding and self.scheduler.asynchronous):
            return 0
        ran, done = planner.decoding(), self._done
        return max(
            (done[flying] for flying in planner.flying if any(r.row in ran for r in planner.emitting(flying))),
            default=0,
        )

    def _launch(self, plan: Plan, now: int) -> None:
        """A step that was just planned enters the first stage once it is launched, and each once that is free.

        When it lands is measured where steps really run, at the end of `begin`.
        """
        if self._execution is not None:
            self._unknown -= 1
            plan.begun, plan.when.ps, self._done[plan] = now, self._unknown, 0
            self.planner.launch(plan)
            return
        free, host, passes = self._free, plan.host, self.planner.passes
        self._host += plan.intake + host.schedule + host.launch
        left = max(self._host, self._sampled(plan))
        each = -(-(plan.gpu - passes) // self._stages)
        self._passed[plan] = max(left, free[0]), each + passes // self._stages
        for stage in range(self._stages):
            left = free[stage] = max(left, free[stage]) + each
        left = free[-1] = left + passes
        self._done[plan] = left
        plan.begun = max(now, self._landed)  # the records let steps follow each other
        self._landed = plan.when.ps = max(left + host.update, plan.begun + 1)
        self.planner.launch(plan)
