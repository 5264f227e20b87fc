"""Replays of SGLang's step ledgers (`../shared/tools/sglang_ledger.md` has their format) through our policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.policies.base import Request, Step
from chairlift.policies.sglang import Sglang
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.engine import make_engine
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.radix_pool import RadixPool, Streams
from chairlift.sim.replica.request import Live, at
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.results.records import RequestRecords
from chairlift.sim.workload.trace import Trace

CONTEXT = 8192
COLUMNS = (
    *("kind", "batch", "prefix", "chunked", "retracted", "preempted", "room", "ratio", "full", "waiting", "finished"),
    "end",
)
PAIRS = {"batch": "tokens", "prefix": "cached tokens"}
SETTINGS = (
    *("page_size", "chunked_prefill_size", "max_prefill_tokens", "max_running_requests", "schedule_policy"),
    *("enable_mixed_chunk", "disable_radix_cache", "schedule_conservativeness", "disable_overlap_schedule"),
    *("enable_priority_scheduling", "schedule_low_priority_values_first", "priority_scheduling_preemption_threshold"),
    *("disable_priority_preemption", "retraction_policy", "prefill_max_requests", "prefill_decode_interval"),
)
EOS = -1  # the stream of the token that ends an answer


class Tick(Backend):
    """Every step takes one unit of time."""

    def step(self, batch: Batch) -> StepCost:
        return StepCost(1)


class Tokens:
    """The tokens of a case's requests as streams: equal at equal places where the driver's tokens are equal."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self.requests = {q["id"]: q for q in requests}
        self.groups = {q["prefix_group"] for q in requests if q["prefix_tokens"]}

    def streams(self, request: int) -> Streams:
        """As `radix_pool.Contents` has it."""
        q = self.requests[request]
        place = np.arange(q["prompt_tokens"], dtype=np.int64)
        names = np.full(len(place), request, dtype=np.int64)
        own = (request * 104729 + place * 31) % 30000
        for group in self.groups:  # a prompt's own token is at times the very one that a group has there
            names[own == (group * 7919 + place * 13) % 20000] = -2 - group
        if q["prefix_tokens"]:
            names[: q["prefix_tokens"]] = -2 - q["prefix_group"]
        cuts = np.flatnonzero(np.diff(names)) + 1
        streams, stops = [*names[cuts - 1].tolist(), int(names[-1])], [*cuts.tolist(), len(names)]
        if not q["ignore_eos"]:
            streams, stops = [*streams, request, EOS], [*stops, len(names) + q["output_tokens"] - 1, 1 << 60]
            if stops[-2] == stops[-3]:
                del streams[-2], stops[-2]
        else:
            streams, stops = [*streams, request], [*stops, 1 << 60]
        return tuple(streams), tuple(stops)


class Watched(Sglang):
    """Our policy, which says what it did in a turn; the order of several preempted at once is the ledger's.

    SGLang takes that order from a set.
    """

    order: dict[int, list[int]]
    turn = 0

    def schedule(self, step: Step) -> int:
        self.gone: list[int] = []
        vouched = super().schedule(step)
        theirs = self.order.get(self.turn, [])
        if sorted(self.gone) == sorted(theirs) and self.gone != theirs and not self.retracted:
            rest = [r for r in step.waiting if r.id not in theirs]
            tail = sorted((r for r in step.waiting if r.id in theirs), key=lambda r: theirs.index(r.id))
            entries = sorted(self._entered[r.id] for r in tail)
            step.reorder([*rest, *tail])
            self._entered.update(zip(theirs, entries, strict=True))
            self.gone = theirs
        return vouched

    def _retract(self, step: Step) -> None:
        before, self.gone = self.gone, []
        super()._retract(step)
        self.retracted, self.gone = self.gone, before

    def _requeue(self, step: Step, request: Request, rest: int, taken: int) -> None:
        super()._requeue(step, request, rest, taken)
        self.gone.append(request.id)


