"""Replicas on spot instances, held to queues and coins that are known in closed form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import Effort, Measure
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.headroom import Beside
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.questions import Spot
from chairlift.sim.plan.spot import cheapest_on_spot, on_spot
from kit.command import chairlift
from kit.queues import Queue

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: vllm
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 1000, output_tokens: 100}
slo: [{percentile: 90, e2el_ms: 100000}]
rate_per_s: 1
search: {requests: 200}
prices: {h100: 3.6}
axes: {replicas: [1, 2, 3, 4]}
"""
PROMISE = Promise(share=0.9, e2el_ms=5757)
EFFORT = Effort(requests=4000)
RATE = 0.9  # of all replicas together, each of which serves 1/s on average


def systems(folder: Path) -> list[Candidate]:
    (folder / "p.yaml").write_text(PLAN)
    return read_plan(folder / "p.yaml").candidates


def queues(candidate: Candidate) -> Measure:
    """Replicas that are M/M/1 queues and share the load evenly."""
    assert candidate.setup is not None
    count = sum(group.count for group in candidate.setup.groups)
    return lambda rate, requests, replications: Queue([PROMISE], 1)(rate / count, requests, replications)


def bounds(candidate: Candidate) -> Bound:
    assert candidate.setup is not None
    return Bound(float(sum(group.count for group in candidate.setup.groups)), "")


def met(replicas: int) -> float:
    """Of M/M/1 queues: the stay is exponential with rate 1 − λ."""
    return 1 - math.exp(-(1 - RATE / replicas) * 5.757)


def share(replicas: int, away: float) -> float:
    """Of all requests, those that meet the promise; nobody does where no replica is left."""
    coins = [math.comb(replicas, k) * away**k * (1 - away) ** (replicas - k) for k in range(replicas)]
    return sum(coin * met(replicas - k) for k, coin in enumerate(coins))


def test_coins_by_hand() -> None:
    """12 hours held and 10 minutes away: 10 of 730 minutes."""
    spot = Spot(off_percent=60, hours_between_losses=12, minutes_until_back=10)

    assert spot.away == pytest.approx(0.0137, abs=5e-5)
    assert spot.gone(4)[:2] == [pytest.approx(0.946, abs=5e-4), pytest.approx(0.0526, abs=5e-4)]
    assert sum(spot.gone(4)) == pytest.approx(1)


@pytest.mark.parametrize(("minutes", "proof"), [(10, 1), (180, -1)])
def test_the_share_is_the_mean_over_what_is_left(tmp_path: Path, minutes: float, proof: int) -> None:
    spot = Spot(off_percent=60, hours_between_losses=12, minutes_until_back=minutes)
    found = on_spot(systems(tmp_path)[1], spot, Beside(RATE, [PROMISE], bounds, queues, EFFORT))
    truth, backlog = share(2, spot.away), spot.away**2  # of the backlog after both are gone the least is thought

    assert found.low <= truth <= found.high
    assert found.low + backlog <= truth
    assert found.high - found.low < 0.2
    assert (found.proof, found.worst) == (proof, PROMISE)
    assert found.usd_per_hour == pytest.approx(0.4 * 7.2)


def test_it_takes_more_replicas_where_losses_are_long(tmp_path: Path) -> None:
    """Two hold 95.8 % on demand; away for a fifth of the time, two meet 75 %, three 91 %, four 97 %."""
    spot = Spot(off_percent=60, hours_between_losses=12, minutes_until_back=180)
    candidates = systems(tmp_path)
    found = cheapest_on_spot(candidates, candidates[1], spot, Beside(RATE, [PROMISE], bounds, queues, EFFORT))

    assert [each.candidate.gpus for each in found] == list(range(2, found[-1].candidate.gpus + 1))
    assert [share(n, spot.away) for n in (2, 3, 4)] == pytest.approx([0.753, 0.913, 0.965], abs=1e-3)
    assert found[-1].proof == 1
    assert found[-1].candidate.gpus in (3, 4)
    assert all(each.proof < 1 for each in found[:-1])


def test_what_the_rest_cannot_serve_counts_twice(tmp_path: Path) -> None:
    """Nobody meets the promise where one is gone, nor for as long again after; 2.7 % of the time one is."""
    spot = Spot(off_percent=60, hours_between_losses=12, minutes_until_back=10)

    def tight(candidate: Candidate) -> Bound:
        return Bound(bounds(candidate).rate_per_s - 1.05, "")

    found = on_spot(systems(tmp_path)[1], spot, Beside(RATE, [PROMISE], tight, queues, EFFORT))
    there, one_gone = spot.gone(2)[:2]

    assert found.high <= there
    assert found.low < there * met(2) - one_gone


def test_the_command_answers(tmp_path: Path) -> None:
    """One replica serves the load; it is away 1.4 % of the time, which a p90 forgives."""
    ask = "ask: {spot: {off_percent: 60, hours_between_losses: 12, minutes_until_back: 10}}\n"
    (tmp_path / "p.yaml").write_text(PLAN + ask)
    out = tmp_path / "out"
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(out), "--jobs", "1")
    told = "on spot at 60 % less, each replica taken every 12 h for 10 min: replicas 1 for $1.44/h keeps the promises"

    assert result.status == 0, result.err
    assert f"at 1 requests/s {told}" in " ".join(result.out.split())
    assert told in (out / "plan.html").read_text()
