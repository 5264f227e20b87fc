"""Axes: which points a grid has, in which order."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.sim.sweep.axes import Axis, Grid, label_of


def grid(**keys: object) -> Grid:
    return Grid.model_validate(keys)


def labels(spec: Grid) -> list[dict[str, object]]:
    return [{key: value.label for key, value in point.items()} for point in spec.points()]


def values(spec: object) -> list[object]:
    return [value.value for value in Axis.model_validate(spec).points()]


def test_a_grid_is_every_combination_the_last_axis_fastest() -> None:
    found = labels(grid(axes={"a": [1, 2], "b": ["x", "y"]}, zip=[{"c": [5, 6], "d": [7, 8]}]))

    assert [tuple(p.values()) for p in found] == [
        (a, b, c, c + 2) for a in (1, 2) for b in ("x", "y") for c in (5, 6)
    ]  # fmt: skip


def test_no_axis_is_one_point() -> None:
    assert labels(grid()) == [{}]


def test_ranges_are_exact_at_both_ends_with_equal_ratios_or_differences() -> None:
    assert values({"log": {"low": 1, "high": 1000, "points": 4}}) == pytest.approx([1, 10, 100, 1000])
    assert values({"linear": {"low": 0, "high": 0.3, "points": 4}}) == [0, 0.1, 0.2, 0.3]
    assert values({"log": {"low": 1, "high": 8, "points": 7, "whole": True}}) == [1, 2, 3, 4, 6, 8]
    assert values({"log": {"low": 5, "high": 9, "points": 1}}) == [5]


@given(low=st.floats(1e-6, 1e6), ratio=st.floats(1.01, 1e4), points=st.integers(2, 40))
def test_a_log_range_rises_by_one_ratio(low: float, ratio: float, points: int) -> None:
    found = values({"log": {"low": low, "high": low * ratio, "points": points}})
    step = ratio ** (1 / (points - 1))

    assert (found[0], found[-1]) == (low, pytest.approx(low * ratio, rel=1e-11))
    assert [b / a for a, b in pairwise(found)] == pytest.approx([step] * (len(found) - 1))


def test_names_of_their_own_and_names_made() -> None:
    named = Axis.model_validate({"named": {"small": {"name": "vllm", "max_num_seqs": 8}, "big": "vllm"}})

    assert [(v.label, v.value) for v in named.points()] == [
        ("small", {"name": "vllm", "max_num_seqs": 8}),
        ("big", "vllm"),
    ]
    assert label_of({"name": "orca", "reserve": "max", "batch": 4}) == "orca reserve=max batch=4"
    assert label_of([{"count": 2}]) == '[{"count": 2}]'


def test_random_points_are_the_same_for_a_seed_and_stay_in_their_space() -> None:
    keys = {
        "a": {"log_uniform": {"low": 1, "high": 10_000}},
        "b": {"uniform": {"low": 2, "high": 4, "whole": True}},
        "c": {"choice": ["x", "y"]},
    }
    found = labels(grid(random={"points": 4000, "keys": keys}))

    assert found == labels(grid(random={"points": 4000, "keys": keys}))
    assert found != labels(grid(random={"points": 4000, "keys": keys, "seed": 1}))
    logs = [math.log10(float(str(p["a"]))) for p in found]
    assert 0 <= min(logs) <= max(logs) <= 4
    assert sum(logs) / 4000 == pytest.approx(2, abs=5 * 4 / math.sqrt(12 * 4000))
    assert {p["b"] for p in found} == {2, 3, 4}
    assert sum(p["c"] == "x" for p in found) == pytest.approx(2000, abs=5 * math.sqrt(1000))
    # adding a key changes none of the others' draws
    more = labels(grid(random={"points": 4000, "keys": {**keys, "d": {"choice": [1]}}}))
    assert [p["a"] for p in more] == [p["a"] for p in found]


def test_random_points_are_crossed_with_the_grid() -> None:
    spec = grid(axes={"p": ["x", "y"]}, random={"points": 3, "keys": {"a": {"uniform": {"low": 0, "high": 1}}}})
    found = labels(spec)

    assert spec.size() == len(found) == 6
    assert [p["a"] for p in found[:3]] == [p["a"] for p in found[3:]]


def test_each_value_is_tried_alone() -> None:
    found = grid(axes={"a": [1, 2, 3], "b": [4, 5]}).each_alone()

    assert [{k: v.value for k, v in p.items()} for p in found] == [
        {"a": 1, "b": 4},
        {"a": 2, "b": 4},
        {"a": 3, "b": 4},
        {"a": 1, "b": 5},
    ]


@pytest.mark.parametrize("spec", [3, {}, {"log": {"low": -1, "high": 2, "points": 3}}, {"values": []}, {"values": 3}])
def test_what_is_no_axis_is_refused(spec: object) -> None:
    with pytest.raises(ValidationError):
        Axis.model_validate(spec)


@pytest.mark.parametrize(
    "axis",
    [[5, 5], [5, 5.0], ["a", "b", "a"], [{"name": "vllm", "x": 1}, {"x": 1.0, "name": "vllm"}], [[1], [1]]],
    ids=str,
)
def test_a_value_that_stands_twice_is_refused(axis: list[object]) -> None:
    with pytest.raises(ValidationError, match="stands twice: each value makes points of its own"):
        Axis.model_validate(axis)
    with pytest.raises(ValidationError, match="the same values of a, b stand twice"):
        grid(zip=[{"a": axis, "b": [0] * len(axis)}])
    assert len(labels(grid(zip=[{"a": axis, "b": list(range(len(axis)))}]))) == len(axis)


def test_true_and_one_and_the_text_one_differ() -> None:
    assert values([True, 1, "1", None, "null"]) == [True, 1, "1", None, "null"]
