"""Plans with replicas that come and go: they cost what was paid for, loading included, and may win by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.sim.plan.bounds import bound
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local
from kit.command import chairlift

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: l4
  backend: roofline
  max_model_len: 2048
  policy: {name: vllm, max_num_seqs: 32}
  workload:
    arrivals: {on_off: {rate_per_s: 12, on_s: 60, off_s: 60}}
    prompt_tokens: 200
    output_tokens: 20
slo: [{percentile: 80, ttft_ms: 30000}]
rate_per_s: 6
search: {requests: 1000, most_requests: 2000, draws: 0}
prices: {l4: 1.0}
zip:
  - replicas: [4, 1, 1]
    autoscale:
      - null
      - {min: 1, max: 4, every_s: 5, provision_s: 5, load_s: 5, target_outstanding: 16, stabilise_down_s: 10}
      - {min: 1, max: 4, every_s: 5, provision_s: 5, load_s: 20, target_outstanding: 16, stabilise_down_s: 10}
"""


def test_an_autoscaled_system_costs_what_was_paid_for(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PLAN)
    plan = read_plan(tmp_path / "p.yaml")
    fixed, quick, _ = plan.candidates
    with Journal(tmp_path) as journal:
        runs = Simulations(journal, Local(1), tuple(plan.spec.slo))
        [one], [two], [three] = (runs.of(each)(6.0, 1000, 1) for each in plan.candidates)

    assert (fixed.usd_per_hour, quick.usd_per_hour) == (4, 1)  # of the fewest: what it costs is measured
    assert (fixed.gpus, quick.gpus) == (4, 4)
    assert fixed.least_s == 0
    assert quick.least_s == 6 * (5 + 5 + 5 + 10)
    assert one.replicas == []
    assert 1 < two.replicas[0] < 4
    assert three.replicas[0] > two.replicas[0] * 0.8  # what loads longer is paid for longer
    assert two.end_s > quick.least_s * 0.7
    assert bound(quick, []).rate_per_s == pytest.approx(bound(fixed, []).rate_per_s)


def test_the_cheapest_may_be_one_that_scales(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PLAN)
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")
    told = json.loads((tmp_path / "out" / "plan.json").read_text())["cheapest"][0]
    by = {system["number"]: system for system in told["systems"]}

    assert result.status == 0, result.err
    winner = told["winner"]
    assert 1 < winner["usd_per_hour"] < 4
    assert winner["usd_per_hour"] == pytest.approx(winner["replicas"][0])  # at $1 an hour
    assert by[3]["outcome"] in ("kept", "dearer")  # four at all times will do, for more
    assert "replicas were paid for on average, loading included" in " ".join(result.out.split())
    assert "autoscaling:" in result.out
