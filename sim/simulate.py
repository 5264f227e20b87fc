"""The one verb: `simulate` runs one `Setup` and says what came of it."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence

from chairlift.backend.base import Executor
from chairlift.sim.cluster import predicted_lengths
from chairlift.sim.cluster.run import run
from chairlift.sim.replica.engine import Engine
from chairlift.sim.results.metrics import Pool, fleet, summarise
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.refusals import refusals
from chairlift.sim.results.token_gaps import gaps_of_finished
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_US

LOOPS = {  # an engine loop, as `Setup.loop` names it → what it is
    "synchronous": "synchronous: a step is planned once the step before has ended",
    "asynchronous": "asynchronous: a step is planned while the step before runs, as vLLM does by default",
    "mixed": "asynchronous on some replicas, synchronous on others",
}


def simulate(
    setup: Setup, leap: bool = True, progress: Callable[[int], None] | None = None, journal: bool = False
) -> Outcome:
    """Serve the trace of ``setup`` to its end.

    ``progress(arrived)`` is called now and then. ``leap=False`` takes every engine step on its own: the same
    results, slowly. ``journal`` keeps what happens to each request (`sim.replica.journal`). Raises `PolicyError` if the
    policy asks for what cannot be, or leaves requests unserved, and `BadInput` if the backend cannot run here.

    >>> from chairlift import load, simulate
    >>> [setup, _] = load("my.yaml", assignments=["workload.requests=300"]).setups
    >>> leapt, stepped = simulate(setup), simulate(setup, leap=False)
    >>> leapt.to_arrow() == stepped.to_arrow()
    True
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
    pools = [Pool(engine.pool.total, engine.pool.block_size, engine.pool.tables) for engine in engines]
    summary = summarise(cluster.requests, runs, pools, setup.slo, wall)
    summary.update(fleet(summary, [replica.up_ps for replica in cluster.replicas]))
    assumptions = _assumptions(setup, engines, summary["swaps"])
    if cluster.scalers:
        assumptions["autoscaling"] = "; ".join(scaler.said() for scaler in cluster.scalers)
    if cluster.notes:
        assumptions["outages"] = "; ".join(cluster.notes)
    if refused := refusals(setup, cluster.requests):
        assumptions["refused"] = refused
    given_up = summary["timed_out"] + summary["failed"]
    if given_up and (others := gaps_of_finished(cluster.requests, runs).of_others):
        assumptions["ITL"] = f"of completed requests, and of {others:,} that were preempted and then given up"
    backend = engines[0].backend
    facts = backend.facts() if isinstance(backend, Executor) else {}
    up_ps = [replica.up_ps for replica in cluster.replicas]
    return Outcome(setup, cluster.requests, runs, summary, assumptions, facts, up_ps)


def _assumptions(setup: Setup, engines: Sequence[Engine], swaps: int) -> dict[str, str]:
    """What a reader of the results must know, by subject. ``engines`` are all replicas', group by group."""
    engine = engines[0]
    lines = {"workload": "; ".join((setup.trace.source, *setup.trace.notes))}
    starts = list(itertools.accumulate((group.count for group in setup.groups[:-1]), initial=0))
    costs = [engines[start].backend.assumptions() for start in starts]
    for what in dict.fromkeys(itertools.chain.from_iterable(costs)):
        told = [each.get(what) for each in costs]
        if len(set(told)) == 1:
            lines[what] = costs[0][what]
        else:
            lines |= {f"{what}{_of(setup, i)}": text for i, text in enumerate(told) if text is not None}
    for i, group in enumerate(setup.groups):
        lines |= {f"{what}{_of(setup, i)}": line for what, line in group.make_scheduler().assumptions().items()}
        what = f"KV pool{_of(setup, i)}"
        lines[what] = f"{group.blocks:,} blocks of {group.block_size} tokens: {group.kv_source}"
        lines |= {f"{what}{_of(setup, i)}": line for what, line in group.said.items()}
        if group.caution:
            lines[f"max_model_len{_of(setup, i)}"] = group.caution
    lines["engine loop"] = LOOPS[setup.loop]
    if unused := setup.unused:
        lines["not used"] = "; ".join(unused)
    if setup.speculate is not None:
        lines |= setup.speculate.said
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


def _of(setup: Setup, group: int) -> str:
    """Of which group of replicas something is said; nothing where there is one."""
    one = setup.groups[group]
    return "" if len(setup.groups) == 1 else f", {one.count} × {one.gpu.name} {one.role}"
