"""Questions beside a plan's answer, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.cheapest import Entry, Race
from chairlift.sim.plan.costs import Tokens
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.questions import Api, a_day
from kit.command import chairlift

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: {name: vllm, max_num_seqs: 64}
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 1000, output_tokens: 100}
slo: [{share: 0.9, e2el_ms: 100000}]
search: {requests: 200, most_requests: 400, precision: 0.5, draws: 0}
prices: {h100: 3.6}
"""
API = "api: {usd_per_million_in: 0.1, usd_per_million_out: 0.4}"


def answered(folder: Path, more: str) -> dict[str, object]:
    (folder / "p.yaml").write_text(PLAN + more)
    result = chairlift("plan", str(folder / "p.yaml"), "--out", str(folder / "out"), "--jobs", "1", "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert all(line in (folder / "out" / "plan.html").read_text() for line in told["asked"])
    return told  # type: ignore[no-any-return]


def test_growth_spares_and_an_api(tmp_path: Path) -> None:
    """One replica serves 1/s and the 2.25/s of two months at 50 % each; with one gone there must be two, at $7.20."""
    ask = f"ask: {{{API}, growth: {{percent_a_month: 50, months: 2}}, spares: 1}}\n"
    told = answered(tmp_path, f"rate_per_s: 1\n{ask}axes: {{replicas: [1, 2, 3]}}\n")
    cheapest = told["cheapest"]

    assert isinstance(cheapest, list)
    assert [race["rate_per_s"] for race in cheapest] == [1, 2.25]
    for race in cheapest:
        assert race["winner"]["system"] == "replicas 2"
        assert [s["outcome"] for s in race["systems"]] == ["excluded", "kept", "dearer"]
        assert race["systems"][0]["why"] == "without 1 of its replicas nothing is left"
    # 1000 and 100 tokens cost $0.00014 there: $0.504 an hour at 1/s, and as much as $7.20 at 14.3/s
    assert told["asked"] == [
        "at 1 requests/s the API takes $0.50 an hour, 0.07 times the $7.20 of this system, which breaks even from 14.3 "
        "requests/s on",
        "at 2.25 requests/s the API takes $1.13 an hour, 0.157 times the $7.20 of this system, which breaks even from "
        "14.3 requests/s on",
        "50 % a month make 1 requests/s 2.25 in 2 months: replicas 2, $7.20/h",
    ]


def test_tokens_a_day_for_a_budget(tmp_path: Path) -> None:
    """$200 pay for two at $86.40 a day each."""
    told = answered(tmp_path, "ask: {budget_usd_per_day: 200}\naxes: {replicas: [1]}\n")
    [capacity], asked = told["capacities"], told["asked"]  # type: ignore[misc]
    served = 2 * capacity["rate_per_s"] * 86_400  # type: ignore[has-type]

    assert asked == [
        f"$200 a day pay for 2 × replicas 1: {served:,.0f} requests a day, {served / 1e3:,.4g} million tokens in and "
        f"{served / 1e4:,.4g} million out"
    ]
    page = (tmp_path / "out" / "plan.html").read_text()
    assert f"$200 a day serve most with 2 × replicas 1: {served:,.0f} requests a day, keeping" in page


def test_the_hours_of_a_day_by_hand(tmp_path: Path) -> None:
    """$3.60 for eight hours, $7.20 for ten and $10.80 for six: $165.60 a day, where three all day cost $259.20."""
    (tmp_path / "p.yaml").write_text(PLAN + "rate_per_s: 10\naxes: {replicas: [1, 2, 3]}\n")
    one, two, three = read_plan(tmp_path / "p.yaml").systems

    def race(rate: float, candidate: Candidate | None) -> Race:
        return Race(rate, None if candidate is None else Entry(candidate, "kept", ""))

    races = [race(2.5, one), race(10, two), race(15, three)]
    hours = [0.25] * 8 + [1.0] * 10 + [1.5] * 6

    assert a_day(races, hours, 10) == pytest.approx((165.6, 259.2))
    assert a_day([*races[:2], race(15, None)], hours, 10) is None


def test_the_hours_are_rates_to_buy_for(tmp_path: Path) -> None:
    hours = [0.5] * 12 + [1.0] * 12
    (tmp_path / "p.yaml").write_text(PLAN + f"rate_per_s: 10\nask: {{hours: {hours}}}\naxes: {{replicas: [1]}}\n")

    assert read_plan(tmp_path / "p.yaml").spec.rates == [5, 10]


def test_what_a_request_costs_there() -> None:
    assert Api(usd_per_million_in=0.1, usd_per_million_out=0.4).per_request(Tokens(1000, 100)) == pytest.approx(0.00014)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("ask: {spares: 1}\n", "ask.spares: is of a load to buy for: give rate_per_s"),
        ("ask: {growth: {percent_a_month: 5, months: 3}}\n", "ask.growth: is of a load to buy for: give rate_per_s"),
        ("rate_per_s: 1\nask: {budget_usd_per_day: 9}\n", "ask.budget_usd_per_day: is of capacities"),
        ("rate_per_s: 1\nask: {hours: [1, 2]}\n", "ask.hours"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(PLAN + more + "axes: {replicas: [1]}\n")
    result = chairlift("plan", str(tmp_path / "p.yaml"))

    assert result.status == 2
    assert said in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("old", "new", "status", "helps"),
    [
        ("rate_per_s: 1\n", "rate_per_s: 1000\n", 1, "add replicas or faster GPUs"),
        ("e2el_ms: 100000", "tpot_ms: 1", 1, "raise the limit, or add faster GPUs or tensor_parallel"),
        ("model: llama-3.1-8b", "model: llama-3.1-70b", 2, "none of 2 systems can be"),
    ],
)
def test_what_cannot_be_is_told_without_simulating(tmp_path: Path, old: str, new: str, status: int, helps: str) -> None:
    text = PLAN + "rate_per_s: 1\naxes: {replicas: [1, 2]}\n"
    assert text.count(old) == 1
    (tmp_path / "p.yaml").write_text(text.replace(old, new))
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == status
    assert helps in " ".join((result.out + result.err).split())
    if status == 1:
        [race] = json.loads((tmp_path / "out" / "plan.json").read_text())["cheapest"]
        assert not any("verdict" in system for system in race["systems"])
        assert race["would_help"]
