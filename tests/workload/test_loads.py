"""Loads that benchmarks ask for: lengths by mean and deviation, stages and ramps, durations, labels over a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.workload import build
from kit.made import SYNTHETIC, lengths, rng, workload

SECOND = 10**12


# ---- lengths by mean, standard deviation and bounds ----


@pytest.mark.parametrize(
    "spec",
    [{"mean": 50, "std": 10, "min": 10, "max": 100}, {"mean": 500, "std": 400}, {"mean": 30, "std": 60, "max": 40}],
)
def test_normal_lengths_are_cut_at_their_bounds(spec: dict[str, float]) -> None:
    drawn = lengths({"normal": spec}).sample(400_000, rng())
    low, high = spec.get("min", 1), spec.get("max", np.inf)

    assert drawn.min() >= low
    assert drawn.max() <= high
    # below the bound lies as much as the normal distribution has below low + ½, by its distribution function
    share = 0.5 * math.erfc(-(low + 0.5 - spec["mean"]) / spec["std"] / math.sqrt(2))
    assert np.mean(drawn == low) == pytest.approx(share, abs=0.003)
    assert lengths({"normal": spec}).mean_tokens() == pytest.approx(drawn.mean(), rel=0.005)


def test_a_deviation_of_0_is_a_constant() -> None:
    assert set(lengths({"normal": {"mean": 256, "std": 0}}).sample(50, rng()).tolist()) == {256}
    with pytest.raises(ValidationError, match="max must be at least min, 10"):
        lengths({"normal": {"mean": 5, "std": 1, "min": 10, "max": 9}})


# ---- stages and ramps ----


def test_stages_of_inference_perf_are_read_as_they_are() -> None:
    trace = build(
        workload(
            arrivals={"stages": [{"rate": 1, "duration": 30}, {"rate": 10, "duration": 6}]},
            prompt_tokens=8,
            output_tokens=8,
        ),
        0,
    )
    times = trace.arrival_ps / SECOND

    assert len(trace) == 30 + 60
    assert times[:30].tolist() == list(range(1, 31))
    assert times[30:].tolist() == pytest.approx([30 + k / 10 for k in range(1, 61)])


def test_their_whole_load_may_be_copied_too() -> None:
    load = {"type": "poisson", "interval": 15, "stages": [{"rate": 50, "duration": 100}, {"rate": 5, "duration": 100}]}
    trace = build(workload(arrivals={"stages": load}, prompt_tokens=8, output_tokens=8), 3)
    times = trace.arrival_ps / SECOND

    first, second = np.sum(times <= 100), np.sum(times >= 115)
    assert first + second == len(trace)  # nobody in the 15 s between
    assert first == pytest.approx(5000, abs=5 * math.sqrt(5000))
    assert second == pytest.approx(500, abs=5 * math.sqrt(500))
    assert times[-1] <= 215


def test_a_ramp_has_the_requests_of_its_mean_rate() -> None:
    stages = [{"rate": 0, "to": 20, "duration": 10}, {"rate": 20, "to": 0, "duration": 10}]
    times = build(workload(arrivals={"stages": stages}, prompt_tokens=8, output_tokens=8), 0).arrival_ps / SECOND

    assert len(times) == 200
    # up to t the rising ramp has t²·20/10/2 requests, so request k comes at √k
    assert times[:100].tolist() == pytest.approx([math.sqrt(k) for k in range(1, 101)])
    # the falling one is its mirror image: 100 - (20 - t)² of it
    assert times[100:].tolist() == pytest.approx([20 - math.sqrt(100 - k) for k in range(1, 101)], abs=1e-6)


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.none() | st.floats(0, 50), st.floats(0.5, 20)).map(
            lambda s: {"rate": s[0], "to": s[1], "duration": s[2]}
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 5),
    st.sampled_from(["constant", "poisson"]),
)
def test_times_rise_and_lie_in_stages(stages: list[dict[str, Any]], interval: float, kind: str) -> None:
    if sum((s["rate"] + (s["rate"] if s["to"] is None else s["to"])) / 2 * s["duration"] for s in stages) < 1e-9:
        return
    spec = Arrivals.model_validate({"stages": {"stages": stages, "interval": interval, "type": kind}})
    times = spec.times_ps(300, rng()) / SECOND

    assert (np.diff(times) >= 0).all()
    start = 0.0
    inside = times > (spec.length_s or 0)
    for stage in stages:
        inside |= (times >= start - 1e-9) & (times <= start + stage["duration"] + 1e-9)
        start += stage["duration"] + interval
    assert inside.all()


def test_requests_beyond_the_stages_are_said_to_be_missing() -> None:
    spec = SYNTHETIC | {"requests": 100, "arrivals": {"stages": [{"rate": 1, "duration": 30}]}}
    trace = build(workload(**spec), 0)

    assert len(trace) == 30
    assert "100 requests wanted, 30 arrive in the time that is asked for" in trace.notes
    with pytest.raises(ValidationError, match="a stage must have a rate above 0"):
        workload(**SYNTHETIC | {"arrivals": {"stages": [{"rate": 0, "duration": 1}]}})


# ---- duration ----


def test_a_duration_says_how_many_requests_there_are() -> None:
    spec = {key: value for key, value in SYNTHETIC.items() if key != "requests"}
    trace = build(workload(**spec | {"arrivals": {"constant": {"rate_per_s": 7.0}}, "duration_s": 100.0}), 0)

    assert len(trace) == 700
    assert trace.arrival_ps[-1] == 100 * SECOND


def test_a_duration_cuts_what_requests_would_give_and_no_draw_changes() -> None:
    full = build(workload(**SYNTHETIC), 5)
    cut = build(workload(**SYNTHETIC | {"duration_s": 6.0}), 5)

    assert 0 < len(cut) < len(full)
    assert (cut.output_tokens == full.output_tokens[: len(cut)]).all()
    assert cut.arrival_ps[-1] <= 6 * SECOND < full.arrival_ps[len(cut)]


def test_a_session_that_starts_in_time_is_kept_whole() -> None:
    spec = {key: value for key, value in SYNTHETIC.items() if key != "requests"}
    trace = build(workload(**spec | {"sessions": {"turns": 4, "think_s": 30}, "duration_s": 20.0}), 1)

    assert trace.session is not None
    assert len(trace) == 4 * (int(trace.session.max()) + 1)
    assert trace.arrival_ps[-1] <= 20 * SECOND


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"clients": {"concurrency": 2}, "arrivals": None}, "duration_s and clients must not both"),
        ({"arrivals": {"burst": {}}}, "duration_s must not be given with a burst"),
        ({"duration_s": 5e6}, "less than or equal to"),
    ],
)
def test_durations_that_cannot_be_are_refused(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        workload(**SYNTHETIC | {"duration_s": 5.0} | keys)


def test_a_duration_before_the_first_request_is_refused() -> None:
    with pytest.raises(BadInput, match=r"no request arrives so early: the first comes at 0\.25 s"):
        build(workload(**SYNTHETIC | {"arrivals": {"constant": {"rate_per_s": 4.0}}, "duration_s": 0.1}), 0)


# ---- over a file ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "".join(f"{i / 10},{100 + i},{10 + i % 7}\n" for i in range(1000))
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    (tmp_path / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens,tenant,session\n0,9,9,x,1\n1,9,9,y,1\n")
    return tmp_path


def test_labels_are_laid_over_a_file(folder: Path) -> None:
    keys = {"prefix": {"groups": 4, "tokens": 64}, "tenants": {"a": 1, "b": 3}, "priority": {"weights": [1, 1]}}
    trace = build(workload(file="t.csv", max_tokens=12, **keys), 0, folder)

    assert trace.tenant is not None
    assert trace.priority is not None
    assert trace.prefix_group is not None
    assert trace.prefix_tokens is not None
    assert np.mean(trace.tenant == 1) == pytest.approx(0.75, abs=0.05)
    assert np.mean(trace.priority == 0) == pytest.approx(0.5, abs=0.06)
    assert set(trace.prefix_group.tolist()) == {0, 1, 2, 3}
    assert set(trace.prefix_tokens.tolist()) == {64}
    assert int(trace.output_tokens.max()) == 12
    assert trace.prompt_tokens.tolist() == [100 + i for i in range(1000)]
    assert {"prefixes laid over the file's requests", "tenants laid over the requests"} <= set(trace.notes)


def test_what_a_file_says_itself_is_replaced_or_in_the_way(folder: Path) -> None:
    trace = build(workload(file="own.csv", tenants={"z": 1}), 0, folder)

    assert trace.tenants == ("z",)
    assert "tenants replaced" in trace.notes
    (folder / "ids.csv").write_text("arrival_s,prompt_tokens,output_tokens,hash_ids\n0,9,9,1\n")
    with pytest.raises(BadInput, match="prefix: must not be given with a file whose hash ids say what its prompts"):
        build(workload(file="ids.csv", prefix={"groups": 1, "tokens": 1}), 0, folder)


def test_a_file_is_cut_by_duration_and_replayed_in_stages(folder: Path) -> None:
    assert len(build(workload(file="t.csv", duration_s=10.0), 0, folder)) == 101
    assert len(build(workload(file="t.csv", duration_s=10.0, time_scale=0.5), 0, folder)) == 201
    trace = build(workload(file="t.csv", arrivals={"stages": [{"rate": 2, "duration": 30}]}), 0, folder)
    assert len(trace) == 60
    assert "60 of 1,000 requests arrive in the time that is asked for" in trace.notes
