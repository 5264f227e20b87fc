"""At which change of the load, of a price or of a promise a plan's answer becomes another one.

The answer is what the cheapest system costs. `changes` makes each assumption up to `FAR` times as large and as small
and looks, by halving, for the nearest value at which the cheapest system has another price, or none will do. A price
needs no halving: the best system of each kind of GPU is raced by itself, and two lines of price cross where they do.

Worked example at 40 requests a second: one H200 at $4.00 will do; of H100s it takes two, at $5.90. The answer flips
when the H200's price rises by 48 %, or the H100's falls by 32 %. Had the H200 a capacity of 50/s, and nothing cheaper
one of more than 22/s, it would flip at 1.25 times and at 0.55 times the load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.cheapest import Entry, Race
from chairlift.sim.plan.promises import Promise

FAR = 2.0  # the largest change that is tried, and its inverse
HALVINGS = 4  # of it, in the logarithm: the nearest change is known to within 2^(1/16), 4.4 %
SWING = 1.2  # the change whose effect on the price is compared over all assumptions

# Races some candidates under some promises at a rate per second.
Ask = Callable[[Sequence[Candidate], Sequence[Promise], float], Race]


class Flip(NamedTuple):
    """A change at which the answer becomes another one."""

    times: float  # the assumption's value, over what it is
    sure: float  # a smaller change, at which it is still the same
    to: str  # what the answer is then, in words

    def __str__(self) -> str:
        return f"{self.times:.3g} ×: {self.to}"


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
    candidates: Sequence[Candidate], promises: Sequence[Promise], rate: float, winner: Entry, ask: Ask
) -> Iterator[Change]:
    """What each assumption does to the answer ``winner`` at ``rate``."""

    def at_load(times: float) -> Race:
        return ask(candidates, promises, rate * times)

    yield _searched("load", winner, at_load)
    for j, promise in enumerate(promises):

        def at_limits(times: float, j: int = j) -> Race:
            return ask(candidates, [*promises[:j], stretched(promises[j], times), *promises[j + 1 :]], rate)

        yield _searched(f"limit of {promise}", winner, at_limits)
    yield from _prices(candidates, winner, lambda some: ask(some, promises, rate))


def stretched(promise: Promise, times: float) -> Promise:
    """The promise with all of its limits so many times as long."""
    return promise.model_copy(update={f"{name}_ms": limit * times for name, limit in promise.limits().items()})


def _searched(what: str, winner: Entry, at: Callable[[float], Race]) -> Change:
    """The change of an assumption under which ``at`` races the candidates."""
    swung = (_usd(at(1 / SWING)), _usd(at(SWING)))
    return Change(what, _nearest(winner, at, 1 / FAR), _nearest(winner, at, FAR), swung)


def _nearest(winner: Entry, at: Callable[[float], Race], far: float) -> Flip | None:
    """The nearest multiple between 1 and ``far`` at which the answer has another price; None if it has not at ``far``.

    The answer is taken to change once on the way; where it changes several times, one of the changes is found.
    """
    found = at(far)
    if _usd(found) == winner.usd_per_hour:
        return None
    sure, flips = 0.0, math.log(far)
    for _ in range(HALVINGS):
        middle = (sure + flips) / 2
        race = at(math.exp(middle))
        if _usd(race) == winner.usd_per_hour:
            sure = middle
        else:
            flips, found = middle, race
    return Flip(math.exp(flips), math.exp(sure), _said(found.winner))


def _prices(
    candidates: Sequence[Candidate], winner: Entry, ask: Callable[[Sequence[Candidate]], Race]
) -> Iterator[Change]:
    """What the price of each kind of GPU does, of candidates that have but one kind."""
    kinds: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        gpus = {group.gpu.name for group in candidate.setup.groups} if candidate.setup is not None else set()
        if len(gpus) == 1:
            kinds.setdefault(gpus.pop(), []).append(candidate)
    best = {gpu: ask(some).winner for gpu, some in kinds.items()}
    usd = {gpu: math.inf if entry is None else entry.usd_per_hour for gpu, entry in best.items()}
    own = next((gpu for gpu, some in kinds.items() if any(c is winner.candidate for c in some)), None)
    for gpu, price in usd.items():
        rivals = {other: usd[other] for other in usd if other != gpu}
        rival = min(rivals, key=lambda other: rivals[other], default=None) if gpu == own else None
        cheapest = winner.usd_per_hour if gpu != own else rivals.get(rival or "", math.inf)
        cross = cheapest / price  # times the price at which this GPU's best and the best of the others cost the same
        flip = Flip(cross, cross, _said(best[rival or gpu])) if 0 < cross < math.inf else None
        swung = (min(price / SWING, cheapest), min(price * SWING, cheapest))
        yield Change(f"price of {gpu}", None if gpu == own else flip, flip if gpu == own else None, swung)


def _usd(race: Race) -> float:
    """The price of a race's answer; infinite if nothing will do."""
    return math.inf if race.winner is None else race.winner.usd_per_hour


def _said(entry: Entry | None) -> str:
    return "nothing will do" if entry is None else f"{entry.candidate.name}, ${entry.usd_per_hour:,.2f}/h"
