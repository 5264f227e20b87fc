"""A scenario at another rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from chairlift.sim.plan.pacing import paced
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document, read
from kit.command import SCENARIO


def scenario(folder: Path, text: str = SCENARIO) -> Document:
    (folder / "s.yaml").write_text(text)
    return read(folder / "s.yaml")


def test_paced_arrivals_keep_their_pattern_and_bursts_replace_it(tmp_path: Path) -> None:
    document = scenario(tmp_path)
    same, bursty = paced(document, 20.0, 50, seed=3), paced(document, 20.0, 50, cv=2.0)
    slow, fast = (prepare(paced(document, rate, 50, seed=3), tmp_path).trace for rate in (2.0, 20.0))

    assert same.data["workload"]["arrivals"] == {"poisson": {"rate_per_s": 20.0}}
    assert bursty.data["workload"]["arrivals"] == {"gamma": {"rate_per_s": 20.0, "cv": 2.0}}
    assert (same.data["seed"], same.data["workload"]["requests"]) == (3, 50)
    assert document.data["workload"]["arrivals"] == {"poisson": {"rate_per_s": 2}}  # untouched
    assert slow.prompt_tokens.tolist() == fast.prompt_tokens.tolist()
    assert slow.arrival_ps.tolist() == pytest.approx((10 * fast.arrival_ps).tolist(), abs=20)
