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
from chairlift.sim.plan.deciding import Effort, Measure
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.flips import Ask, Change, Flip, changes
from chairlift.sim.plan.headroom import Beside, Margin, margin
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


def unbounded(_: Candidate) -> Bound:
    return Bound(math.inf, "")


def asking(folder: Path, effort: Effort, seed: int = 1) -> tuple[list[Candidate], list[Promise], Ask]:
    """M/M/1 queues of one service a second (h100) and of two (h200): up to 0.6/s and 1.6/s each."""
    (folder / "p.yaml").write_text(PLAN)
    plan = read_plan(folder / "p.yaml")

    def ask(candidates: Sequence[Candidate], promises: Sequence[Promise], rate: float) -> Race:
        return race(candidates, unbounded, lambda each: queue(each, promises, seed), promises, rate, effort)

    return plan.candidates, plan.spec.slo, ask


def queue(candidate: Candidate, promises: Sequence[Promise], seed: int) -> Measure:
    speed = SPEED[str(candidate.labels["gpu"])]
    own = Queue([Promise(share=p.wanted, e2el_ms=p.limits()["e2el"] * speed) for p in promises], seed)
    return lambda rate, requests, replications: own(rate / candidate.gpus / speed, requests, replications)


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Change]:
    candidates, promises, ask = asking(tmp_path, Effort(requests=4000))
    answer = ask(candidates, promises, 1.0)
    assert answer.winner is not None
    assert answer.winner.candidate.name == "gpu h200, replicas 1"
    return {each.what: each for each in changes(candidates, promises, 1.0, answer.winner, ask)}


def test_the_load_flips_the_answer_where_closed_forms_say(found: dict[str, Change]) -> None:
    load = found["load"]

    assert load.more is not None
    assert load.less is not None
    assert load.more.sure * 0.97 < 1.6 < load.more.times * 1.03  # two h200s at $8 then, three h100s cost $9
    assert "×: gpu h200, replicas 2, $8.00/h, in place of gpu h200, replicas 1, $4.00/h" in str(load.more)
    assert load.less.times * 0.97 < 0.6 < load.less.sure * 1.03
    assert str(load.less).endswith("×: gpu h100, replicas 1, $3.00/h, in place of gpu h200, replicas 1, $4.00/h")
    for flip in (load.less, load.more):
        assert abs(math.log(flip.times / flip.sure)) <= math.log(2) / 16 + 1e-9
    assert load.usd == (4, 4)


def test_prices_flip_it_where_two_systems_cost_the_same(found: dict[str, Change]) -> None:
    """Two h100s at $6 will do as one h200 at $4 does: both cost $6 with an h200 at $6, and $4 with an h100 at $2."""
    own, other = found["price of h200"], found["price of h100"]

    assert own.more is not None
    assert own.more.times == pytest.approx(1.5)
    assert str(own.more) == "1.5 ×: gpu h100, replicas 2, $6.00/h, in place of gpu h200, replicas 1, $6.00/h"
    assert own.less is None
    assert own.usd == pytest.approx((4 / 1.2, 4.8))
    assert other.less is not None
    assert other.less.times == pytest.approx(4 / 6)
    assert str(other.less) == "0.667 ×: gpu h100, replicas 2, $4.00/h, in place of gpu h200, replicas 1, $4.00/h"
    assert other.more is None
    assert other.usd == pytest.approx((4, 4))


def test_limits_that_change_nothing_flip_nothing(found: dict[str, Change]) -> None:
    """An h200 keeps half of the limit up to 2 − 2.3 / 2.88 = 1.2/s, and an h100 twice of it up to 0.8/s."""
    limit = found["limit of p90 E2E ≤ 5757 ms"]

    assert limit.less is limit.more is None
    assert limit.nearest == math.inf


@pytest.mark.parametrize("seed", range(4))
def test_a_margin_and_a_flip_are_of_one_mind(tmp_path: Path, seed: int) -> None:
    """Runs of 400 requests cannot tell much, and so little that another look at a load may see less than the margin.

    An h200 serves up to 1.6/s: a flip before that is none of which the runs are sure.
    """
    effort = Effort(requests=400, most_requests=400, precision=0.05)
    candidates, promises, ask = asking(tmp_path, effort, seed)
    best = ask(candidates, promises, 1.0).winner
    assert best is not None
    beside = Beside(1.0, promises, unbounded, lambda each: queue(each, promises, seed), effort)
    spare = margin(best.candidate, beside)
    load = next(iter(changes(candidates, promises, 1.0, best, ask, spare)))

    assert spare.kept >= 1.25
    assert load.more is not None
    assert spare.kept <= load.more.sure < load.more.times <= spare.broken
    assert load.more.times > 1.6 or not load.more.proven
    assert ("too close to say" in str(load.more)) == (not load.more.proven)


def test_what_a_margin_has_shown_is_not_simulated_again(tmp_path: Path) -> None:
    """Kept at 1.5 times the load: a fifth more changes no price. Broken at twice: there others are raced."""
    candidates, promises, ask = asking(tmp_path, Effort(requests=4000))
    best = ask(candidates, promises, 1.0).winner
    assert best is not None
    asked: list[tuple[float, bool]] = []

    def counted(some: Sequence[Candidate], under: Sequence[Promise], rate: float) -> Race:
        asked.append((rate, any(each is best.candidate for each in some)))
        return ask(some, under, rate)

    load = next(iter(changes(candidates, promises, 1.0, best, counted, Margin(1.5, 2.0, "broken"))))

    assert [rate for rate, _ in asked if 1 <= rate < 1.5] == []
    assert [(rate, own) for rate, own in asked if rate >= 2] == [(2.0, False)]
    assert load.more is not None
    assert load.more.sure * 0.97 < 1.6 < load.more.times * 1.03
    assert load.usd == (4, 4)


def test_nothing_that_will_do_is_said_so() -> None:
    flip = Flip(1.5, 1.45, "gpu h100, replicas 3", 9.0, "", math.inf)

    assert str(flip) == "1.5 ×: nothing that will do, in place of gpu h100, replicas 3, $9.00/h"


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
    flip = by["price of h200"]["less"]  # three quarters of an h200's $4 are an h100's $3
    assert (flip["before"], flip["to"]) == ("gpu h100, replicas 1", "gpu h200, replicas 1")
    assert (flip["before_usd"], flip["to_usd"]) == pytest.approx((3, 3))
    assert "0.75 ×: gpu h200, replicas 1, $3.00/h, in place of gpu h100, replicas 1, $3.00/h" in page
    assert by["price of h100"]["usd_per_hour"] == pytest.approx([2.5, 3.6])
    sentence = "The cheapest that keeps p90 E2E ≤ 100000 ms at 1 requests/s is gpu h100, replicas 1, for $3.00 an hour."
    assert sentence in " ".join(result.out.split())
    assert sentence in page
    assert page.index(sentence) < page.index("Cheapest system") < page.index("What would change the answer")
    assert Page(out / "plan.html").links == []
