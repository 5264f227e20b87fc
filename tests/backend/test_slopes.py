"""Derivatives of fits, against differences and ends worked by hand."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest

from chairlift.backend.calibrated.profile import DraftTime, GpuTime
from chairlift.backend.fitting.slopes import DRAFTING, TABLES, Ends, of_terms
from chairlift.backend.fitting.steps import EAGER, GRAPH, PIECEWISE, Floats, Spans, Steps, predicted

DENSE = GpuTime(
    weights_s=4e-3,
    token_s=20e-6,
    sharpness=2.5,
    sequence_s=5e-6,
    kv_s=30e-9,
    kv_mixed_s=50e-9,
    pair_s=1e-9,
    chunk_s=2e-4,
    request_s=3e-5,
    decode_residual=((1, 1.0), (16, 1.1), (256, 0.9)),
    chunk_residual=((128, 1.05), (1024, 0.95), (8192, 1.1)),
    kv_residual=((1, 1.2), (64, 0.9)),
)
EXPERTS = replace(DENSE, experts_s=20e-3, expert_share=1 / 16, sharpness=1.3)
TILES = replace(DENSE, tile_tokens=128, odd_tiles=1.16, chunk_residual=((1, 1.0),))
PAIRS = replace(TILES, empty_pair_s=3e-3)
SIZES = replace(PAIRS, size_factors=((128, 0.9), (500, 1.3)))
FLOORS = replace(DENSE, piecewise_floor_s=9e-3, eager_floor_s=40e-3)
HOT = replace(DENSE, hot_chunk=0.1, hot_kv=0.3)
WARM = replace(HOT, hot_computed=0.2)
WARM_EXPERTS = replace(EXPERTS, hot_computed=0.2, tile_tokens=128, odd_tiles=1.16)
WHOLE = replace(WARM, whole_pair_s=0.6e-9)
LIVE = replace(EXPERTS, live_experts=True)
DRAFTS = replace(WARM, drafting=DraftTime(pass_s=5e-4, token_s=1e-6, draft_s=4e-6, verify_s=3e-4, kv_s=9e-9))


def steps(chunks: list[int], tokens: list[int], decodes: list[int], kind: list[int]) -> Steps:
    """Steps of so many chunks, computed tokens and decodes; what no price depends on is 0."""
    n = len(chunks)
    made = {name: np.zeros(n) for name in Steps.__dataclass_fields__}
    made |= {
        "chunks": np.array(chunks, dtype=float),
        "computed": np.array(tokens, dtype=float),
        "decodes": np.array(decodes, dtype=float),
        "context": np.array(decodes, dtype=float) * 700,
        "pairs": np.array(chunks, dtype=float) * 130_000,
        "prompt": np.array(tokens, dtype=float) * 0.9 * (np.array(chunks) > 0),
        "whole": 170_000.0 * ((np.array(chunks) == 1) & (np.array(kind) == EAGER)),
        "drafts": np.array(decodes, dtype=float) * 3,
        "passes": np.full(n, 3.0),
        "passed": np.array([0, *tokens[:-1]], dtype=float),
        "kind": np.array(kind),
        "warmth": np.linspace(0, 1, n),
    }
    return Steps(**made)  # type: ignore[arg-type]


MANY = steps(
    [0, 0, 0, 1, 1, 2, 3, 1, 5],
    [1, 24, 300, 128, 500, 900, 2100, 8192, 9000],
    [1, 20, 256, 0, 12, 100, 256, 0, 7],
    [GRAPH, GRAPH, GRAPH, PIECEWISE, PIECEWISE, EAGER, EAGER, EAGER, EAGER],
)


def value(gpu: GpuTime, name: str) -> float:
    """The field ``name`` of ``gpu`` or, with a point in it, of what drafts add."""
    found: float = attrgetter(name)(gpu)
    return found


def with_value(gpu: GpuTime, name: str, number: float) -> GpuTime:
    """``gpu`` with another number in that field."""
    if gpu.drafting is not None and name in DRAFTING:
        return replace(gpu, drafting=replace(gpu.drafting, **{name.removeprefix("drafting."): number}))
    changed: Any = {name: number}
    return replace(gpu, **changed)


@pytest.mark.parametrize(
    "gpu",
    [
        *(DENSE, EXPERTS, TILES, PAIRS, SIZES, FLOORS, HOT, WARM, WARM_EXPERTS, WHOLE, LIVE, DRAFTS),
        replace(FLOORS, drafting=DRAFTS.drafting),
    ],
)
def test_derivatives_are_those_that_differences_show(gpu: GpuTime) -> None:
    found = of_terms(gpu, MANY)
    terms = [name for name in found if name not in TABLES and value(gpu, name)]

    assert set(DRAFTING) & set(terms) == (set(DRAFTING) if gpu.drafting else set())
    for name in terms:
        step = 1e-6 * value(gpu, name)
        up, down = (with_value(gpu, name, value(gpu, name) + sign * step) for sign in (1, -1))
        differences = (predicted(up, MANY) - predicted(down, MANY)) / (2 * step)
        np.testing.assert_allclose(found[name], differences, rtol=1e-4, atol=1e-8)
    for name in TABLES:
        table = getattr(gpu, name)
        for knot in range(len(table)):
            differences = np.zeros(len(MANY))
            for sign in (1, -1):
                moved = [(at, v * np.exp(sign * 1e-6 * (i == knot))) for i, (at, v) in enumerate(table)]
                differences += sign * predicted(replace(gpu, **{name: tuple(moved)}), MANY) / 2e-6
            np.testing.assert_allclose(found[name][:, knot], differences, rtol=1e-4, atol=1e-8)


def test_a_floor_hides_what_is_below_it() -> None:
    found = of_terms(FLOORS, MANY)
    work = predicted(DENSE, MANY)
    hidden = (MANY.chunks > 0) & (work < np.where(MANY.kind == EAGER, 40e-3, 9e-3))

    assert hidden.any()
    assert not hidden.all()
    assert (found["token_s"][hidden] == 0).all()
    assert (found["piecewise_floor_s"] + found["eager_floor_s"] == hidden).all()


def spans(begun: list[float], launched: list[float], free: float) -> Spans:
    """One span of three steps, done when nobody looks."""
    one = np.array([begun])
    never = np.full(1, free)
    return Spans(np.arange(3)[None, :], never, np.zeros(1), one, np.array([launched]), np.full((1, 3), 1e9), never > 0)


def test_an_end_is_the_sum_of_what_led_to_it() -> None:
    work = np.array([3.0, 4.0, 5.0])
    singly = np.zeros(3, dtype=bool)

    # launched at 0, 6 and 7: the first ends at 3, the second waits for its launch and ends at 10, the third at 15
    ends = Ends.of(spans([0, 5, 6], [0, 6, 7], 0.0), work, singly, 0.0, 0.0)

    assert ends.seconds.tolist() == [[3.0, 10.0, 15.0]]
    assert ends.first.tolist() == [[0, 1, 1]]


def test_launches_kernel_by_kernel_have_a_head_and_a_tail() -> None:
    work, singly = np.array([3.0, 1.0, 5.0]), np.ones(3, dtype=bool)
    of_steps = np.eye(3)
    found = spans([0, 5, 9], [2, 9, 12], -np.inf)

    # 0 + 2 (head) + 3 = 5; 5 + 2 + 1 = 8, but the launch goes on to 9 and leaves 1 (tail) behind it: 10;
    # 9 + 2 = 11 + 5 = 16
    ends = Ends.of(found, work, singly, 2.0, 1.0)
    slopes = ends.slopes(found, np.zeros(3, dtype=np.int64), np.arange(3), of_steps)

    assert ends.seconds.tolist() == [[5.0, 10.0, 16.0]]
    assert slopes.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert ends.head.tolist() == [[True, False, True]]
    assert ends.tail.tolist() == [[False, True, False]]


@pytest.mark.parametrize("seed", range(20))
def test_derivatives_of_ends_are_those_that_differences_show(seed: int) -> None:
    rng = np.random.default_rng(seed)
    begun = np.cumsum(rng.uniform(0, 6, (1, 3)), axis=1)
    found = spans(begun[0].tolist(), (begun[0] + rng.uniform(0, 4, 3)).tolist(), float(rng.uniform(-5, 5)))
    work, singly = rng.uniform(1, 6, 3), rng.random(3) < 0.5

    def at(head: float, tail: float, gpu_s: Floats) -> Floats:
        return Ends.of(found, gpu_s, singly, head, tail).seconds[0]

    ends = Ends.of(found, work, singly, 1.0, 0.5)
    slopes = ends.slopes(found, np.zeros(3, dtype=np.int64), np.arange(3), np.eye(3))

    h = 1e-6
    for i in range(3):
        moved = work + h * np.eye(3)[i]
        np.testing.assert_allclose(slopes[:, i], (at(1.0, 0.5, moved) - at(1.0, 0.5, work)) / h, atol=1e-6)
    np.testing.assert_allclose(ends.head[0], (at(1.0 + h, 0.5, work) - at(1.0, 0.5, work)) / h, atol=1e-6)
    np.testing.assert_allclose(ends.tail[0], (at(1.0, 0.5 + h, work) - at(1.0, 0.5, work)) / h, atol=1e-6)
