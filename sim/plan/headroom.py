"""How much more load a deployment can take: its capacity as it is, with replicas failed, and under bursts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Capacity, Effort, Measure, find
from chairlift.sim.plan.file import Stress
from chairlift.sim.plan.pacing import sampled
from chairlift.sim.plan.promises import Promise
from chairlift.sim.scenario import load
from chairlift.sim.scenario.loops import synchronous


@dataclass(frozen=True)
class Headroom:
    """A deployment under one stress."""

    stress: str  # in words: "as it is", "N − 1 replicas", "gaps of CV 2"
    capacity: Capacity
    growth: dict[float, str]  # multiple of today's rate → what becomes of the promises there, see `holds`

    @staticmethod
    def holds(capacity: Capacity, rate: float) -> str:
        """``kept`` if the capacity's interval lies above ``rate``, ``broken`` below it, else ``too close to say``."""
        if rate <= capacity.low:
            return "kept"
        return "broken" if rate >= capacity.high else "too close to say"


def fewer(candidate: Candidate, failed: int) -> Candidate:
    """The deployment with ``failed`` replicas of its largest group gone.

    Its price stays the same: failed replicas are paid for too. Raises `BadInput` if that group has no replica left.
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
    setup = load.prepare(sampled(document), candidate.folder, candidate.trust)
    if candidate.synchronous:
        synchronous(setup)
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
    """What becomes of the deployment ``today``, which serves ``rate`` requests per second, under each stress."""
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
