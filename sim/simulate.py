"""The one verb: `simulate` runs one `Setup` and says what came of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from chairlift.backend.base import Executor
from chairlift.sim.cluster import predicted_lengths
from chairlift.sim.cluster.run import run
from chairlift.sim.replica.engine import Engine
from chairlift.sim.results.metrics import fleet, summarise
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_US


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
        cluster = run(setup, leap, progress, journal)
    finally:
        if collecting:
            gc.enable()
    wall = time.perf_counter() - started
    engines = cluster.engines
    runs = [engine.records for engine in engines]
    pools = [(engine.pool.total, engine.pool.block_size) for engine in engines]
    summary = summarise(cluster.requests, runs, pools, setup.slo, wall)
    summary.update(fleet(summary, [replica.up_ps for replica in cluster.replicas]))
    backend = engines[0].backend
    facts = backend.facts() if isinstance(backend, Executor) else {}
    return Outcome(setup, cluster.requests, runs, summary, _assumptions(setup, engines[0], summary["swaps"]), facts)


def _assumptions(setup: Setup, engine: Engine, swaps: int) -> dict[str, str]:
    """What a reader of the results must know, by subject; ``engine`` is the first replica's."""
    lines = {"workload": "; ".join((setup.trace.source, *setup.trace.notes))}
    lines.update(engine.backend.assumptions())
    for group in setup.groups:
        whose = "" if len(setup.groups) == 1 else f", {group.count} × {group.gpu.name} {group.role}"
        lines.update({f"{what}{whose}": line for what, line in group.make_scheduler().assumptions().items()})
        lines[f"KV pool{whose}"] = f"{group.blocks:,} blocks of {group.block_size} tokens: {group.kv_source}"
    if (predictor := engine.scheduler.predictor) is not None:
        lines["predicted lengths"] = predicted_lengths.described(predictor)
    if swaps:
        host = engine.state.host
        move_us = host.block_ps / PS_PER_US
        lines["swapping"] = f"{host.blocks:,} blocks of host memory, {move_us:.1f} µs to move one (assumed)"
    if engine.scheduler.oracle:
        lines["oracle"] = "this policy reads true output lengths"
    elif setup.trace.max_tokens is not None and (setup.trace.max_tokens == setup.trace.output_tokens).all():
        lines["declared lengths"] = "clients declare their exact output lengths (max_tokens)"
    return lines
