"""Small random clusters, run from Python: what the property tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chairlift.backend import specs
from chairlift.backend.base import FOREVER, NO_HOST, WHOLE, Backend, Batch, Host, StepCost
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.policies.base import KvGroups, Router, Scheduler
from chairlift.policies.routers import RoundRobin
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster.audit import audit
from chairlift.sim.cluster.build import build
from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.ranks import Ranks
from chairlift.sim.replica.request import Live
from chairlift.sim.results.metrics import Pool, areas, durations_ps, occupancy
from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.study import Failures, Limits, ReplicaGroup, Setup, Slo, Speculate
from chairlift.sim.workload.trace import Trace

MODEL = specs.model("opt-13b")
GPU = specs.gpu("a100-40gb")


@dataclass
class Affine(Backend):
    """A made-up cost with every shape a real one has: constants, slopes, prompt terms, a breakpoint, host time."""

    fixed: int = 1000
    token: int = 10
    context: int = 1
    host: Host = NO_HOST
    each: int = 0  # host ps a sequence, scheduling and updating
    chunk_launch: int = 0  # host ps more where there is a chunk
    chunk_tail: int = WHOLE
    decode_tail: int = WHOLE
    late: bool = False  # launched kernel by kernel, an idle GPU gets its first one after half of the launch
    arrival: int = 0
    arrival_token: int = 0
    vouch: int = FOREVER
    cap: int = FOREVER  # context beyond which the slope vanishes (a breakpoint)

    def step(self, batch: Batch) -> StepCost:
        tokens = sum(c.length for c in batch.prefills) + batch.decodes + batch.padded + batch.drafts
        pairs = sum(c.start * c.length for c in batch.prefills)
        slots = batch.decodes + batch.padded
        first = self.fixed + self.token * tokens + pairs + self.context * min(batch.context, self.cap)
        steps = self.vouch
        slope = self.context * slots
        if batch.context >= self.cap:
            slope = 0
        elif slots:
            steps = min(steps, (self.cap - batch.context) // slots + 1)
        return StepCost(first, slope, max(1, steps), self._host(batch))

    def _host(self, batch: Batch) -> Host:
        sequences = self.each * (batch.decodes + len(batch.prefills))
        eager = self.chunk_launch if batch.prefills else 0
        tail = self.chunk_tail if batch.prefills else self.decode_tail
        if not (sequences or eager) and tail == WHOLE:
            return self.host
        schedule, launch, update, *_ = self.host
        head = (launch + eager) // 2 if self.late and tail != WHOLE else 0
        return Host(schedule + sequences, launch + eager, update + sequences, tail, head)


def sync_vllm() -> Vllm:
    """vLLM's policy with its defaults, but a step at a time and without a cache."""
    return Vllm(async_scheduling=False, enable_prefix_caching=False)


def trace_of(rows: Sequence[tuple[int, int, int]], **columns: Any) -> Trace:
    """A trace from (arrival ps, prompt, output) rows."""
    arrival, prompt, output = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Trace(arrival_ps=arrival, prompt_tokens=prompt, output_tokens=output, **columns)


@dataclass
class World:
    """A finished run."""

    requests: RequestRecords
    engines: list[Engine]

    def outcome(self) -> tuple[object, ...]:
        """All that may not depend on how the steps were grouped."""
        r = self.requests
        gaps = [sorted_gaps(e) for e in self.engines]
        return (
            bytes(r.status),
            list(r.replica),
            list(r.admitted),
            list(r.first_token),
            list(r.finished),
            list(r.preemptions),
            list(r.cached_tokens),
            list(r.swaps),
            list(r.swapped_tokens),
            [e.planner.steps for e in self.engines],
            gaps,
            [shares(e) for e in self.engines],
        )


def shares(engine: Engine) -> dict[str, Any]:
    """How full a replica was, and with what; each share is one of time and of the pool."""
    pool = Pool(engine.pool.total, engine.pool.block_size, engine.pool.tables)
    told = occupancy([engine.records], [pool])
    return {name: value for name, value in told.items() if name not in ("runs", "mean_leap")}


def sorted_gaps(engine: Engine) -> list[tuple[int, int]]:
    """Every inter-token gap of a replica as sorted (gap, how many)."""
    count: dict[int, int] = {}
    runs = engine.records.runs()
    for start, first, slope, steps, decodes, late in zip(
        *(runs[c].tolist() for c in ("start_ps", "first_ps", "slope_ps", "steps", "decodes", "late_decodes")),
        strict=True,
    ):
        assert start >= 0
        for j in range(steps):
            weight = decodes - late if j == 0 else decodes
            if weight:
                gap = first + j * slope
                count[gap] = count.get(gap, 0) + weight
    gaps = engine.records.gaps()
    for gap, weight in zip(gaps["gap_ps"].tolist(), gaps["count"].tolist(), strict=True):
        count[gap] = count.get(gap, 0) + weight
    return sorted(count.items())


def planners(engine: Engine) -> Sequence[Planner]:
    """The planner of each rank of a replica."""
    return engine.planner.ranks if isinstance(engine.planner, Ranks) else [engine.planner]


