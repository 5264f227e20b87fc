"""The clock of a GPU that sinks under prompts: its closed forms, sums of any grouping, and prices that remember."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chairlift.backend.base import FOREVER, PS, Batch, Chunk
from chairlift.backend.calibrated import profile
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.warmth import COOL_PS, HEAT_PS, LEVELS, Warmth
from chairlift.backend.drafting import Drafting
from chairlift.backend.fitting.recording import read
from chairlift.backend.fitting.steps import steps_of
from chairlift.backend.slowed import Slowed
from chairlift.policies.vllm import Vllm
from kit.synthetic import Planted, record, write
from kit.worlds import check_books, play, trace_of

MS = 10**9
SHIPPED = profile.load("h200-llama-3.1-8b-vllm-0.26")
COLD = replace(SHIPPED, gpu_time=replace(SHIPPED.gpu_time, hot_computed=0.0, hot_kv=0.0))
HOT = replace(COLD, gpu_time=replace(COLD.gpu_time, hot_chunk=0.1, hot_kv=0.4))


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


@given(start=st.integers(0, HEAT_PS), ms=st.integers(1, 300), share=st.floats(0, 1))
def test_a_step_that_computes_prompts_for_a_share_of_its_time_warms_and_cools_by_turns(
    start: int, ms: int, share: float
) -> None:
    """As if it did both in slices of 0.01 ms, one after the other."""
    whole, sliced = Warmth(), Warmth()
    for each in (whole, sliced):
        each.heat(start)
    slices = []
    for _ in range(100 * ms):
        slices.append(sliced.now)
        sliced.heat(round(share * MS / 100))
        sliced.cool(round((1 - share) * MS / 100))

    assert whole.mean(ms * MS, share) == pytest.approx(sum(slices) / len(slices), abs=1e-3)
    whole.heat(ms * MS, share)
    assert whole.now == pytest.approx(sliced.now, abs=1e-3)
    assert whole.level == pytest.approx(whole.now * LEVELS, abs=0.5 + 1e-9)


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
    cold, hot = Calibrated(COLD), Calibrated(HOT)
    decodes, prompt = Batch((), 64, 64_000), Batch((Chunk(0, 2048),), 0, 0)
    assert not cold.remembers
    assert hot.remembers
    assert hot.step(decodes) == cold.step(decodes)
    # A cold GPU gets warm meanwhile. 2,048 tokens take nearly all of the step: after t it is at 1 - exp(-t / 50 ms).
    took = cold.step(prompt).first / HEAT_PS
    warming = 1 - (1 - math.exp(-took)) / took
    assert hot.step(prompt).first == pytest.approx((1 + 0.1 * warming) * cold.step(prompt).first, rel=2e-3)

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


@pytest.mark.parametrize(("decodes", "tokens"), [(0, 16), (200, 16), (64, 256), (0, 2048), (100, 8000)])
def test_a_warm_gpu_computes_slower_and_reads_as_fast(decodes: int, tokens: int) -> None:
    """By the form, of a profile without tiles or sizes."""
    gpu = replace(COLD.gpu_time, size_factors=(), chunk_residual=((1, 1.0),), tile_tokens=1, empty_pair_s=0.0)
    gpu = replace(gpu, hot_computed=0.2, hot_token_s=1.0)
    warm, cool = (
        Calibrated(replace(COLD, gpu_time=each, piecewise=False)) for each in (gpu, replace(gpu, hot_computed=0.0))
    )
    batch = Batch((Chunk(0, tokens),), decodes, decodes * 700)
    warm.ran(tokens, PS, 0, 1)

    p, computed = gpu.sharpness, gpu.token_s * (tokens + decodes)
    products = [(gpu.weights_s**p + (slower * computed) ** p) ** (1 / p) for slower in (1.0, 1.2)]
    attention = gpu.kv_mixed_s * decodes * 700 + gpu.pair_s * tokens * (tokens + 1) / 2
    more = warm.step(batch).first - cool.step(batch).first
    assert more == pytest.approx(PS * (products[1] - products[0] + 0.2 * attention), rel=1e-3)


def test_what_a_launch_outlasts_lets_the_gpu_cool() -> None:
    """Work of 14 ms is launched kernel by kernel in 26: in a train of such steps the GPU is not all the way warm."""
    backend = Calibrated(HOT)
    small = Batch((Chunk(0, 640),), 0, 0)
    for _ in range(100):
        backend.ran(640, backend.step(small).first, 0, 1)

    share = HOT.gpu_time.hot_token_s * 640 / HOT.host.eager_s
    warm = share / 0.05 / (share / 0.05 + (1 - share) / 0.1)
    usual = Calibrated(COLD).step(small).first
    assert backend.step(small).first == pytest.approx((1 + 0.1 * warm) * usual, rel=2e-3)


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.7])
def test_a_backend_around_another_tells_it_what_ran(factor: float) -> None:
    """As for drafts, or for plans that ask what if all steps took longer; then the clock within is as much slower."""
    prompt, alone = Batch((Chunk(0, 2048),), 0, 0), Calibrated(HOT)
    around = Drafting(Calibrated(HOT)) if factor == 1 else Slowed(Calibrated(HOT), factor)
    assert around.remembers
    for rest in (0, 100 * MS, 3 * MS, 0):
        took = alone.step(prompt).first
        assert around.step(prompt).first == pytest.approx(factor * took, abs=2)
        alone.ran(2048, took, 0, 1)
        around.ran(2048, round(factor * took), 0, 1)
        alone.ran(0, rest, 0, 1)
        for _ in range(4):
            around.ran(0, round(factor * rest / 4), 0, 1)


def test_fits_and_prices_mean_the_same_by_warmth(tmp_path: Path) -> None:
    """Recorded steps, told to a backend one after the other. No launch of theirs outlasts them by its profile."""
    steps = steps_of(read(write(tmp_path, [record(Planted())]), "llama-3.1-8b").select(None), token_s=20e-6)
    host = replace(SHIPPED.host, piecewise_s=0.0, eager_s=0.0)
    backend = Calibrated(replace(HOT, gpu_time=replace(HOT.gpu_time, hot_token_s=20e-6), host=host))
    end, found, chunked = 0, [], steps.chunks > 0
    columns = (steps.schedule, steps.done, steps.prompt + steps.decodes, steps.woke, chunked)
    for schedule, done, tokens, woke, chunks in zip(*(each.tolist() for each in columns), strict=True):
        begin = round(schedule * PS) if woke else end
        backend.ran(0, begin - end, 0, 1)
        end = round(done * PS)
        share = min(1.0, 20e6 * tokens / (end - begin))
        found.append(backend._warmth.mean(end - begin, share) if chunks else backend._warmth.now)
        backend.ran(int(tokens) if chunks else 0, end - begin, 0, 1)

    assert np.ptp(steps.warmth[chunked]) > 0.5
    assert steps.warmth == pytest.approx(np.array(found), abs=1e-6)


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
