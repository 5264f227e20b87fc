"""Drafts that decodes verify, step by step: hand-worked runs, both loops, and who may not have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.policies.base import PolicyError, Scheduler, Speculation
from chairlift.policies.sarathi import Sarathi
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.drafts import Drafted, DraftedStep
from chairlift.sim.replica.engine import Engine, make_engine
from chairlift.sim.replica.radix_pool import RadixPool
from chairlift.sim.replica.verifying import VerifyingPlanner
from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.workload.trace import Trace
from kit.worlds import sorted_gaps

THREE = Speculation(drafts=3, lookahead=3)


class HundredAStep(Backend):
    """Every step takes 100 ps; keeps the batches that it priced."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def step(self, batch: Batch) -> StepCost:
        self.batches.append(batch)
        return StepCost(100)


def everything(request: int, position: int, drafts: int) -> int:
    return drafts


def nothing(request: int, position: int, drafts: int) -> int:
    return 0


def serve(
    requests: Sequence[tuple[int, int]],  # prompt and output tokens of each
    accepts: Callable[[int, int, int], int],
    blocks: int = 100,
    **settings: bool,
) -> Engine:
    """Requests that come at once, on blocks of 4 tokens; the engine once all have left."""
    prompts, outputs = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    trace = Trace(arrival_ps=np.zeros(len(requests), np.int64), prompt_tokens=prompts, output_tokens=outputs)
    records = RequestRecords(trace)
    policy = Vllm(enable_prefix_caching=False, **settings)  # type: ignore[arg-type]
    parts = (policy, HundredAStep(), CountingPool(blocks, 4), records, outputs.tolist(), 64)
    engine = make_engine(VerifyingPlanner(THREE, accepts, *parts))
    for i, (prompt, output) in enumerate(requests):
        assert engine.submit(Drafted(i, 0, prompt, output), 0)
    now, turns = engine.begin(0), 0
    while now is not None:
        engine.settle(now)
        now = engine.begin(now)
        turns += 1
        assert turns < 1000
    assert set(records.status) == {Status.FINISHED}
    assert engine.pool.free == blocks
    assert engine.state.kv_tokens == 0
    return engine


def times(engine: Engine) -> tuple[list[int], list[int]]:
    """When each request had its first token, and its last."""
    records = engine.planner.requests
    return list(records.first_token), list(records.finished)


def test_kept_drafts_come_with_the_token_after_them() -> None:
    """9 tokens: 1 with the prompt, then 4 and 4."""
    engine = serve([(10, 9)], everything, async_scheduling=False)

    assert times(engine) == ([100], [300])
    assert sorted_gaps(engine) == [(100, 2)]
    backend = engine.backend
    assert isinstance(backend, HundredAStep)
    assert [(b.prefills, b.decodes, b.context, b.drafts) for b in backend.batches] == [
        (((0, 10),), 0, 0, 0),
        ((), 1, 14, 3),
        ((), 1, 18, 3),
    ]


def test_what_is_rejected_is_computed_again() -> None:
    """9 tokens: one with the prompt, then one a step, each beside 3 drafts that are not kept."""
    engine = serve([(10, 9)], nothing, async_scheduling=False)

    assert times(engine) == ([100], [900])
    backend = engine.backend
    assert isinstance(backend, HundredAStep)
    assert [b.context for b in backend.batches] == [0, *range(14, 22)]


def test_asynchronous_a_step_is_planned_before_it_is_seen_that_the_answer_has_ended() -> None:
    """The output of steps 2 and 3, of 4 tokens each, ends the answer; step 4 was launched before, for nothing."""
    engine = serve([(10, 9)], everything, async_scheduling=True)

    assert times(engine) == ([100], [300])
    assert sorted_gaps(engine) == [(100, 2)]
    assert engine.planner.steps == 4


def test_asynchronous_no_step_is_planned_for_an_answer_that_ends_whatever_is_kept() -> None:
    """5 tokens, no draft kept: the output of the fourth decode is sure to bring the last one."""
    engine = serve([(10, 5)], nothing, async_scheduling=True)

    assert times(engine) == ([100], [500])
    assert engine.planner.steps == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_gaps_add_up_to_the_time_from_first_token_to_last(asynchronous: bool) -> None:
    """Of requests that are preempted too: 20 blocks of 4 do not hold 6 answers of 30."""

    def some(request: int, position: int, drafts: int) -> int:
        return min(drafts, (request + position) % 4)

    engine = serve([(5 + i, 30) for i in range(6)], some, blocks=20, async_scheduling=asynchronous)
    firsts, lasts = times(engine)

    assert sum(engine.planner.requests.preemptions) > 3
    assert sum(gap * count for gap, count in sorted_gaps(engine)) == sum(lasts) - sum(firsts)


def test_slots_are_taken_for_all_drafts_ahead_of_them() -> None:
    """A prompt of 10 with 3 tokens of lookahead takes 4 blocks of 4; its decode of 4 tokens, until 14 + 3, takes 5."""
    engine = serve([(10, 9)], everything, async_scheduling=False)

    assert engine.records.runs()["held_blocks"].tolist() == [4, 5, 6]


def test_drafts_by_the_size_of_the_batch() -> None:
    table = Speculation(5, 5, by_batch=((2, 4, 5), (5, 8, 2), (16, 64, 0)))

    assert [table.proposed(n) for n in (1, 2, 4, 5, 8, 9, 15, 16, 64, 65)] == [5, 5, 5, 2, 2, 2, 2, 0, 0, 0]
    assert THREE.proposed(1000) == 3


def test_a_policy_that_cannot_plan_drafts_is_refused() -> None:
    ones = np.ones(1, np.int64)
    records = RequestRecords(Trace(arrival_ps=np.zeros(1, np.int64), prompt_tokens=ones, output_tokens=ones))

    def planner(policy: Scheduler, pool: CountingPool, stages: int = 1) -> None:
        VerifyingPlanner(THREE, nothing, policy, HundredAStep(), pool, records, [1], 64, stages=stages)

    planner(Vllm(), CountingPool(8, 4))
    planner(Vllm(), CountingPool(8, 4), stages=2)
    with pytest.raises(PolicyError, match="policy Sarathi: speculation is not modelled here"):
        planner(Sarathi(), CountingPool(8, 4))
    with pytest.raises(PolicyError, match="speculation is not modelled"):
        planner(Vllm(), RadixPool(8, 4, None))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="speculation is not modelled"):
        planner(Vllm(async_scheduling=False), CountingPool(8, 4), stages=2)  # drafts of a step that is not in


@pytest.mark.parametrize("asynchronous", [False, True])
def test_those_whose_steps_are_alike_are_a_group(asynchronous: bool) -> None:
    """16 tokens, of which each step brings one: step 1 is the prompts', and the last step ends the answers."""
    engine = serve([(10, 16)] * 4, nothing, async_scheduling=asynchronous)
    assert isinstance(engine.state, DraftedStep)

    assert engine.planner.steps == 16
    assert engine.state.drafted.steps == 14
    assert times(engine) == ([100] * 4, [1600] * 4)
    assert list(engine.planner.requests.extra["verifications"]) == [15] * 4
