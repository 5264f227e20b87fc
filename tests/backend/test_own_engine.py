"""The shipped profiles of our own engine against runs of it that the fits have not seen (measured on H200s)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chairlift.backend.calibrated.profile import load
from chairlift.backend.fitting.recording import read
from chairlift.sim.calibration.validate import Cell, setup_of, validate
from chairlift.sim.results.metrics import Latencies
from chairlift.sim.simulate import simulate
from kit.places import ROOT

MEASURED = ROOT / "backend" / "gpu" / "measured"
MODELS = ("llama-3.1-8b", "llama-3.1-8b-fp8", "qwen3-30b-a3b", "qwen3-30b-a3b-tp2-ep")


@pytest.fixture(scope="module", params=MODELS)
def cells(request: pytest.FixtureRequest) -> tuple[str, list[Cell]]:
    recording = read(MEASURED / "hardware_check", request.param)
    profile = load(f"h200-{request.param}-chairlift-0.1")
    return request.param, validate(recording, list(recording.experiments.values()), lambda _each: profile)


@pytest.mark.parametrize(
    ("metric", "dense", "fp8", "experts"),
    [
        ("duration", 0.004, 0.002, 0.007),
        ("output_throughput", 0.004, 0.002, 0.007),
        ("steps", 0.015, 0.008, 0.02),
        ("median_ttft_ms", 0.05, 0.04, 0.05),
        ("p90_ttft_ms", 0.04, 0.07, 0.1),
        ("p99_ttft_ms", 0.04, 0.06, 0.22),
        ("median_tpot_ms", 0.025, 0.015, 0.035),
        ("p90_tpot_ms", 0.02, 0.01, 0.025),
        ("p99_tpot_ms", 0.04, 0.01, 0.03),
        ("median_e2el_ms", 0.015, 0.012, 0.03),
        ("p90_e2el_ms", 0.022, 0.015, 0.03),
        ("p99_e2el_ms", 0.015, 0.012, 0.035),
    ],
)
def test_predictions_do_not_get_worse(
    cells: tuple[str, list[Cell]], metric: str, dense: float, fp8: float, experts: float
) -> None:
    model, predicted = cells
    found = {cell.experiment: cell.relative_error for cell in predicted if cell.metric == metric}
    most = experts if model.startswith("qwen") else fp8 if model.endswith("fp8") else dense

    assert set(found) >= {"conv_8", "conv_20"}
    assert all(error is not None and abs(error) <= most for error in found.values()), found


def test_a_high_percentile_of_ttft_rests_on_which_arrivals_meet_in_a_step() -> None:
    """Shifted by up to 2 ms each, 120 arrivals move the p99 of TTFT by more than its band."""
    recording = read(MEASURED / "hardware_check", "qwen3-30b-a3b-tp2-ep")
    setup = setup_of(recording.experiments["conv_8"], recording, load("h200-qwen3-30b-a3b-tp2-ep-chairlift-0.1"))
    random, arrivals = np.random.default_rng(0), setup.trace.arrival_ps
    found = []
    for _ in range(12):
        shift = np.rint(random.uniform(-2e9, 2e9, len(arrivals))).astype(np.int64)
        shifted = replace(setup.trace, arrival_ps=np.sort(np.maximum(arrivals + shift, 0)))
        found.append(np.percentile(Latencies(simulate(replace(setup, trace=shifted)).requests).of("ttft"), [50, 99]))

    median, high = np.array(found).T

    assert high.max() > 1.15 * high.min()
    assert median.max() < 1.1 * median.min()


@pytest.mark.parametrize("model", [*MODELS, "opt-13b", "llama-3.1-8b-eagle3"])
def test_a_profile_is_of_the_grid_that_lies_here(model: str) -> None:
    recording = read(MEASURED / "grid", model)
    profile = load(f"h200-{model}-chairlift-0.1")

    assert profile.provenance["experiments"] == list(recording.experiments)
    assert profile.parallel == recording.parallel
    assert profile.model == recording.shape
    assert {profile.graph_tokens} == {each.limits["graph_tokens"] for each in recording.experiments.values()}
    assert profile.provenance["rows"]["steps"] == sum(len(e.steps["done_s"]) for e in recording.experiments.values())
