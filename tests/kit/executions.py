"""Executed runs of tiny models: policies with settings that make them busy, requests, and a clock that ticks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from chairlift.backend.base import Prompt
from chairlift.policies.base import Scheduler
from chairlift.policies.orca import Orca
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.sim.workload.trace import Trace
from kit.worlds import trace_of

MS = 10**9  # ps
Rows = list[tuple[int, int, int]]

POLICIES: dict[str, tuple[type[Scheduler], Callable[[int], dict[str, Any]]]] = {
    "orca": (Orca, lambda n: {"max_batch": n, "reserve": "declared"}),
    "tgi": (Tgi, lambda n: {"max_batch_total_tokens": 110 * n, "max_waiting_tokens": 3}),
    "static": (Static, lambda n: {"batch": n}),
    "static-global": (Static, lambda n: {"batch": n, "pad_to": "global"}),
    "vllm": (Vllm, lambda n: {"max_num_seqs": n, "async_scheduling": False}),
    "vllm-async": (Vllm, lambda n: {"max_num_seqs": n}),
    "vllm-no-cache": (Vllm, lambda n: {"max_num_seqs": n, "async_scheduling": False, "enable_prefix_caching": False}),
    "vllm-async-no-cache": (Vllm, lambda n: {"max_num_seqs": n, "enable_prefix_caching": False}),
    "vllm-async-small-chunks": (Vllm, lambda n: {"max_num_seqs": n, "long_prefill_token_threshold": 9}),
}


class Ticking:
    """A clock that goes on by a millisecond whenever somebody looks, so that a run is the same every time."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += 10**6
        return self.now


class Working:
    """Who is in a step (`backend.base.Members`): some prompts and decodes; blocks are the engine's own."""

    def __init__(self, prompts: list[Prompt], decodes: list[int]) -> None:
        self.prompts, self.decodes = prompts, decodes
        self.dead: list[int] = []

    def table(self, request: int) -> None:
        return None

    def tokens(self, request: int) -> list[int]:
        return [(request * 31 + 7 * i * i) % 89 for i in range(60)]


def made(rows: Rows, groups: int = 0, prefix: int = 0, **columns: Any) -> Trace:
    """Rows (arrival ms, prompt, output); with ``groups`` the first ``prefix`` tokens of every so many are equal."""
    rows = sorted(((at * MS, prompt, output) for at, prompt, output in rows), key=lambda row: row[0])
    if groups:
        columns["prefix_group"] = [i % groups for i in range(len(rows))]
        columns["prefix_tokens"] = [min(prefix, prompt) for _, prompt, _ in rows]
    return trace_of(rows, **{"max_tokens": [output for _, _, output in rows], **columns})


def many(count: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return [(0, int(p), int(o)) for p, o in zip(rng.integers(1, 91, count), rng.integers(1, 41, count), strict=True)]
