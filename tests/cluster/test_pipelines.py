"""Whole runs on pipelines: closed forms, bubbles, and whatever happens to requests meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chairlift.backend.base import NO_HOST, Backend, Batch, Host, StepCost
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.metrics import Pool, bubbles, summarise
from chairlift.sim.study import Slo
from kit.crowds import check_a_journal_changes_nothing, check_those_who_leave, mixed, table, tight
from kit.worlds import Affine, World, check_books, play, sorted_gaps, trace_of


@dataclass
class Equal(Backend):
    """Every step takes as long."""

    cost: int
    host: Host = NO_HOST

    def step(self, batch: Batch) -> StepCost:
        return StepCost(self.cost, host=self.host)


def serve(requests: int, tokens: int, stages: int, budget: int, asynchronous: bool = False, cost: int = 1200) -> World:
    """Requests that come at once, with prompts of 4 tokens; a pass of all stages takes ``cost`` ps."""
    world = play(
        trace_of([(0, 4, tokens)] * requests),
        lambda: Vllm(async_scheduling=asynchronous, enable_prefix_caching=False, max_num_batched_tokens=budget),
        lambda: Equal(cost),
        pipeline=stages,
    )
    check_books(world)
    return world


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_pipeline_brings_a_token_of_each_a_pass(stages: int, asynchronous: bool) -> None:
    """s requests in s steps of their own, a pass of s · d: request i has its first token at (s + i) d, and one each
    s · d from there; n tokens of all take n · s · d and the last one's wait of (s − 1) d. In series it were s times n
    passes.
    """
    d, n = 1200 // stages, 7
    r = serve(stages, n, stages, 4, asynchronous).requests

    assert list(r.first_token) == [(stages + i) * d for i in range(stages)]
    assert list(r.finished) == [(stages + i) * d + (n - 1) * stages * d for i in range(stages)]
    assert max(r.finished) == n * stages * d + (stages - 1) * d


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_alone_is_as_fast_as_without_stages(stages: int, asynchronous: bool) -> None:
    world = serve(1, 9, stages, 100, asynchronous)

    assert list(world.requests.finished) == [9 * 1200]
    assert sorted_gaps(world.engines[0]) == [(1200, 8)]


@pytest.mark.parametrize(("requests", "stages"), [(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_bubbles_of_a_steady_pipeline(requests: int, stages: int, asynchronous: bool) -> None:
    """m steps that follow each other, and themselves, through p stages leave 1 − m / p of them idle.

    Of n tokens each, n · m · d ps of a stage are busy, of the n · p · d + (m − 1) · d from the first step's begin to
    the last one's end; with n = 1 that is GPipe's (p − 1) / (m + p − 1) (Huang et al. 2019).
    """
    m, p = requests, stages
    for n in (1, 7, 500):
        records = serve(m, n, p, 4, asynchronous).engines[0].records
        assert (records.stage_ps * p, records.piped_ps * p) == (n * m * 1200, (n * p + m - 1) * 1200)
        share = bubbles([records])["bubble_share"]
        assert share == pytest.approx(1 - n * m / (n * p + m - 1))
        if n == 1:
            assert share == pytest.approx((p - 1) / (m + p - 1))
    assert share == pytest.approx(1 - m / p, abs=0.002)


def test_a_pipeline_that_nobody_is_in_has_no_bubbles() -> None:
    """Two requests, each through 2 stages alone: half of the stages idle meanwhile, however long the time between."""
    trace = trace_of([(0, 4, 3), (1_000_000, 4, 3)])
    world = play(trace, lambda: Vllm(async_scheduling=False), lambda: Equal(1200), pipeline=2)

    assert bubbles([world.engines[0].records]) == {"bubble_share": 0.5}


def test_those_that_begin_together_stay_together_and_leave_bubbles() -> None:
    """8 requests in one step, of 4 stages: 9 tokens of all take 9 passes; in 4 steps, 2 requests each, 9 and 3/4."""
    together, apart = serve(8, 9, 4, 100), serve(8, 9, 4, 8)

    assert max(together.requests.finished) == 9 * 1200
    assert max(apart.requests.finished) == 9 * 1200 + 3 * 300
    records = together.engines[0].records.runs()
    assert records["decodes"].tolist() == [0, *[8] * 8]


def test_chunks_of_a_prompt_follow_each_other_through_the_stages() -> None:
    """A prompt in 5 chunks, through 4 stages of 300 ps: the last leaves after 4 + 4 of them, not 5 passes."""
    world = play(
        trace_of([(0, 20, 1)]),
        lambda: Vllm(async_scheduling=False, max_num_batched_tokens=4),
        lambda: Equal(1200),
        pipeline=4,
    )

    assert list(world.requests.first_token) == [(5 - 1 + 4) * 300]


def test_steps_of_unequal_cost_wait_for_each_other() -> None:
    """Two stages. A prompt of 400 tokens costs 400 + 100 ps, one of 4 tokens 4 + 100: 250 and 52 a stage.

    The short one leaves the first stage at 302, and the second, for which it need not wait, at 552.
    """
    world = play(
        trace_of([(0, 400, 1), (0, 4, 1)]),
        lambda: Vllm(async_scheduling=False, max_num_batched_tokens=400),
        lambda: Affine(fixed=100, token=1, context=0),
        pipeline=2,
    )

    assert list(world.requests.first_token) == [500, 552]


def test_launches_follow_each_other_on_the_host() -> None:
    """Two steps launched in 30 ps each, taken in in 5: 30 + 600 + 600 + 5, and 60 + 600 behind the first."""
    world = play(
        trace_of([(0, 4, 1), (0, 4, 1)]),
        lambda: Vllm(async_scheduling=False, max_num_batched_tokens=4),
        lambda: Equal(1200, Host(10, 20, 5)),
        pipeline=2,
    )

    assert list(world.requests.first_token) == [1235, 1835]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    stages=st.integers(2, 4),
    asynchronous=st.booleans(),
    cached=st.booleans(),
    priority=st.booleans(),
    blocks=st.integers(7, 40),
    budget=st.integers(16, 200),
    version=st.sampled_from(["0.26", "0.33"]),
)
@example(3151, 4, True, False, False, 14, 16, "0.26")  # an answer ends with the token that was in flight
def test_books_balance_however_tight_memory_is(
    seed: int, stages: int, asynchronous: bool, cached: bool, priority: bool, blocks: int, budget: int, version: str
) -> None:
    policy = tight(asynchronous, cached, priority, budget, version)
    check_books(play(mixed(seed), policy, blocks=blocks, max_model_len=112, pipeline=stages))


@pytest.mark.parametrize(("version", "stops"), [("0.26", 1), ("0.27", 0)])
def test_where_vllm_stops_by_an_assertion_the_run_goes_on_and_counts_it(version: str, stops: int) -> None:
    """A request that was preempted in flight joins again too soon, once; a ledger shows vLLM stop where we count."""
    world = play(mixed(25), tight(True, False, False, 24, version), blocks=10, max_model_len=112, pipeline=2)
    engine = world.engines[0]
    pools = [Pool(engine.pool.total, engine.pool.block_size)]

    check_books(world)
    assert summarise(world.requests, [engine.records], pools, Slo(), 1.0)["engine_stops"] == stops


@pytest.mark.parametrize("asynchronous", [False, True])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    timeout=st.floats(5e-9, 2e-7),
    at=st.floats(1e-9, 3e-7),
    version=st.sampled_from(["0.26", "0.33"]),
)
def test_clients_that_give_up_and_replicas_that_fail(
    asynchronous: bool, seed: int, timeout: float, at: float, version: str
) -> None:
    check_those_who_leave(table(seed, 25), asynchronous, timeout, at, version, pipeline=3)


@pytest.mark.parametrize("version", ["0.26", "0.33"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_journal_changes_nothing(asynchronous: bool, version: str) -> None:
    check_a_journal_changes_nothing(asynchronous, blocks=12, version=version, pipeline=3)
