"""One verdict, worked out by hand."""

from __future__ import annotations

import math

import pytest

from chairlift.sim.plan.promises import BINS, Promise, Sample
from chairlift.sim.plan.verdict import judge

PROMISE = Promise(percentile=99, ttft_ms=500)


def run(failed: int, requests: int = 1000) -> Sample:
    """A run of ``requests`` equally distant requests, of which the last of each of the first parts misses `PROMISE`."""
    each = requests // BINS
    met = [each - (part < failed) for part in range(BINS)]
    starts = [float(part) for part in range(BINS)]
    return Sample(
        starts, float(BINS), 0.0, [0.0] * BINS, [[each] * BINS], [met], {"p99_ttft_ms": 400.0 + failed}, 100.0
    )


def test_two_replications_by_hand() -> None:
    """15 and 25 of 1000 miss: √((5² + 5²) / 1 / 2) / 1000 = 0.5 %; t of 97.5 % with one degree of freedom is 12.706."""
    verdict = judge([PROMISE], [run(15), run(25)], 10.0, 1000)
    [kept] = verdict.kept
    logit = math.log(0.02 / 0.98)
    half = 12.7062 * 0.005 / (0.02 * 0.98)

    assert (verdict.warm_up, verdict.cool_down, verdict.is_short) == (0, 0, False)
    assert kept.share == pytest.approx(0.98)
    assert kept.logit_gap == pytest.approx(logit - math.log(0.01 / 0.99))
    assert kept.logit_se == pytest.approx(0.255, abs=1e-3)
    assert kept.low == pytest.approx(1 - 1 / (1 + math.exp(-logit - half)))
    assert kept.high == pytest.approx(1 - 1 / (1 + math.exp(-logit + half)))
    assert (verdict.proof, verdict.holds) == (0, False)
    mean, low, high = verdict.figures["p99_ttft_ms"]
    assert mean == 420
    assert (low, high) == (pytest.approx(420 - 12.7062 * 5), pytest.approx(420 + 12.7062 * 5))


def test_replications_that_agree_prove_it() -> None:
    assert judge([PROMISE], [run(20 + i % 2) for i in range(8)], 10.0, 1000).proof == -1
    assert judge([PROMISE], [run(4 + i % 2) for i in range(8)], 10.0, 1000).proof == 1


def test_without_a_failure_it_takes_100_requests_for_each_percent_allowed() -> None:
    """Requests count as clusters of some 30: the rule of three, 3 / n, becomes 100 / n."""
    assert judge([PROMISE], [run(0)] * 9, 10.0, 1000).proof == 0
    assert judge([PROMISE], [run(0)] * 10, 10.0, 1000).proof == 1


def test_of_two_promises_the_worse_decides_and_each_gets_half_of_the_risk() -> None:
    both = [Promise(percentile=50, ttft_ms=500), PROMISE]
    samples = [
        sample._replace(eligible=sample.eligible * 2, met=sample.met * 2) for sample in (run(15), run(25), run(20))
    ]
    alone, together = judge([PROMISE], samples, 10.0, 1000), judge(both, samples, 10.0, 1000)

    assert together.gap == alone.gap == together.kept[1].logit_gap
    assert together.kept[1].low < alone.kept[0].low < alone.kept[0].high < together.kept[1].high
