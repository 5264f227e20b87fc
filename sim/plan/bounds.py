"""What no schedule can do, without simulating: too little memory, too high a rate, too short a latency.

A bound on the rate prices the average request at the step costs that the simulation itself would take, at their best.
Every decode runs in the cheapest batch that the KV pool and the policy's limits allow, every prompt token in the
cheapest chunk, and a replica does both at once for the price of the dearer. A system that cannot serve a rate on these
terms cannot serve it under any schedule. Prompts that may share prefixes cost nothing here: a cache may hold them.

Worked example: a prompt of 1000 tokens at 0.02 ms each in the cheapest chunk takes 20 ms, and 100 further tokens at 0.3
ms each in the cheapest batch take 30 ms. One mixed replica then serves at most 1 / 30 ms = 33 requests a second, and a
prefill and a decode replica together at most min(1 / 20 ms, 1 / 30 ms), the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chairlift.backend.base import Backend, Batch, Chunk
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.promises import PROMISED, Promise
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.results.catalogue import LATENCY
from chairlift.sim.study import ReplicaGroup, Setup
from chairlift.sim.units import PS_PER_MS, PS_PER_S
from chairlift.sim.workload.clients import starts
from chairlift.sim.workload.trace import Trace

SLACK = 0.97  # factor on every time: batches between those that are tried may be a little cheaper
UNLUCKY = 0.01  # a share of the sampled requests may lie this far below that of all requests, by chance
CHUNKS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """What a candidate can do at most."""

    rate_per_s: float  # requests per second; where requests follow one another, sessions started per second
    impossible: str  # why the promises break at any rate; "" if they may be kept


def bound(candidate: Candidate, promises: Sequence[Promise]) -> Bound:
    """The bound of a candidate that has a setup."""
    setup = candidate.setup
    assert setup is not None
    trace = setup.trace
    reuse = Identity.shares(trace) or trace.hash_ids is not None
    prompts = trace.prompt_tokens.astype(np.float64)
    decodes = trace.output_tokens.astype(np.float64) - 1
    rates: dict[str, float] = {}
    for group in setup.groups:
        prompt_s, decode_s = _seconds(setup, group, prompts, decodes)
        prompt_s *= not reuse
        need = {"prefill": prompt_s, "decode": decode_s}.get(group.role, max(prompt_s, decode_s))
        rates[group.role] = rates.get(group.role, 0.0) + (setup.most(group) / need if need > 0 else np.inf)
    per_start = len(trace) / starts(trace)
    return Bound(float(min(rates.values())) / per_start, _impossible(setup, promises, reuse))


def work_of(setup: Setup, group: ReplicaGroup) -> tuple[float, float]:
    """Least seconds that one replica of ``group`` needs for the prompt of an average request, and for its decodes."""
    trace = setup.trace
    return _seconds(setup, group, trace.prompt_tokens.astype(np.float64), trace.output_tokens.astype(np.float64) - 1)


def _seconds(setup: Setup, group: ReplicaGroup, prompts: Floats, decodes: Floats) -> tuple[float, float]:
    """Least seconds that one replica of ``group`` needs for the prompt of an average request, and for its decodes.

    ``prompts`` and ``decodes``: tokens of each request, shape (n,); a request has one decode less than output tokens.
    """
    backend = group.make_backend(setup.model)
    scheduler = group.make_scheduler()
    ranks = group.parallel.data
    cheapest = _prompt_token(backend, scheduler.token_limit, ranks)
    total = float(decodes.sum())
    if total == 0:
        return cheapest * float(prompts.mean()) * SLACK / PS_PER_S, 0.0
    context = float((decodes * (prompts + (decodes + 1) / 2)).sum()) / total  # mean KV tokens that a decode reads
    room = group.blocks * group.block_size / max(1.0, float(prompts.min()))
    limits = (scheduler.sequence_limit, scheduler.token_limit)  # a decode takes one of a step's tokens
    most = int(min([max(1.0, room), *(limit * ranks for limit in limits if limit is not None)]))
    sizes = sorted({*range(1, min(most, 512) + 1), *np.geomspace(1, most, 64).astype(int).tolist(), most})
    each = min(backend.step(Batch((), b, round(b * context))).first / b for b in sizes)
    return cheapest * float(prompts.mean()) * SLACK / PS_PER_S, each * float(decodes.mean()) * SLACK / PS_PER_S


def _prompt_token(backend: Backend, limit: int | None, ranks: int) -> float:
    """Least picoseconds of a prompt token, in chunks of at most ``limit`` tokens that attend to no earlier chunk.

    Each of ``ranks`` has a chunk.
    """
    sizes = [n for n in CHUNKS if limit is None or n <= limit] + ([limit] if limit else [])
    return min(backend.step(Batch((Chunk(0, n),) * ranks, 0, 0)).first / (n * ranks) for n in sizes)


def _impossible(setup: Setup, promises: Sequence[Promise], reuse: bool) -> str:
    """Why a promise breaks even where each request has the system to itself; "" if none does."""
    trace = setup.trace
    fastest: dict[str, Floats] = {}
    for group in setup.groups:
        backend = group.make_backend(setup.model)
        if group.role != "decode":
            ttft = trace.prompt_tokens * (_prompt_token(backend, None, group.parallel.data) * SLACK) / PS_PER_MS
            known = fastest.get("ttft")
            fastest["ttft"] = ttft if known is None else np.minimum(known, ttft)
        if group.role != "prefill":
            lengths = np.unique(trace.prompt_tokens)
            costs = np.array([backend.step(Batch((), 1, int(n))).first for n in lengths.tolist()]) / PS_PER_MS
            tpot = costs[np.searchsorted(lengths, trace.prompt_tokens)] * SLACK
            known = fastest.get("tpot")
            fastest["tpot"] = tpot if known is None else np.minimum(known, tpot)
    if reuse:
        fastest["ttft"] = np.zeros(len(trace))
    fastest["e2el"] = fastest["ttft"] + fastest["tpot"] * (trace.output_tokens - 1)
    fastest["itl"] = fastest["tpot"]
    for metric in PROMISED:  # of other latencies nothing is known: they may be 0
        fastest.setdefault(metric, np.zeros(len(trace)))
    for promise in promises:
        counted, good = _counted(promise, trace), np.ones(len(trace), dtype=bool)
        for metric, limit in promise.limits().items():
            good &= fastest[metric] <= limit
        weights = counted * (trace.output_tokens - 1 if "itl" in promise.limits() else 1)
        share = float((weights * good).sum() / weights.sum()) if weights.sum() else 1.0
        if share < promise.wanted - UNLUCKY:
            quantiles = ", ".join(
                f"p{100 * promise.wanted:g} {LATENCY[metric].label} is at least "
                f"{float(f'{np.quantile(fastest[metric][counted], promise.wanted):.3g}'):,g} ms"
                for metric in promise.limits()
            )
            return f"{promise} cannot be kept even by a request that is alone: {quantiles}"
    return ""


def _counted(promise: Promise, trace: Trace) -> npt.NDArray[np.bool_]:
    """Which requests of the trace a promise is about, shape (n,)."""
    counted = np.ones(len(trace), dtype=bool)
    if promise.tenant is not None and trace.tenant is not None:
        counted &= np.array(trace.tenants)[trace.tenant] == promise.tenant
    if promise.priority is not None and trace.priority is not None:
        counted &= trace.priority == promise.priority
    if list(promise.limits()) == ["tpot"]:
        counted &= trace.output_tokens > 1
    return counted
