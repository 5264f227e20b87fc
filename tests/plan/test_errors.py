"""The second width of an answer: errors of step costs, held to queues whose capacity is known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.backend.calibrated.resampled import Resampled
from chairlift.backend.calibrated.settings import Settings as ProfileSettings
from chairlift.backend.roofline import Efficiency
from chairlift.backend.slowed import Slower
from chairlift.sim.plan.capacity import Errors, find
from chairlift.sim.plan.deciding import Effort, Measure
from chairlift.sim.plan.errors import ASSUMED, described, drawn, errors, kept, likely
from chairlift.sim.plan.promises import Promise
from chairlift.sim.results.metrics import request_latencies
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from kit.command import chairlift
from kit.queues import Queue, mm1_capacity

SHARE, STAY_S = 0.9, 5.757
PROMISE = Promise(share=SHARE, e2el_ms=1e3 * STAY_S)


def truth(factor: float) -> float:
    """Capacity of the M/M/1 queue whose services take ``factor`` as long."""
    return mm1_capacity(SHARE, STAY_S / factor) / factor


def slower(factor: float, seed: int) -> Measure:
    """That queue: on a clock that runs ``factor`` times as fast, it is one of mean 1 at a higher rate."""
    queue = Queue([Promise(share=SHARE, e2el_ms=1e3 * STAY_S / factor)], seed)
    return lambda rate, requests, replications: queue(rate * factor, requests, replications)


def drawing(factors: list[float], seed: int) -> Callable[[int], Measure]:
    return lambda draw: slower(factors[draw], seed)


def test_shifts_are_those_of_the_closed_form() -> None:
    factors = [1.0, 1.05, 0.9, 1.3]
    capacity = find(slower(1.0, 1), [PROMISE], 0.5, math.inf, Effort(precision=0.03))
    found = errors(drawing(factors, 1), capacity, [PROMISE], Effort(requests=8000), 3)

    assert found is not None
    assert found.shifts == pytest.approx([math.log(truth(f) / truth(1.0)) for f in factors[1:]], abs=0.025)
    assert found.dominate


def test_the_whole_width_covers_a_profile_that_is_five_percent_off() -> None:
    """The plan believes services of mean 1, and draws errors of 5 %; the real system takes 5 % longer."""
    factors = [1.0, *np.exp(0.05 * np.array([-1.5, -0.9, -0.5, -0.15, 0.15, 0.5, 0.9, 1.5]))]
    covered = narrow = 0
    for seed in range(15):
        capacity = find(slower(1.0, seed), [PROMISE], 0.5, math.inf, Effort(precision=0.03))
        found = errors(drawing(factors, seed), capacity, [PROMISE], Effort(), 8)
        assert found is not None
        low, high = found.whole(capacity.rate_per_s)
        covered += low <= truth(1.05) <= high
        narrow += capacity.low <= truth(1.05) <= capacity.high

    assert covered == 15
    assert narrow <= 5


def test_widths_by_hand() -> None:
    """Shifts of ±3 and ±4 %: a root mean square of 3.54 %, times t of 4 degrees of freedom at 97.5 %, 2.776."""
    off = Errors((0.03, -0.03, 0.04, -0.04), 0.02, 0.95)

    assert off.half == pytest.approx(2.7764 * math.sqrt((2 * 9 + 2 * 16) / 4) / 100, rel=1e-4)
    assert off.dominate
    low, high = off.whole(20.0)
    assert math.log(high / low) / 2 == pytest.approx(math.hypot(off.half, 0.02))
    assert not Errors((0.001, -0.001), 0.02, 0.95).dominate


def test_no_capacity_has_no_error() -> None:
    median = Promise(percentile=60, e2el_ms=1e3 * math.log(2))  # of services alone, without any wait
    unreachable = find(Queue([median], 0), [median], 0.5, math.inf, Effort())

    assert not unreachable.reached
    assert errors(drawing([1.0, 1.1], 0), unreachable, [PROMISE], Effort(), 1) is None


def test_draws_in_which_a_load_is_kept() -> None:
    factors = [1.0, 0.8, 0.95, 1.2, 1.5]

    assert kept(drawing(factors, 2), 0.55, [PROMISE], Effort(requests=8000), 4) == 2  # truth(1.2) is 0.43


def test_draws_that_others_tell_of_are_not_simulated() -> None:
    """One factor orders all draws: it takes the dearest, and then those on either side of where the promise breaks."""
    factors = [1.0, 0.8, 0.95, 1.2, 1.5, 0.9, 1.05, 1.4, 1.3]
    looked: list[int] = []

    def measure(draw: int) -> Measure:
        looked.append(draw)
        return slower(factors[draw], 2)

    def priced(draw: int) -> tuple[float, ...]:
        return (math.log(factors[draw]), math.log(factors[draw]))

    effort = Effort(requests=8000)
    assert kept(measure, 0.55, [PROMISE], effort, 8, priced) == kept(measure, 0.55, [PROMISE], effort, 8) == 3
    assert len(looked) <= 4 + 8
    looked.clear()
    assert kept(measure, 0.2, [PROMISE], effort, 8, priced) == 8  # the dearest keeps it
    assert looked == [4]
    looked.clear()
    assert kept(measure, 0.55, [PROMISE], effort, 8, lambda draw: (factors[draw], -factors[draw])) == 3
    assert len(looked) == 8  # none is dearer in both


# ---- systems ----


def ready(**keys: Any) -> Setup:
    arrivals = {"constant": {"rate_per_s": 4}}
    workload = {"requests": 60, "arrivals": arrivals, "prompt_tokens": 300, "output_tokens": 20}
    base = {"model": "llama-3.1-8b", "gpu": "h200", "policy": "vllm", "max_model_len": 4096, "workload": workload}
    return prepare(Document({**base, **keys}, {}, "s.yaml"), Path())


def test_what_is_drawn_depends_on_what_is_known() -> None:
    measured, carried, assumed = (
        ready(gpu=gpu, backend=b) for gpu, b in (("h200", "auto"), ("h100", "auto"), ("h100", "roofline"))
    )
    one, two, three = (drawn(setup, 3).groups[0] for setup in (measured, carried, assumed))

    assert drawn(measured, 0) is measured
    assert isinstance(one.make_backend(measured.model), Resampled)
    assert isinstance(two.backend, Slower)
    assert isinstance(two.backend.settings.build(carried.model, two.gpu, two.parallel), Resampled)
    assert three.backend == Slower(Efficiency(), pytest.approx(three.backend.factor))  # type: ignore[attr-defined]
    factors = [drawn(assumed, i).groups[0].backend.factor for i in range(1, 33)]  # type: ignore[attr-defined]
    assert np.log(factors).std() == pytest.approx(ASSUMED, rel=0.1)
    assert "more recorded runs" in described(measured)
    assert "it is carried: calibrate llama-3.1-8b on it" in described(carried)
    assert "nothing is measured" in described(assumed)
    assert likely(assumed)(3) == pytest.approx(-math.log(factors[2]), abs=1e-6)


@pytest.mark.parametrize("backend", ["roofline", {"name": "profile", "profile": "h200-llama-3.1-8b-vllm-0.23"}])
def test_a_system_twice_as_slow_is_the_same_on_a_slower_clock(backend: Any) -> None:
    fast = ready(backend=backend)
    slow = ready(backend=backend, workload={**_load(2)})
    slow.groups[0].backend = Slower(slow.groups[0].backend, 2.0)
    here, there = (request_latencies(simulate(setup).requests) for setup in (fast, slow))

    for name in ("ttft", "e2el"):
        assert there[name] == pytest.approx(2 * here[name], rel=1e-6)


def _load(rate: float) -> dict[str, Any]:
    arrivals = {"constant": {"rate_per_s": rate}}
    return {"requests": 60, "arrivals": arrivals, "prompt_tokens": 300, "output_tokens": 20}


def test_a_draw_of_errors_may_be_asked_of_auto() -> None:
    auto = ready(backend={"name": "auto", "draw": 2})
    named = ready(backend="h200-llama-3.1-8b-vllm-0.26")
    named.groups[0].backend = ProfileSettings("h200-llama-3.1-8b-vllm-0.26", draw=2)

    assert simulate(auto).to_arrow() == simulate(named).to_arrow()


def test_answers_say_both_widths_and_which_dominates(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "base:\n  model: llama-3.1-8b\n  gpu: h100\n  max_model_len: 4096\n  policy: {name: vllm, max_num_seqs: 32}\n"
        "  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 100, output_tokens: 10}\n"
        "slo: [{percentile: 90, ttft_ms: 100}]\n"
        "search: {requests: 200, most_requests: 800, precision: 0.2, draws: 4}\naxes: {gpu: [h100]}\n"
    )
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")
    [capacity] = json.loads((tmp_path / "out" / "plan.json").read_text())["capacities"]
    text = " ".join(result.out.split())

    assert len(capacity["with_errors"]["draws"]) == 4
    assert capacity["with_errors"]["low"] < capacity["low"] < capacity["high"] < capacity["with_errors"]["high"]
    assert "by errors of the step costs" in text
    assert "the errors dominate" in text
    assert "calibrate llama-3.1-8b on it" in text
    bought = chairlift(
        *("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "o2"), "--jobs", "1", "--rate", "2", "--json")
    )
    margin = json.loads(bought.out)["cheapest"][0]["winner"]["margin"]
    assert (margin["draws"], margin["draws_kept"]) == (4, 4)
