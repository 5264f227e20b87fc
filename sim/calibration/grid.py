"""The designed grid: runs that show every term of an engine's step costs, for ``chairlift calibrate --backend torch``.

``grid_decode`` has waves of equal prompts that then decode together, over batch × context. ``grid_prefill`` has one
prompt at a time. ``grid_mixed_*`` has steady decodes, among which prompts arrive under a token budget. In
``grid_sizes`` a prompt meets a few decodes in a step of every size of which an engine captures a CUDA graph, for a
library may have other kernels for one than for the next. All run under the vllm policy. Waves lie far apart; the clock
of an executing engine skips the silence between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.backend import memory, specs
from chairlift.backend.base import Settings
from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.draft_shapes import head_of
from chairlift.backend.drafting import WithDrafts
from chairlift.backend.parallel import ONE, Parallel
from chairlift.policies.routers import RoundRobin
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.recording import Recorder
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Kv, Limits, ReplicaGroup, Setup, Slo, Speculate
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.acceptance import Acceptance
from chairlift.sim.workload.trace import Trace

APART_S = 1000  # from the start of a wave to the start of the next
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CONTEXTS = (16, 256, 1024, 4096)  # tokens
TOKENS = 16  # of each answer in a wave
PROMPTS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2047, 3072, 4096, 6144, 8190, 12_000)
BUDGETS = (128, 256, 512, 1024, 2048, 8192)  # tokens a step
ROWS = 4096  # of the largest graph that our own engine captures
BESIDE, SHORT, FEW = 8, 64, 8  # requests that decode where every size is met; tokens of their prompts and answers
REPEATS = 3  # of each size
LATER_S = 0.004  # after those prompts comes the one that meets their decodes: while they are computed
MOST = 140_000  # tokens of prompts and answers in a wave: more would take seconds of prefill and show nothing new
SEED = 7
DRAFTS = Speculate(method="eagle3", tokens=3, acceptance=Acceptance(synthetic=2.4))  # as vLLM 0.26 was recorded,
DRAFT_VOCAB = 32_000  # with a head of so many tokens


def grid(model: specs.Model, room: int, width: int = 1) -> Iterator[tuple[str, Trace, int]]:
    """Name, requests and token budget of each run, on an engine with ``room`` tokens of KV.

    ``width``: tokens that a decode computes in a step, drafts included.
    """
    longest = min(model.max_model_len, room)
    waves = [(b, c) for c in CONTEXTS for b in BATCHES if b * (c + TOKENS) <= min(room, MOST) and c + TOKENS < longest]
    rows = [(float(i * APART_S), c, TOKENS) for i, (b, c) in enumerate(waves) for _ in range(b)]
    yield "grid_decode", _trace(rows, "waves over batch and context"), 8192
    lengths = [n for n in PROMPTS if n < longest] * 3
    yield "grid_prefill", _trace([(float(i * APART_S), n, 1) for i, n in enumerate(lengths)], "one at a time"), 8192
    random = np.random.default_rng(SEED)
    for budget in BUDGETS:
        steady = [(0.0, int(random.integers(50, 600)), 300) for _ in range(int(min(64, budget // 4, room // 2000)))]
        most = min(3000, longest // 2)
        more = [(1 + 0.06 * i, int(random.integers(20, most)), 30) for i in range(40)]
        yield f"grid_mixed_{budget}", _trace([*steady, *more], f"chunks beside decodes, budget {budget}"), budget
    yield "grid_sizes", _trace(_sizes(random, longest, room, width), "a chunk beside decodes, of every size"), 8192


def _sizes(random: np.random.Generator, longest: int, room: int, width: int) -> list[tuple[float, int, int]]:
    """Waves of short prompts and then one that meets their decodes in a step of each captured size, in random order."""
    middle = [(before + size) // 2 for before, size in pairwise(graph_sizes(min(ROWS, room // 4)))]
    prompts = [rows - BESIDE * width for rows in middle for _ in range(REPEATS)]
    prompts = [tokens for tokens in random.permutation(prompts).tolist() if 1 <= tokens < longest]
    waves = [[*[(0.0, SHORT, FEW)] * BESIDE, (LATER_S, tokens, 1)] for tokens in prompts]
    return [(i * APART_S + at, tokens, output) for i, wave in enumerate(waves) for at, tokens, output in wave]


def measure(
    model: specs.Model,
    gpu: specs.GPU,
    backend: Settings,
    folder: Path,
    progress: Callable[[str], None] = lambda _name: None,
    parallel: Parallel = ONE,
    speculates: bool = False,
) -> None:
    """Run the grid on ``backend`` and record it in ``folder``; where it ``speculates``, with the drafts of `DRAFTS`.

    Raises ValueError where it cannot serve ``model``.
    """
    kv = Kv()
    draft = replace(head_of(model, DRAFTS.method), vocab=min(model.vocab, DRAFT_VOCAB)) if speculates else None
    fit = memory.kv_blocks(model, gpu, parallel, kv.block_size, kv.memory_utilization, kv.reserve_gib, draft=draft)
    if speculates:
        backend = WithDrafts(backend, draft, Drafts(DRAFTS.method, DRAFTS.tokens))
    recorder = Recorder(folder)
    width = 1 + DRAFTS.tokens if speculates else 1
    for name, trace, budget in grid(model, fit.blocks * kv.block_size, width):
        progress(name)
        settings: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": 256}
        group = ReplicaGroup(
            1, "mixed", gpu, parallel, Vllm, settings, backend, fit.blocks, kv.block_size, fit.explain()
        )
        setup = Setup("", name, trace, model, model.max_model_len, [group], RoundRobin, {}, Slo(), SEED, Limits())
        if speculates:
            group.speculation = group.make_scheduler().speculation(DRAFTS.method, DRAFTS.tokens)
            setup.speculate = DRAFTS
        recorder.add(simulate(setup), name)


def _trace(rows: list[tuple[float, int, int]], source: str) -> Trace:
    """Requests of (arrival in seconds, prompt tokens, output tokens)."""
    arrival, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(
        arrival_ps=np.rint(arrival * PS_PER_S).astype(np.int64),
        prompt_tokens=prompt.astype(np.int64),
        output_tokens=output.astype(np.int64),
        source=source,
    )
