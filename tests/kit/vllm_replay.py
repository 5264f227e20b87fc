"""A ledger's case of vLLM through our scheduler: settings and requests in, rows like vLLM's out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.policies.base import KvGroups, Speculation
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster.build import make_pool
from chairlift.sim.replica.drafted_group import Drafted
from chairlift.sim.replica.drafts import DraftedStep
from chairlift.sim.replica.engine import make_engine
from chairlift.sim.replica.hybrid_pool import HybridPool
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import Live, at
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.replica.verifying import VerifyingPlanner
from chairlift.sim.results.records import RequestRecords
from chairlift.sim.workload.trace import Trace

SPECULATIVE = ("spec", "padded", "drafting", "emitted")  # columns of cases with drafts
COLUMNS = ("scheduled", *SPECULATIVE, "preempted", "new", "resumed", "free_blocks", "held", "finished")
PAIRS = {"scheduled": "tokens", "new": "cached tokens", "resumed": "cached tokens"}
PAIRS |= {"spec": "drafts", "emitted": "tokens"}
PREEMPTIONS = attrgetter("lost")  # what the property returns: it is asked of everybody, twice a step
LATER = (  # settings that only some ledgers have, most of them since 0.23
    "enable_chunked_prefill",
    "max_num_scheduled_tokens",
    "watermark",
    "max_num_active_seqs",
    "long_prefill_token_threshold_adaptive",
    "prefill_schedule_interval",
)


def rows(case: dict[str, Any], version: str) -> Iterator[dict[str, Any]]:
    """The ledger of our scheduler, as vLLM's of that version."""
    return Replay(case, version).rows()


def groups_of(case: dict[str, Any]) -> KvGroups | None:
    """The groups of layers of a case, if some have a window."""
    if "groups" not in case:
        return None
    chunked = any(group["type"] == "chunked" for group in case["groups"])
    return KvGroups(tuple(group["window"] or 0 for group in case["groups"]), chunked)


def speculation_of(case: dict[str, Any], version: str) -> Speculation | None:
    """The drafts of a case, if it has any: the policy's rule for them, with the case's settings."""
    if "num_speculative_tokens" not in case:
        return None
    drafts = case["num_speculative_tokens"]
    by_batch = tuple((first, last, these) for first, last, these in case["k_by_batch"] or ())
    rule = Vllm(version=version).speculation("ngram" if case["method"] == "ngram" else "eagle3", drafts)
    return rule._replace(by_batch=by_batch, prefix=case["prefix_mode"])


def accepted(case: dict[str, Any], request: int, position: int, drafts: int) -> int:
    """How many of its drafts the driver let a request keep that had emitted ``position`` tokens."""
    x = (case["seed"] * 2246822519 + request * 2654435761 + position * 3266489917) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    x ^= x >> 16
    return sum(x < threshold for threshold in case["accept_thresholds"][:drafts])


ONE = StepCost(1)


class Tick(Backend):
    """Every step takes one unit of time."""

    def step(self, batch: Batch) -> StepCost:
        return ONE


