"""The small workloads and clusters that promises are tried on.

All are of one scale: a step takes 10 ms, 0.1 ms more for each token computed in it and 0.01 ms more for each token of
context; prompts and answers have up to 49 tokens; the model takes 120.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.shapes import GPU, Model
from chairlift.policies.base import Router, Scheduler
from chairlift.policies.routers import RoundRobin
from chairlift.policies.vllm import Vllm
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.study import Failures, Limits, Outage, ReplicaGroup, Setup, Slo
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.trace import Trace

PS_PER_MS = PS_PER_S // 1000
MODEL_LEN = 120  # tokens, prompt and answer
LONGEST = 49  # tokens of a prompt, and of an answer
SPARE = 13  # tokens that clients declare beyond their answer's length
BLOCK = 4  # tokens, but for a policy that fixes its own
TENANTS = ("a", "b", "c")


class Row(NamedTuple):
    """One request."""

    arrival_ms: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    priority: int
    tenant: str
    session: int
    prefix_group: int
    prefix_tokens: int


@dataclass(frozen=True)
class Case:
    """A workload and what serves it."""

    name: str
    says: str
    seed: int
    between_ms: int = 20  # mean time between two arrivals; 0: all arrive at once
    least_output: int = 1
    pool_tokens: int = 1000  # of a replica's KV pool; 200 hold three or four requests
    replicas: int = 1
    away: tuple[tuple[int, int, int], ...] = ()  # replica, from when (ms), for how long (ms)
    timeout_ms: int | None = None
    stale_ms: int = 0  # age of what the router sees
    vague: bool = False  # all clients declare the same
    sessions: int = 0  # half of the requests are turns of so many sessions

    def rows(self, count: int = 30) -> list[Row]:
        """Its workload."""
        rng = stream(self.seed, "conformance")
        spaces = rng.integers(0, 9, count).cumsum() * self.between_ms // 4
        prompts = rng.integers(1, LONGEST + 1, count).tolist()
        outputs = rng.integers(self.least_output, LONGEST + 1, count).tolist()
        priorities = rng.integers(0, 3, count).tolist()
        tenants = rng.integers(0, len(TENANTS), count).tolist()
        sessions = rng.integers(-self.sessions, self.sessions, count).tolist() if self.sessions else [-1] * count
        groups = rng.integers(-1, 3, count).tolist()
        return [
            Row(
                at,
                prompt,
                output,
                (LONGEST if self.vague else output) + SPARE,
                priority,
                TENANTS[tenant],
                max(-1, session),
                group,
                prompt * 3 // 4 if group >= 0 else 0,
            )
            for at, prompt, output, priority, tenant, session, group in zip(
                spaces.tolist(), prompts, outputs, priorities, tenants, sessions, groups, strict=True
            )
        ]


POLICY_CASES = (
    Case("room", "requests come one after the other, and the KV pool has room for all", 1),
    Case("crowd", "all requests come at once to a KV pool that holds a few", 2, 0, pool_tokens=200),
    Case("pair", "two replicas whose KV pools hold a few", 3, pool_tokens=200, replicas=2),
    Case(
        "long",
        "long answers, all at once, to clients that declare nothing of them; the KV pool holds a few",
        4,
        0,
        25,
        pool_tokens=200,
        vague=True,
    ),
    Case(
        "failing",
        "two replicas that fail and come back; their requests are sent elsewhere",
        5,
        pool_tokens=300,
        replicas=2,
        away=((0, 200, 300), (1, 900, 200)),
    ),
    Case("impatient", "clients give up after 0.6 s", 6, pool_tokens=300, timeout_ms=600),
)

ROUTER_CASES = (
    Case("three", "three replicas", 1, 10, 10, replicas=3, sessions=6),
    Case("burst", "all requests come at once to two replicas", 2, 0, 10, pool_tokens=300, replicas=2, sessions=6),
    Case("stale", "three replicas, seen as they were up to 0.2 s ago", 3, 10, 10, replicas=3, sessions=6, stale_ms=200),
    Case(
        "failing",
        "three replicas that fail and come back; their requests are sent elsewhere",
        4,
        10,
        10,
        replicas=3,
        sessions=6,
        away=((0, 100, 200), (1, 150, 400), (2, 350, 100)),
    ),
    Case("impatient", "clients of two replicas give up after 0.6 s", 5, 10, 10, replicas=2, sessions=6, timeout_ms=600),
)


def setup(
    case: Case,
    rows: Sequence[Row],
    policy: type[Scheduler] = Vllm,
    policy_settings: dict[str, Any] | None = None,
    router: type[Router] = RoundRobin,
    router_settings: dict[str, Any] | None = None,
) -> Setup:
    """``case`` with these requests, ready to simulate; by default vLLM's policy without a cache, and round robin."""
    block = policy.block_tokens or BLOCK
    group = ReplicaGroup(
        count=case.replicas,
        role="mixed",
        gpu=_GPU,
        parallel=ONE,
        scheduler=policy,
        scheduler_settings={"enable_prefix_caching": False} if policy_settings is None else policy_settings,
        backend=_Cost(),
        blocks=case.pool_tokens // block,
        block_size=block,
        kv_source="of the conformance suite",
        host_gib=60 * _MODEL.kv_bytes_per_token / 2**30,  # 60 tokens
        host_link=1,
    )
    outages = [Outage(replica=i, at_s=at / 1000, for_s=span / 1000) for i, at, span in case.away]
    return Setup(
        variant="",
        case=case.name,
        trace=trace_of(rows),
        model=_MODEL,
        max_model_len=MODEL_LEN,
        groups=[group],
        router=router,
        router_settings=router_settings or {},
        slo=Slo(),
        seed=0,
        limits=Limits(timeout_s=None if case.timeout_ms is None else case.timeout_ms / 1000),
        router_stale_ps=case.stale_ms * PS_PER_MS,
        failures=Failures(schedule=outages) if outages else None,
    )


