"""Runs of our own engine with drafts, by its profile, which is fitted to a grid that has not seen them (one H200)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from chairlift.backend.calibrated.profile import load
from chairlift.backend.fitting.recording import read
from chairlift.sim.calibration.validate import predict
from kit.places import ROOT, TRUTH

MODEL = "llama-3.1-8b-eagle3"
MEASURED = json.loads((ROOT / "backend" / "gpu" / "measured" / "drafted_runs.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(not TRUTH.is_dir(), reason="the recordings of shared/truth are not here")


@pytest.mark.parametrize("run", MEASURED["runs"], ids=lambda run: str(run["name"]))
def test_runs_with_drafts_are_predicted(run: dict[str, Any]) -> None:
    """The requests, the drafts and how many are kept are those of the run recorded with vLLM 0.26."""
    profile = load(f"h200-{MODEL}-chairlift-0.1")
    recording = read(TRUTH / "h200-vllm-0.26", MODEL)
    theirs = recording.experiments[run["name"]]
    same = replace(theirs, limits=theirs.limits | {"graph_tokens": profile.graph_tokens})
    found = predict(same, recording, profile).metrics()

    off = {name: found[name] / value - 1 for name, value in run["ours"].items() if name in found and value}

    bands = {"duration": 0.01, "median": 0.05, "p90": 0.05, "p99": 0.1}
    # the run at 6/s is short by so much; arrivals that are shifted by up to 2 ms move it to between −9 and +5 %
    slack = {"p90_ttft_ms": 0.015}
    held = {name: bands[name.split("_")[0]] + slack.get(name, 0) for name in off if name.split("_")[0] in bands}
    assert len(held) == 10
    assert all(abs(off[name]) < band for name, band in held.items()), off
