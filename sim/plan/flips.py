"""At which change of the load, of a price or of a promise a plan's answer becomes another one.

The answer is what the cheapest system costs. `changes` makes each assumption up to `FAR` times as large and as small
and looks, by halving, for the nearest value at which the cheapest system has another price, or none will do. A price
needs no halving: the best system of each kind of GPU is raced by itself, and two lines of price cross where they do.

What is known is not asked again. The load up to which the answer's `Margin` proves that it keeps the promises flips
nothing towards a dearer one, and from where it breaks one on the answer is no longer raced. A flip at which the old
answer is but too close to say, and not proven to break a promise, says so.

Worked example at 40 requests a second: one H200 at $4.00 will do; of H100s it takes two, at $5.90. The answer flips
when the H200's price rises by 48 %, or the H100's falls by 32 %: at the first both cost $5.90, at the second $4.00. Had
the H200 a capacity of 50/s, and nothing cheaper one of more than 22/s, it would flip at 1.25 times and at 0.55 times
the load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.cheapest import Entry, Race
from chairlift.sim.plan.headroom import Margin
from chairlift.sim.plan.promises import Promise

FAR = 2.0  # the largest change that is tried, and its inverse
NEAR = 2 ** (1 / 16)  # a flip is known to within this factor, 4.4 %
SWING = 1.2  # the change whose effect on the price is compared over all assumptions

# Races some candidates under some promises at a rate per second.
Ask = Callable[[Sequence[Candidate], Sequence[Promise], float], Race]


class Flip(NamedTuple):
    """A change at which the answer becomes another one."""

    times: float  # the assumption's value, over what it is
    sure: float  # a smaller change, at which it is still the same
    before: str  # the answer up to there
    before_usd: float  # dollars an hour, at the changed assumption
    to: str  # the answer from there on; "": nothing will do
    to_usd: float  # likewise; inf: nothing will do
    proven: bool = True  # whether ``before`` no longer is the answer; else its runs are too close to say

    def __str__(self) -> str:
        to = f"{self.to}, ${self.to_usd:,.2f}/h" if self.to else "nothing that will do"
        told = f"{self.times:.3g} ×: {to}, in place of {self.before}, ${self.before_usd:,.2f}/h"
        return told if self.proven else f"{told} (whether that still will do is too close to say)"


@dataclass(frozen=True)
class Change:
    """What one assumption does to the answer."""

    what: str  # in words: "load", "price of h100", "limit of p99 TTFT ≤ 500 ms"
    less: Flip | None  # the nearest smaller value; None: none down to 1 / `FAR`, for a price: none at all
    more: Flip | None  # the nearest greater one; None: likewise
    usd: tuple[float, float]  # dollars an hour of the answer at 1 / `SWING` and at `SWING` times the value; inf: none

    @property
    def swing(self) -> float:
        """How far apart those prices are."""
        return abs(self.usd[1] - self.usd[0])

    @property
    def nearest(self) -> float:
        """How large a change flips the answer, either way, as the logarithm of a factor; infinite if none does."""
        return min((abs(math.log(flip.times)) for flip in (self.less, self.more) if flip is not None), default=math.inf)


def changes(
    candidates: Sequence[Candidate],
    promises: Sequence[Promise],
    rate: float,
    winner: Entry,
    ask: Ask,
    margin: Margin | None = None,
) -> Iterator[Change]:
    """What each assumption does to the answer ``winner`` at ``rate``; ``margin``: what is known of it beyond that."""
    kept, broken = (1.0, math.inf) if margin is None else (margin.kept, margin.broken)

    def at_load(times: float) -> Race:
        some = [each for each in candidates if times < broken or each is not winner.candidate]
        return ask(some, promises, rate * times)

    yield _searched("load", winner, at_load, kept)
    for j, promise in enumerate(promises):

        def at_limits(times: float, j: int = j) -> Race:
            return ask(candidates, [*promises[:j], stretched(promises[j], times), *promises[j + 1 :]], rate)

        yield _searched(f"limit of {promise}", winner, at_limits)
    yield from _prices(candidates, winner, lambda some: ask(some, promises, rate))


def stretched(promise: Promise, times: float) -> Promise:
    """The promise with all of its limits so many times as long."""
    return promise.model_copy(update={f"{name}_ms": limit * times for name, limit in promise.limits().items()})


def _searched(what: str, winner: Entry, at: Callable[[float], Race], kept: float = 1.0) -> Change:
    """The change of an assumption under which ``at`` races the candidates; up to ``kept`` times it is none."""
    swung, flips = [], []
    for swing, far in ((1 / SWING, 1 / FAR), (SWING, FAR)):
        race = at(swing) if swing > kept or swing < 1 or winner.candidate.scales else None
        swung.append(winner.usd_per_hour if race is None else _usd(race))
        flips.append(_nearest(winner, at, far, max(1.0, kept) if far > 1 else 1.0, swing, race))
    return Change(what, flips[0], flips[1], (swung[0], swung[1]))


def _nearest(
    winner: Entry, at: Callable[[float], Race], far: float, kept: float, swing: float, swung: Race | None
) -> Flip | None:
    """The nearest multiple between ``kept`` and ``far`` with another answer; None if it is the same at ``far``.

    ``swung``: the race at ``swing``, if there was one. The answer is taken to change once on the way; where it changes
    several times, one of the changes is found.
    """
    sure, flips, found = math.log(kept), math.log(far), swung
    if swung is not None and not _same(swung, winner) and (far < 1 or swing > kept):
        flips = math.log(swing)
    else:
        sure = max(sure, math.log(swing)) if far > 1 else math.log(swing)
        if sure >= flips > 0:  # the margin reaches as far
            return None
        found = at(far)
        if _same(found, winner):
            return None
    assert found is not None
    while abs(flips - sure) > math.log(NEAR) * (1 + 1e-9):
        middle = (sure + flips) / 2
        race = at(math.exp(middle))
        if _same(race, winner):
            sure = middle
        else:
            flips, found = middle, race
    old = next((entry for entry in found.entries if entry.candidate is winner.candidate), winner)
    was = winner if old.verdict is None else old  # where replicas come and go, the load says what they cost
    to = "" if found.winner is None else found.winner.candidate.name
    before = winner.candidate.name, was.usd_per_hour
    return Flip(math.exp(flips), math.exp(sure), *before, to, _usd(found), old.outcome != "open")


def _same(race: Race, winner: Entry) -> bool:
    """Whether the answer of a race is that of ``winner``: the same system, or one as dear."""
    best = race.winner
    return best is not None and (best.candidate is winner.candidate or best.usd_per_hour == winner.usd_per_hour)


def _prices(
    candidates: Sequence[Candidate], winner: Entry, ask: Callable[[Sequence[Candidate]], Race]
) -> Iterator[Change]:
    """What the price of each kind of GPU does, of candidates that have but one kind.

    Of an answer that has several kinds, only the prices of GPUs that it has none of are told.
    """
    kinds: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if len(gpus := _gpus(candidate)) == 1:
            kinds.setdefault(gpus.pop(), []).append(candidate)
    of_it = _gpus(winner.candidate)
    best = {gpu: ask(some).winner for gpu, some in kinds.items() if gpu not in of_it}
    if len(of_it) == 1:
        best |= dict.fromkeys(of_it, winner)
    usd = {gpu: math.inf if entry is None else entry.usd_per_hour for gpu, entry in best.items()}
    for gpu, entry in best.items():
        others = min((usd[other] for other in usd if other != gpu), default=math.inf)
        if entry is winner:
            rival = min((other for other in usd if other != gpu), key=lambda other: usd[other], default=gpu)
            old, new, cheapest = winner, best[rival], others
        else:
            old, new, cheapest = winner, entry, winner.usd_per_hour
        cross = cheapest / usd[gpu]  # times the price at which this GPU's best and the best of the others cost the same
        flip = None
        if new is not None and old is not new and 0 < cross < math.inf:
            flip = Flip(cross, cross, old.candidate.name, cheapest, new.candidate.name, cheapest)
        swung = (min(usd[gpu] / SWING, cheapest), min(usd[gpu] * SWING, cheapest))
        yield Change(f"price of {gpu}", None if entry is winner else flip, flip if entry is winner else None, swung)


def _gpus(candidate: Candidate) -> set[str]:
    """The kinds of GPUs that a candidate has; none if it cannot be."""
    return set() if candidate.setup is None else {group.gpu.name for group in candidate.setup.groups}


def _usd(race: Race) -> float:
    """The price of a race's answer; infinite if nothing will do."""
    return math.inf if race.winner is None else race.winner.usd_per_hour
