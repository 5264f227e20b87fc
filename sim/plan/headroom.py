"""How much more load a deployment can take: its capacity as it is, with replicas failed, and under bursts.

Of the cheapest system a `Margin` is told, which costs a few verdicts instead of whole capacities: up to which of
`STEPS` above the load the promises are kept, and what becomes of them with a replica gone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Capacity, find, worst
from chairlift.sim.plan.cheapest import ONE_OF_MANY
from chairlift.sim.plan.deciding import Effort, Measure, decide
from chairlift.sim.plan.file import Stress
from chairlift.sim.plan.pacing import sampled
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.verdict import Verdict
from chairlift.sim.scenario import load
from chairlift.sim.scenario.loops import synchronous

FAR = 64.0  # times the load, to which a capacity without a bound is looked for
STEPS = (1.1, 1.25, 1.5, 2.0)  # multiples of the load that a margin tells apart


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


@dataclass(frozen=True)
class Margin:
    """What a system that keeps the promises at a load could take beyond it."""

    kept: float  # the largest multiple of the load proven to be kept, 1 at least
    broken: float  # the smallest multiple proven to break a promise; inf if none was
    one_less: str  # "kept", "broken" or "too close to say" at the load with a replica gone; "" where none is left
    draws: int = 0  # of the step costs' errors
    draws_kept: int = 0  # those in which the promises seem kept at the load

    def __str__(self) -> str:
        if math.isinf(self.broken):
            told = f"at {self.kept:g} × the load the promises are still kept"
        elif self.kept == 1:
            told = f"{self.broken:g} × the load would break a promise"
        else:
            told = f"{self.kept:g} × the load is kept, {self.broken:g} × would break a promise"
        less = f"with a replica gone at this load: {self.one_less}" if self.one_less else "without its replica: nothing"
        off = f"; with the step costs off as they may be: kept in {self.draws_kept} of {self.draws} draws"
        return f"{told}; {less}" + off * bool(self.draws)


@dataclass(frozen=True)
class Beside:
    """How it is told whether systems beside an answer keep its promises at its load, or at a multiple of it."""

    rate_per_s: float
    promises: Sequence[Promise]
    bounds: Callable[[Candidate], Bound]
    measure: Callable[[Candidate], Measure]
    effort: Effort

    def verdict(self, candidate: Candidate, times: float = 1.0) -> Verdict | None:
        """The verdict at so many times the load; None where no schedule could serve that.

        Its runs come to little: what they cannot tell is too close to say.
        """
        rate = self.rate_per_s * times
        if self.bounds(candidate).rate_per_s < rate:
            return None
        return decide(self.measure(candidate), self.promises, rate, self.effort, ONE_OF_MANY)


def margin(candidate: Candidate, beside: Beside) -> Margin:
    """The margin of a candidate that keeps the promises, by halving `STEPS`."""
    kept, broken = 0, len(STEPS)  # STEPS[kept - 1] is kept, STEPS[broken] is broken
    unsure = len(STEPS)  # from here on nothing was proven
    while kept < min(broken, unsure):
        at = (kept + min(broken, unsure)) // 2
        verdict = beside.verdict(candidate, STEPS[at])
        proof = -1 if verdict is None else verdict.proof
        if proof > 0:
            kept = at + 1
        elif proof < 0:
            broken = at
        else:
            unsure = at
    replicas = sum(group.count for group in candidate.setup.groups) if candidate.setup else 1
    less = ""
    if replicas > 1 and not candidate.scales:  # an autoscaler would order another
        try:
            smaller = fewer(candidate, 1)
        except BadInput:  # the only one of its role
            smaller = None
        if smaller is not None:
            verdict = beside.verdict(smaller)
            less = {1: "kept", -1: "broken", 0: "too close to say"}[-1 if verdict is None else verdict.proof]
    return Margin(STEPS[kept - 1] if kept else 1.0, STEPS[broken] if broken < len(STEPS) else math.inf, less)


def bracket(
    measure: Measure, promises: Sequence[Promise], kept: Verdict, bound: float, effort: Effort, precision: float
) -> Capacity:
    """The capacity of a system of which ``kept`` proves that it keeps the promises at some rate: an interval, roughly.

    Where no schedule can serve more than ``bound``, the interval ends there; else at the first of doubled rates that is
    proven broken. It is halved (in the logarithm) until its ends are two of ``precision`` apart, or, about a rate that
    is too close to say, until a rate one precision below and one above have been tried. What lies above the first rate
    that breaks a promise is not looked at.

    Worked example: kept at 50/s, and a bound of 84/s. At 65/s a promise breaks, 57/s is too close to say, 52/s is kept
    and 63/s breaks one: [52, 63], and the rate is where a line through the gaps at its ends crosses 0.
    """
    seen = {kept.rate_per_s: kept}
    low, high, notes = kept.rate_per_s, bound, list[str]()
    tried = low if math.isinf(bound) else 0.0

    unsure: list[float] = []  # the first rate that is too close to say

    def look(rate: float) -> None:
        nonlocal low, high
        seen[rate] = decide(measure, promises, rate, effort, ONE_OF_MANY)
        if seen[rate].proof > 0:
            low = max(low, rate)
        elif seen[rate].proof < 0:
            high = min(high, rate)
        elif not unsure:
            unsure.append(rate)

    while math.isinf(high) and tried < kept.rate_per_s * FAR:
        tried *= 2
        look(tried)
    while math.isfinite(high) and math.log(high / low) > 2 * precision:
        rates = [at * math.exp(side * precision) for at in unsure for side in (-1, 1)] or [math.sqrt(low * high)]
        rates = [rate for rate in (float(f"{each:.6g}") for each in rates) if low < rate < high and rate not in seen]
        if not rates:
            break
        look(rates[0])
    if math.isinf(high):
        notes.append("no rate that was looked at breaks a promise: runs are too short, or the slo is loose")
    elif math.log(high / low) > 2.02 * precision:
        notes.append(f"the interval is wider than {100 * precision:g} % either way: more is not looked for on a front")
    verdicts = [seen[rate] for rate in sorted(seen)]
    broken = next((verdict for verdict in verdicts if verdict.proof < 0), None)
    limiting = None if broken is None else worst(broken, promises)
    return Capacity(_between(verdicts, low, high), low, high, verdicts, limiting, notes=notes)


def _between(verdicts: Sequence[Verdict], low: float, high: float) -> float:
    """Where a line through the gaps at the two ends of an interval crosses 0, in the logarithm of the rate."""
    if math.isinf(high):
        return low
    gaps = {verdict.rate_per_s: verdict.gap for verdict in verdicts}
    below, above = gaps.get(low, -1.0), gaps.get(high, 1.0)
    part = min(max(-below / (above - below), 0.15), 0.85) if above > below else 0.5  # ends are proven: it is not there
    return float(low * (high / low) ** part)


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
    capacity: Capacity,
    stress: Stress,
    promises: Sequence[Promise],
    bounds: Callable[[Candidate], Bound],
    measure: Callable[[Candidate, float | None], Measure],
    effort: Effort,
    told: Callable[[str], None] = lambda _: None,
) -> list[Headroom]:
    """What becomes of the deployment ``today``, which serves ``rate`` requests per second, under each stress.

    ``capacity``: what it has as it is.
    """
    cases: list[tuple[str, Candidate, float | None]] = []
    replicas = sum(group.count for group in today.setup.groups) if today.setup else 1
    if stress.failed_replicas:
        if stress.failed_replicas < replicas:
            cases.append((f"N − {stress.failed_replicas} replicas", fewer(today, stress.failed_replicas), None))
        else:
            told(f"replicas: {replicas}; without {stress.failed_replicas} nothing is left")
    cases += [(f"gaps of CV {cv:g}", today, cv) for cv in stress.burst_cvs]
    capacities = [("as it is", capacity)]
    for name, candidate, cv in cases:
        told(name)
        most = bounds(candidate).rate_per_s
        near = min(capacity.rate_per_s, most)
        capacities.append((name, find(measure(candidate, cv), promises, rate, most, effort, told, about=near)))
    return [
        Headroom(name, each, {times: Headroom.holds(each, rate * times) for times in (1.0, *stress.growth)})
        for name, each in capacities
    ]
