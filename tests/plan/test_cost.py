"""What a plan says of money and of margin, by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Effort
from chairlift.sim.plan.cheapest import Race, race
from chairlift.sim.plan.costs import cost_of, tokens_of
from chairlift.sim.plan.file import BuyingPlan, read_plan
from chairlift.sim.plan.headroom import margin
from chairlift.sim.plan.promises import Promise
from kit.command import chairlift
from kit.queues import Queue, mm1_capacity

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: vllm
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 1000, output_tokens: 100}
slo: [{percentile: 90, ttft_ms: 1000}]
rate_per_s: 10
search: {requests: 200}
prices: {h100: 3.6}
"""


def plan(folder: Path, axes: str = "axes: {replicas: [1, 2]}\n") -> BuyingPlan:
    (folder / "plan.yaml").write_text(PLAN + axes)
    return read_plan(folder / "plan.yaml")


def test_dollars_a_million_tokens_by_hand(tmp_path: Path) -> None:
    """$3.60 an hour over 36 million tokens in and 3.6 million out."""
    found = plan(tmp_path)
    one, two = found.systems
    cost = cost_of(one, 10.0, found.prices)

    assert tokens_of(one) == (1000, 100)
    assert cost.all == pytest.approx(3.6 / 39.6)
    assert cost.into * 36 + cost.out * 3.6 == pytest.approx(3.6)
    assert 0 < cost.into < cost.out  # a token out takes longer than one in
    assert cost_of(two, 10.0, found.prices).all == pytest.approx(2 * cost.all)
    assert cost_of(one, 20.0, found.prices).into == pytest.approx(cost.into / 2)


def test_prefill_replicas_are_paid_for_prompts(tmp_path: Path) -> None:
    groups = "[{count: 3, role: prefill}, {count: 1, role: decode}]"
    found = plan(tmp_path, f"zip: [{{replicas: [{groups}], link: [{{gb_per_s: 50}}]}}]\n")
    cost = cost_of(found.systems[0], 10.0, found.prices)

    assert cost.into * 36 == pytest.approx(3 * 3.6)
    assert cost.out * 3.6 == pytest.approx(3.6)


def system(folder: Path, replicas: int) -> Candidate:
    return plan(folder, f"axes: {{replicas: [{replicas}]}}\n").systems[0]


def test_the_margin_of_a_queue_whose_capacity_is_known(tmp_path: Path) -> None:
    """An M/M/1 queue keeps "90 %: E2E ≤ 5757 ms" up to 0.6/s; two share the load evenly and keep it up to 1.2/s."""
    promise = Promise(share=0.9, e2el_ms=5757)
    assert mm1_capacity(0.9, 5.757) == pytest.approx(0.6, abs=1e-3)

    def measure(candidate: Candidate):  # type: ignore[no-untyped-def]
        assert candidate.setup is not None
        count = sum(group.count for group in candidate.setup.groups)
        return lambda rate, requests, replications: Queue([promise], 1)(rate / count, requests, replications)

    def bounds(_: Candidate) -> Bound:
        return Bound(math.inf, "")

    two = system(tmp_path, 2)
    found = margin(two, 0.9, [promise], bounds, measure, Effort(requests=4000))
    alone = margin(system(tmp_path, 1), 0.45, [promise], bounds, measure, Effort(requests=4000))

    assert (found.kept, found.broken, found.one_less) == (1.25, 1.5, "broken")  # 1.2 / 0.9 = 1.33
    assert (alone.kept, alone.broken, alone.one_less) == (1.25, 1.5, "")
    assert "1.25 × the load is kept, 1.5 × would break a promise" in str(found)
    assert margin(two, 0.5, [promise], bounds, measure, Effort(requests=4000)).one_less == "kept"
    assert margin(two, 0.9, [promise], lambda _: Bound(1.0, ""), measure, Effort(requests=4000)).broken <= 1.25


