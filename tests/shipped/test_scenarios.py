"""Every shipped scenario runs, at a reduced size, and shows what its question says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from chairlift.sim.plan.file import read_plan
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.places import ROOT

SCENARIOS = ROOT / "scenarios"
REDUCED = {  # enough for the effect, little enough for a test
    "routing": 5000,
    "failures": 9000,
    "autoscale": 6000,
    "disaggregated": 3000,
    "chat_sessions": 2500,
    "million": 3000,
}


@cache
def summaries(name: str) -> dict[str, dict[str, Any]]:
    """Variant → summary."""
    study = load(SCENARIOS / f"{name}.yaml", [f"workload.requests={REDUCED[name]}"])
    return {setup.variant: simulate(setup).summary for setup in study.setups}


APART = {file for folder in ("sweeps", "plans") for file in (SCENARIOS / folder).iterdir()}
SHIPPED = sorted({*SCENARIOS.rglob("*.yaml")} - APART)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_scenario_begins_with_its_question(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert text.startswith("# ")
    assert "?" in text.splitlines()[0] + text.splitlines()[1]
    assert "?" in yaml.safe_load(text)["question"]


@pytest.mark.parametrize("name", sorted(REDUCED))
def test_all_requests_end_well(name: str) -> None:
    for variant, summary in summaries(name).items():
        ended = sum(summary[key] for key in ("completed", "rejected", "timed_out", "failed"))
        assert ended == REDUCED[name], variant
        assert summary["rejected"] == summary["timed_out"] == 0, variant
        assert summary["failed"] == 0 or variant == "same, requests fail", variant


def test_routers_rank_as_said() -> None:
    tail = {variant: s["p99_ttft_ms"] for variant, s in summaries("routing").items()}

    assert tail["shortest queue"] < tail["two choices"] < tail["random"]
    assert tail["shortest queue"] < tail["fewest requests"] < tail["fewest, 1 s old"]
    assert tail["two choices, 1 s old"] < tail["fewest, 1 s old"]


def test_a_failure_makes_a_tail_and_failing_requests_loses_them() -> None:
    found = summaries("failures")

    assert found["one away for a minute"]["p99_ttft_ms"] > 1.5 * found["no failure"]["p99_ttft_ms"]
    assert found["one away for a minute"]["completed"] == REDUCED["failures"]
    assert 50 < found["same, requests fail"]["failed"] < 500
    # a replica that is down costs nothing; the run is some 2 % longer
    assert found["each every 5 minutes"]["replica_hours"] < found["no failure"]["replica_hours"] * 1.05


def test_an_autoscaler_saves_hours_and_costs_a_tail() -> None:
    found = summaries("autoscale")
    fixed, quick, slow = (found[v] for v in ("always eight", "60 each, 10 s late", "60 each, 60 s late"))

    assert quick["replica_hours"] < fixed["replica_hours"]
    assert fixed["p99_ttft_ms"] < quick["p99_ttft_ms"] < slow["p99_ttft_ms"]


def test_disaggregation_takes_the_tail_of_itl_and_the_link_delays_only_what_follows() -> None:
    found = summaries("disaggregated")
    apart, slow = found["2 prefill, 2 decode"], found["2 and 2, one slow link"]

    assert apart["p99_itl_ms"] < found["together"]["p99_itl_ms"] / 2
    assert slow["p99_ttft_ms"] == apart["p99_ttft_ms"]
    assert slow["p99_tpot_ms"] > 2 * apart["p99_tpot_ms"]
    assert slow["median_transfer_ms"] > 10 * apart["median_transfer_ms"]


def test_sticky_sessions_find_their_history() -> None:
    hits = {variant: s["prefix_hit_rate"] for variant, s in summaries("chat_sessions").items()}

    assert hits["no cache"] == 0
    assert hits["sticky sessions"] > 0.6
    assert 0 < hits["round robin"] < hits["sticky sessions"] - 0.15


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "llama-3.1-8b-fp8"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_scenario_answers_for_a_mixture_of_experts_and_for_fp8(path: Path, model: str) -> None:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    fewer = ["workload.requests=30"] if "requests" in keys["workload"] else []
    study = load(path, [f"model={model}", *fewer], trust=True)
    for setup in study.setups[:2]:
        if not setup.executes and len(setup.trace) <= 2000:
            assert simulate(setup).summary["completed"] > 0


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "llama-3.1-8b-fp8"])
@pytest.mark.parametrize("path", sorted((SCENARIOS / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_has_systems_for_a_mixture_of_experts_and_for_fp8(path: Path, model: str) -> None:
    candidates = read_plan(path, [f"model={model}"], trust=True).candidates
    setups = [candidate.setup for candidate in candidates if candidate.setup is not None]
    assert setups
    for setup in (setups[0], setups[-1]):
        few = replace(setup, trace=setup.trace.head(60))
        assert simulate(few).summary["completed"] == 60
