"""A replica whose steps really run: the same policy and bookkeeping as `sim.engine`, the clock moved by real time.

The plan goes to the hardware as soon as it is made. A synchronous engine waits for it at once; an asynchronous one
plans and launches the next step first, and so keeps the hardware busy, as vLLM does. A step ends when its tokens are
in: from one such moment to the next the simulated clock goes on by the wall clock, all host work included. While the
replica is idle no time is measured; the clock then jumps to the next arrival.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from backend.base import Batch, Executor, Measured, Prompt, StepCost
from policies.base import PolicyError, Request
from sim.engine import Engine
from sim.prefix import Identity
from sim.runs import NOBODY, Plan
from sim.step import ReplicaStep


class Executing(Engine):
    """An `Engine` over an `Executor`. ``identity`` says which prompts have tokens in common."""

    def __init__(self, *parts: Any, identity: Identity, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        assert isinstance(self.backend, Executor)
        self._executor = self.backend
        self._identity = identity
        self._cost = self._execute
        self._clock: int | None = None  # wall clock when the latest step's tokens were in, ns; None while idle
        self._joined: dict[int, list[Request]] = {}  # plan (by id) → decodes in it whose last token was no decode's
        self._asked: dict[int, tuple[int, int, int]] = {}  # plan (by id) → when, ps spent planning, attention pairs
        self._pairs = 0
        self._updating = 0  # ps, since the latest step's tokens were in

    def begin(self, now: int) -> int | None:  # noqa: D102 - documented in `Engine`
        if self._clock is None:
            self._clock = time.perf_counter_ns()
        self._start = now
        self._count = 1
        state = self.state
        if self._flight is None:
            plan = self._ask_until(now)
            if plan is None:
                self._clock = None
                return None
            if not self._ahead:
                self._plan = plan
                self.end = self._wait(plan, now)
                return self.end
            self.commit(plan, 1)
            self._flight = plan
        flight = self._flight
        parked = set(state.parked)
        self._plan = self.ask(now, now)
        self.end = self._landing = self._wait(flight, now)
        self._announce(flight, self._landing)
        if flight.decoding:
            for request in (*state.evicted, *(r for r in state.parked.values() if r.id not in parked)):
                request._last = self._landing  # its token was under way when it was planned out of the next step
        return self.end

    def settle(self, now: int) -> list[Request]:  # noqa: D102
        began = time.perf_counter_ns()
        if not self._ahead:
            done = super().settle(now)
        else:
            plan, flight, state = self._plan, self._flight, self.state
            assert flight is not None
            self.end = None
            self._record(flight, *flight.air)
            if flight.emitting:
                self._deliver(flight, now)
            done = self.complete(flight, now) if flight.ending or state.parked else NOBODY
            self._flight = None
            if plan is not None:
                self.commit(plan, 1)
                self._flight = plan
            self._let_go(now)
        self._updating = (time.perf_counter_ns() - began) * 1000
        self.records.measured[-1] = self._updating
        return done

    def ask(self, now: int, start: int) -> Plan | None:  # noqa: D102
        began = time.perf_counter_ns()
        plan = super().ask(now, start)
        if plan is not None:
            joined = [r for r in self.state.fresh.values() if r._counter is not None] if plan.decoding else []
            self._joined[id(plan)] = joined
            self._asked[id(plan)] = (now, (time.perf_counter_ns() - began) * 1000, self._pairs)
        return plan

    def _execute(self, batch: Batch) -> StepCost:
        """Launch a plan instead of pricing it; how long it takes is known when it is done."""
        self._pairs = sum(t * (2 * r._offset + t + 1) // 2 for r, t in self.state.chunks)
        try:
            self._executor.launch(batch._replace(members=_Members(self.state, self._identity)))
        except RuntimeError as error:  # more sequences than it has room for
            raise PolicyError(f"policy {type(self.scheduler).__name__}: {error}") from None
        return StepCost(0, 0, 1)

    def _wait(self, plan: Plan, start: int) -> int:
        """Wait for ``plan``, which started at ``start``; when it is done."""
        measured: Measured = self._executor.wait()
        assert self._clock is not None
        clock = time.perf_counter_ns()
        end = start + plan.first + (clock - self._clock) * 1000  # `first`: what the policy paused
        self._clock = clock
        plan.first = end - start
        decodes = plan.row[2]
        late, gaps = self._lateness(self._joined.pop(id(plan)), decodes, start, end) if plan.decoding else (0, [])
        plan.row = (*plan.row[:5], late, *plan.row[6:])
        plan.late_gaps = gaps
        plan.air = (start, plan.first, 1, plan.row)
        asked, planning, pairs = self._asked.pop(id(plan))
        self.records.measured.extend((asked, planning - measured.host, measured.host, measured.gpu, pairs, 0))
        return end

    def _lateness(self, joined: Sequence[Request], decodes: int, start: int, end: int) -> tuple[int, list[int]]:
        """As `Planner._late`, at the end of a step."""
        gaps: list[int] = []
        late = 0
        for request in joined:
            if request._last != start:
                gaps += (end - request._last, 1)
                late += 1
        old, since = decodes - len(joined), self.state.decoded_at
        if old > 0 and since != start:
            gaps += (end - since, old)
            late += old
        return late, gaps


class _Members:
    """Who is in the plan that a replica has just made (`backend.base.Members`)."""

    def __init__(self, state: ReplicaStep, identity: Identity) -> None:
        self._state = state
        self._identity = identity
        self.prompts = [
            Prompt(
                r.id,
                r._offset,
                tokens,
                r.pad if r._offset == 0 else 0,
                r._offset + tokens >= r.prompt_tokens + r._emitted,
            )
            for r, tokens in state.chunks
        ]
        decoding = state.whole or bool(state.ran)
        self.decodes = [r.id for r in state.admitted.values() if r._counter is not None] if decoding else []
        self.dead = [r.id for r in state.batch if r._counter is not None] if decoding else []
        self._requests = {r.id: r for r, _ in state.chunks}

    def table(self, request: int) -> Sequence[int] | None:
        """The pool's blocks of a request."""
        return self._state.pool.table(request)

    def tokens(self, request: int) -> Sequence[int]:
        """Numbers that stand for its prompt's tokens."""
        tokens: list[int] = self._identity.tokens(request, self._requests[request].prompt_tokens).tolist()
        return tokens
