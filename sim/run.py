"""Running one `Setup`: build its replicas, serve its trace, hand back the records and what they come to."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from policies.base import Request, Scheduler
from sim.cluster import Cluster
from sim.engine import Engine
from sim.kv import CountingPool, PrefixCacheMatters, StandInPool
from sim.metrics import summarise
from sim.prefix import Identity, PrefixPool
from sim.records import RequestRecords, RunRecords
from sim.setup import Setup
from sim.trace import Trace


@dataclass
class Outcome:
    """What one run left behind."""

    setup: Setup
    requests: RequestRecords
    runs: list[RunRecords]  # one a replica
    summary: dict[str, Any]
    assumptions: dict[str, str]


def simulate(setup: Setup, leap: bool = True, progress: Callable[[int], None] | None = None) -> Outcome:
    """Serve the trace of ``setup`` to its end.

    ``progress(arrived)`` is called now and then. ``leap=False`` takes every engine step on its own: the same
    results, slowly. Raises `PolicyError` if the policy asks for what cannot be, or leaves requests unserved.
    """
    started = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()  # a run makes no cycles to speak of, and looking for them costs a tenth of its time
    try:
        requests, engines = _served(setup, leap, progress, Identity.shares(setup.trace))
    except PrefixCacheMatters:
        requests, engines = _served(setup, leap, progress, True)
    finally:
        if collecting:
            gc.enable()
    wall = time.perf_counter() - started
    runs = [engine.records for engine in engines]
    pools = [(engine.pool.total, engine.pool.block_size) for engine in engines]
    summary = summarise(requests, runs, pools, setup.slo, wall)
    return Outcome(setup, requests, runs, summary, _assumptions(setup, engines[0]))


def _served(
    setup: Setup, leap: bool, progress: Callable[[int], None] | None, identify: bool
) -> tuple[RequestRecords, list[Engine]]:
    """``identify``: prefix caching, where the policy has it, needs to know each block."""
    trace = setup.trace
    requests = RequestRecords(trace)
    outputs: list[int] = trace.output_tokens.tolist()
    engines = []
    for index in range(setup.replicas):
        scheduler = setup.make_scheduler()
        pool = make_pool(scheduler, trace, setup.blocks, setup.block_size, identify)
        engines.append(
            Engine(scheduler, setup.make_backend(), pool, requests, outputs, setup.max_model_len, index, leap)
        )
    make = request_maker(setup, outputs, engines[0].scheduler.oracle)
    Cluster(requests, engines, setup.make_router(), make, progress).run()
    return requests, engines


def make_pool(scheduler: Scheduler, trace: Trace, blocks: int, block_size: int, identify: bool) -> CountingPool:
    """The KV pool that ``scheduler`` needs: it knows each block only where prefix caching can matter."""
    if not scheduler.prefix_caching:
        return CountingPool(blocks, block_size)
    if identify:
        return PrefixPool(blocks, block_size, Identity(trace, block_size), late=scheduler.asynchronous)
    return StandInPool(blocks, block_size)


def request_maker(setup: Setup, outputs: list[int], oracle: bool) -> Callable[[int], Request]:
    """A function from a row of the trace to the request that policies see."""
    trace = setup.trace
    arrivals = trace.arrival_ps.tolist()
    prompts = trace.prompt_tokens.tolist()
    caps = None if trace.max_tokens is None else trace.max_tokens.tolist()
    priorities = None if trace.priority is None else trace.priority.tolist()
    tenants = None if trace.tenant is None else trace.tenant.tolist()
    sessions = None if trace.session is None else trace.session.tolist()
    longest = setup.max_model_len

    def make(i: int) -> Request:
        prompt = prompts[i]
        return Request(
            i,
            arrivals[i],
            prompt,
            max(1, longest - prompt) if caps is None else caps[i],
            outputs[i] if oracle else None,
            priorities[i] if priorities is not None else 0,
            tenants[i] if tenants is not None else 0,
            sessions[i] if sessions is not None else -1,
        )

    return make


def _assumptions(setup: Setup, engine: Engine) -> dict[str, str]:
    lines = {"workload": "; ".join((setup.trace.source, *setup.trace.notes))}
    lines.update(engine.backend.assumptions())
    lines["KV pool"] = f"{setup.blocks:,} blocks of {setup.block_size} tokens: {setup.kv_source}"
    if engine.scheduler.oracle:
        lines["oracle"] = "this policy reads true output lengths"
    elif setup.trace.max_tokens is not None and (setup.trace.max_tokens == setup.trace.output_tokens).all():
        lines["declared lengths"] = "clients declare their exact output lengths (max_tokens)"
    return lines
