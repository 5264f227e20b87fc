"""What no schedule can do, without simulating: too little memory, too high a rate, too short a latency.

The bound on the rate is a linear program over the kinds of steps that the engines could run. A step has some prompt
tokens, some decodes and their context, and takes the time that the simulation itself would charge for it. The program
looks for the mix of steps, for every second of every replica, that serves the most average requests:

- their prompts' tokens are computed, their decodes are made, and their contexts are read;
- a step holds no more tokens, sequences and context than the policy's limits and the KV pool allow;
- where a promise limits TPOT, the decodes of those who are to meet it see steps that are no longer on average.

A system that cannot serve a rate on these terms cannot serve it under any schedule. Prompts that may share prefixes
cost nothing here, and neither does the pool limit their context: a cache may hold them.

Worked example: a step of one decode takes 10 ms, one of 500 prompt tokens and one decode 30 ms, and no others exist. A
request of 1000 prompt tokens and 10 decodes needs two of the long steps, which make two of its decodes, and eight of
the short ones: 140 ms, so that one replica serves at most 7.1 requests a second.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

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

SLACK = 0.97  # factor on every time: steps between those that are tried may be a little cheaper
UNLUCKY = 0.01  # a share of the sampled requests may lie this far below that of all requests, by chance
SPREAD = 2.0  # standard errors that a mean over the sampled requests may lie above that over all requests
TOKENS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)  # of a step
SPLITS = (1, 4)  # chunks that the prompt tokens of a step are tried in: of several, each attends to less
MOST_DECODES = 4096  # of a step, where no limit says so
CONTEXTS = (0.0, 0.5, 1.0, 2.0)  # of a decode, as multiples of the mean; those of the pool's limit are tried too

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """What a candidate can do at most."""

    rate_per_s: float  # requests per second; where requests follow one another, sessions started per second
    impossible: str  # why the promises break at any rate; "" if they may be kept


class Bounds:
    """The bound of each candidate, under some promises; what equal replicas and workloads share is worked out once."""

    def __init__(self, promises: Sequence[Promise]) -> None:
        self.promises = promises
        self._steps: dict[Hashable, Floats] = {}
        self._known: dict[Hashable, Bound] = {}  # of one replica, shared out as the fleet's are

    def __call__(self, candidate: Candidate) -> Bound:
        """The bound of a candidate that has a setup."""
        setup = candidate.setup
        assert setup is not None
        load = _Load(setup.trace)
        counts = [setup.most(group) for group in setup.groups]
        keys = [_key(group, setup) for group in setup.groups]
        whole = load.key, tuple(keys), tuple(count / sum(counts) for count in counts)
        if whole not in self._known:
            for key, group in zip(keys, setup.groups, strict=True):
                if (load.key, key) not in self._steps:
                    self._steps[load.key, key] = _steps(setup, group, load)
            steps = [self._steps[load.key, key] for key in keys]
            impossible, rates = _impossible(setup, self.promises, load.reuse), [served(steps, whole[-1], load.wanted())]
            drafts = setup.speculate is not None  # which bring tokens in less than a step
            for promise in () if drafts else filter(_paces, self.promises):
                rate = served(steps, whole[-1], load.paced(promise))
                impossible = impossible or f"{promise} cannot be kept by steps of any batch" * (rate <= 0)
                rates += [rate] * (rate > 0)
            self._known[whole] = Bound(min(rates), impossible)
        known = self._known[whole]
        return replace(known, rate_per_s=known.rate_per_s * sum(counts) / load.per_start)


def bound(candidate: Candidate, promises: Sequence[Promise]) -> Bound:
    """The bound of a candidate that has a setup."""
    return Bounds(promises)(candidate)


class Wanted(NamedTuple):
    """What an average request asks for, at the least that the sampled requests allow for."""

    prompt: float  # tokens
    decodes: float
    read: float  # KV tokens that those decodes read
    limit_s: float = math.inf  # steps that those decodes see are no longer, on average


class _Load:
    """What the requests of a trace ask for."""

    def __init__(self, trace: Trace) -> None:
        self.prompts = trace.prompt_tokens.astype(np.float64)
        self.decodes = trace.output_tokens.astype(np.float64) - 1
        self.read = self.decodes * (self.prompts + (self.decodes + 1) / 2)
        self.reuse = Identity.shares(trace) or trace.hash_ids is not None
        self.context = float(self.read.sum() / max(self.decodes.sum(), 1.0))  # of a decode, on average
        self.per_start = len(trace) / starts(trace)
        self.key = hash((self.prompts.tobytes(), self.decodes.tobytes(), self.reuse))

    def wanted(self) -> Wanted:
        """All that an average request asks for."""
        return Wanted(0.0 if self.reuse else _least(self.prompts), _least(self.decodes), _least(self.read))

    def paced(self, promise: Promise) -> Wanted:
        """The same under a promise of TPOT, without the decodes of those who need not meet it: the longest answers."""
        n = len(self.decodes)
        most = n - math.ceil(n * min(1.0, 1 - promise.wanted + UNLUCKY))
        decodes, read = (_least(np.sort(values)[:most], n) for values in (self.decodes, self.read))
        return Wanted(self.wanted().prompt, decodes, read, promise.limits()["tpot"] / 1e3)


def _paces(promise: Promise) -> bool:
    """Whether a promise limits the TPOT of requests of every kind."""
    return "tpot" in promise.limits() and promise.tenant is None and promise.priority is None


def _least(values: Floats, of: int | None = None) -> float:
    """The least that the mean of ``values`` over ``of`` requests may be, those left out counting as 0."""
    of = of or len(values)
    mean = float(values.sum()) / of
    spread = math.sqrt(max(float((values**2).sum()) / of - mean**2, 0.0) / of)
    return max(0.0, mean - SPREAD * spread)


def _key(group: ReplicaGroup, setup: Setup) -> Hashable:
    """What the steps of a group's replicas depend on."""
    policy = (group.scheduler.__qualname__, sorted(group.scheduler_settings.items()), setup.speculate)
    parts = (policy, group.backend, group.gpu.name)
    return group.role, group.blocks, group.block_size, setup.model.name, repr((parts, group.parallel))


