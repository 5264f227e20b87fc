"""How long a run will take, said before it takes that long. Measured on one core, so within a factor of three."""

from __future__ import annotations

from collections.abc import Sequence

from chairlift.sim.study import Setup

SAID_S = 600  # from so many seconds on it is said
REQUEST_S = 5e-5  # a request of 20 to 500 output tokens
LOOK_S = 2e-6  # a look of an autoscaler that changes nothing
OUTAGE_S = 4e-5  # a failure and its repair


def seconds(setup: Setup) -> float:
    """Seconds of one core that the run is likely to take; of one that executes its steps, what its arrivals take."""
    trace = setup.trace
    if setup.executes:
        return trace.duration_s
    total = len(trace) * REQUEST_S
    if setup.autoscale is not None and not setup.autoscale.schedule:
        total += trace.duration_s / setup.autoscale.every_s * LOOK_S
    if setup.failures is not None and setup.failures.mtbf_s is not None and setup.failures.mttr_s is not None:
        replicas = sum(group.count for group in setup.groups)
        total += trace.duration_s * replicas / (setup.failures.mtbf_s + setup.failures.mttr_s) * OUTAGE_S
    return total


def said(setups: Sequence[Setup], times: int = 1) -> str:
    """``some 2.8 hours: 1 run of 200,000,000 requests in all``; "" for what ends sooner than anybody would ask.

    ``times``: how often each of ``setups`` is run.
    """
    total = times * sum(map(seconds, setups))
    if total < SAID_S:
        return ""
    length = f"{total / 3600:,.1f} hours" if total >= 3600 else f"{total / 60:.0f} minutes"
    runs, requests = times * len(setups), times * sum(len(setup.trace) for setup in setups)
    return f"some {length}: {runs:,} run{'s' * (runs > 1)}, {requests:,} requests"
