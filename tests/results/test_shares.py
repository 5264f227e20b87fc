"""How full a pool is, and with what, does not depend on how steps are grouped into runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.policies.base import KvGroups
from chairlift.policies.orca import Orca
from chairlift.policies.sglang import Sglang
from chairlift.policies.static import Static
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica.decode_group import Decodes
from chairlift.sim.replica.request import Live
from chairlift.sim.results.metrics import Pool, areas, exact_sum
from chairlift.sim.results.records import RUN_COLUMNS
from kit.worlds import Affine, check_places, play, shares, trace_of

POLICIES: dict[str, Any] = {  # whose pools count blocks, know each, or are a radix tree
    "vllm": lambda: Vllm(enable_prefix_caching=False),
    "vllm-cached": Vllm,
    "vllm-cached-synchronous": lambda: Vllm(async_scheduling=False),
    "vllm-windows": Vllm,
    "sglang": lambda: Sglang(chunked_prefill_size=-1, page_size=1),
    "sglang-pages": lambda: Sglang(disable_overlap_schedule=True, page_size=16),
    "orca": lambda: Orca(max_batch=4, reserve="pow2"),
    "static": lambda: Static(batch=4),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_shares_are_the_same_with_and_without_leaping(policy: str) -> None:
    # prompts that share most of their tokens come so close together that several compute the same tokens at once
    draw = random.Random(8)
    rows = sorted((draw.randrange(40) * 1000, draw.randrange(20, 60), draw.randrange(5, 60)) for _ in range(12))
    shared, outputs = [prompt * 9 // 10 for _, prompt, _ in rows], [output for _, _, output in rows]
    trace = trace_of(rows, prefix_group=[0] * 12, prefix_tokens=shared, max_tokens=outputs)
    make: Any = POLICIES[policy]
    groups = KvGroups((16, 0)) if policy == "vllm-windows" else None

    leapt, stepped = (
        play(trace, make, Affine, 900, leap=leap, max_model_len=300, groups=groups).engines[0] for leap in (True, False)
    )

    assert len(leapt.records.rows) < len(stepped.records.rows) == leapt.planner.steps
    assert (stepped.records.runs()["held_sum"] == 0).all()  # so `stepped` does not depend on how growth is summed up
    assert shares(leapt) == shares(stepped)
    check_places(leapt)


@given(
    stored=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    size=st.sampled_from([1, 4, 16]),
    steps=st.integers(1, 70),
)
def test_the_growth_of_a_group_is_that_of_its_members(stored: list[int], size: int, steps: int) -> None:
    group = Decodes(size)
    for i, tokens in enumerate(stored):
        request = Live(i, 0, tokens, 100)
        request.stored = tokens
        group.join(request)
    held = np.array([sum(-(-(tokens + k + 1) // size) for tokens in stored) for k in range(steps)])

    growth = group.growth(steps)

    assert growth.held_sum == (held - held[0]).sum()
    assert growth.held_moment == (np.arange(steps) * (held - held[0])).sum()


def run_of(**columns: int) -> dict[str, Any]:
    return {name: np.array([columns.get(name, 0)]) for name in RUN_COLUMNS}


def test_the_areas_of_a_run_by_hand() -> None:
    # A and B share 8 tokens in blocks of 4 and have 2 and 3 of their own; three steps of 100, 110 and 120 ps. Each
    # decode stores a token: 13, 15, 17 places. B's second token opens a block in step 1, A's third one in step 2.
    run = run_of(
        **{"first_ps": 100, "slope_ps": 10, "steps": 3, "decodes": 2, "kv_tokens": 21, "held_blocks": 4},
        **{"spared_blocks": 2, "held_sum": 0 + 1 + 2, "held_moment": 0 * 0 + 1 * 1 + 2 * 2},
    )

    stored, promised, held = areas(run, Pool(100, 4))

    assert stored.tolist() == [100 * 13 + 110 * 15 + 120 * 17]
    assert promised.tolist() == [0]
    assert held.tolist() == [4 * (100 * 4 + 110 * 5 + 120 * 6)]


def test_promises_are_kept_by_the_decodes_that_have_them() -> None:
    run = run_of(
        **{"first_ps": 100, "slope_ps": 10, "steps": 3, "decodes": 5, "kv_tokens": 40, "held_blocks": 20},
        **{"promised_tokens": 9, "promised_decodes": 3},
    )

    assert areas(run, Pool(100, 4)).promised.tolist() == [100 * 9 + 110 * 6 + 120 * 3]


def test_areas_beyond_64_bits_are_exact() -> None:
    run = run_of(first_ps=10**15, steps=1, kv_tokens=10**7, held_blocks=10**6)

    stored, _, held = areas(run, Pool(10**6, 16))

    assert (exact_sum(stored), exact_sum(held)) == (10**22, 16 * 10**21)