def check_places(engine: Engine) -> None:
    """At no time is more stored, or promised, than is held, or more held than there is."""
    blocks, size, tables = pool = Pool(engine.pool.total, engine.pool.block_size, engine.pool.tables)
    runs = engine.records.runs()
    stored, promised, held = areas(runs, pool)
    assert (stored >= 0).all()
    assert (promised >= 0).all()
    assert (stored + promised <= held).all()
    assert (held <= durations_ps(runs) * blocks * size).all()
    assert (runs["spared_blocks"] >= 0).all()
    assert tables == 1 or (runs["spared_blocks"] + runs["held_blocks"]).sum() % tables == 0


def most(engine: Engine, trace: Trace, i: int) -> int:
    """Tokens that a replica lets request ``i`` have."""
    prompt = int(trace.prompt_tokens[i])
    pool, longest = planners(engine)[0].pool, planners(engine)[0].state.max_model_len
    cap = longest - prompt if trace.max_tokens is None else int(trace.max_tokens[i])
    return engine.scheduler.allowed(Live(i, 0, prompt, cap), longest, pool.total, pool.block_size)


def check_books(world: World) -> None:
    """Every request ended once, all tokens came out, and nothing is left behind."""
    r = world.requests
    trace = r.trace
    assert set(r.status) <= {Status.FINISHED, Status.REJECTED}
    done = [i for i in range(len(trace)) if r.status[i] == Status.FINISHED]
    assert all(trace.arrival_ps[i] <= r.admitted[i] < r.first_token[i] <= r.finished[i] for i in done)
    assert all(r.emitted[i] == min(trace.output_tokens[i], most(world.engines[r.replica[i]], trace, i)) for i in done)
    gaps = 0
    for engine in world.engines:
        state, group = engine.state, engine.state.group
        assert engine.pool.free == engine.pool.total
        assert (state.kv_tokens, engine.planner.promised, group.context, group.live, group.dead) == (0, 0, 0, 0, 0)
        assert not state.waiting
        assert state.host.free == state.host.blocks
        assert not state.host.busy
        assert not state.admitted
        gaps += sum(weight for _, weight in sorted_gaps(engine))
        check_places(engine)
    # a gap for each token, but for first ones and those that come together with another
    assert gaps == r.messages().sum() - sum(first >= 0 for first in r.first_token)


@dataclass
class Group(ReplicaGroup):
    """Equal replicas with a made-up cost: one backend for all of them, or what makes one for each."""

    cost: Backend | Callable[[], Backend] = Affine
    policy: Callable[[], Scheduler] | None = None  # makes a replica's policy; None: ``scheduler`` with its settings

    def make_scheduler(self) -> Scheduler:
        return super().make_scheduler() if self.policy is None else self.policy()

    def make_backend(self, model: specs.Model) -> Backend:
        return self.cost if isinstance(self.cost, Backend) else self.cost()


def host_of(blocks: int, block_ps: int, block_size: int) -> tuple[float, float]:
    """`ReplicaGroup.host_gib` and ``host_link`` for so many blocks of host memory that take ``block_ps`` to move."""
    size = MODEL.kv_bytes_per_token_on(1) * block_size
    return blocks * size / 2**30, size * 1000 / block_ps / GPU.host_gb_per_s


def setup_of(trace: Trace, groups: Sequence[ReplicaGroup], router: type[Router] = RoundRobin, **more: Any) -> Setup:
    """``groups`` serving ``trace``; ``more`` are fields of `Setup`."""
    fields: dict[str, Any] = {
        "variant": "",
        "case": "",
        "model": MODEL,
        "max_model_len": 2000,
        "router_settings": {},
        "slo": Slo(),
        "seed": 0,
        "limits": Limits(),
        **more,
    }
    return Setup(trace=trace, groups=list(groups), router=router, **fields)


def play(
    trace: Trace,
    scheduler: Callable[[], Scheduler],
    backend: Callable[[], Backend] = Affine,
    blocks: int = 1000,
    block_size: int = 16,
    replicas: int = 1,
    leap: bool = True,
    max_model_len: int = 1 << 20,
    host: tuple[int, int] = (0, 1),
    journal: bool = False,
    groups: KvGroups | None = None,
    speculate: Speculate | None = None,
    limits: Limits | None = None,
    failures: Failures | None = None,
    pipeline: int = 1,
) -> World:
    """Serve ``trace`` on ``replicas`` equal replicas, round robin; ``host``: blocks of host memory, ps to move one.

    Each block of a prefix cache is known, whether the trace shares prefixes or not. ``groups``: of the model's layers,
    if some have a window. ``speculate``: drafts that its decodes verify.
    """
    sample = scheduler()
    block_size = sample.block_tokens or block_size
    parallel = Parallel(pipeline=pipeline)
    parts = (replicas, "mixed", GPU, parallel, type(sample), {}, Efficiency(), blocks, block_size, "made up")
    group = Group(*parts, *host_of(*host, block_size), kv_groups=groups, cost=backend, policy=scheduler)
    if speculate is not None:
        group.speculation = sample.speculation(speculate.method, speculate.tokens)
    more = {"speculate": speculate, "limits": limits or Limits(), "failures": failures}
    cluster = build(setup_of(trace, [group], max_model_len=max_model_len, **more), leap, journal=journal)
    cluster.run()
    audit(cluster)
    return World(cluster.requests, cluster.engines)
