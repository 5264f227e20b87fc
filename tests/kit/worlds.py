"""Small random clusters, run from Python: what the property tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from chairlift.backend.base import FOREVER, NO_HOST, WHOLE, Backend, Batch, Host, StepCost
from chairlift.policies.base import KvGroups, Scheduler
from chairlift.policies.routers import RoundRobin
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster.build import make_pool
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.predicted_lengths import predictions
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.replica.engine import Engine, make_engine
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.workload.trace import Trace


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
    arrival: int = 0
    arrival_token: int = 0
    vouch: int = FOREVER
    cap: int = FOREVER  # context beyond which the slope vanishes (a breakpoint)

    def step(self, batch: Batch) -> StepCost:
        tokens = sum(c.length for c in batch.prefills) + batch.decodes + batch.padded
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
        schedule, launch, update, _ = self.host
        return Host(schedule + sequences, launch + eager, update + sequences, tail)


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
    order: list[int] = field(default_factory=list)

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
        )


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


def most(engine: Engine, trace: Trace, i: int) -> int:
    """Tokens that a replica lets request ``i`` have."""
    prompt = int(trace.prompt_tokens[i])
    pool, longest = engine.pool, engine.state.max_model_len
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
    assert gaps == sum(r.emitted) - sum(first >= 0 for first in r.first_token)  # a token, a gap; but for first ones


def play(
    trace: Trace,
    scheduler: Callable[[], Scheduler],
    backend: Callable[[], Backend] = Affine,
    blocks: int = 1000,
    block_size: int = 16,
    replicas: int = 1,
    leap: bool = True,
    max_model_len: int = 1 << 20,
    host: tuple[int, int] = (0, 0),
    journal: bool = False,
    groups: KvGroups | None = None,
) -> World:
    """Serve ``trace`` on ``replicas`` equal replicas, round robin; ``host``: blocks of host memory, ps to move one.

    ``groups``: of the model's layers, if some have a window.
    """
    requests = RequestRecords(trace)
    outputs = trace.output_tokens.tolist()
    sample = scheduler()
    oracle = sample.oracle
    guesses = None if sample.predictor is None else predictions(outputs, sample.predictor, 0).tolist()

    def make(i: int) -> Live:
        prompt = int(trace.prompt_tokens[i])
        cap = max_model_len - prompt if trace.max_tokens is None else int(trace.max_tokens[i])
        priority = 0 if trace.priority is None else int(trace.priority[i])
        tenant = 0 if trace.tenant is None else int(trace.tenant[i])
        request = Live(i, int(trace.arrival_ps[i]), prompt, cap, outputs[i] if oracle else None, priority, tenant)
        request.ignore_eos = trace.ignore_eos is not None and bool(trace.ignore_eos[i])
        request.predicted_tokens = guesses[i] if guesses else None
        return request

    cluster = Cluster(requests, make)
    cluster.front = ReplicaPool(cluster.clock, requests, RoundRobin(), Random(0), cluster.refuse)
    cluster.pools.append(cluster.front)

    def build(replica: Replica) -> Engine:
        policy = scheduler()
        size = policy.block_tokens or block_size
        pool = make_pool(policy, trace, blocks, size, {}, groups=groups, max_model_len=max_model_len)

        def finish(request: Live, now: int) -> None:
            replica.left(request)
            cluster.ended(request, now)

        planner = Planner(
            policy,
            backend(),
            pool,
            requests,
            outputs,
            max_model_len,
            index=replica.index,
            leap=leap,
            finish=finish,
            host=HostMemory(*host, pool.block_size, policy.overlaps_swaps),
            journal=journal,
        )
        return make_engine(planner)

    for index in range(replicas):
        replica = Replica(cluster.clock, index, build)
        cluster.replicas.append(replica)
        cluster.front.open(replica)
    cluster.run()
    engines = [replica.engine for replica in cluster.replicas]
    return World(requests, engines)
