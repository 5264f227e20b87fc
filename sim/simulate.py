"""Running one `Setup`: build its replicas, serve its trace, hand back the records and what they come to."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from random import Random

import numpy as np

from chairlift.backend.base import Backend, Executor
from chairlift.policies.base import Request, Scheduler
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cluster import predicted_lengths as predict
from chairlift.sim.cluster.cluster import Cluster, Replica
from chairlift.sim.cluster.control import Autoscaler, Breakdowns, Handover, Patience
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.replica.counting_pool import CountingPool, PrefixCacheMatters, StandInPool
from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.executing import Executing
from chairlift.sim.replica.journal import JournalEngine, JournalExecuting
from chairlift.sim.replica.prefix_pool import Identity, PrefixPool
from chairlift.sim.results.metrics import fleet, summarise
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.records import RequestRecords
from chairlift.sim.study import ReplicaGroup, Setup
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.trace import Trace


def simulate(
    setup: Setup, leap: bool = True, progress: Callable[[int], None] | None = None, journal: bool = False
) -> Outcome:
    """Serve the trace of ``setup`` to its end.

    ``progress(arrived)`` is called now and then. ``leap=False`` takes every engine step on its own: the same
    results, slowly. ``journal`` keeps what happens to each request (`sim.replica.journal`). Raises `PolicyError` if the
    policy asks for what cannot be, or leaves requests unserved, and `BadInput` if the backend cannot run here.
    """
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a run makes no cycles to speak of, and looking for them costs a tenth of its time
    try:
        identify = setup.executes or Identity.shares(setup.trace)
        requests, engines, up_ps = _served(setup, leap, progress, identify, journal)
    except PrefixCacheMatters:
        requests, engines, up_ps = _served(setup, leap, progress, True, journal)
    finally:
        if collecting:
            gc.enable()
    wall = time.perf_counter() - started
    runs = [engine.records for engine in engines]
    pools = [(engine.pool.total, engine.pool.block_size) for engine in engines]
    summary = summarise(requests, runs, pools, setup.slo, wall)
    summary.update(fleet(summary, up_ps))
    backend = engines[0].backend
    facts = backend.facts() if isinstance(backend, Executor) else {}
    return Outcome(setup, requests, runs, summary, _assumptions(setup, engines[0], summary["swaps"]), facts)


def _served(
    setup: Setup, leap: bool, progress: Callable[[int], None] | None, identify: bool, journal: bool = False
) -> tuple[RequestRecords, list[Engine], list[int]]:
    """Records, engines, and how long each was up, ps.

    ``identify``: prefix caching, where the policy has it, needs to know each block.
    """
    trace = setup.trace
    requests = RequestRecords(trace)
    outputs: list[int] = trace.output_tokens.tolist()
    first_only = [1] * len(outputs)  # what a prefill replica has to emit
    identities: dict[int, Identity] | None = {} if identify else None
    samples = [group.make_scheduler() for group in setup.groups]
    predictor = predict.wanted(samples)
    guesses = None if predictor is None else predict.predictions(outputs, predictor, setup.seed).tolist()
    make = request_maker(setup, outputs, any(s.oracle for s in samples), guesses)
    cluster = Cluster(requests, make, progress, setup.limits.queue)
    cluster.front = ReplicaPool(cluster, setup.make_router(), _chance(setup, "router"), setup.router_stale_ps)
    behind = cluster.front
    if setup.link is not None:
        behind = ReplicaPool(cluster, setup.make_router(), _chance(setup, "decode router"), setup.router_stale_ps)
        handover = Handover(cluster, setup.link, setup.model.kv_bytes_per_token, behind)

    pricing, executing = (JournalEngine, JournalExecuting) if journal else (Engine, Executing)

    def build(replica: Replica, group: ReplicaGroup) -> Engine:
        scheduler = group.make_scheduler()
        pool = make_pool(scheduler, trace, group.blocks, group.block_size, identities, setup.executes)
        tokens = first_only if group.role == "prefill" else outputs

        def finish(request: Request, now: int) -> None:
            if request._at >= 0:  # else its client gave up in the very step that handed it over
                replica.left(request)
            cluster.ended(request, now)

        backend = _ready(setup, group, pool)
        parts = (scheduler, backend, pool, requests, tokens, setup.max_model_len)
        if isinstance(backend, Executor):  # it has no host memory to swap to: preempted requests compute again
            identity = (identities or {}).get(pool.block_size) if pool.tracks else None
            identity = identity or Identity(trace, 16)
            engine: Engine = executing(*parts, index=replica.index, leap=False, finish=finish, identity=identity)
        else:
            host = group.make_host(setup.model)
            engine = pricing(*parts, index=replica.index, leap=leap, finish=finish, host=host)
        engine.state.more_arrivals = cluster.more_arrivals
        if group.role == "prefill":
            engine.handover = handover.take
        return engine

    for group in setup.groups:
        most = group.count if setup.autoscale is None else setup.autoscale.max
        for i in range(most):
            replica = Replica(cluster, len(cluster.replicas), lambda r, g=group: build(r, g))  # type: ignore[misc]
            cluster.replicas.append(replica)
            if i < group.count:
                (behind if group.role == "decode" else cluster.front).open(replica)
    if setup.failures is not None:
        chances = [_chance(setup, f"failures of replica {r.index}") for r in cluster.replicas]
        Breakdowns(cluster, setup.failures, chances, setup.start_up_ps, behind)
    if setup.autoscale is not None:
        Autoscaler(cluster, cluster.front, setup.autoscale)
    if setup.limits.timeout_s is not None or setup.limits.queue_timeout_s is not None:
        cluster.on_arrival = Patience(cluster, setup.limits).arrived
    try:
        cluster.run()
    finally:
        engines = [replica.engine for replica in cluster.replicas]
        for engine in engines:
            engine.backend.close()
    audit(requests, engines, cluster.request_time)
    return requests, engines, [replica.up_ps for replica in cluster.replicas]


def audit(requests: RequestRecords, engines: list[Engine], request_time: int) -> None:
    """Check what must hold of every run; raises AssertionError, which is a defect of ours, never of the input.

    Little's law, exactly: the requests inside, summed over time as the cluster counted them, is the time that each
    spent there, summed over requests as the records tell. Every token has its gap, but for first tokens. No replica
    runs two steps at once. Nothing is left behind.
    """
    columns = requests.columns()
    arrival, finished, first = (np.asarray(columns[c]) for c in ("arrival_ps", "finished_ps", "first_token_ps"))
    stays = finished - arrival
    inside = int((stays >> 32).sum()) * (1 << 32) + int((stays & 0xFFFFFFFF).sum())  # the sum outgrows 64 bits
    assert inside == request_time, f"Little's law: {inside} ps by the records, {request_time} ps by the clock"
    tokens = int(np.asarray(columns["emitted_tokens"]).sum())
    gaps = 0
    for engine in engines:
        runs, more = engine.records.runs(), engine.records.gaps()
        gaps += int((runs["decodes"] * runs["steps"] - runs["late_decodes"]).sum() + more["count"].sum())
        steps = runs["steps"]
        ends = runs["start_ps"] + steps * runs["first_ps"] + runs["slope_ps"] * (steps * (steps - 1) // 2)
        assert (runs["start_ps"][1:] >= ends[:-1]).all(), f"replica {engine.index}: two steps at once"
        assert engine.pool.free == engine.pool.total, f"replica {engine.index}: blocks are left behind"
        host = engine.state.host
        assert host.free == host.blocks, f"replica {engine.index}: swapped blocks are left behind"
    assert gaps == tokens - int((first >= 0).sum()), f"{tokens} tokens, {gaps} gaps"


def _ready(setup: Setup, group: ReplicaGroup, pool: CountingPool) -> Backend:
    """A backend for one replica. Raises `BadInput` where it cannot serve that."""
    try:
        backend = group.make_backend(setup.model)
        if isinstance(backend, Executor):
            backend.prepare(pool.total, pool.block_size, setup.max_model_len, pool.tracks)
    except ValueError as error:
        raise BadInput(Problem(str(error), path="backend")) from None
    return backend


def _chance(setup: Setup, purpose: str) -> Random:
    return Random(int(stream(setup.seed, purpose).integers(1 << 62)))


def make_pool(
    scheduler: Scheduler,
    trace: Trace,
    blocks: int,
    block_size: int,
    identities: dict[int, Identity] | None,
    executes: bool = False,
) -> CountingPool:
    """The KV pool that ``scheduler`` needs: it knows each block only where prefix caching can matter.

    ``identities``: by block size, what all replicas share of the trace, filled as needed; None where it cannot matter.
    ``executes``: steps really run.
    """
    if not scheduler.prefix_caching:
        return CountingPool(blocks, block_size)
    if identities is None:
        return StandInPool(blocks, block_size)
    if block_size not in identities:
        identities[block_size] = Identity(trace, block_size)
    return PrefixPool(blocks, block_size, identities[block_size], scheduler.asynchronous, forgets=executes)


def request_maker(
    setup: Setup, outputs: list[int], oracle: bool, guesses: list[int] | None = None
) -> Callable[[int], Request]:
    """A function from a row of the trace to the request that policies see."""
    trace = setup.trace
    arrivals = trace.arrival_ps.tolist()
    prompts = trace.prompt_tokens.tolist()
    caps = None if trace.max_tokens is None else trace.max_tokens.tolist()
    priorities = None if trace.priority is None else trace.priority.tolist()
    hashes = trace.hash_ids
    tenants = None if trace.tenant is None else trace.tenant.tolist()
    sessions = None if trace.session is None else trace.session.tolist()
    longest = setup.max_model_len

    def make(i: int) -> Request:
        prompt = prompts[i]
        request = Request(
            i,
            arrivals[i],
            prompt,
            max(1, longest - prompt) if caps is None else caps[i],
            outputs[i] if oracle else None,
            priorities[i] if priorities is not None else 0,
            tenants[i] if tenants is not None else 0,
            sessions[i] if sessions is not None else -1,
        )
        if guesses is not None:
            request.predicted_tokens = guesses[i]
        if hashes is not None:
            request.hash_ids = hashes.row(i).tolist()
        return request

    return make


def _assumptions(setup: Setup, engine: Engine, swaps: int) -> dict[str, str]:
    lines = {"workload": "; ".join((setup.trace.source, *setup.trace.notes))}
    lines.update(engine.backend.assumptions())
    for group in setup.groups:
        what = "KV pool" if len(setup.groups) == 1 else f"KV pool, {group.count} × {group.gpu.name} {group.role}"
        lines[what] = f"{group.blocks:,} blocks of {group.block_size} tokens: {group.kv_source}"
    if (predictor := engine.scheduler.predictor) is not None:
        lines["predicted lengths"] = predict.described(predictor)
    if swaps:
        host = engine.state.host
        lines["swapping"] = f"{host.blocks:,} blocks of host memory, {host.block_ps / 1e6:.1f} µs to move one (assumed)"
    if engine.scheduler.oracle:
        lines["oracle"] = "this policy reads true output lengths"
    elif setup.trace.max_tokens is not None and (setup.trace.max_tokens == setup.trace.output_tokens).all():
        lines["declared lengths"] = "clients declare their exact output lengths (max_tokens)"
    return lines