class Replay:
    """Our scheduler, driven as the ledger's driver drove SGLang's: one turn of the event loop a step."""

    def __init__(self, case: dict[str, Any], version: str) -> None:
        requests = case["requests"]
        self.pending = sorted(requests, key=lambda q: (q["arrival_step"], q["id"]))
        n = max(q["id"] for q in requests) + 1
        prompts, outputs = np.ones(n, np.int64), np.ones(n, np.int64)
        for q in requests:
            prompts[q["id"]] = q["prompt_tokens"]
            outputs[q["id"]] = min(q["output_tokens"], q["max_new_tokens"])
        trace = Trace(arrival_ps=np.zeros(n, np.int64), prompt_tokens=prompts, output_tokens=outputs)
        self.policy = Watched(version=version, **{name: case[name] for name in SETTINGS})
        self.policy.order = {row["step"]: row["preempted"] for row in case["ledger"]}
        size = case["page_size"]
        self.pool = CountingPool(case["pool_tokens"] // size, size)
        if not case["disable_radix_cache"]:
            self.pool = RadixPool(self.pool.total, size, Tokens(requests), self.policy.radix.unified)
        parts = (self.policy, Tick(), self.pool, RequestRecords(trace), outputs.tolist(), CONTEXT)
        self.planner = Planner(*parts)
        self.engine = make_engine(self.planner)
        self.left = len(requests)
        self.plan: Plan | None = None  # what was planned last

    def rows(self) -> Iterator[dict[str, Any]]:
        """The ledger of our scheduler."""
        planner, ahead, step = self.planner, self.policy.asynchronous, 0
        while self.left:
            while self.pending and self.pending[0]["arrival_step"] <= step:
                self._arrive(self.pending.pop(0), step)
            flight = planner.flight
            row = {"step": step, **self._plan(step)}
            plan = self.plan
            if ahead:
                landing = flight
            else:
                landing = plan
                if plan is not None:
                    planner.commit(plan, 1)
            done = planner.complete(landing, step, plan) if landing is not None else []
            if ahead:
                if plan is not None:
                    planner.commit(plan, 1)
                planner.flight = plan
            row["finished"] = [r.id for r in done]
            self.left -= len(done)
            row["end"] = self._room()
            yield row
            step += 1
            if row["kind"] == "idle" and self.pending:
                step = max(step, self.pending[0]["arrival_step"])

    def _arrive(self, q: dict[str, Any], step: int) -> None:
        lengths, priority = (q["prompt_tokens"], q["max_new_tokens"]), q["priority"] or 0
        request = Live(q["id"], step, *lengths, priority=priority, ignore_eos=q["ignore_eos"])
        if not self.engine.submit(request, step):
            raise RuntimeError(f"request {q['id']} can never fit")

    def _room(self) -> list[int]:
        pool = self.pool
        cached = pool.cached if isinstance(pool, RadixPool) else 0
        return [(pool.free - cached) * pool.block_size, cached * pool.block_size]

    def _plan(self, step: int) -> dict[str, Any]:
        planner, policy = self.planner, self.policy
        policy.turn, policy.retracted = step, []
        here = set(planner.state.admitted)
        flight = planner.flight
        start = flight.when if flight is not None else at(step)
        plan = self.plan = planner.ask(step, start)
        if plan is not None:
            plan.when.ps = step + 1
        if flight is not None:
            planner.drop_tokens()
        chunks = {r.id: tokens for r, tokens in plan.chunks} if plan else {}
        batch = policy._batches[0]
        if plan is None:
            state = planner.state
            busy = state.admitted or state.waiting or flight is not None
            kind = "none" if busy else "idle"
        else:
            kind = ("mixed" if plan.decoding else "extend") if chunks else "decode"
        return {
            "kind": kind,
            "batch": [[r.id, chunks.get(r.id, 1)] for r in batch],
            "prefix": [[r.id, r.stored] for r, _ in plan.chunks if r.id not in here] if plan else [],
            "chunked": policy._cut.id if policy._cut is not None else None,
            "retracted": policy.retracted,
            "preempted": policy.gone,
            "room": self._room(),
            "ratio": round(policy._running.ratio, 6),
            "full": policy._full,
            "waiting": [r.id for r in planner.state.waiting],
        }


def rows(case: dict[str, Any], version: str) -> Iterator[dict[str, Any]]:
    """Our rows of a case as its driver writes them: ``waiting`` only if it changed, no ``prefix`` where nothing runs.

    A ratio is theirs where it is so to the last digit written but one: sums of floats, in another order.
    """
    replay = Replay(case, version)
    theirs = iter(case["ledger"])
    waiting: list[int] = []
    for row in replay.rows():
        if row["waiting"] == waiting:
            del row["waiting"]
        else:
            waiting = row["waiting"]
        if not row["batch"]:
            del row["prefix"]
        ratio = next(theirs, row)["ratio"]
        if abs(ratio - row["ratio"]) < 2e-6:
            row["ratio"] = ratio
        yield row
