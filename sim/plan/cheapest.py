"""The cheapest system that keeps all promises at a rate: bounds first, then a race in order of price.

A system that a bound excludes is never simulated, and neither is one that costs more than the answer. All others meet
the same requests, in growing numbers, until it is proven that all promises are kept or that one is broken. Most systems
that are too small are proven so by a few short runs. Of systems that cost the same, heats of the same requests leave
the half that is furthest from breaking a promise, and then half of those (successive halving: Jamieson and Talwalkar,
AISTATS 2016); the best that is left is simulated until it is proven to keep them, and the others are behind.

Worked example at 60 requests a second: an L4 at $0.80 can serve no more than 15/s by its bound and is excluded; two of
them likewise. One A100 at $1.80 is simulated and breaks a promise. One H100 at $2.50 is simulated and keeps all. Two
A100s at $3.60 are dearer and are not looked at. A system whose replicas come and go stands where its fewest replicas
would, and counts at what was paid for in its runs.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from chairlift.sim.plan.bounds import Bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import COARSE, LONGER, MOST, SCREEN, Effort, Measure, coarse, decide, glance
from chairlift.sim.plan.promises import Promise, Sample
from chairlift.sim.plan.verdict import Verdict

ONE_OF_MANY = 16  # replications of the first length that a system beside the answer is worth


@dataclass(frozen=True)
class Entry:
    """What became of one candidate at one rate."""

    candidate: Candidate
    outcome: str  # "kept", "broken", "open" (too close to say), "excluded" (by a bound), "dearer" (than the answer),
    # or "behind" (as dear as one that will do, and in heats nearer to breaking a promise)
    why: str  # the same in words
    verdict: Verdict | None = None  # None: it was not simulated

    @property
    def usd_per_hour(self) -> float:
        """Its price; where replicas come and go, of those that were paid for on average."""
        if self.verdict is None or not self.verdict.replicas:
            return self.candidate.usd_per_hour
        return sum(n * usd for n, usd in zip(self.verdict.replicas, self.candidate.usd_of_replica, strict=True))


@dataclass
class Race:
    """The answer for one rate."""

    rate_per_s: float
    winner: Entry | None  # None: no candidate is proven to keep the promises
    entries: list[Entry] = field(default_factory=list)  # one a candidate, in order of price

    def of(self, outcome: str) -> list[Entry]:
        """The entries with this outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]


def race(
    candidates: Iterable[Candidate],
    bounds: Callable[[Candidate], Bound],
    measure: Callable[[Candidate], Measure],
    promises: Sequence[Promise],
    rate: float,
    effort: Effort,
    wanted: int = 1,
    prune: bool = True,
    told: Callable[[str], None] = lambda _: None,
    fine: Callable[[Candidate], float] | None = None,
) -> Race:
    """The cheapest of ``candidates`` that keeps ``promises`` at ``rate``, and what became of all others.

    ``wanted``: how many systems that will do are looked for. Beyond the first, each has the least number of replicas
    that will do, and `ONE_OF_MANY` says what its runs may come to. Those of one price are no longer put into heats, and
    one that serves short runs as another does that will do is not simulated further. ``fine``: the precision at which a
    candidate is told from one at its limit, in place of the effort's. ``prune=False`` simulates every candidate that
    has a setup, for tests to compare with.
    """
    ordered = sorted(candidates, key=lambda c: (c.usd_per_hour, c.name))
    entries: list[Entry] = []
    winner: Entry | None = None
    served: set[str] = set()
    started, raced = time.monotonic(), 0

    def decided(candidate: Candidate) -> Entry:
        nonlocal raced
        told(_progress(rate, candidate, entries, len(ordered), raced, time.monotonic() - started))
        hard = effort if fine is None else replace(effort, precision=fine(candidate))
        lengths = MOST * LONGER if winner is None or not prune else ONE_OF_MANY
        verdict = decide(measure(candidate), promises, rate, hard, lengths)
        raced += 1
        return Entry(candidate, *_said(verdict, promises), verdict)

    for _, group in groupby(ordered, key=lambda c: c.usd_per_hour):
        racing: list[Candidate] = []
        for candidate in group:
            entry = _excluded(candidate, bounds, rate) if prune or candidate.setup is None else None
            if entry is None and prune and winner is not None and candidate.usd_per_hour >= winner.usd_per_hour:
                if len(served) >= wanted:
                    entry = Entry(candidate, "dearer", f"{winner.candidate.name} will do for less")
                elif candidate.system in served:
                    entry = Entry(candidate, "dearer", "fewer replicas of it will do")
            if entry is None:
                racing.append(candidate)
            else:
                entries.append(entry)
        if prune and wanted == 1:
            racing = _heats(racing, bounds, measure, promises, rate, effort)
        good: list[Entry] = []  # those of this price that will do
        for candidate in racing:
            if good and prune and wanted == 1 and not candidate.scales:
                why = f"as dear as {good[0].candidate.name}, and no better in heats"
                entries.append(Entry(candidate, "behind", why))
                continue
            if prune and (same := _alike(candidate, good, measure, rate, effort)) is not None:
                why = f"as dear as {same.candidate.name}, and serves short runs as it does"
                entries.append(Entry(candidate, "behind", why))
                served.add(candidate.system)
                continue
            entries.append(entry := decided(candidate))
            if entry.outcome == "kept":
                good.append(entry)
                served.add(candidate.system)
                if winner is None or _order(entry) < _order(winner):
                    winner = entry
    return Race(rate, winner, entries)


