"""A replica whose steps really run: policy and bookkeeping of `sim.replica.engine`, the clock moved by real time.

The plan goes to the hardware as soon as it is made. A synchronous engine waits for it at once; an asynchronous one
plans and launches the next step first, and so keeps the hardware busy, as vLLM does. A step ends when its tokens are
in: from one such moment to the next the simulated clock goes on by the wall clock, all host work included. While the
replica is idle no time is measured; the clock then jumps to the next arrival.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from chairlift.backend.base import Batch, Executor, Host, Prompt, StepCost
from chairlift.policies.base import PolicyError
from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live, When
from chairlift.sim.replica.session_prompts import Turns
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import Plan

_UNKNOWN = Host()  # of a step whose host work is measured, not priced


class Executing(Engine):
    """An `Engine` over an `Executor`. ``identity`` says which prompts have tokens in common: the pool's own."""

    def __init__(self, *parts: Any, identity: Identity, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        assert isinstance(self.backend, Executor)
        self._executor = self.backend
        self._turns = Turns(identity, self._requests, self._executor.answer)
        self._cost = self._execute
        self._clock: int | None = None  # wall clock when the latest step's tokens were in, ns; None while idle
        self._asked: dict[int, tuple[int, int, int]] = {}  # plan (by id) → when, ps spent planning, attention pairs
        self._pairs = 0

    def submit(self, request: Live, now: int) -> bool:  # noqa: D102 - documented in `Engine`, as those below
        self._turns.arrived(request.id)
        return super().submit(request, now)

    def begin(self, now: int) -> int | None:  # noqa: D102
        if self._clock is None:
            self._clock = time.perf_counter_ns()
        if self._ahead and self._flight is None:
            plan = self._ask_until(now)
            if plan is not None:
                self.commit(plan, 1)
                self._launch(plan, now, now + 1, now)
        end = None if self._ahead and self._flight is None else super().begin(now)
        if end is None:
            self._clock = None
        return end

    def settle(self, now: int) -> list[Live]:  # noqa: D102
        began = time.perf_counter_ns()
        done = super().settle(now)
        self.records.measured[-1] = (time.perf_counter_ns() - began) * 1000
        return done

    def ask(self, now: int, start: When) -> Plan | None:  # noqa: D102
        began = time.perf_counter_ns()
        self._turns.look()
        plan = super().ask(now, start)
        if plan is not None:
            assert self._clock is not None
            asked = now + (began - self._clock) * 1000
            self._asked[id(plan)] = (asked, (time.perf_counter_ns() - began) * 1000, self._pairs)
            if not self._ahead:
                plan.first += self._wait(plan)
        return plan

    def _overlap(self, flight: Plan, plan: Plan | None, now: int) -> bool:
        """Wait for the step in flight, ``plan`` being launched behind it; the next one does not come at its pace."""
        landing = max(now + 1, now + flight.gpu + self._wait(flight))  # `gpu`: what the policy paused
        self._gpu_next = landing + 1
        flight.when.ps = landing
        return False

    def _execute(self, batch: Batch) -> StepCost:
        """Launch a plan instead of pricing it; how long it takes is known when it is done."""
        self._pairs = sum(t * (2 * r.stored + t + 1) // 2 for r, t in self.state.chunks)
        try:
            self._executor.launch(batch._replace(members=_Members(self.state, self._turns)))
        except RuntimeError as error:  # more sequences than it has room for
            raise PolicyError(f"policy {type(self.scheduler).__name__}: {error}") from None
        return StepCost(0, 0, 1, _UNKNOWN)

    def _wait(self, plan: Plan) -> int:
        """Wait for ``plan``, the oldest under way; ps since the step before it was in, or since idling ended."""
        measured = self._executor.wait()
        assert self._clock is not None
        clock = time.perf_counter_ns()
        passed, self._clock = (clock - self._clock) * 1000, clock
        asked, planning, pairs = self._asked.pop(id(plan))
        self.records.measured.extend((asked, planning - measured.host, measured.host, measured.gpu, pairs, 0))
        return passed


class _Members:
    """Who is in the plan that a replica has just made (`backend.base.Members`)."""

    def __init__(self, state: ReplicaStep, turns: Turns) -> None:
        self._state = state
        self._turns = turns
        self.prompts = [
            Prompt(
                r.id,
                r.stored,
                tokens,
                r.pad if r.stored == 0 else 0,
                r.stored + tokens >= r.prompt_tokens + r.produced,
            )
            for r, tokens in state.chunks
        ]
        decoding = state.whole or bool(state.ran)
        self.decodes = [r.id for r in state.admitted.values() if r.group is not None] if decoding else []
        self.dead = [r.id for r in state.batch] if decoding else []

    def table(self, request: int) -> Sequence[int] | None:
        """The pool's blocks of a request."""
        return self._state.pool.table(request)

    def tokens(self, request: int) -> Sequence[int]:
        """Numbers that stand for its prompt's tokens."""
        return self._turns.prompt(request)
