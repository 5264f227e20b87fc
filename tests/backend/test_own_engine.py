"""The shipped profile of our own engine against runs of it that the fit has not seen (measured on an H200)."""

from __future__ import annotations

import pytest

from chairlift.backend.calibrated.profile import load
from chairlift.backend.fitting.recording import read
from chairlift.sim.calibration.validate import Cell, validate
from kit.places import ROOT

MEASURED = ROOT / "backend" / "gpu" / "measured" / "hardware_check"


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    recording = read(MEASURED, "llama-3.1-8b")
    profile = load("h200-llama-3.1-8b-chairlift-0.1")
    return validate(recording, list(recording.experiments.values()), lambda _each: profile)


@pytest.mark.parametrize(
    ("metric", "most"),
    [
        ("duration", 0.005),
        ("output_throughput", 0.005),
        ("steps", 0.01),
        ("median_ttft_ms", 0.06),
        ("p90_ttft_ms", 0.09),
        ("p99_ttft_ms", 0.06),
        ("median_tpot_ms", 0.02),
        ("p99_tpot_ms", 0.09),
        ("median_e2el_ms", 0.04),
        ("p99_e2el_ms", 0.01),
    ],
)
def test_predictions_do_not_get_worse(cells: list[Cell], metric: str, most: float) -> None:
    found = {cell.experiment: cell.relative_error for cell in cells if cell.metric == metric}

    assert set(found) == {"conv_8", "conv_20", "small_budget"}
    assert all(error is not None and abs(error) <= most for error in found.values()), found
