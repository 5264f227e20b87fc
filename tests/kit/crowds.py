"""Requests at random, more than memory is kept for, and what must hold of them whatever an engine does beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_versions import NEWEST
from chairlift.sim.results.records import Status
from chairlift.sim.study import Failures, Limits, Outage, Speculate
from chairlift.sim.workload.acceptance import Acceptance
from chairlift.sim.workload.trace import Trace
from kit.worlds import play, trace_of

OF_ANY: dict[str, st.SearchStrategy[Any]] = {  # run that drafts
    "seed": st.integers(0, 999),
    "tokens": st.integers(1, 5),
    "cached": st.booleans(),
    "priority": st.booleans(),
}
SHORT_OF_MEMORY: dict[str, st.SearchStrategy[Any]] = {  # among those
    "blocks": st.integers(7, 40),
    "budget": st.integers(16, 200),
    "method": st.sampled_from(["eagle3", "draft_model"]),
}


def table(seed: int, requests: int, rate_ps: int = 2000) -> list[tuple[int, int, int]]:
    """Requests with prompts of 2 to 60 tokens, answers of 1 to 40, at random times, ``rate_ps`` apart on average."""
    draw = np.random.default_rng(seed)
    arrivals = np.sort(draw.integers(0, requests * rate_ps, requests))
    return [(int(at), int(draw.integers(2, 60)), int(draw.integers(1, 40))) for at in arrivals]


def mixed(seed: int) -> Trace:
    """25 requests of three priorities, in four groups that share the first 20 tokens of their prompts."""
    rows = table(seed, 25)
    return trace_of(
        rows,
        priority=[i % 3 for i in range(25)],
        prefix_group=np.arange(25) % 4,
        prefix_tokens=np.minimum(np.array([prompt for _, prompt, _ in rows]), 20),
    )


def tight(asynchronous: bool, cached: bool, priority: bool, budget: int, version: str = NEWEST) -> Callable[[], Vllm]:
    """vLLM with small batches of ``budget`` tokens a step."""
    return lambda: Vllm(
        async_scheduling=asynchronous,
        enable_prefix_caching=cached,
        scheduling_policy="priority" if priority else "fcfs",
        max_num_batched_tokens=budget,
        max_num_seqs=16,
        version=version,
    )


def drafts(tokens: int = 3, method: str = "eagle3", **acceptance: Any) -> Speculate:
    """So many drafts a step, kept as ``acceptance`` says."""
    draft = "opt-125m" if method == "draft_model" else None
    return Speculate(method=method, tokens=tokens, acceptance=Acceptance(**acceptance), draft=draft)  # type: ignore[arg-type]


def check_those_who_leave(
    rows: list[tuple[int, int, int]],
    asynchronous: bool,
    timeout_s: float,
    at_s: float,
    version: str = NEWEST,
    **more: Any,
) -> None:
    """Clients give up and a replica fails: what clients got until then stays, and `audit` adds up all gaps."""
    world = play(
        trace_of(rows),
        lambda: Vllm(async_scheduling=asynchronous, version=version),
        blocks=20,
        replicas=2,
        limits=Limits(timeout_s=timeout_s),
        failures=Failures(schedule=[Outage(replica=0, at_s=at_s, for_s=1e-8)]),
        **more,
    )

    assert set(world.requests.status) <= {Status.FINISHED, Status.TIMED_OUT}


def check_a_journal_changes_nothing(asynchronous: bool, blocks: int, version: str = NEWEST, **more: Any) -> None:
    """A run with a journal ends as one without, preemptions included."""

    def policy() -> Vllm:
        return Vllm(async_scheduling=asynchronous, version=version)

    trace = trace_of(table(3, 40))
    with_it, without = (play(trace, policy, blocks=blocks, journal=journal, **more) for journal in (True, False))

    assert sum(without.requests.preemptions) > 0
    assert with_it.outcome() == without.outcome()
    assert with_it.engines[0].records.event_rows
