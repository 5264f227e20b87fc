"""The most important property: leaping over runs of steps changes nothing, bit for bit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.sim.replica.step_plan import duration, steps_to_reach
from kit.leaping import POLICIES, backends, rows
from kit.worlds import Affine, World, check_books, play, trace_of


def both(
    name: str,
    table: list[tuple[int, int, int]],
    backend: Affine,
    size: int,
    blocks: int,
    block_size: int,
    replicas: int,
) -> tuple[World, World]:
    table = sorted(table)
    priority = [(7 * i) % 3 for i in range(len(table))] if "priority" in name else None
    tenant = [(5 * i) % 3 for i in range(len(table))] if "tenants" in name else None
    trace = trace_of(
        table, max_tokens=[o for _, _, o in table], priority=priority, tenant=tenant, tenants=("a", "b", "c")
    )
    make = POLICIES[name]
    sample = make(size)
    if sample.block_tokens == 1:
        blocks, block_size = blocks * block_size, 1
    one, other = (
        play(trace, lambda: make(size), lambda: backend, blocks, block_size, replicas, leap, 2000, (7, 451))
        for leap in (True, False)
    )
    return one, other


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=60)
@given(
    table=rows,
    backend=backends,
    size=st.integers(1, 6),
    blocks=st.integers(8, 40),
    block_size=st.sampled_from([4, 16]),
    replicas=st.integers(1, 3),
)
def test_leap_equals_step(
    name: str,
    table: list[tuple[int, int, int]],
    backend: Affine,
    size: int,
    blocks: int,
    block_size: int,
    replicas: int,
) -> None:
    leapt, stepped = both(name, table, backend, size, blocks, block_size, replicas)

    assert leapt.outcome() == stepped.outcome()
    for world in (leapt, stepped):
        check_books(world)


def test_decodes_that_are_chosen_one_by_one_leap_too() -> None:
    """By urgency vLLM takes each in its turn: both prompts in a step, 29 steps of two decodes, 20 of one."""
    trace = trace_of([(0, 10, 30), (0, 10, 50)], priority=[1, 0])
    make = POLICIES["vllm-priority"]
    world = play(trace, lambda: make(2), lambda: Affine(1000, 10, 1), 40, 16, 1, True, 2000)
    runs = world.engines[0].records.runs()

    assert list(zip(runs["decodes"].tolist(), runs["steps"].tolist(), strict=True)) == [(0, 1), (2, 29), (1, 20)]


@given(st.integers(1, 10**12), st.integers(0, 10**9), st.integers(1, 10**15))
def test_a_cut_is_the_first_boundary_that_reaches(first: int, slope: int, span: int) -> None:
    steps = steps_to_reach(span, first, slope)

    assert duration(first, slope, steps) >= span
    assert steps == 1 or duration(first, slope, steps - 1) < span
