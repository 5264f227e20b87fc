"""One Hypothesis profile for all property tests.

A slow example is no failure: machines are shared, and Hypothesis' deadline of 200 ms made tests fail by chance.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "chairlift",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("chairlift")