def trace_of(rows: Sequence[Row]) -> Trace:
    """The requests as a trace. Tenants are numbered in order of appearance, as a trace file's are."""
    codes: dict[str, int] = {}
    for row in rows:
        codes.setdefault(row.tenant, len(codes))
    columns: dict[str, Any] = {
        name: np.array([getattr(row, name) for row in rows]) for name in Row._fields if name != "tenant"
    }
    arrival_ps = columns.pop("arrival_ms").astype(np.int64) * PS_PER_MS
    tenant = np.array([codes[row.tenant] for row in rows])
    return Trace(arrival_ps=arrival_ps, tenant=tenant, tenants=tuple(codes), **columns)


def read_rows(path: Path) -> list[Row]:
    """The requests in a trace file that `trace_of` and `workload.formats.chairlift.save` wrote. Raises `BadInput`."""
    trace = load(path, "chairlift")
    for name in ("prompt_tokens", "output_tokens"):  # longer ones may be refused for their size: no policy's doing
        tokens = getattr(trace, name)
        if len(long := np.flatnonzero(tokens > LONGEST)):
            rule = f"must be at most {LONGEST}, as in all cases of a check"
            raise BadInput(Problem(rule, file=str(path), path=name, value=int(tokens[long[0]])))
    for name in ("hash_ids", "follows"):
        if getattr(trace, name) is not None:
            raise BadInput(Problem("a check serves no such column: leave it out", file=str(path), path=name))
    columns = {
        "arrival_ms": (trace.arrival_ps // PS_PER_MS).tolist(),
        "tenant": [""] * len(trace) if trace.tenant is None else [trace.tenants[i] for i in trace.tenant.tolist()],
    }
    defaults = {"max_tokens": None, "priority": 0, "session": -1, "prefix_group": -1, "prefix_tokens": 0}
    for name in Row._fields:
        if name not in columns:
            column = getattr(trace, name)
            columns[name] = [defaults.get(name)] * len(trace) if column is None else column.tolist()
    rows = [Row(**dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]
    return [row if row.max_tokens else row._replace(max_tokens=row.output_tokens + SPARE) for row in rows]


class _MadeUp(Backend):
    """10 ms a step, 0.1 ms a token computed, 0.01 ms a token of context."""

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; each step after it reads as many tokens more as it has decodes and dead slots."""
        slots = batch.decodes + batch.padded
        tokens = sum(chunk.length for chunk in batch.prefills) + slots
        each = PS_PER_MS // 100
        return StepCost(10 * PS_PER_MS + tokens * (PS_PER_MS // 10) + batch.context * each, slots * each)


@dataclass(frozen=True)
class _Cost:
    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        return _MadeUp()


_MODEL = Model(
    "tiny", layers=1, hidden=64, heads=1, kv_heads=1, head_size=64, ffn=64, vocab=64, max_model_len=MODEL_LEN
)
_GPU = GPU(  # only its host link matters: a block of 4 tokens, 1 KiB, moves in 1 ms
    name="made up",
    bf16_tflops=1,
    hbm_gb_per_s=1,
    memory_gib=1,
    nvlink_gb_per_s=0,
    host_gb_per_s=BLOCK * _MODEL.kv_bytes_per_token / 1e6,
    tdp_w=1,
    usd_per_gpu_hour=1,
    price_date="",
    price_source="",
    source="made up",
)
