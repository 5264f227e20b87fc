"""One Hypothesis profile for all property tests, a bound on the memory of a test, and little garbage to look through.

A slow example is no failure: machines are shared, and Hypothesis' deadline of 200 ms made tests fail by chance.

Linux hands out more memory than there is, and then ends a process of its choice: a test that takes too much must fail
by a MemoryError of its own, and not end the whole run, or somebody else's.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings

SHARE = 3  # a process may have a third of the machine's memory: two tests at work leave some to the others

settings.register_profile(
    "chairlift",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("chairlift")

with suppress(ImportError, ValueError, OSError):  # Windows has no such limits; a stricter one stays
    import resource

    _most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // SHARE
    resource.setrlimit(resource.RLIMIT_DATA, (_most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What is loaded by now stays: no collection of garbage looks at it again, and an engine that starts does one."""
    gc.collect()
    gc.freeze()