def test_a_race_says_how_far_it_is(tmp_path: Path) -> None:
    promise = Promise(share=0.9, e2el_ms=5757)
    said: list[str] = []
    candidates = plan(tmp_path, "axes: {replicas: [1, 2, 3, 4]}\n").candidates

    def measure(candidate: Candidate):  # type: ignore[no-untyped-def]
        return lambda rate, requests, replications: Queue([promise], 1)(rate / candidate.gpus, requests, replications)

    def bounds(candidate: Candidate) -> Bound:
        return Bound(0.8 * candidate.gpus, "")

    found = race(candidates, bounds, measure, [promise], 1.5, Effort(requests=2000), told=said.append)

    assert found.winner is not None
    assert found.winner.candidate.gpus == 3
    assert "0 raced, 1 excluded, 3 of 4 left" in said[0]
    assert "1 raced, 1 excluded, 2 of 4 left, " in said[1]
    assert said[1].endswith(" s at most")


def test_answers_say_cost_and_margin(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN + "axes: {replicas: [1, 2]}\nfront: true\n")
    result = chairlift("plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    winner = told["cheapest"][0]["winner"]
    text = " ".join(result.out.split())

    assert winner["usd_per_million_tokens"]["all"] == pytest.approx(winner["usd_per_hour"] / 39.6)
    assert "$0.0909 per million tokens" in text
    assert winner["margin"]["kept"] >= 1
    assert all(point["usd_per_million_tokens"]["out"] > 0 for point in told["front"])
    assert np.isfinite(winner["margin"]["broken"] or 0)
    assert "1,000 in and 100 out a request" in text
    assert "per million tokens" in (tmp_path / "out" / "plan.html").read_text()


def test_a_race_with_heats_finds_what_brute_force_finds(tmp_path: Path) -> None:
    """Replicas that are M/M/1 queues keep "90 %: E2E ≤ 5757 ms" up to 0.6/s each, at 1.2 times the speed to 0.79/s."""
    promise = Promise(share=0.9, e2el_ms=5757)
    axes = "axes: {replicas: [1, 2, 3, 4], policy.max_num_seqs: [8, 16, 24, 32, 40, 48, 56, 64]}\n"
    candidates = plan(tmp_path, axes).candidates
    simulated: Counter[str] = Counter()

    def capacity(candidate: Candidate) -> float:
        speed = 1.2 if candidate.labels["policy.max_num_seqs"] == 40 else 1.0
        return candidate.gpus * speed * (1 + math.log(0.1) / (5.757 * speed))

    def measure(candidate: Candidate):  # type: ignore[no-untyped-def]
        speed = 1.2 if candidate.labels["policy.max_num_seqs"] == 40 else 1.0
        queue = Queue([Promise(share=0.9, e2el_ms=5757 * speed)], 1)  # on the clock of its services

        def measured(rate: float, requests: int, replications: int):  # type: ignore[no-untyped-def]
            simulated[candidate.name] += requests * replications
            return queue(rate / candidate.gpus / speed, requests, replications)

        return measured

    def bounds(candidate: Candidate) -> Bound:
        return Bound(1.2 * candidate.gpus, "")

    def raced(prune: bool) -> Race:
        return race(candidates, bounds, measure, [promise], 1.5, Effort(requests=4000), prune=prune)

    pruned = raced(True)
    effort = sum(simulated.values())
    simulated.clear()
    brute = raced(False)

    assert pruned.winner is not None
    assert brute.winner is not None
    assert pruned.winner.candidate.name == brute.winner.candidate.name == "replicas 2, max_num_seqs 40"
    for found in (pruned, brute):
        assert all(capacity(e.candidate) > 1.5 for e in found.of("kept"))
        assert all(capacity(e.candidate) < 1.5 for e in [*found.of("broken"), *found.of("excluded")])
    assert {e.candidate.gpus for e in pruned.of("behind")} == {2}  # as dear as the answer
    assert len(pruned.entries) == len(brute.entries) == 32
    assert effort < sum(simulated.values()) / 4
