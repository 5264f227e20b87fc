"""Whole runs with drafts on pipelines: closed forms, one stage, dead tokens, and whatever happens to requests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.backend.base import Batch, StepCost
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.metrics import bubbles
from chairlift.sim.results.records import DRAFT_COLUMNS, Kind
from kit import crowds
from kit.crowds import check_a_journal_changes_nothing, check_those_who_leave, drafts, mixed, table, tight
from kit.worlds import Affine, World, check_books, play, sorted_gaps, trace_of

PASS = 60  # ps that each draft takes, of those below


@dataclass
class Drafting(Affine):
    """As `Affine`, with passes that draft."""

    dead: int = 0  # tokens beside each decode's own, which lie in its context too

    def step(self, batch: Batch) -> StepCost:
        dead = self.dead * batch.decodes
        if dead:
            batch = batch._replace(context=batch.context + dead, drafts=dead)
        return StepCost(super().step(batch).first + PASS * batch.proposes, 0, 1, self.host)


def even(cost: int = 1200) -> Drafting:
    """Every step takes ``cost`` ps, and its passes."""
    return Drafting(fixed=cost, token=0, context=0)


def serve(requests: int, tokens: int, stages: int, share: float, cost: int = 1200, budget: int = 4) -> World:
    """Requests that come at once, with prompts of 4 tokens and 3 drafts, of which each is kept so often."""
    world = play(
        trace_of([(0, 4, tokens)] * requests),
        lambda: Vllm(enable_prefix_caching=False, max_num_batched_tokens=budget),
        lambda: even(cost),
        speculate=drafts(3, rates=[share] * 3),
        pipeline=stages,
    )
    check_books(world)
    return world


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_last_stage_sets_the_pace_of_a_full_pipeline(stages: int, share: float) -> None:
    """s requests in s steps of their own, each d in a stage and p more in the last.

    The first step leaves the last stage at s · d + p, each further one d + p behind the one before: of a request that
    step is the s-th after its last one, so a message of each comes every s (d + p). The first message has one token,
    each after it 1 or 4.
    """
    d, p, n = 1200 // stages, 3 * PASS, 13
    world = serve(stages, n, stages, share)
    messages = n if share == 0 else 1 + 12 // 4
    r, pace = world.requests, d + p

    assert list(r.first_token) == [stages * d + p + i * pace for i in range(stages)]
    assert list(r.finished) == [first + (messages - 1) * stages * pace for first in r.first_token]
    assert sorted_gaps(world.engines[0]) == [(stages * pace, stages * (messages - 1))]
    assert list(r.messages()) == [messages] * stages


@pytest.mark.parametrize(("requests", "stages"), [(1, 2), (2, 2), (1, 4), (2, 4), (4, 4)])
def test_bubbles_of_a_steady_pipeline_with_drafts(requests: int, stages: int) -> None:
    """Of m requests a round of steps computes m (d + p / s) ps in a stage on average.

    A round takes m (d + p) in the last stage, or s · d + p, a request's own way through all, if that is longer. What
    is kept none of is planned no further than its end, so all of n rounds are whole.
    """
    m, s, d, p, n = requests, stages, 1200 // stages, 3 * PASS, 500
    records = serve(m, n, s, 0.0).engines[0].records
    each = max(m * (d + p), s * d + p)

    assert records.stage_ps * s == n * m * (s * d + p)
    assert records.piped_ps == pytest.approx(n * each, rel=0.01)
    assert bubbles([records])["bubble_share"] == pytest.approx(1 - m * (s * d + p) / (s * each), abs=0.005)


def together(seed: int, requests: int) -> list[tuple[int, int, int]]:
    draw = np.random.default_rng(seed)
    return [(0, int(draw.integers(2, 60)), int(draw.integers(1, 60))) for _ in range(requests)]


@pytest.mark.parametrize("cached", [False, True])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    requests=st.integers(1, 12),
    tokens=st.integers(1, 7),
    stages=st.integers(2, 4),
    share=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
)
def test_those_that_begin_together_do_on_stages_what_they_do_on_one(
    cached: bool, seed: int, requests: int, tokens: int, stages: int, share: float
) -> None:
    """They stay together in one step, which passes all stages before their next: an outcome to the picosecond.

    Whatever is kept of their drafts, whoever ends with what is in flight. Costs are multiples of 2, 3 and 4.
    """
    parts: dict[str, Any] = {"speculate": drafts(tokens, rates=[share] * tokens)}

    def policy() -> Vllm:
        return Vllm(enable_prefix_caching=cached, max_num_batched_tokens=100_000)

    def backend() -> Drafting:
        return Drafting(fixed=1200, token=12, context=12)

    one, several = (
        play(trace_of(together(seed, requests)), policy, backend, leap=False, pipeline=n, **parts) for n in (1, stages)
    )

    assert several.outcome()[:-1] == one.outcome()[:-1]
    assert {name: list(several.requests.extra[name]) for name in DRAFT_COLUMNS} == {
        name: list(one.requests.extra[name]) for name in DRAFT_COLUMNS
    }


@pytest.mark.parametrize("cached", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 7), stages=st.integers(2, 4))
def test_drafts_of_which_none_is_kept_are_dead_tokens(cached: bool, seed: int, tokens: int, stages: int) -> None:
    """With room for all, a run on stages is the plain one with so many dead tokens a decode, if they cost no passes."""
    trace = trace_of(table(seed, 20, 4000))

    def policy() -> Vllm:
        return Vllm(enable_prefix_caching=cached, max_num_batched_tokens=100_000)

    plain = play(trace, policy, lambda: Drafting(dead=tokens), pipeline=stages)
    drafted = play(trace, policy, Affine, speculate=drafts(tokens, rates=[0] * tokens), pipeline=stages)

    # all but how full the pool was: slots are taken ahead of drafts
    assert drafted.outcome()[:-1] == plain.outcome()[:-1]


ANY = {**crowds.OF_ANY, "stages": st.integers(2, 4)}


@settings(max_examples=40)
@given(
    **ANY,
    **crowds.SHORT_OF_MEMORY,
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_books_balance_however_tight_memory_is(
    seed: int,
    tokens: int,
    stages: int,
    cached: bool,
    priority: bool,
    blocks: int,
    budget: int,
    method: str,
    share: float,
) -> None:
    """Every token comes once, every gap is counted, no block is left: `audit` and `check_books`."""
    speculate = drafts(tokens, method, rates=[share] * tokens)
    policy = tight(True, cached, priority, budget)
    check_books(
        play(mixed(seed), policy, Drafting, blocks=blocks, max_model_len=112, speculate=speculate, pipeline=stages)
    )


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    stages=st.integers(2, 4),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    timeout=st.floats(5e-9, 2e-7),
    at=st.floats(1e-9, 3e-7),
)
def test_clients_that_give_up_and_replicas_that_fail(
    seed: int, stages: int, share: float, timeout: float, at: float
) -> None:
    speculate = drafts(3, rates=[share] * 3)
    check_those_who_leave(table(seed, 25), True, timeout, at, speculate=speculate, pipeline=stages)


def test_a_journal_changes_nothing() -> None:
    check_a_journal_changes_nothing(True, blocks=8, speculate=drafts(3, length=2), pipeline=3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_journal_says_in_which_steps_a_request_decodes(share: float) -> None:
    """In as many as bring it a message after the first one, and in those whose tokens are nobody's, as it has ended."""
    trace = trace_of(table(5, 30, 1000))
    policy = partial(Vllm, max_num_batched_tokens=64)
    world = play(trace, policy, Affine, speculate=drafts(3, rates=[share] * 3), pipeline=3, journal=True)
    records = world.engines[0].records
    decodes = records.runs()["decodes"]
    events = [
        (int(row), Kind(int(kind)), int(request))
        for row, kind, request in zip(*(records.events()[c] for c in ("run", "kind", "request")), strict=True)
    ]

    assert sum(world.requests.preemptions) == 0
    for i, messages in enumerate(world.requests.messages().tolist()):
        mine = sorted((row, kind) for row, kind, request in events if request == i)
        ready = max(row for row, kind in mine if kind == Kind.CHUNK) + 1
        runs, steps = True, 0
        end = next(row for row, kind in mine if kind == Kind.END)
        turns = {row: kind for row, kind in mine if kind in (Kind.PARK, Kind.JOIN)}
        for row in range(ready, end):
            runs = turns.get(row) == Kind.JOIN if row in turns else runs
            steps += runs and decodes[row] > 0
        assert steps == messages - 1 + sum(kind == Kind.DROP for _, kind in mine)


def test_the_same_drafts_are_kept_on_any_number_of_stages() -> None:
    trace = trace_of(table(1, 60, 4000))
    worlds = [play(trace, Vllm, speculate=drafts(3, length=2.4), pipeline=n) for n in (1, 2, 4)]

    assert len({tuple(world.requests.finished) for world in worlds}) == 3
    assert len({tuple(world.requests.extra["accepted_tokens"]) for world in worlds}) == 1
