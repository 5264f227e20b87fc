"""The largest rate at which promises are kept in the long run, as an interval: stochastic root finding.

The rate sought is the first at which a promise breaks, going up: it need not stay broken beyond, and the search looks.
All rates meet the same random numbers (a replication's requests and the pattern of their gaps; only the scale of the
gaps differs), so that what differs between two rates is the rate. Three stages: a screen over a geometric grid, secant
steps between the last rate that keeps the promises and the first that breaks them, and then growing replications and
run lengths until a rate is *proven* to keep them and another, close by, proven to break one.

Those two rates are the interval. Each is a test of its own, one-sided at half of 1 − confidence, so no shape of the
curve between rates is assumed; the capacity lies between them with at least about the confidence asked for. It is the
interval of the simulation's randomness: it knows nothing of errors of the step costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from chairlift.sim.plan.promises import Promise, Sample
from chairlift.sim.plan.verdict import Verdict, judge
from chairlift.sim.sweep.statistics import student

Measure = Callable[[float, int, int], Sequence[Sample]]  # rate, requests a replication, replications → a sample each
Told = Callable[[str], None]

GRID = 12  # rates of the screen
WIDTH = 20.0  # from the lowest to the highest of them
SCREEN = 4  # replications there
FIRST = 8  # replications from which on a verdict counts
MOST = 32  # replications; beyond that runs get longer
MARGIN = 1.15  # times the half-width expected: where the proofs are looked for
LOOKS = 40  # verdicts of one stage
MOVES = 3  # of the centre before more work is put in
NEAR = 0.12  # logarithm of the ratio of two rates of which one tells about the other
LOWEST = 1e-4  # of the bound on the rate, or of the first guess


@dataclass(frozen=True)
class Effort:
    """How hard to look."""

    precision: float = 0.015  # half of the interval's width, as a part of the rate
    confidence: float = 0.95
    requests: int = 2000  # a replication, to begin with
    most_requests: int = 256_000  # a replication
    budget: float = math.inf  # requests in all, beyond which no more work is put in


@dataclass
class Capacity:
    """What a search found. Rates in requests per second."""

    rate_per_s: float  # the best guess; 0: the promises do not even hold without load
    low: float  # proven to be kept; 0: nothing is proven
    high: float  # proven to be broken; inf: nothing is proven
    verdicts: list[Verdict]  # every rate that was looked at, in order of rates
    limiting: Promise | None  # what breaks first
    islands: list[float] = field(default_factory=list)  # higher rates at which the promises hold again
    notes: list[str] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether there is any rate that keeps the promises."""
        return self.rate_per_s > 0

    @property
    def simulated_s(self) -> float:
        """Simulated seconds of all looks."""
        return sum(verdict.simulated_s for verdict in self.verdicts)