def _order(entry: Entry) -> tuple[float, float]:
    """The cheapest first; of those of equal price, the one furthest from breaking a promise."""
    return entry.usd_per_hour, entry.verdict.gap if entry.verdict else math.inf


def _alike(
    candidate: Candidate, others: Sequence[Entry], measure: Callable[[Candidate], Measure], rate: float, effort: Effort
) -> Entry | None:
    """One of ``others`` whose short runs are those of ``candidate``, every figure of them; None: there is none.

    Settings differ that the load does not reach, such as limits of a batch.
    """
    if not others or candidate.scales:
        return None
    requests = coarse(effort)

    def seen(each: Candidate) -> list[Sample]:
        return [sample._replace(wall_s=0.0) for sample in measure(each)(rate, requests, SCREEN)]

    own = seen(candidate)
    return next((entry for entry in others if seen(entry.candidate) == own), None)


def _heats(
    racing: list[Candidate],
    bounds: Callable[[Candidate], Bound],
    measure: Callable[[Candidate], Measure],
    promises: Sequence[Promise],
    rate: float,
    effort: Effort,
) -> list[Candidate]:
    """Candidates of one price, the one that seems furthest from breaking a promise first, by successive halving.

    In each heat all runs have the same requests; the better half meets the next heat, of runs twice as long. Short runs
    in which nobody misses a promise say nothing of how much more load there may be: the bound does.
    """
    out: list[Candidate] = []  # those that left, the later ones in front
    part = 2 * COARSE
    while len(racing) > 2 and part > 1:
        seen = {
            each.name: _standing(glance(measure(each), promises, rate, effort, part), bounds(each)) for each in racing
        }
        racing = sorted(racing, key=lambda candidate: (seen[candidate.name], candidate.name))
        half = (len(racing) + 1) // 2
        racing, out = racing[:half], racing[half:] + out
        part //= 2
    return racing + out


def _standing(verdict: Verdict, bound: Bound) -> tuple[float, float, float]:
    """How near a candidate seems to a broken promise, the greater the nearer."""
    missed = any(kept.share < 1 for kept in verdict.kept)
    return verdict.gap if missed else -math.inf, -bound.rate_per_s, verdict.strain or 0.0


def _progress(
    rate: float, candidate: Candidate, entries: Sequence[Entry], systems: int, raced: int, spent_s: float
) -> str:
    """A line about a race under way: which system is simulated, how many are done with, and the time left at most."""
    counts = Counter(entry.outcome for entry in entries)
    excluded, left = counts["excluded"], systems - len(entries)
    line = f"{rate:g}/s: {candidate.name}, ${candidate.usd_per_hour:,.2f}/h: {raced} raced, {excluded} excluded, "
    line += f"{left} of {systems} left"
    if raced:  # the others are excluded as often as those so far, and take as long
        most_s = spent_s / raced * left * raced / (raced + excluded)
        line += f", {most_s:,.0f} s at most"
    return line


def _excluded(candidate: Candidate, bounds: Callable[[Candidate], Bound], rate: float) -> Entry | None:
    """The entry of a candidate that cannot keep the promises at ``rate``; None: it may."""
    if candidate.setup is None:
        return Entry(candidate, "excluded", candidate.misfit)
    found = bounds(candidate)
    if found.impossible:
        return Entry(candidate, "excluded", found.impossible)
    if found.rate_per_s < rate:
        return Entry(candidate, "excluded", f"cannot serve more than {found.rate_per_s:.3g}/s, however scheduled")
    return None


def _said(verdict: Verdict, promises: Sequence[Promise]) -> tuple[str, str]:
    """The outcome of a simulated candidate, and why: what became of the promise nearest to breaking."""
    worst = max(range(len(promises)), key=lambda j: verdict.kept[j].logit_gap)
    kept = verdict.kept[worst]
    share = f"{100 * kept.share:.3g} % [{100 * kept.low:.3g}, {100 * kept.high:.3g}]"
    if verdict.is_short and verdict.proof >= 0:
        return "open", f"waits had not settled after {verdict.requests:,} requests"
    outcome = {1: "kept", -1: "broken", 0: "open"}[verdict.proof]
    return outcome, f"{promises[worst]}: {share} met it, {100 * promises[worst].wanted:g} % wanted"
