"""How much more a deployment can take: its capacity as it is, with replicas gone, and under burstier arrivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.capacity import Capacity, Effort, Measure, find
from chairlift.sim.plan.file import SAMPLE, Candidate, Stress, paced
from chairlift.sim.plan.promises import Promise
from chairlift.sim.scenario import load


@dataclass(frozen=True)
class Headroom:
    """A deployment under one stress."""

    stress: str
    capacity: Capacity
    growth: dict[float, str]  # multiple of today's rate → "kept", "broken", "too close to say"

    @staticmethod
    def holds(capacity: Capacity, rate: float) -> str:
        """Whether a capacity's interval lies above ``rate``."""
        if rate <= capacity.low:
            return "kept"
        return "broken" if rate >= capacity.high else "too close to say"


def fewer(candidate: Candidate, failed: int) -> Candidate:
    """The deployment with ``failed`` replicas gone, of the largest group that has more than one to lose.

    The price stays: what is broken is paid for. Raises `BadInput` if that leaves none.
    """
    document = dataclasses.replace(candidate.document, data=dict(candidate.document.data))
    replicas = document.data.get("replicas", 1)
    if isinstance(replicas, list):
        at = max(range(len(replicas)), key=lambda i: replicas[i].get("count", 1))
        left = replicas[at].get("count", 1) - failed
        changed = [dict(group) for group in replicas]
        changed[at]["count"] = left
        document.data["replicas"] = changed
    else:
        left = replicas - failed
        document.data["replicas"] = left
    if left < 1:
        raise BadInput(Problem(f"{failed} failed replicas leave none", file=candidate.name, path="failed_replicas"))
    setup = load.prepare(paced(document, 1.0, SAMPLE), candidate.folder, candidate.trust)
    return dataclasses.replace(candidate, document=document, setup=setup)


def headroom(
    today: Candidate,
    rate: float,
    stress: Stress,
    promises: Sequence[Promise],
    bounds: Callable[[Candidate], Bound],
    measure: Callable[[Candidate, float | None], Measure],
    effort: Effort,
    told: Callable[[str], None] = lambda _: None,
) -> list[Headroom]:
    """``today`` under each stress."""
    cases: list[tuple[str, Candidate, float | None]] = [("as it is", today, None)]
    replicas = sum(group.count for group in today.setup.groups) if today.setup else 1
    if stress.failed_replicas:
        if stress.failed_replicas < replicas:
            cases.append((f"N − {stress.failed_replicas} replicas", fewer(today, stress.failed_replicas), None))
        else:
            told(f"there are but {replicas} replicas: without {stress.failed_replicas} nothing is left")
    cases += [(f"gaps of CV {cv:g}", today, cv) for cv in stress.burst_cvs]
    found = []
    for name, candidate, cv in cases:
        told(name)
        capacity = find(measure(candidate, cv), promises, rate, bounds(candidate).rate_per_s, effort, told)
        growth = {times: Headroom.holds(capacity, rate * times) for times in (1.0, *stress.growth)}
        found.append(Headroom(name, capacity, growth))
    return found
