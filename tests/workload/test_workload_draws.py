"""Arrival processes and length distributions against what mathematics says of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.arrivals import Arrivals
from kit.made import lengths, rng

# ---- arrivals ----


def test_a_burst_is_all_zeros():
    assert Arrivals(burst={}).times_ps(4, rng()).tolist() == [0, 0, 0, 0]


def test_constant_arrivals_are_rounded_once_and_do_not_drift():
    times = Arrivals.model_validate({"constant": {"rate_per_s": 3}}).times_ps(300_000, rng())

    assert times[0] == 333_333_333_333
    assert times[-1] == 100_000 * 10**12  # 300,000 gaps of a third of a second


RENEWAL = {
    "poisson": ({"rate_per_s": 4.0}, 1.0),
    "gamma": ({"rate_per_s": 4.0, "cv": 2.0}, 2.0),
    # CV² of a Weibull of shape 1/2 is Γ(5)/Γ(3)² - 1 = 5
    "weibull": ({"rate_per_s": 4.0, "shape": 0.5}, math.sqrt(5)),
}


@pytest.mark.parametrize("process", RENEWAL)
def test_renewal_arrivals_have_the_rate_and_the_cv_asked_for(process):
    setting, cv = RENEWAL[process]
    n = 400_000
    times = Arrivals.model_validate({process: setting}).times_ps(n, rng()) / 1e12
    gaps = np.diff(times)

    # The mean of n gaps is off by cv/√n: five of those.
    assert gaps.mean() == pytest.approx(0.25, rel=5 * cv / math.sqrt(n))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_a_gamma_process_of_cv_one_is_poisson():
    gaps = np.diff(Arrivals.model_validate({"gamma": {"rate_per_s": 1.0, "cv": 1.0}}).times_ps(200_000, rng()))

    # P(gap > mean) = 1/e for an exponential, and for no other gamma
    assert np.mean(gaps > 1e12) == pytest.approx(math.exp(-1), abs=0.005)


def test_on_off_has_silences_and_the_mean_rate_of_both_phases():
    process = Arrivals.model_validate({"on_off": {"rate_per_s": 20.0, "on_s": 5.0, "off_s": 15.0}})
    times = process.times_ps(200_000, rng()) / 1e12
    gaps = np.diff(times)

    assert len(times) / times[-1] == pytest.approx(20.0 * 5 / (5 + 15), rel=0.1)
    # Of gaps, one in rate·on_s = 100 holds a silence (or more): P = (1/on) / (rate + 1/on).
    assert np.mean(gaps > 1.0) == pytest.approx((1 / 5) / (20 + 1 / 5) * math.exp(-1 / 15), rel=0.1)


def test_rescaling_on_off_stretches_the_whole_picture():
    process = Arrivals.model_validate({"on_off": {"rate_per_s": 20.0, "on_s": 5.0, "off_s": 15.0}})
    twice = process.rescaled(10.0)
    before, after = (p.times_ps(1000, rng()) for p in (process, twice))

    np.testing.assert_allclose(after, before / 2, atol=1, rtol=0)


@settings(max_examples=60)
@given(
    st.sampled_from(["constant", "poisson", "gamma", "weibull", "on_off"]),
    st.floats(1e-3, 1e6),
    st.integers(1, 300),
    st.integers(0, 2**32),
)
def test_arrivals_are_sorted_whole_and_not_negative(process, rate, n, seed):
    extra = {"gamma": {"cv": 3.0}, "weibull": {"shape": 0.5}, "on_off": {"on_s": 2.0, "off_s": 7.0}}
    times = Arrivals.model_validate({process: {"rate_per_s": rate} | extra.get(process, {})}).times_ps(n, rng(seed))

    assert times.dtype == np.int64
    assert times.shape == (n,)
    assert times[0] >= 0
    assert np.all(np.diff(times) >= 0)


def test_arrivals_past_the_end_of_the_clock_are_refused():
    with pytest.raises(BadInput, match="106 days"):
        Arrivals.model_validate({"constant": {"rate_per_s": 1e-6}}).times_ps(10, rng())


# ---- lengths ----


def redrawn_mean(mean, cap):
    """Mean of round(Exp) given that it is at most the cap, with 0 as 1, added up term by term."""
    weight = [math.exp(-max(k - 0.5, 0) / mean) - math.exp(-(k + 0.5) / mean) for k in range(cap + 1)]
    return sum(max(k, 1) * w for k, w in enumerate(weight)) / sum(weight)


@pytest.mark.parametrize("cap", [32, 128, 512, 1536])
def test_exponential_redrawn_has_the_truncated_mean(cap):
    distribution = lengths({"exponential": {"mean": 128, "cap": cap}})
    drawn = distribution.sample(400_000, rng())

    assert drawn.min() == 1
    assert drawn.max() <= cap
    assert distribution.mean_tokens() == pytest.approx(redrawn_mean(128, cap), rel=1e-9)
    assert drawn.mean() == pytest.approx(redrawn_mean(128, cap), rel=0.01)


def test_exponential_redrawn_is_the_rejection_loop():
    cap, n = 128, 200_000
    loop = np.rint(rng(1).exponential(128, 3 * n))
    loop = np.maximum(loop[loop <= cap][:n], 1)
    drawn = lengths({"exponential": {"mean": 128, "cap": cap}}).sample(n, rng(2))

    for level in range(0, cap, 8):
        assert np.mean(drawn <= level) == pytest.approx(np.mean(loop <= level), abs=0.006)


def test_a_cap_far_below_the_mean_takes_no_longer():
    drawn = lengths({"exponential": {"mean": 1e9, "cap": 3}}).sample(10_000, rng())

    assert set(drawn.tolist()) == {1, 2, 3}


def test_exponential_clipped_piles_up_at_the_cap():
    drawn = lengths({"exponential": {"mean": 128, "cap": 128, "over_cap": "clip"}}).sample(200_000, rng())

    assert np.mean(drawn == 128) == pytest.approx(math.exp(-127.5 / 128), abs=0.005)


@pytest.mark.parametrize(
    ("spec", "mean"),
    [
        (512, 512),
        ({"constant": {"tokens": 9}}, 9),
        ({"uniform": {"low": 32, "high": 512}}, 272),
        ({"exponential": {"mean": 128}}, 128.004),  # 0 counts as 1: 1 - e^(-1/256) more, less the rounding
        ({"exponential": {"mean": 50, "cap": 60, "over_cap": "clip"}}, None),
        ({"lognormal": {"mu": 5.0, "sigma": 0.5}}, math.exp(5.125)),
        ({"lognormal": {"mu": 5.0, "sigma": 1.5, "cap": 200}}, None),
        ({"quantiles": {"levels_pct": [0, 50, 100], "tokens": [10, 20, 100]}}, 37.5),
        ({"mixture": {"weights": [3, 1], "parts": [100, {"uniform": {"low": 200, "high": 400}}]}}, 150),
        ({"values": [1, 2, 6]}, 3),
    ],
)
def test_mean_tokens_is_the_mean_of_what_is_drawn(spec, mean):
    distribution = lengths(spec)

    if mean is not None:
        assert distribution.mean_tokens() == pytest.approx(mean, rel=1e-4)
    assert distribution.sample(300_000, rng()).mean() == pytest.approx(distribution.mean_tokens(), rel=0.01)


def test_uniform_has_both_ends():
    assert set(lengths({"uniform": {"low": 3, "high": 5}}).sample(1000, rng()).tolist()) == {3, 4, 5}


def test_quantiles_give_their_levels_back():
    drawn = lengths({"quantiles": {"levels_pct": [0, 50, 90, 100], "tokens": [1, 1000, 3000, 9000]}}).sample(
        300_000, rng()
    )

    assert np.percentile(drawn, [50, 90]) == pytest.approx([1000, 3000], rel=0.02)
    assert drawn.min() >= 1
    assert drawn.max() <= 9000


def test_values_are_cycled_in_order():
    assert lengths({"values": [4, 5, 6]}).sample(7, rng()).tolist() == [4, 5, 6, 4, 5, 6, 4]


def test_a_length_too_long_for_the_trace_is_refused_with_advice():
    with pytest.raises(BadInput, match="give the distribution a cap"):
        lengths({"lognormal": {"mu": 20, "sigma": 10}}).sample(1000, rng())


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ({"exponential": {"mean": 1}, "uniform": {"low": 1, "high": 2}}, "exactly one of"),
        ({}, "exactly one of"),
        ({"exponential": {"mean": math.nan}}, "finite"),
        ({"exponential": {"mean": -1}}, "greater than 0"),
        ({"uniform": {"low": 9, "high": 2}}, "at least low, which is 9"),
        ({"quantiles": {"levels_pct": [5, 100], "tokens": [1, 2]}}, "rise from 0 to 100"),
        ({"quantiles": {"levels_pct": [0, 100], "tokens": [1, 2, 3]}}, "one number a level"),
        ({"quantiles": {"levels_pct": [0, 100], "tokens": [2, 1]}}, "must not fall"),
        ({"mixture": {"weights": [1], "parts": [1, 2]}}, "one number a part"),
        (0, "greater than or equal to 1"),
        (True, "a whole number, or one distribution"),
        ("512", "a whole number, or one distribution"),
    ],
)
def test_a_wrong_distribution_is_refused(spec, rule):
    with pytest.raises(ValidationError, match=rule):
        lengths(spec)
