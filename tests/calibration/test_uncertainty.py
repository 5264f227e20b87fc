"""Intervals of draws hold as many further draws as they say."""

from __future__ import annotations

import numpy as np
import pytest

from chairlift.sim.calibration.uncertainty import METRICS, intervals, within


def test_of_nineteen_draws_the_outermost_hold_nine_in_ten() -> None:
    """A twentieth is equally likely to fall into each of the 20 gaps around 19 others."""
    draws = [{**dict.fromkeys(METRICS), "duration": float(value)} for value in range(19, 0, -1)]

    assert intervals(draws) == {"duration": {"p5": 1.0, "p50": 10.0, "p95": 19.0}}
    assert within(19) == 0.9


@pytest.mark.parametrize(("count", "share"), [(3, 0.5), (5, 2 / 3), (19, 0.9), (40, 0.9)])
def test_intervals_hold_the_share_of_further_draws_that_they_say(count: int, share: float) -> None:
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        *drawn, another = chance.lognormal(size=count + 1).tolist()
        found = intervals([{**dict.fromkeys(METRICS), "duration": each} for each in drawn])["duration"]
        held += found["p5"] <= another <= found["p95"]

    assert within(count) == pytest.approx(share)
    assert held / 2000 == pytest.approx(share, abs=0.035)  # three standard errors
