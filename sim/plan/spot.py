"""Replicas on spot instances: they cost less, and now and then one is taken away.

Each replica is taken after exponential times of some hours and is back some minutes later, loading included. So of N
replicas as many are gone at a time as N independent coins of probability a say, where a = away / (held + away).
Losses are far rarer than requests. Between two of them the system serves its load as one of the replicas that are left
does, and the share that meets a promise is the mean over the numbers that are gone. Two things are taken off it:

- a request is lost and starts again where its replica is taken while it is under way, with probability stay / held;
- an outage that the rest cannot serve leaves a backlog, which is taken to last as long again as the outage.

Worked example: four replicas, each held for 12 hours and away for 10 minutes: a = 1.37 %. All four are there for
94.6 % of the time, three for 5.3 %, fewer for 0.1 %. If three keep "p99 TTFT ≤ 500 ms" as four do, so does the whole on
spot; if three cannot serve the load, 2 · 5.4 % of the requests miss it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import FIRST, MOST
from chairlift.sim.plan.headroom import Beside, fewer
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.questions import Spot
from chairlift.sim.plan.verdict import Verdict, judge, unseen

RARE = 1e-3  # of the time: numbers of replicas gone that are rarer are not simulated, and nobody meets a promise then
SURE = 6.0  # times the requests by which `unseen` proves a promise that nobody misses: a fifth of the allowance is left


@dataclass(frozen=True)
class OnSpot:
    """What becomes of the promises on spot instances."""

    candidate: Candidate
    usd_per_hour: float  # on spot
    proof: int  # 1: all promises are kept, -1: one breaks, 0: too close to say
    worst: Promise  # the one that is nearest to breaking
    low: float  # the share of the requests that meets it, at least
    high: float  # and at most

    def __str__(self) -> str:
        told = {1: "keeps the promises", 0: "is too close to say", -1: "breaks a promise"}[self.proof]
        share = (
            f"{100 * self.low:.4g} to {100 * self.high:.4g} % meet {self.worst}, {100 * self.worst.wanted:g} % wanted"
        )
        return f"{self.candidate.name} for ${self.usd_per_hour:,.2f}/h {told}: {share}"


def on_spot(candidate: Candidate, spot: Spot, beside: Beside) -> OnSpot:
    """What becomes of the promises where all replicas of a candidate that has a setup are on spot."""
    assert candidate.setup is not None
    promises = beside.promises
    shares = spot.gone(sum(group.count for group in candidate.setup.groups))
    low, high = [0.0] * len(promises), [0.0] * len(promises)
    stay_s = 0.0
    for gone, share in enumerate(shares):
        verdict = None if share < RARE and gone else _left(candidate, gone, beside)
        if gone == 0 and verdict is not None:
            stay_s = verdict.stays * verdict.simulated_s / verdict.replications
        for j in range(len(promises)):
            if verdict is None:
                low[j] -= share  # the backlog, in which others miss it too
                high[j] += 0.0 if share >= RARE else share
            else:
                low[j] += share * verdict.kept[j].low
                high[j] += share * verdict.kept[j].high
    cut = stay_s / 3600 / spot.hours_between_losses
    low, high = [max(0.0, each - cut) for each in low], [max(0.0, each - cut) for each in high]
    proofs = [
        1 if least >= promise.wanted else -1 if most < promise.wanted else 0
        for promise, least, most in zip(promises, low, high, strict=True)
    ]
    worst = min(range(len(promises)), key=lambda j: (1 - promises[j].wanted) / max(1 - low[j], 1e-12))
    usd = candidate.usd_per_hour * (1 - spot.off_percent / 100)
    return OnSpot(candidate, usd, min(proofs), promises[worst], low[worst], high[worst])


def _left(candidate: Candidate, gone: int, beside: Beside) -> Verdict | None:
    """The verdict on what is left of the candidate; None: nothing is left, or not enough to serve the load.

    It has `FIRST` replications at least, since its share is wanted and not only a proof; where nobody misses a promise,
    the requests that it takes to say so of a good part of those that may.
    """
    try:
        rest = fewer(candidate, gone) if gone else candidate
    except BadInput:
        return None
    verdict = beside.verdict(rest)
    if verdict is None or verdict.drifting:
        return None
    promises, confidence = beside.promises, beside.effort.confidence
    few = unseen(0.5 + confidence / 2)
    lacking = [few / (1 - p.wanted) for p, kept in zip(promises, verdict.kept, strict=True) if kept.share == 1]
    replications = max(FIRST, min(MOST, math.ceil(SURE * max(lacking, default=0.0) / verdict.requests)))
    if replications <= verdict.replications:
        return verdict
    samples = beside.measure(rest)(beside.rate_per_s, verdict.requests, replications)
    return judge(promises, samples, beside.rate_per_s, verdict.requests, confidence)


def cheapest_on_spot(candidates: Sequence[Candidate], winner: Candidate, spot: Spot, beside: Beside) -> list[OnSpot]:
    """The answer's system with as few replicas as keep the promises on spot; those with fewer come before it.

    They begin with as many replicas as the answer has on demand. None will do where the last does not.
    """
    found: list[OnSpot] = []
    sizes = [each for each in candidates if each.system == winner.system and each.gpus >= winner.gpus]
    for each in sorted(sizes, key=lambda candidate: candidate.gpus):
        if each.setup is not None and not each.scales:
            found.append(on_spot(each, spot, beside))
            if found[-1].proof > 0:
                break
    return found