def _steps(setup: Setup, group: ReplicaGroup, load: _Load) -> Floats:
    """The steps that a replica of ``group`` could run: prompt tokens, decodes, context and least seconds of each.

    Shape (k, 4). The tokens of a step are shared out over the ranks of the group, each with the limits of the policy.
    With speculative decoding a decode brings as many tokens as it does on average, and counts as so many.
    """
    backend, scheduler, ranks = group.make_backend(setup.model), group.make_scheduler(), group.parallel.data
    most = (scheduler.token_limit or max(TOKENS)) * ranks
    speculate = setup.speculate
    each = 1.0 if speculate is None else 1 + sum(speculate.acceptance.of(speculate.tokens))
    totals = [0, *sorted({n for n in TOKENS if n < most} | {most})] if group.role != "decode" else [0]
    room = math.inf if load.reuse else float(group.blocks * group.block_size)
    limits = [limit * ranks for limit in (scheduler.sequence_limit, scheduler.token_limit) if limit is not None]
    found = []
    for decodes in (0, *_sizes(min(limits, default=MOST_DECODES))) if group.role != "prefill" else (0,):
        contexts = sorted({min(room, max(float(decodes), decodes * c * load.context)) for c in CONTEXTS})
        for tokens in sorted({max(0, total - decodes) for total in totals}):
            for splits in SPLITS if tokens else (1,):
                length = tokens // (splits * ranks)
                chunks = (Chunk(0, length),) * (splits * ranks) if length else ()
                if not chunks and (tokens or not decodes):
                    continue
                for context in contexts if decodes else (0.0,):
                    cost = backend.step(Batch(chunks, decodes, round(context))).spacing(scheduler.asynchronous)[0]
                    found.append((length * len(chunks), decodes * each, context * each, cost / PS_PER_S))
    steps = np.array(found, dtype=np.float64)
    steps[:, 3] *= SLACK / _stages(group)  # as many steps may be under way as there are stages
    return steps


def _sizes(most: int) -> list[int]:
    """Numbers of decodes to try, up to ``most``: from 8 on multiples of 8, which CUDA graphs are captured for."""
    rising = (2 ** (k / 2) for k in range(2 * math.ceil(math.log2(most)) + 1))
    return sorted({min(most, 8 * round(size / 8) if size > 6 else round(size)) for size in rising})


def served(steps: Sequence[Floats], shares: Sequence[float], wanted: Wanted) -> float:
    """The most requests a second that replicas can serve, by the steps of each kind and its share of one replica."""
    from scipy.optimize import linprog  # here: costs a second to import

    if not any(wanted[:3]):
        return math.inf
    table = np.concatenate(steps)
    last = len(table)
    rows = np.zeros((3 + len(steps) + 1, last + 1))  # a column for each step, and one for the rate
    rows[:3, :last], rows[:3, last] = -table[:, :3].T, wanted[:3]  # no more is served than is done
    begin = 0
    for row, group in zip(rows[3:], steps, strict=False):
        row[begin : begin + len(group)] = group[:, 3]  # each kind's time
        begin += len(group)
    if math.isfinite(wanted.limit_s):
        rows[-1, :last] = table[:, 1] * (table[:, 3] - wanted.limit_s)
    answer = linprog(np.append(np.zeros(last), -1.0), A_ub=rows, b_ub=[0, 0, 0, *shares, 0], method="highs")
    return float(answer.x[last]) if answer.status == 0 else math.inf


def work_of(setup: Setup, group: ReplicaGroup) -> tuple[float, float]:
    """Least seconds that one replica of ``group`` needs for the prompt of an average request, and for its decodes."""
    load = _Load(setup.trace)
    steps = _steps(setup, group, load)
    decodes = Wanted(0.0, float(load.decodes.mean()), float(load.read.mean()))
    prompts, answers = (
        served([steps], [1.0], each) for each in (Wanted(float(load.prompts.mean()), 0.0, 0.0), decodes)
    )
    return 1 / prompts, 1 / answers


def _stages(group: ReplicaGroup) -> int:
    """Steps that a replica may have under way at a time, each in another stage of its pipeline."""
    return group.parallel.pipeline if group.scheduler.fills_pipelines else 1


def _prompt_token(backend: Backend, group: ReplicaGroup) -> float:
    """Least picoseconds of a prompt token, in chunks that attend to no earlier chunk; each rank of a step has one."""
    ranks = group.parallel.data
    each = min(backend.step(Batch((Chunk(0, n),) * ranks, 0, 0)).first / (n * ranks) for n in TOKENS)
    return each / _stages(group)


def _impossible(setup: Setup, promises: Sequence[Promise], reuse: bool) -> str:
    """Why a promise breaks even where each request has the system to itself; "" if none does."""
    trace = setup.trace
    fastest: dict[str, Floats] = {}
    for group in setup.groups:
        backend = group.make_backend(setup.model)
        if group.role != "decode":
            ttft = trace.prompt_tokens * (_prompt_token(backend, group) * SLACK) / PS_PER_MS
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
    fastest["itl"] = fastest["tpot"]
    if setup.speculate is not None:
        fastest["tpot"] = fastest["tpot"] / (1 + setup.speculate.tokens)
    fastest["e2el"] = fastest["ttft"] + fastest["tpot"] * (trace.output_tokens - 1)
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
