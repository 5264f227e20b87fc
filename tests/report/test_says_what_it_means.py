"""Numbers say what they are of, and in which unit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.backend import specs
from kit.command import SCENARIO, chairlift

FLEET = "replicas: [{count: 1}, {count: 2, gpu: h100}]\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_mixed_fleet_says_the_step_costs_of_each_gpu() -> None:
    Path("fleet.yaml").write_text(SCENARIO + FLEET)
    chairlift("run", "fleet.yaml", "--out", "out", "-q")

    told = json.loads(Path("out/summary.json").read_text())["assumptions"]
    weights = specs.MODELS["opt-13b"].weight_bytes
    for name, count in (("a100-40gb", 1), ("h100", 2)):
        read_ms = weights / (0.8 * specs.GPUS[name].hbm_gb_per_s * 1e9) * 1e3
        assert told[f"decode floor, {count} × {name} mixed"].startswith(f"{read_ms:.2f} ms")
        assert name in told[f"cost model, {count} × {name} mixed"]
    assert "decode floor" not in told
    assert "efficiency" in told  # the same on both, so said once


def test_a_fleet_of_one_kind_says_them_once() -> None:
    Path("fleet.yaml").write_text(SCENARIO + "replicas: 3\n")
    chairlift("run", "fleet.yaml", "--out", "out", "-q")

    assert "decode floor" in json.loads(Path("out/summary.json").read_text())["assumptions"]


def test_compare_names_metrics_with_their_units() -> None:
    Path("small.yaml").write_text(SCENARIO)
    Path("sweep.yaml").write_text("base: small.yaml\nseeds: 2\naxes: {policy: [vllm, orca]}\n")
    chairlift("sweep", "sweep.yaml", "-q", "--jobs", "1")

    told = chairlift("compare", "runs/sweep", "--metric", "p99_ttft_ms", "--metric", "duration").out
    assert "TTFT p99, ms p99_ttft_ms" in told
    assert "duration, s duration" in told
