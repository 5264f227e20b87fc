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
    """Requests count as clusters of some 30: the rule of three, 3 / n, becomes 100 / n, where no figure says more."""
    unknown = run(0)._replace(figures={})

    assert judge([PROMISE], [unknown] * 9, 10.0, 1000).proof == 0
    assert judge([PROMISE], [unknown] * 10, 10.0, 1000).proof == 1


def of_percentiles(p99s: list[float], failed: int = 0, requests: int = 1000) -> list[Sample]:
    return [run(failed, requests)._replace(figures={"p99_ttft_ms": p99}) for p99 in p99s]


def test_where_nobody_missed_the_percentile_itself_is_judged() -> None:
    """The p99s 400 e^±0.1 and 400 e^±0.05: logarithms of mean ln 400 and standard error √(0.025 / 3 / 4) = 0.0456.

    Student's t of 97.5 % with three degrees of freedom is 3.182, so that the p99 is proven below 400 e^0.1453 = 462.5.
    """
    p99s = [400 * math.exp(off) for off in (-0.1, 0.1, -0.05, 0.05)]

    for limit, proof in ((462, 0), (463, 1)):
        verdict = judge([Promise(percentile=99, ttft_ms=limit)], of_percentiles(p99s), 10.0, 1000)
        assert (verdict.proof, verdict.holds) == (proof, True)
        assert verdict.kept[0].low == pytest.approx(0.99 if proof else 0.975, abs=1e-5)  # else 100 of 4000 may miss it
        assert verdict.strain == pytest.approx(math.log(400 / limit))


def test_the_percentile_says_nothing_where_requests_missed_or_were_few() -> None:
    low = [100.0, 101.0, 99.0, 100.0]

    assert judge([PROMISE], of_percentiles(low, failed=1), 10.0, 1000).proof == 1  # four missed, of forty that may
    assert judge([PROMISE], of_percentiles(low, failed=12), 10.0, 1000).proof == -1  # the share decides
    assert judge([PROMISE], of_percentiles(low, requests=400), 10.0, 400).proof == 0  # four are beyond each p99
    several = Promise(share=0.99, ttft_ms=500, tpot_ms=50)
    assert judge([several], of_percentiles(low), 10.0, 1000).strain is None


def test_of_two_promises_the_worse_decides_and_each_gets_half_of_the_risk_of_a_broken_one() -> None:
    """All are kept where each of them is, which costs no risk; one of them is broken where any of two tests says so."""
    both = [Promise(percentile=50, ttft_ms=500), PROMISE]
    samples = [
        sample._replace(eligible=sample.eligible * 2, met=sample.met * 2) for sample in (run(15), run(25), run(20))
    ]
    alone, together = judge([PROMISE], samples, 10.0, 1000), judge(both, samples, 10.0, 1000)

    assert together.gap == alone.gap == together.kept[1].logit_gap
    assert together.kept[1].low == alone.kept[0].low < alone.kept[0].high < together.kept[1].high
