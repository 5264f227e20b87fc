"""Several steps in flight, turn by turn: hand-worked cases, and who may not have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chairlift.policies.base import PolicyError, Scheduler
from chairlift.policies.sarathi import Sarathi
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.radix_pool import RadixPool
from chairlift.sim.results.records import RequestRecords
from chairlift.sim.workload.trace import Trace
from kit import vllm_replay


def rows(
    stages: int,
    budget: int,
    outputs: list[int],
    asynchronous: bool = False,
    prompts: Sequence[int] = (),
    blocks: int = 99,
    version: str = "0.33.0",
) -> list[dict[str, Any]]:
    """The ledger of requests that come at once, with prompts of 4 tokens unless told."""
    same = {"arrival_step": 0, "priority": 0, "prefix_group": -1, "prefix_tokens": 0}
    lengths = list(zip(prompts or [4] * len(outputs), outputs, strict=True))
    case = {
        "requests": [{"id": i, "prompt_tokens": p, "output_tokens": o, **same} for i, (p, o) in enumerate(lengths)],
        "pipeline_parallel_size": stages,
        "async_scheduling": asynchronous,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 8,
        "block_size": 4,
        "num_blocks": blocks + 1,
        "long_prefill_token_threshold": 0,
        "policy": "fcfs",
        "reserve_full_isl": True,
        "prefix_caching": False,
        "max_model_len": 64,
        "ledger": [{"processed": None}],
    }
    return list(vllm_replay.rows(case, version))


def scheduled(found: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [row.get("scheduled", []) for row in found]


def ends(found: list[dict[str, Any]]) -> dict[int, int]:
    """Request → the turn in which its end was taken in."""
    return {request: row["step"] for row in found for request in row["finished"]}


def test_two_that_come_apart_fill_two_stages_in_turn() -> None:
    found = rows(stages=2, budget=4, outputs=[3, 3])

    assert scheduled(found)[:7] == [[[0, 4]], [[1, 4]], [[0, 1]], [[1, 1]], [[0, 1]], [[1, 1]], []]
    assert ends(found) == {0: 5, 1: 6}


def test_two_that_begin_together_stay_together_and_leave_a_bubble() -> None:
    found = rows(stages=2, budget=8, outputs=[3, 3])

    both = [[0, 1], [1, 1]]
    assert scheduled(found)[:6] == [[[0, 4], [1, 4]], [], both, [], both, []]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_alone_gets_a_token_each_time_all_stages_are_passed(stages: int, asynchronous: bool) -> None:
    """Its n tokens are planned in turns 0, s, 2s, …; the last is taken in s − 1 turns later, one more asynchronous."""
    found = rows(stages, 8, [5], asynchronous)

    assert [row["step"] for row in found if row.get("scheduled")] == [stages * i for i in range(5)]
    assert ends(found) == {0: stages * 4 + stages - 1 + asynchronous}


def test_chunks_of_a_prompt_follow_each_other_at_once() -> None:
    found = rows(stages=4, budget=1, outputs=[1])

    assert scheduled(found)[:5] == [[[0, 1]], [[0, 1]], [[0, 1]], [[0, 1]], []]


@pytest.mark.parametrize(("version", "again"), [("0.26.0", [[2, 4]]), ("0.27.0", [])])
def test_until_0_26_who_is_preempted_does_not_wait_for_its_tokens_in_flight(
    version: str, again: list[list[int]]
) -> None:
    """Turn 3 computes the last of request 2's prompt, which takes the last of 5 blocks. Turn 4 needs one for request 0,
    and preempts 2. Turn 2 is taken in with turn 5, and request 1 leaves two blocks. So turn 6 could admit 2, whose only
    token turn 3 brings behind it: 4 tokens computed for nothing.
    """
    found = rows(4, 4, [2, 1, 1], prompts=[4, 7, 5], blocks=5, version=version)

    assert scheduled(found)[3:7] == [[[2, 4]], [[0, 1]], [], again]
    assert found[4]["preempted"] == [2]
    assert ends(found) == {1: 5, 2: 6, 0: 7}


def test_a_policy_that_cannot_fill_a_pipeline_is_refused() -> None:
    zeros, ones = np.zeros(1, np.int64), np.ones(1, np.int64)
    records = RequestRecords(Trace(arrival_ps=zeros, prompt_tokens=ones, output_tokens=ones))

    def planner(policy: Scheduler, pool: CountingPool) -> Planner:
        return Planner(policy, vllm_replay.Tick(), pool, records, [1], 64, stages=2)

    planner(Vllm(), CountingPool(8, 4))
    with pytest.raises(PolicyError, match="policy Sarathi: several steps in flight are not modelled"):
        planner(Sarathi(), CountingPool(8, 4))
    with pytest.raises(PolicyError, match="several steps in flight"):
        planner(Vllm(), RadixPool(8, 4, None))  # type: ignore[arg-type]
