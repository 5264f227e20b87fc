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
from chairlift.sim.plan.cheapest import Race, race
from chairlift.sim.plan.costs import cost_of, tokens_of
from chairlift.sim.plan.deciding import Effort, Looks, decide
from chairlift.sim.plan.file import BuyingPlan, read_plan
from chairlift.sim.plan.headroom import Beside, bracket, margin
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
    found = margin(two, Beside(0.9, [promise], bounds, measure, Effort(requests=4000)))
    alone = margin(system(tmp_path, 1), Beside(0.45, [promise], bounds, measure, Effort(requests=4000)))

    assert (found.kept, found.broken, found.one_less) == (1.25, 1.5, "broken")  # 1.2 / 0.9 = 1.33
    assert (alone.kept, alone.broken, alone.one_less) == (1.25, 1.5, "")
    assert "1.25 × the load is kept, 1.5 × would break a promise" in str(found)
    assert margin(two, Beside(0.5, [promise], bounds, measure, Effort(requests=4000))).one_less == "kept"
    assert margin(two, Beside(0.9, [promise], lambda _: Bound(1.0, ""), measure, Effort(requests=4000))).broken <= 1.25


def test_the_rough_capacity_of_a_queue_on_a_front(tmp_path: Path) -> None:
    """The M/M/1 queue again, known to keep the promise at 0.3/s; no schedule serves more than 1/s."""
    promise = Promise(share=0.9, e2el_ms=5757)
    queue, effort = Queue([promise], 4), Effort(requests=4000)
    kept = decide(queue, [promise], 0.3, effort)
    before = queue.served
    bounded = bracket(queue, [promise], kept, 1.0, effort, 0.1)
    spent = queue.served - before
    free = bracket(queue, [promise], kept, math.inf, effort, 0.1)
    loose = bracket(Queue([promise], 4), [promise], kept, 0.65, effort, 0.5)

    assert kept.proof == 1
    for found in (bounded, free):
        assert found.low <= 0.6 <= found.high <= found.low * math.exp(0.2001)
        assert abs(found.rate_per_s / 0.6 - 1) < 0.1
        assert found.limiting is promise
        assert {verdict.proof for verdict in found.verdicts if verdict.rate_per_s <= found.low} == {1}
    assert spent < 8 * 16 * 4000
    assert (loose.low, loose.high) == (0.3, 0.65)  # near enough as it is
    assert [verdict.rate_per_s for verdict in loose.verdicts] == [0.3]


def test_decisions_are_right_as_often_as_they_say() -> None:
    """Proofs are of 95 %; ten percent off the capacity of an M/M/1 queue, hardly one of forty may be wrong or open."""
    promise = Promise(share=0.9, e2el_ms=5757)
    proofs = {
        times: Counter(decide(Queue([promise], seed), [promise], 0.6 * times, Effort()).proof for seed in range(40))
        for times in (0.9, 1.1)
    }

    assert proofs[0.9][1] >= 38
    assert proofs[1.1][-1] >= 38


@pytest.mark.parametrize(("times", "right"), [(0.99, 1), (1.01, -1)])
def test_looking_again_and_again_errs_no_more_than_once(times: float, right: int) -> None:
    """One percent off the capacity of an M/M/1 queue some nine looks are taken, most of which prove nothing.

    2.5 % may be wrong either way, so that of 200 more than 10 are with a probability of 1 %: 5.5 % were before each
    look had a level of its own.
    """
    promise = Promise(share=0.9, e2el_ms=5757)
    effort = Effort(requests=500, precision=0.002)
    proofs = Counter(decide(Queue([promise], seed), [promise], 0.6 * times, effort).proof for seed in range(200))

    assert proofs[-right] <= 10
    assert proofs[right] > 15


def test_the_risks_of_all_looks_by_hand() -> None:
    """From 2,000 requests to 64,000 there are five doublings: six shares of 5 %, of which three were not spent."""
    looks = Looks(0.95, 2000, 64_000)

    assert [1 - looks.at(n) for n in (2000, 8000, 8000)] == pytest.approx([0.05 / 6, 0.05 / 3, 0.05 / 3])
    assert looks.spent == pytest.approx(0.5)
    assert 1 - looks.at(64_000) == pytest.approx(0.05 / 2)


def test_a_precision_says_how_near_to_its_limit_a_system_is_told_from_it() -> None:
    """At its very capacity nothing can be told of an M/M/1 queue: with a coarse precision that costs less."""
    promise = Promise(share=0.9, e2el_ms=5757)
    spent = []
    for precision in (0.002, 0.1):
        queue = Queue([promise], 3)
        assert decide(queue, [promise], 0.6, Effort(precision=precision)).proof == 0
        spent.append(queue.served)

    assert spent[1] < spent[0] / 2


def test_systems_that_serve_short_runs_alike_are_simulated_once(tmp_path: Path) -> None:
    """Batches of 64 and of 128 are beyond what the load reaches, those of 8 are not: as queues, 0.7 times as fast."""
    promise = Promise(share=0.9, e2el_ms=5757)
    candidates = plan(tmp_path, "axes: {policy.max_num_seqs: [8, 64, 128]}\n").candidates
    simulated: Counter[int] = Counter()

    def measure(candidate: Candidate):  # type: ignore[no-untyped-def]
        limit = int(candidate.labels["policy.max_num_seqs"])
        speed = 0.7 if limit == 8 else 1.0
        queue = Queue([Promise(share=0.9, e2el_ms=5757 * speed)], 1)

        def measured(rate: float, requests: int, replications: int):  # type: ignore[no-untyped-def]
            simulated[limit] = max(simulated[limit], requests * replications)
            return queue(rate / speed, requests, replications)

        return measured

    def raced(wanted: int) -> Race:
        found = race(candidates, lambda _: Bound(1.0, ""), measure, [promise], 0.45, Effort(), wanted=wanted)
        assert found.winner is not None
        return found

    found = raced(8)
    outcomes = {entry.candidate.labels["policy.max_num_seqs"]: entry.outcome for entry in found.entries}

    assert sorted((outcomes[64], outcomes[128])) == ["behind", "kept"]
    assert outcomes[8] == "broken"  # its capacity is 0.3/s
    assert "serves short runs as it does" in found.of("behind")[0].why
    assert min(simulated[64], simulated[128]) == 2000  # four short runs


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
