"""Whether a system keeps its promises at one load, from as many requests as it takes to prove it either way.

A verdict is looked at again and again while its runs grow, and each look may err: a proof at 95 % that is sought in ten
looks is wrong far more often than it says. So each look has a level of its own, `Looks`. Each doubling of the requests
has a right to the same share of the risk, and a look spends what has become due since the one before. How many looks
there will be need not be known, only the most requests that they may come to (Lan and DeMets, Biometrika 70, 1983). The
risks of all looks add up to no more than that of one, however they depend on one another (Bonferroni), and their
intervals are repeated confidence intervals (Jennison and Turnbull, Group Sequential Methods, 2000, ch. 9).

Worked example: at a confidence of 95 % a promise may be proven kept wrongly in 2.5 % of all cases. A first look has
2,000 requests, and there may be 64,000. Those are five doublings, so that a sixth of the risk, 0.42 %, is due at the
first look. The next one has 8,000: two more doublings, and 0.83 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chairlift.sim.plan.promises import Promise, Sample
from chairlift.sim.plan.stretches import LEAST
from chairlift.sim.plan.verdict import Verdict, judge

# Simulates one system: rate per second, requests a replication, number of replications → a sample of each replication.
Measure = Callable[[float, int, int], Sequence[Sample]]

SCREEN = 4  # replications of a first look,
COARSE = 4  # of this part of the length of others, unless that is too short to settle
FIRST = 8  # replications, at least, of a load at which it is given up to prove anything
MOST = 32  # replications, at most; what needs more work than that gets longer replications
LONGER = 8  # replications grow at most to this multiple of their first length; then it is too close to say
STAYS = 6  # a replication is as long as so many stays of requests in short runs
STEEP = 10.0  # slope of the gap over the logarithm of the rate, where no verdicts show it
USUAL = 3.0  # Student's t of a proof in one of the first looks by some 20 replications


@dataclass(frozen=True)
class Effort:
    """How hard to look."""

    precision: float = 0.015  # half of the interval's width, as a fraction of the rate
    confidence: float = 0.95  # that the capacity lies in the interval
    requests: int = 2000  # of a replication, to begin with
    most_requests: int = 256_000  # of a replication, at most
    budget: float = math.inf  # requests of all replications together, after which replications grow no further
    draws: int = 0  # of the step costs' errors, `chairlift.sim.plan.errors`


class Looks:
    """What each of several looks at growing runs may err, so that all of them together have ``confidence``.

    ``first`` and ``most``: the requests of the first look, and what the last may come to.
    """

    def __init__(self, confidence: float, first: int, most: int) -> None:
        self.confidence, self.first, self.most = confidence, first, max(first, most)
        self.spent = 0.0  # of the risk
        self.risk = 0.0  # of the last look

    def at(self, requests: int) -> float:
        """The confidence of the next look, at ``requests`` in all; with no more of them it is the same look again."""
        share = (1 + math.log2(requests / self.first)) / (1 + math.log2(self.most / self.first))
        if share > self.spent:
            self.risk, self.spent = share - self.spent, share
        return 1 - self.risk * (1 - self.confidence)


def coarse(effort: Effort, part: int = COARSE) -> int:
    """Requests of a replication of one ``part``-th of the usual length, which is not made too short to be judged."""
    return max(min(LEAST, effort.requests), effort.requests // part)


def glance(
    measure: Measure,
    promises: Sequence[Promise],
    rate: float,
    effort: Effort,
    part: int = COARSE,
    confidence: float | None = None,
) -> Verdict:
    """The verdict of a few runs that are `coarse`, with a ``confidence`` in place of the effort's."""
    requests = coarse(effort, part)
    return judge(promises, measure(rate, requests, SCREEN), rate, requests, confidence or effort.confidence)


def decide(
    measure: Measure, promises: Sequence[Promise], rate: float, effort: Effort, lengths: int = MOST * LONGER
) -> Verdict:
    """The verdict on ``rate``, from as many requests as it takes to prove it either way, within limits.

    Short runs come first: they often prove that a promise is broken, and say how long requests stay. Where they break
    none, replications are `STAYS` times as long as that. Those that have not settled get longer; else there are more of
    them, as many as their standard errors ask for, up to `MOST`, and then they get longer. ``lengths``: what all of
    them together may come to, in replications of the first length.

    Where they are stretches of a recorded file, they grow no further once the file has nothing new to say. None grows
    where all that the limits allow could hardly prove anything, or where the load is so near to the one that breaks a
    promise that a plan of this precision need not tell them apart.
    """
    longest, most = min(effort.most_requests, LONGER * effort.requests), lengths * effort.requests
    looks = Looks(effort.confidence, SCREEN * coarse(effort), most)
    verdict = glance(measure, promises, rate, effort, confidence=looks.at(looks.first))
    if verdict.is_hopeless:
        return verdict
    requests, replications = effort.requests, SCREEN
    if all(kept.share == 1 for kept in verdict.kept):
        requests = min(longest, most // FIRST, _long_enough(verdict, requests))
    while True:
        verdict = judge(
            promises, measure(rate, requests, replications), rate, requests, looks.at(requests * replications)
        )
        if verdict.proof < 0 or (verdict.proof > 0 and not verdict.is_short):
            return verdict
        if verdict.is_used_up and not verdict.is_short:
            return verdict
        room = most / (requests * replications)
        if replications >= FIRST and not verdict.is_short and _is_close(verdict, room, effort):
            return verdict
        more = math.ceil(replications * _lacking(verdict) / 2) * 2  # an even number: cores come in pairs
        more = min(MOST, more, most // requests)
        if (verdict.is_short or replications == MOST) and requests < longest and room >= 2:
            requests = min(longest, requests * 2)
        elif more > replications:
            replications = more
        else:
            return verdict


def _long_enough(verdict: Verdict, requests: int) -> int:
    """A length of replications that shows the system under its lasting load: in quarters of ``requests``, and no less.

    Short runs hide how long requests stay, so `STAYS` of their stays are twice what a run needs to be long at all.
    """
    quarter = max(1, requests // 4)
    return max(requests, quarter * math.ceil(verdict.requests * verdict.stays * STAYS / quarter))


def _lacking(verdict: Verdict) -> float:
    """How many times the replications it takes to prove what a verdict suggests: 1.25 to 4."""
    times = [
        (USUAL * kept.logit_se / kept.logit_gap) ** 2 for kept in verdict.kept if not kept.proof and kept.logit_gap
    ]
    if verdict.gap > 0:  # one promise proven broken is enough
        times = [min(times, default=2.0)]
    wanted = max((2.0 if math.isinf(each) else each for each in times), default=2.0)
    return min(max(wanted, 1.25), 4.0)


def _is_close(verdict: Verdict, room: float, effort: Effort) -> bool:
    """Whether more runs, ``room`` times as many at most, are not worth while: see `decide`."""
    if not 0 < verdict.gap_se < math.inf:
        return False
    likely = (abs(verdict.gap) + verdict.gap_se) * math.sqrt(room)  # of the gap, in today's standard errors
    return likely < USUAL * verdict.gap_se or USUAL * verdict.gap_se < STEEP * effort.precision
