"""The largest rate at which all promises are kept in the long run, as an interval: stochastic root finding.

The rate sought is the first, going up, at which a promise breaks. Promises may be kept again at still higher rates; the
search looks there too, and reports such rates as islands.

All rates meet the same random numbers: a replication has the same requests at every rate, and the same gaps between
them but for their scale. So two rates' results differ by the rate alone. The search has three stages:

1. `screen`: a geometric grid of rates, a few short replications each, until its lowest rate keeps the promises and a
   higher one breaks them. The bracket is the last rate that keeps them, going up, and the first that breaks them.
2. `close_in`: secant steps narrow the bracket to a few times the precision asked for.
3. `prove`: more replications, and then longer ones, until one rate is *proven* to keep the promises, and another, close
   above it, is proven to break one.

The two proven rates are the interval. Each is a test of its own, one-sided at half of 1 − confidence, and no shape of
the curve between them is assumed. The capacity lies between them with at least about the confidence asked for. The
interval is of the simulation's randomness alone; `chairlift.sim.plan.errors` has what errors of the step costs add.

Worked example, an M/M/1 queue that serves one request a second, and "90 % of requests: E2E ≤ 5757 ms" (the closed form
says 0.6/s). The guess 0.5 makes a grid from 0.1 to 2. With one seed, the screen finds 0.51 kept and 0.67 broken, and
secant steps lead to 0.615. 32 replications of 8000 requests correct that to 0.598; they prove 0.592 kept, 0.609 broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from chairlift.sim.plan.deciding import FIRST, MOST, SCREEN, Effort, Measure, coarse
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.verdict import Verdict, judge
from chairlift.sim.sweep.statistics import student

Told = Callable[[str], None]  # takes a line about progress

GRID = 12  # rates of the screen
WIDTH = 20.0  # ratio of the highest to the lowest of those rates
AROUND = 5, 4.0  # the same two where another capacity says about where this one lies
MARGIN = 1.15  # proofs are sought this many expected half-widths away from the centre
LOOKS = 40  # verdicts of one stage, at most
MOVES = 3  # of the centre, before more work is put into each verdict
ROUGH = 0.05  # precision from which on grown work goes to rates beside the centre at once, where that is likely to do:
ROUGHLY = 1.3  # half of the interval expected is no more than so many times the half that is sought
NEAR = 0.12  # two rates are near each other if the logarithm of their ratio is below this
LOWEST = 1e-4  # of the grid's highest rate: a promise that breaks even below breaks at any load


@dataclass(frozen=True)
class Errors:
    """What errors of step costs do to a capacity."""

    shifts: tuple[float, ...]  # of each draw: logarithm of its capacity over the plan's
    simulated: float  # half of the simulation's own interval, in the logarithm of the rate
    confidence: float

    @property
    def half(self) -> float:
        """Half of the width that the errors make alone, in the logarithm of the rate. They err either way alike."""
        rms = math.sqrt(sum(shift * shift for shift in self.shifts) / len(self.shifts))
        return student(0.5 + self.confidence / 2, len(self.shifts)) * rms

    @property
    def dominate(self) -> bool:
        """Whether the errors make more of the whole width than the simulation's chance."""
        return self.half > self.simulated

    def whole(self, rate_per_s: float) -> tuple[float, float]:
        """The interval of a capacity of ``rate_per_s`` with both widths in it."""
        half = math.hypot(self.half, self.simulated)
        return rate_per_s * math.exp(-half), rate_per_s * math.exp(half)


@dataclass
class Capacity:
    """What a search found. Rates in requests per second."""

    rate_per_s: float  # the best guess; 0: a promise breaks at any load
    low: float  # this rate is proven to keep the promises; 0: none is
    high: float  # this rate is proven to break a promise; inf: none is
    verdicts: list[Verdict]  # of every rate that was looked at, in order of rates
    limiting: Promise | None  # the promise that breaks first; None: none was seen to break
    islands: list[float] = field(default_factory=list)  # rates above `high` at which the promises seem kept again
    notes: list[str] = field(default_factory=list)  # what a reader must know about the search, in words
    errors: Errors | None = None  # what errors of the step costs do to it; None: nobody looked

    @property
    def reached(self) -> bool:
        """Whether any rate keeps the promises."""
        return self.rate_per_s > 0

    @property
    def simulated_s(self) -> float:
        """Seconds simulated for all verdicts, on the replicas' clocks."""
        return sum(verdict.simulated_s for verdict in self.verdicts)


