"""The clock of a GPU that sinks under prompts: its closed forms, sums of any grouping, and prices that remember."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chairlift.backend.base import FOREVER, Batch, Chunk
from chairlift.backend.calibrated import profile
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.warmth import COOL_PS, HEAT_PS, LEVELS, Warmth
from chairlift.policies.vllm import Vllm
from kit.worlds import check_books, play, trace_of

MS = 10**9
SHIPPED = profile.load("h200-llama-3.1-8b-vllm-0.26")
HOT = replace(SHIPPED, gpu_time=replace(SHIPPED.gpu_time, hot_chunk=0.1, hot_kv=0.4))


def test_prompts_warm_a_gpu_and_anything_else_cools_it() -> None:
    warmth = Warmth()
    warmth.cool(5 * COOL_PS)
    assert warmth.now == warmth.level == 0

    warmth.heat(HEAT_PS)
    assert warmth.now == pytest.approx(1 - 1 / math.e)
    warmth.heat(HEAT_PS)
    assert warmth.now == pytest.approx(1 - 1 / math.e**2)
    warmth.cool(COOL_PS)
    assert warmth.now == pytest.approx((1 - 1 / math.e**2) / math.e)
    warmth.heat(20 * HEAT_PS)
    assert warmth.now == pytest.approx(1)
    assert warmth.level == LEVELS


@given(
    heat=st.integers(1, 10 * HEAT_PS),
    parts=st.lists(st.integers(0, COOL_PS), max_size=20),
    again=st.integers(1, HEAT_PS),
)
def test_many_rests_cool_as_one(heat: int, parts: list[int], again: int) -> None:
    one, many = Warmth(), Warmth()
    for each in (one, many):
        each.heat(heat)
    one.cool(sum(parts))
    for part in parts:
        many.cool(part)

    assert (one.now, one.level) == (many.now, many.level)
    assert one.level == pytest.approx(one.now * LEVELS, abs=0.5 + 1e-9)
    for each in (one, many):
        each.heat(again)
    assert one.now == many.now


@given(heat=st.integers(1, 5 * HEAT_PS), first=st.integers(MS // 10, 30 * MS), slope=st.integers(0, MS // 100))
def test_a_series_lasts_for_as_long_as_its_steps_begin_in_the_level(heat: int, first: int, slope: int) -> None:
    warmth = Warmth()
    warmth.heat(heat)
    level, found = warmth.level, warmth.steps(first, slope)

    if level == 0:
        assert found == FOREVER
        return
    begun = 0
    while warmth.level == level:
        warmth.cool(first + begun * slope)
        begun += 1
    assert found == begun


def test_a_step_is_priced_by_the_steps_before_it() -> None:
    cold, hot = Calibrated(SHIPPED), Calibrated(HOT)
    decodes, prompt = Batch((), 64, 64_000), Batch((Chunk(0, 2048),), 0, 0)
    assert not cold.remembers
    assert hot.remembers
    assert hot.step(decodes) == cold.step(decodes)
    assert hot.step(prompt) == cold.step(prompt)

    for _ in range(10):  # 0.4 s of prompts
        hot.ran(2048, cold.step(prompt).first, 0, 1)
    assert hot.step(prompt).first == pytest.approx(1.1 * cold.step(prompt).first, rel=2e-3)
    warm, usual = hot.step(decodes), cold.step(decodes)
    attention = usual.slope // 64 * 64_000  # a step reads a token more of each of the 64 than the one before
    assert warm.first - usual.first == pytest.approx(0.4 * attention, rel=2e-3)
    assert warm.slope == pytest.approx(1.4 * usual.slope, rel=2e-3)
    assert 1 < warm.steps < 10
    hot.ran(0, 10**12, 0, 1)
    assert hot.step(decodes) == usual


@hypothesis_settings(max_examples=40)
@given(
    table=st.lists(
        st.tuples(st.integers(0, 200).map(lambda ms: ms * MS), st.integers(1, 3000), st.integers(1, 200)),
        min_size=1,
        max_size=15,
    ),
    ahead=st.booleans(),
)
def test_leap_equals_step(table: list[tuple[int, int, int]], ahead: bool) -> None:
    trace = trace_of(sorted(table))
    leapt, stepped = (
        play(trace, lambda: Vllm(async_scheduling=ahead), lambda: Calibrated(HOT), blocks=600, leap=leap)
        for leap in (True, False)
    )

    assert leapt.outcome() == stepped.outcome()
    for world in (leapt, stepped):
        check_books(world)
