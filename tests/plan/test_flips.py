"""What would change a plan's answer, held to queues whose capacity is known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.cheapest import Race, race
from chairlift.sim.plan.deciding import Effort
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.flips import Change, changes
from chairlift.sim.plan.promises import Promise
from kit.command import chairlift
from kit.pages import Page
from kit.queues import Queue

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: {name: vllm, max_num_seqs: 64}
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 1000, output_tokens: 100}
slo: [{share: 0.9, e2el_ms: 5757}]
rate_per_s: 1
search: {requests: 200, most_requests: 200, draws: 0}
prices: {h100: 3, h200: 4}
axes: {gpu: [h100, h200], replicas: [1, 2, 3]}
"""
SPEED = {"h100": 1.0, "h200": 2.0}


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Change]:
    """At 1/s, M/M/1 queues of one service a second (h100) and two (h200): up to 0.6/s and 1.6/s each."""
    (tmp_path / "p.yaml").write_text(PLAN)
    plan = read_plan(tmp_path / "p.yaml")

    def ask(candidates: Sequence[Candidate], promises: Sequence[Promise], rate: float) -> Race:
        def measure(candidate: Candidate):  # type: ignore[no-untyped-def]
            speed = SPEED[str(candidate.labels["gpu"])]
            own = [Promise(share=p.wanted, e2el_ms=p.limits()["e2el"] * speed) for p in promises]
            queue = Queue(own, 1)
            return lambda rate, requests, replications: queue(rate / candidate.gpus / speed, requests, replications)

        return race(candidates, lambda _: Bound(math.inf, ""), measure, promises, rate, Effort(requests=4000))

    answer = ask(plan.candidates, plan.spec.slo, 1.0)
    assert answer.winner is not None
    assert answer.winner.candidate.name == "gpu h200, replicas 1"
    return {each.what: each for each in changes(plan.candidates, plan.spec.slo, 1.0, answer.winner, ask)}


def test_the_load_flips_the_answer_where_closed_forms_say(found: dict[str, Change]) -> None:
    load = found["load"]

    assert load.more is not None
    assert load.less is not None
    assert load.more.sure * 0.97 < 1.6 < load.more.times * 1.03  # two h200s at $8 then, three h100s cost $9
    assert load.more.to == "gpu h200, replicas 2, $8.00/h"
    assert load.less.times * 0.97 < 0.6 < load.less.sure * 1.03
    assert load.less.to == "gpu h100, replicas 1, $3.00/h"
    assert load.less.sure / load.less.times == pytest.approx(2 ** (1 / 16))
    assert load.usd == (4, 4)


def test_prices_flip_it_where_two_systems_cost_the_same(found: dict[str, Change]) -> None:
    """Two h100s at $6 will do as one h200 at $4 does."""
    own, other = found["price of h200"], found["price of h100"]

    assert own.more is not None
    assert own.more.times == pytest.approx(1.5)
    assert own.more.to == "gpu h100, replicas 2, $6.00/h"
    assert own.less is None
    assert own.usd == pytest.approx((4 / 1.2, 4.8))
    assert other.less is not None
    assert other.less.times == pytest.approx(4 / 6)
    assert other.more is None
    assert other.usd == pytest.approx((4, 4))


def test_limits_that_change_nothing_flip_nothing(found: dict[str, Change]) -> None:
    """An h200 keeps half of the limit up to 2 − 2.3 / 2.88 = 1.2/s, and an h100 twice of it up to 0.8/s."""
    limit = found["limit of p90 E2E ≤ 5757 ms"]

    assert limit.less is limit.more is None
    assert limit.nearest == math.inf


def test_a_plan_says_what_would_change_its_answer(tmp_path: Path) -> None:
    """Prompts of 1000 tokens within 100 s at 1/s: any system will do, and at half of the load too."""
    (tmp_path / "p.yaml").write_text(PLAN.replace("e2el_ms: 5757", "e2el_ms: 100000"))
    out = tmp_path / "out"
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(out), "--jobs", "1", "--what-would-change")
    told = json.loads((out / "plan.json").read_text())["changes"]
    by = {each["what"]: each for each in told}
    page = (out / "plan.html").read_text()

    assert result.status == 0, result.err
    assert list(by) == ["price of h100", "price of h200", "load", "limit of p90 E2E ≤ 100000 ms"]  # the nearest first
    assert by["load"]["less"] is None
    assert by["price of h100"]["more"]["times"] == pytest.approx(4 / 3)
    assert by["price of h200"]["less"]["times"] == pytest.approx(3 / 4)
    assert by["price of h100"]["usd_per_hour"] == pytest.approx([2.5, 3.6])
    sentence = "The cheapest that keeps p90 E2E ≤ 100000 ms at 1 requests/s is gpu h100, replicas 1, for $3.00 an hour."
    assert sentence in " ".join(result.out.split())
    assert sentence in page
    assert page.index(sentence) < page.index("Cheapest system") < page.index("What would change the answer")
    assert Page(out / "plan.html").links == []