class Unreachable(Exception):
    """A promise breaks at any load; carries the verdict on the lowest rate."""

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
    fine: Callable[[Capacity], float] | None = None,
    about: float = 0.0,
) -> Capacity:
    """The capacity of the system that ``measure`` simulates.

    ``guess`` is any rate to begin with. ``bound`` is a rate above which none can be served; infinity if none is known.
    ``fine``: takes what the screen shows, and says the precision to prove it to, in place of the effort's. ``about``:
    the capacity of the same system under less stress, if that is known; a quarter of it and more is looked at first.
    """
    search = _Search(measure, promises, guess, bound, effort, told)
    try:
        search.screen(about)
        precision = effort.precision if fine is None else fine(search.provisional())
        search.close_in(precision)
        search.prove(precision)
    except Unreachable as unreachable:
        broken = unreachable.verdict
        return Capacity(0.0, 0.0, broken.rate_per_s, search.ordered(), worst(broken, promises))
    return search.result()


class _Search:
    """One search under way. ``requests`` and ``replications`` are what the next verdict takes; they only grow."""

    def __init__(
        self, measure: Measure, promises: Sequence[Promise], guess: float, bound: float, effort: Effort, told: Told
    ) -> None:
        self.measure, self.promises, self.effort, self.told = measure, promises, effort, told
        self.guess, self.bound = guess, bound
        self.requests = effort.requests
        self.replications = FIRST
        self.seen: dict[float, Verdict] = {}
        self.glanced: set[float] = set()  # rates whose runs were not let grow until they settled
        self.below = 0.0  # the bracket: the last rate that holds, going up,
        self.above = math.inf  # and the first that does not
        self.precision = effort.precision  # of the interval that `prove` seeks
        self.centre = 0.0  # the rate around which proofs are sought; 0 before `prove`
        self.looks = 0  # verdicts so far
        self.spent = 0  # requests so far
        self.notes: list[str] = []

    def look(self, rate: float, replications: int, longest: int | None = None) -> Verdict:
        """The verdict on ``rate``, on runs that are doubled until they settle or the search may simulate no more.

        Runs that still drift then count as overloaded. A verdict that took as much work before is not made again,
        and before `prove` neither is one that more work would not change.
        ``longest``: requests of a run, at most, where the verdict is but a first look.
        """
        rate = float(f"{rate:.6g}")
        old = self.seen.get(rate)
        if old is not None and old.is_hopeless and self.centre == 0:
            return old
        cut_off = old is not None and old.is_short and rate in self.glanced and longest is None
        if old is not None and old.replications >= replications and old.requests >= self.requests and not cut_off:
            return old
        requests = self.requests
        while True:
            self.told(f"{rate:.4g}/s: {replications} × {requests:,} requests")
            verdict = judge(
                self.promises, self.measure(rate, requests, replications), rate, requests, self.effort.confidence
            )
            self.looks += 1
            self.spent += requests * replications
            most = requests >= (longest or self.effort.most_requests) or self.spent > self.effort.budget
            if most or not verdict.is_short or verdict.proof < 0:
                break
            requests = min(requests * 2, longest or self.effort.most_requests)
        if longest is None and verdict.drifting and verdict.proof >= 0:
            verdict = replace(verdict, overloaded=True)
        elif longest is None and verdict.proof >= 0:
            self.requests = max(self.requests, requests)
        self.seen[rate] = verdict
        (self.glanced.discard if longest is None else self.glanced.add)(rate)
        return verdict

    def ordered(self) -> list[Verdict]:
        """All verdicts in order of rates."""
        return [self.seen[rate] for rate in sorted(self.seen)]

    def screen(self, about: float = 0.0) -> None:
        """Look at a grid of rates, extended until its lowest rate holds and a higher one does not.

        ``about``: the grid's highest rate, if one is known to be near the capacity. Raises `Unreachable` if no rate
        holds.
        """
        whole = self.requests
        self.requests = coarse(replace(self.effort, requests=whole))
        top = about or (self.bound if math.isfinite(self.bound) else self.guess * 4)
        grid, width = AROUND if about else (GRID, WIDTH)
        for i in range(grid):
            self.look(top * width ** (i / (grid - 1) - 1), SCREEN, whole)
        step = width ** (1 / (grid - 1))
        while self.ordered()[-1].holds:
            rate = self.ordered()[-1].rate_per_s * step
            if rate > min(self.bound * step**6, top * WIDTH**2):  # short runs break none just above the bound
                self.notes.append(
                    "no rate that was looked at breaks a promise: runs are too short, or the slo is loose"
                )
                break
            self.look(rate, SCREEN, whole)
        self.requests = whole
        looked = {math.inf}
        while True:
            self.bracket()
            if self.below == 0:
                lowest = self.ordered()[0].rate_per_s / step**4
                if lowest < LOWEST * top:
                    raise Unreachable(self.look(lowest, FIRST))
                self.look(lowest, SCREEN)
            elif ends := sorted(({self.below} if about else {self.below, self.above}) - looked):
                looked.update(ends)  # short runs may have kept what long ones break
                for rate in ends:
                    self.look(rate, SCREEN)
            else:
                return

    def provisional(self) -> Capacity:
        """What is known before anything is proven: the bracket, and where the promises may break in it."""
        known = 0 < self.below < self.above < math.inf
        rate = math.exp(self.crossing()) if known else self.below
        return Capacity(rate, self.below, self.above, self.ordered(), None)

    def bracket(self) -> None:
        """Set ``below`` and ``above`` to where the promises first break, going up, by the verdicts so far."""
        self.below, self.above = 0.0, math.inf
        for verdict in self.trusted():
            if verdict.holds:
                self.below = verdict.rate_per_s
            else:
                self.above = verdict.rate_per_s
                return

    def close_in(self, precision: float) -> None:
        """Narrow the bracket to three precisions, by secant steps that keep 15 % away from either end of it."""
        begun = self.looks
        if self.below == 0 or not math.isfinite(self.above):
            return
        while math.log(self.above / self.below) > 3 * precision and self.looks < begun + LOOKS:
            low, high = math.log(self.below), math.log(self.above)
            guess = self.crossing() if math.isfinite(self.above) else high
            self.look(math.exp(min(max(guess, low + 0.15 * (high - low)), high - 0.15 * (high - low))), FIRST)
            self.bracket()
            if self.below == 0:  # more replications showed that not even the lowest rate holds
                self.look(self.above / WIDTH ** (2 / (GRID - 1)), FIRST)
                self.bracket()

    def crossing(self) -> float:
        """Logarithm of the rate at which a line between the gaps at the bracket's two ends crosses 0."""
        low, high = self.seen[self.below], self.seen[self.above]
        x, y = math.log(low.rate_per_s), math.log(high.rate_per_s)
        if high.gap - low.gap <= 0:
            return (x + y) / 2
        return x + (y - x) * -low.gap / (high.gap - low.gap)

    def prove(self, precision: float) -> None:
        """Put in more work until a rate close below the centre is proven to hold, and one close above to break.

        ``precision``: half of the width of the interval sought, as a fraction of the rate.

        The interval expected at the work so far is the standard error of the gap at the centre over the slope of the
        gap. Where it is too wide, work grows first. Otherwise the search looks that far on either side of the centre;
        if one side proves nothing, the centre is moved a few times before work grows again.
        """
        if self.below == 0 or not math.isfinite(self.above):
            return
        begun = self.looks
        self.precision = precision
        self.centre = math.exp(self.crossing())
        moves = 0
        while self.looks < begun + 2 * LOOKS:
            slope = self.slope()
            centre = self.look(self.centre, self.replications)
            half = student(1 - (1 - self.effort.confidence) / 2 / len(self.promises), max(centre.freedom, 0.5))
            half *= centre.gap_se / slope
            self.bracket()
            if centre.gap_se == 0 and 0 < self.below < self.above < math.inf:  # a jump: halve the bracket
                self.centre = math.sqrt(self.below * self.above)
            else:
                self.centre *= math.exp(min(max(-centre.gap / slope, -NEAR / 2), NEAR / 2))
            done = self.replications * self.requests
            if half * MARGIN > precision and self.grow(min(half * MARGIN / precision, 2.0) ** 2):
                moves = 0
                half *= math.sqrt(done / (self.replications * self.requests))  # as it is likely to become
                if precision < ROUGH or half * MARGIN > precision * ROUGHLY:
                    continue
            self.look_around(min(max(half * MARGIN, precision / 2), NEAR))
            low, high = self.proven()
            if high - low <= 2 * precision * self.centre * 1.0001:
                break
            moves += 1
            if moves <= MOVES and half * MARGIN <= precision and high <= low * math.exp(8 * precision):
                self.centre = math.sqrt(low * high)
            elif self.grow(2.0):
                moves = 0
            else:
                break
        self.bracket()

    def slope(self) -> float:
        """Slope of the gap over the logarithm of the rate, from rates near the centre; at least 0.5."""
        rates = [verdict for verdict in self.ordered() if abs(math.log(verdict.rate_per_s / self.centre)) < 2 * NEAR]
        rates = rates if len(rates) > 1 else [self.seen[self.below], self.seen[self.above]]
        run = math.log(rates[-1].rate_per_s / rates[0].rate_per_s)
        return max((rates[-1].gap - rates[0].gap) / run, 0.5)

    def look_around(self, width: float) -> None:
        """Look ``width`` (in the logarithm) below and above the centre; where that proves nothing, 1.3 times as far."""
        for sign in (-1, 1):
            for more in (1.0, 1.3):
                if self.look(self.centre * math.exp(sign * width * more), self.replications).proof == -sign:
                    break

    def trusted(self) -> list[Verdict]:
        """The verdicts that count, in order of rates: near the centre only those that took as much work as the last."""
        if self.centre == 0:
            return self.ordered()
        work = self.replications * self.requests
        return [
            verdict
            for verdict in self.ordered()
            if abs(math.log(verdict.rate_per_s / self.centre)) > NEAR or verdict.replications * verdict.requests >= work
        ]

    def proven(self) -> tuple[float, float]:
        """The largest rate proven to hold, below all rates that seem broken, and the smallest proven to be broken.

        Neither is nearer to the centre than a third of the precision: of many verdicts close to the truth, each right
        with the confidence asked for, one errs sooner or later. 0 and infinity where nothing is proven.
        """
        low, high, apart = 0.0, math.inf, math.exp(self.precision / 3)
        doubted = False  # whether a rate below the present one seems broken
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
        """Whether the search may put more work into a verdict than it does now."""
        more = self.replications < MOST or self.requests < self.effort.most_requests
        more = more and not any(verdict.is_used_up for verdict in self.seen.values())
        return more and self.spent < self.effort.budget

    def grow(self, factor: float) -> bool:
        """Put about ``factor`` times the work into further verdicts; False if the search may not.

        Replications grow in number up to `MOST`, then in length, at most eightfold at once.
        """
        if not self.can_grow():
            return False
        if self.replications < MOST:
            self.replications = min(MOST, 2 ** math.ceil(math.log2(self.replications * factor)))
        else:
            doublings = max(1, round(math.log2(factor)))
            self.requests = min(self.effort.most_requests, self.requests * 2 ** min(doublings, 3))
        return True

    def result(self) -> Capacity:
        """What all verdicts together say."""
        low, high = self.proven()
        rate = self.below if self.centre == 0 else min(max(self.fitted(), low), high)
        limiting = worst(self.seen[self.above], self.promises) if math.isfinite(self.above) else None
        islands = [verdict.rate_per_s for verdict in self.trusted() if verdict.rate_per_s > high and verdict.holds]
        if high - low > 2 * self.precision * max(rate, 1e-12) * 1.01:
            rows = any(verdict.worth < verdict.replications for verdict in self.seen.values())
            why = (
                "the recorded file has no more rows"
                if rows
                else "search.budget_requests or search.most_requests was reached"
            )
            self.notes.append(f"the interval is wider than asked for: {why}")
        return Capacity(rate, low, high, self.ordered(), limiting, islands, [*self.notes, *self.unsettled(rate)])

    def unsettled(self, near: float) -> Iterator[str]:
        """A line each about verdicts that count although their runs had not settled."""
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
        """The rate at which a line fitted to the gaps near the centre crosses 0; of too few, the centre.

        Where the precision is rough, it is the line between the bracket's ends then: the centre was looked at but once.
        """
        near = [verdict for verdict in self.trusted() if abs(math.log(verdict.rate_per_s / self.centre)) <= NEAR / 2]
        if len(near) < 3:
            known = self.precision >= ROUGH and 0 < self.below < self.above < math.inf
            return math.exp(self.crossing()) if known else self.centre
        x = np.log([verdict.rate_per_s / self.centre for verdict in near])
        slope, at = np.polyfit(x, [verdict.gap for verdict in near], 1)
        return self.centre * math.exp(min(max(-at / slope, -NEAR), NEAR)) if slope > 0 else self.centre


def worst(verdict: Verdict, promises: Sequence[Promise]) -> Promise:
    """The promise with the greatest gap."""
    return promises[max(range(len(promises)), key=lambda j: verdict.kept[j].logit_gap)]
