"""Steps that really run: what an `Executor` adds to the loops of `sim.replica.engine`, and the wall clock.

The plan goes to the hardware as soon as it is made. A synchronous engine waits for it at once; one that plans ahead
plans and launches the next step first, and so keeps the hardware busy, as vLLM does. A step ends when its tokens are
in: from one such moment to the next the simulated clock goes on by the wall clock, all host work included. While the
replica is idle no time is measured; the clock then jumps to the next arrival.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from chairlift.backend.base import Batch, Executor, Host, Prompt, StepCost, Verified
from chairlift.policies.base import PolicyError
from chairlift.sim.replica.drafts import DraftedStep
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live, When
from chairlift.sim.replica.session_prompts import Turns
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.replica.verifying import VerifyingPlanner
from chairlift.sim.results.records import MeasuredRow

_UNKNOWN = Host()  # of a step whose host work is measured, not priced


class Execution:
    """Runs the steps of ``planner`` on its backend, which is an `Executor`.

    ``identity`` says which prompts have tokens in common: the pool's own.
    """

    def __init__(self, planner: Planner, identity: Identity) -> None:
        assert isinstance(planner.backend, Executor)
        self._executor = planner.backend
        self._planner = planner
        requests = planner.requests
        prompts: list[int] = requests.trace.prompt_tokens.tolist()
        self._turns = Turns(identity, prompts, requests.status, requests.emitted, self._executor.answer)
        self._clock: int | None = None  # wall clock when the latest step's tokens were in, ns; None while idle
        # plan (by id) → when, ps planning, ps launching, pairs, drafts
        self._asked: dict[int, tuple[int, int, int, int, int]] = {}
        self._pairs = self._drafts = 0
        self._launching = 0  # how long the latest launch took, ns
        self._settling = 0  # wall clock when the latest run was settled, ns
        self._read = 0  # the latest reading of the wall clock, ns
        planner.price = self._launch

    def arrived(self, request: Live) -> None:
        """A request has come."""
        self._turns.arrived(request.row)

    def wake(self) -> None:
        """The replica has something to plan; if it was idle, time is measured from here."""
        if self._clock is None:
            self._clock = self._now()

    def rest(self) -> None:
        """The replica is idle."""
        self._clock = None

    def ask(self, now: int, start: When) -> Plan | None:
        """As `Planner.ask`; the plan has been launched."""
        began = self._now()
        self._turns.look()
        plan = self._planner.ask(now, start)
        if plan is not None:
            assert self._clock is not None
            asked, launching = now + (began - self._clock) * 1000, self._launching
            planning = self._now() - began - launching
            self._asked[id(plan)] = (asked, planning * 1000, launching * 1000, self._pairs, self._drafts)
        return plan

    def wait(self, plan: Plan) -> int:
        """Wait for ``plan``, the oldest under way; ps since the step before it was in, or since idling ended."""
        gpu = self._executor.wait()
        assert self._clock is not None
        clock = self._now()
        passed, self._clock = (clock - self._clock) * 1000, clock
        asked, planning, launching, pairs, drafts = self._asked.pop(id(plan))
        self._planner.records.measured.extend(MeasuredRow(asked, planning, launching, gpu, pairs, drafts))
        return passed

    def land(self, flight: Plan, now: int) -> int:
        """Wait for the step in flight and date its tokens; a later time, for the step that was launched behind it."""
        landing = max(now + 1, now + flight.gpu + self.wait(flight))  # `gpu`: what the policy paused
        flight.when.ps = landing
        return landing + 1

    def settling(self) -> None:
        """A run is about to be settled."""
        self._settling = self._now()

    def settled(self) -> None:
        """A run has been settled: how long that took is the last step's update."""
        self._planner.records.measured[-1] = (self._now() - self._settling) * 1000

    def _launch(self, batch: Batch) -> StepCost:
        """Launch a plan instead of pricing it; how long it takes is known when it is done."""
        state = self._planner.state
        self._pairs = sum(t * (2 * r.stored + t + 1) // 2 for r, t in state.chunks)
        self._drafts = batch.drafts
        members = _Members(state, self._turns)
        if isinstance(self._planner, VerifyingPlanner):
            members = _Verifying(self._planner.state, self._turns, self._planner.decodes())
        batch = batch._replace(members=members)
        began = self._now()
        try:
            self._executor.launch(batch)
        except RuntimeError as error:  # more sequences than it has room for
            raise PolicyError(str(error), name_of(state.scheduler)) from None
        self._launching = self._now() - began
        return StepCost(0, 0, 1, _UNKNOWN)

    def _now(self) -> int:
        """The wall clock, ns; never earlier than it was read before.

        A recording refuses negative times, and once held one: the time to plan a step, from which the executor's own
        reading of its launch was taken. The launch lies within the plan, so a clock that ran back must have made it.
        """
        self._read = max(self._read, time.perf_counter_ns())
        return self._read


class _Members:
    """Who is in the plan that a replica has just made (`backend.base.Members`)."""

    def __init__(self, state: ReplicaStep, turns: Turns) -> None:
        self._state = state
        self._turns = turns
        self.prompts = [
            Prompt(
                r.row,
                r.stored,
                tokens,
                r.pad if r.stored == 0 else 0,
                r.stored + tokens >= r.prompt + r.produced,
            )
            for r, tokens in state.chunks
        ]
        self.verified: Sequence[Verified] = ()
        decoding = state.whole or bool(state.ran)
        self.decodes = [r.row for r in state.admitted.values() if r.group is not None] if decoding else []
        self.dead = [r.row for r in state.batch] if decoding else []

    def table(self, request: int) -> Sequence[int] | None:
        """The pool's blocks of a request."""
        return self._state.pool.table(request)

    def tokens(self, request: int) -> Sequence[int]:
        """Numbers that stand for its prompt's tokens."""
        return self._turns.prompt(request)


class _Verifying(_Members):
    """Likewise where decodes verify drafts."""

    def __init__(self, state: DraftedStep, turns: Turns, decodes: Sequence[Verified]) -> None:
        super().__init__(state, turns)
        self.verified = decodes
        self.prompts = []
        for request, tokens in state.chunks:
            drafts = state.chosen[request.row].drafts
            known = tokens - drafts
            ends = request.stored + known >= request.prompt + request.produced
            self.prompts.append(Prompt(request.row, request.stored, known, 0, ends, drafts))
