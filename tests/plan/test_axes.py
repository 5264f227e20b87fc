"""A pruned race over each kind of axis finds what simulating every system finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from chairlift.sim.plan.bounds import Bounds
from chairlift.sim.plan.cheapest import race
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: vllm
  workload:
    arrivals: {poisson: {rate_per_s: 1}}
    prompt_tokens: {uniform: {low: 100, high: 900}}
    output_tokens: {uniform: {low: 5, high: 40}}
slo:
  - {percentile: 95, ttft_ms: 400}
  - {percentile: 95, tpot_ms: 40}
rate_per_s: RATE
search: {requests: 200, most_requests: 800, precision: 0.1}
"""
DRAFTS = "{method: eagle3, tokens: 2, acceptance: {length: 1.6}}"
SPLITS = ["2", *(f"[{{count: {p}, role: prefill}}, {{count: {d}, role: decode}}]" for p, d in ((1, 1), (1, 2)))]
LINKS = ["null" if split.isdigit() else "{gb_per_s: 50}" for split in SPLITS]
SWAP = "{name: vllm_v0, preemption_mode: swap, max_num_batched_tokens: 4096}"
SPACES = {
    "router": "axes: {router: [round_robin, least_outstanding, power_of_two], replicas: [1, 2, 3]}",
    "tensor and pipeline": "zip: [{parallel: [{tensor: 1}, {tensor: 1}, {tensor: 2}, {pipeline: 2}], "
    "replicas: [1, 2, 1, 1]}]",
    "data and expert": "axes: {model: [qwen3-30b-a3b], parallel: [{tensor: 2}, {tensor: 2, expert: 2}, "
    "{data: 2, expert: 2}], replicas: [2, 6]}",
    "quantised": "axes: {model: [llama-3.1-8b, llama-3.1-8b-fp8], replicas: [1, 2]}",
    "engine": "axes: {policy: [vllm, sglang], replicas: [1, 2]}",
    "version": "axes: {policy.version: [0.23, 0.33], replicas: [1, 2]}",
    "speculation": f"axes: {{speculate: [null, {DRAFTS}], replicas: [1, 2]}}",
    "host memory": f"axes: {{policy: [{SWAP}], kv.blocks: [1200], kv.host_gib: [0, 4], replicas: [1, 2, 3]}}",
    "prefill and decode": f"zip: [{{replicas: [{', '.join(SPLITS)}], link: [{', '.join(LINKS)}]}}]",
}

# Requests a second at which each of a space's systems keeps the promises or breaks them: one that is too near to its
# capacity to say takes 32 long runs, and is no truth to prune by.
RATE = 70
RATES = {"tensor and pipeline": 64, "data and expert": 60, "host memory": 60, "prefill and decode": 80}


@pytest.mark.parametrize("axis", SPACES)
def test_pruned_is_brute_force(axis: str, tmp_path: Path) -> None:
    rate = RATES.get(axis, RATE)
    (tmp_path / "p.yaml").write_text(PLAN.replace("RATE", str(rate)) + SPACES[axis] + "\n")
    plan = read_plan(tmp_path / "p.yaml")
    assert all(candidate.setup is not None for candidate in plan.candidates)
    promises, effort = plan.spec.slo, plan.spec.search.effort()
    with Journal(tmp_path / "out") as journal:
        runs = Simulations(journal, Local(1), tuple(promises))
        pruned, brute = (
            race(plan.candidates, Bounds(promises), runs.of, promises, rate, effort, prune=prune)
            for prune in (True, False)
        )

    assert pruned.winner is not None
    assert brute.winner is not None
    assert pruned.winner.usd_per_hour == brute.winner.usd_per_hour
    truth = {entry.candidate.name: entry.outcome for entry in brute.entries}
    assert all(truth[entry.candidate.name] == "broken" for entry in pruned.of("excluded"))
    assert all(truth[entry.candidate.name] == entry.outcome for entry in pruned.entries if entry.verdict is not None)
    assert set(truth.values()) == {"kept", "broken"}  # of both kinds, and nothing open