class Unreachable(Exception):
    """The promises break at any load; carries the verdict at the lowest one."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


def find(
    measure: Measure,
    promises: Sequence[Promise],
    guess: float,
    bound: float,
    effort: Effort,
    told: Told = lambda _: None,
) -> Capacity:
    """The capacity. ``guess``: any rate to begin with; ``bound``: none above it can be served (inf: not known)."""
    search = _Search(measure, promises, guess, bound, effort, told)
    try:
        search.screen()
        search.close_in()
        search.prove()
    except Unreachable as unreachable:
        worst = _worst(unreachable.verdict, promises)
        return Capacity(0.0, 0.0, unreachable.verdict.rate_per_s, search.ordered(), worst)
    return search.result()


class _Search:
    def __init__(
        self, measure: Measure, promises: Sequence[Promise], guess: float, bound: float, effort: Effort, told: Told
    ) -> None:
        self.measure, self.promises, self.effort, self.told = measure, promises, effort, told
        self.guess, self.bound = guess, bound
        self.requests = effort.requests
        self.replications = FIRST
        self.seen: dict[float, Verdict] = {}
        self.below = 0.0  # the last rate that holds, going up, and the first that does not
        self.above = math.inf
        self.centre = 0.0  # where the proofs are sought
        self.looks = 0
        self.spent = 0  # requests
        self.notes: list[str] = []

    def look(self, rate: float, replications: int) -> Verdict:
        """The verdict at ``rate``, on runs as long as it takes to settle."""
        rate = float(f"{rate:.6g}")
        old = self.seen.get(rate)
        if old is not None and old.replications >= replications and old.requests >= self.requests:
            return old
        requests = self.requests
        while True:
            self.told(f"{rate:.4g}/s: {replications} × {requests:,} requests")
            verdict = judge(
                self.promises, self.measure(rate, requests, replications), rate, requests, self.effort.confidence
            )
            self.looks += 1
            self.spent += requests * replications
            most = requests >= self.effort.most_requests or self.spent > self.effort.budget
            if most or not verdict.is_short or verdict.proof < 0:
                break
            requests *= 2
        if verdict.drifting and verdict.proof >= 0:
            verdict = replace(verdict, overloaded=True)
        elif verdict.proof >= 0:
            self.requests = max(self.requests, requests)
        self.seen[rate] = verdict
        return verdict

    def ordered(self) -> list[Verdict]:
        return [self.seen[rate] for rate in sorted(self.seen)]

    def screen(self) -> None:
        """A grid around the guess, extended until its first rate holds and a later one does not."""
        top = self.bound if math.isfinite(self.bound) else self.guess * 4
        rates = [top * WIDTH ** (i / (GRID - 1) - 1) for i in range(GRID)]
        for rate in rates:
            self.look(rate, SCREEN)
        step = WIDTH ** (1 / (GRID - 1))
        while not self.ordered()[0].holds:
            lowest = self.ordered()[0].rate_per_s / step**4
            if lowest < LOWEST * top:
                raise Unreachable(self.look(lowest, FIRST))
            self.look(lowest, SCREEN)
        while self.ordered()[-1].holds:
            rate = self.ordered()[-1].rate_per_s * step
            if rate > min(self.bound * step, top * WIDTH**2):
                self.notes.append(
                    "no rate that was looked at breaks a promise: runs are too short, or the slo is loose"
                )
                break
            self.look(rate, SCREEN)
        self.bracket()

    def bracket(self) -> None:
        """Where the promises first break, going up, as known by now."""
        self.below, self.above = 0.0, math.inf
        for verdict in self.trusted():
            if verdict.holds:
                self.below = verdict.rate_per_s
            else:
                self.above = verdict.rate_per_s
                return

    def close_in(self) -> None:
        """Secant steps, kept within the middle of the bracket, until it is a few precisions wide."""
        begun = self.looks
        if self.below == 0 or not math.isfinite(self.above):
            return
        while math.log(self.above / self.below) > 3 * self.effort.precision and self.looks < begun + LOOKS:
            low, high = math.log(self.below), math.log(self.above)
            guess = self.crossing() if math.isfinite(self.above) else high
            self.look(math.exp(min(max(guess, low + 0.15 * (high - low)), high - 0.15 * (high - low))), FIRST)
            self.bracket()
            if self.below == 0:  # what seemed to hold does not
                self.look(self.above / WIDTH ** (2 / (GRID - 1)), FIRST)
                self.bracket()

    def crossing(self) -> float:
        """Logarithm of the rate where the worst promise's line between the bracket's ends crosses 0."""
        low, high = self.seen[self.below], self.seen[self.above]
        x, y = math.log(low.rate_per_s), math.log(high.rate_per_s)
        if high.gap - low.gap <= 0:
            return (x + y) / 2
        return x + (y - x) * -low.gap / (high.gap - low.gap)

    def prove(self) -> None:
        """Grow replications, then lengths, until two rates close by are proven to be on either side."""
        if self.below == 0 or not math.isfinite(self.above):
            return
        begun = self.looks
        precision = self.effort.precision
        self.centre = math.exp(self.crossing())
        moves = 0
        while self.looks < begun + 2 * LOOKS:
            slope = self.slope()
            centre = self.look(self.centre, self.replications)
            half = student(1 - (1 - self.effort.confidence) / 2 / len(self.promises), self.replications - 1)
            half *= centre.gap_se / slope
            self.bracket()
            if centre.gap_se == 0 and 0 < self.below < self.above < math.inf:  # a jump: no line leads to it
                self.centre = math.sqrt(self.below * self.above)
            else:
                self.centre *= math.exp(min(max(-centre.gap / slope, -NEAR / 2), NEAR / 2))
            if half * MARGIN > precision and self.grow(min(half * MARGIN / precision, 4.0) ** 2):
                moves = 0
                continue
            self.look_around(min(max(half * MARGIN, precision / 2), NEAR))
            low, high = self.proven()
            if high - low <= 2 * precision * self.centre * 1.0001:
                break
            moves += 1
            if moves <= MOVES and half * MARGIN <= precision and 0 < low < high < math.inf:
                self.centre = math.sqrt(low * high)
            elif self.grow(2.0):
                moves = 0
            else:
                break
        self.bracket()

    def slope(self) -> float:
        """Of the worst promise's log odds over the logarithm of the rate, between rates a few percent apart."""
        rates = [verdict for verdict in self.ordered() if abs(math.log(verdict.rate_per_s / self.centre)) < 2 * NEAR]
        rates = rates if len(rates) > 1 else [self.seen[self.below], self.seen[self.above]]
        run = math.log(rates[-1].rate_per_s / rates[0].rate_per_s)
        return max((rates[-1].gap - rates[0].gap) / run, 0.5)

    def look_around(self, width: float) -> None:
        """Look ``width`` below and above, and once more a little further out where that proves nothing."""
        for sign in (-1, 1):
            for more in (1.0, 1.3):
                if self.look(self.centre * math.exp(sign * width * more), self.replications).proof == -sign:
                    break

    def trusted(self) -> list[Verdict]:
        """In order of rates, those that count: near the centre only what was looked at as hard as at last."""
        if self.centre == 0:
            return self.ordered()
        work = self.replications * self.requests
        return [
            verdict
            for verdict in self.ordered()
            if abs(math.log(verdict.rate_per_s / self.centre)) > NEAR or verdict.replications * verdict.requests >= work
        ]

    def proven(self) -> tuple[float, float]:
        """The largest rate proven to hold below all that seem broken, and the smallest proven to be broken.

        Neither is nearer to the centre than a third of the precision: of many looks close to the truth one errs.
        """
        low, high, apart = 0.0, math.inf, math.exp(self.effort.precision / 3)
        doubted = False  # whether a lower rate seems broken
        for verdict in self.trusted():
            rate = verdict.rate_per_s
            if verdict.proof < 0 and rate >= self.centre * apart:
                high = rate
                break
            if verdict.proof > 0 and rate <= self.centre / apart and not doubted:
                low = rate
            doubted = doubted or (not verdict.holds and rate < self.centre / apart)
        return low, high

    def can_grow(self) -> bool:
        more = self.replications < MOST or self.requests < self.effort.most_requests
        return more and self.spent < self.effort.budget

    def grow(self, factor: float) -> bool:
        """``factor`` times the work: first more replications, then longer ones. False: that is all one may."""
        if not self.can_grow():
            return False
        if self.replications < MOST:
            self.replications = min(MOST, 2 ** math.ceil(math.log2(self.replications * factor)))
        else:
            doublings = max(1, round(math.log2(factor)))
            self.requests = min(self.effort.most_requests, self.requests * 2 ** min(doublings, 3))
        return True

    def result(self) -> Capacity:
        low, high = self.proven()
        rate = self.below if self.centre == 0 else min(max(self.fitted(), low), high)
        limiting = _worst(self.seen[self.above], self.promises) if math.isfinite(self.above) else None
        islands = [verdict.rate_per_s for verdict in self.trusted() if verdict.rate_per_s > high and verdict.holds]
        if high - low > 2 * self.effort.precision * max(rate, 1e-12) * 1.01:
            self.notes.append("the interval is wider than asked for: search.budget or search.most_requests was reached")
        return Capacity(rate, low, high, self.ordered(), limiting, islands, [*self.notes, *self.unsettled(rate)])

    def unsettled(self, near: float) -> Iterator[str]:
        """Which of the rates that count, if any, were judged on runs too short for them."""
        growing = [verdict for verdict in self.trusted() if verdict.overloaded]
        if growing:
            after = f"after {max(verdict.requests for verdict in growing):,} requests"
            yield f"from {growing[0].rate_per_s:.4g}/s on waits still grow {after}: taken as not sustainable"
        close = [v for v in self.trusted() if near > 0 and abs(math.log(v.rate_per_s / near)) <= NEAR]
        short = [v for v in close if v.is_short and v.proof >= 0 and not v.overloaded]
        if short:
            few = max(verdict.requests for verdict in short)
            yield f"at {short[-1].rate_per_s:.4g}/s {few:,} requests are too few to settle: raise search.most_requests"

    def fitted(self) -> float:
        """The rate where a line through the last verdicts near the centre crosses 0."""
        near = [verdict for verdict in self.trusted() if abs(math.log(verdict.rate_per_s / self.centre)) <= NEAR / 2]
        if len(near) < 3:
            return self.centre
        x = np.log([verdict.rate_per_s / self.centre for verdict in near])
        slope, at = np.polyfit(x, [verdict.gap for verdict in near], 1)
        return self.centre * math.exp(min(max(-at / slope, -NEAR), NEAR)) if slope > 0 else self.centre


def _worst(verdict: Verdict, promises: Sequence[Promise]) -> Promise:
    return promises[max(range(len(promises)), key=lambda j: verdict.kept[j].logit_gap)]