class Replay:
    """Our scheduler, driven as the ledger's driver drove vLLM's: one call of schedule() a step."""

    def __init__(self, case: dict[str, Any], version: str) -> None:
        self.pending = sorted(case["requests"], key=lambda q: (q["arrival_step"], q["id"]))
        n = max(q["id"] for q in case["requests"]) + 1
        columns: dict[str, Any] = {name: np.zeros(n, np.int64) for name in ("prefix_group", "prefix_tokens")}
        columns |= {name: np.ones(n, np.int64) for name in ("prompt_tokens", "output_tokens")}
        for q in case["requests"]:
            for name in columns:
                columns[name][q["id"]] = q[name]
        trace = Trace(arrival_ps=np.zeros(n, np.int64), **columns)
        groups, retention = groups_of(case), {}
        if groups is not None:
            every = case["retention_interval"]
            retention["prefix_cache_retention_interval"] = "dense" if every is None else every
        policy = Vllm(
            version=version,
            max_num_batched_tokens=case["max_num_batched_tokens"],
            max_num_seqs=case["max_num_seqs"],
            block_size=case["block_size"],
            num_gpu_blocks=case["num_blocks"],
            long_prefill_token_threshold=case["long_prefill_token_threshold"],
            scheduling_policy=case["policy"],
            scheduler_reserve_full_isl=case["reserve_full_isl"],
            enable_prefix_caching=case["prefix_caching"],
            async_scheduling=case["async_scheduling"],
            **{name: case[name] for name in LATER if name in case},
            **retention,
        )
        longest = case["max_model_len"]
        speculation = speculation_of(case, version)
        pool = make_pool(
            policy, trace, case["num_blocks"] - 1, case["block_size"], {}, False, groups, longest, speculation
        )
        outputs = trace.output_tokens.tolist()
        stages = case.get("pipeline_parallel_size", 1)
        records = RequestRecords(trace)
        parts = (policy, Tick(), pool, records, outputs, longest)
        self.kind: type[Live] = Live
        if speculation is None:
            self.planner: Planner = Planner(*parts, stages=stages)
        else:
            self.planner = VerifyingPlanner(speculation, partial(accepted, case), *parts, leap=False, stages=stages)
            self.kind = Drafted
        self.engine = make_engine(self.planner)
        self.lag = stages - 1 + policy.asynchronous
        self.left = len(self.pending)
        self.flight: list[Plan | None] = []
        self.just_finished = False
        self.emitted: list[list[int]] = []  # request, tokens: of the outputs processed in the row at hand
        self.row_by_row = "processed" in case["ledger"][0]  # at most one output a row, and rows until all are in

    def rows(self) -> Iterator[dict[str, Any]]:
        """The ledger of our scheduler."""
        step = 0
        while self.left or (self.row_by_row and self.flight):
            self._arrive(step)
            row: dict[str, Any] = {"step": step}
            empty = True
            if self._has_requests():
                row |= self._schedule(step)
                empty = not row["scheduled"]
            row["finished"] = []
            self.emitted = []
            if self.row_by_row:
                processed = len(self.flight) > self.lag or (empty and bool(self.flight) and not self._has_requests())
                if processed:
                    row["finished"] = self._update(step)
            else:
                processed = False
                while len(self.flight) > self.lag or (self.flight and not self._has_requests()):
                    row["finished"] += self._update(step)
            if self.planner.records.stops:  # so does vLLM, by an assertion, before the row is written
                return
            if isinstance(self.planner, VerifyingPlanner):
                row["emitted"] = self.emitted
            if "scheduled" in row or row["finished"] or processed:
                yield row
            elif not self.pending and not self.flight and self.left:
                raise RuntimeError(f"stuck at step {step}: {self.left} left")
            step += 1
            if not self._has_requests() and not self.flight and self.pending:
                step = max(step, self.pending[0]["arrival_step"])

    def _arrive(self, step: int) -> None:
        while self.pending and self.pending[0]["arrival_step"] <= step:
            q = self.pending.pop(0)
            request = self.kind(q["id"], step, q["prompt_tokens"], q["output_tokens"], priority=q["priority"])
            if not self.engine.submit(request, step):
                raise RuntimeError(f"request {q['id']} can never fit")

    def _has_requests(self) -> bool:
        state = self.engine.state
        return bool(state.waiting or state.admitted or self.just_finished)

    def _schedule(self, step: int) -> dict[str, Any]:
        state = self.engine.state
        self.just_finished = False
        everybody = [*state.admitted.values(), *state.waiting]
        before = list(map(PREEMPTIONS, everybody))
        here = set(state.admitted)
        plan = self.planner.ask(step, at(step))
        chunks = {r.id: tokens for r, tokens in plan.chunks} if plan else {}
        drafts: dict[str, Any] = {}
        if isinstance(state, DraftedStep):
            scheduled = [[i, c.tokens] for i, c in state.chosen.items()]
            drafts = {
                "spec": [[number, c.drafts] for number, c in state.chosen.items() if c.drafts],
                "padded": sorted(number for number, c in state.chosen.items() if c.padding),
                "drafting": self.planner.drafting,
            }
        elif plan and plan.decoding:
            scheduled = [[i, chunks.get(i, 1)] for i, r in state.admitted.items() if r.group is not None or i in chunks]
        else:
            scheduled = [[i, chunks[i]] for i in state.admitted if i in chunks]
        after = list(map(PREEMPTIONS, everybody))
        preempted = [] if after == before else [r.id for r, n in zip(everybody, before, strict=True) if r.lost > n]
        arrived = [] if here >= state.admitted.keys() else [r for i, r in state.admitted.items() if i not in here]
        row = {
            "scheduled": scheduled,
            "preempted": sorted(preempted),
            "new": [[r.id, r.stored] for r in arrived if not r.preemptions],
            "resumed": [[r.id, r.stored] for r in arrived if r.preemptions],
            "free_blocks": self.engine.pool.free,
        } | drafts
        if isinstance(self.engine.pool, HybridPool):
            row["held"] = self.engine.pool.held()
        if plan is not None:
            plan.when.ps = step + 1
            self.planner.commit(plan, 1)
        self.flight.append(plan)
        return row

    def _update(self, step: int) -> list[int]:
        plan = self.flight.pop(0)
        if plan is None:
            return []
        before = {r.id: r.produced for r in plan.ending}
        going = {r.id: r for r in plan.ending}
        finished = sorted(r.id for r in self.planner.complete(plan, step, next(iter(self.flight), None)))
        self.emitted += [[i, r.produced - before[i]] for i, r in going.items()]
        self.left -= len(finished)
        self.just_finished |= bool(finished)
        return finished
