"""Questions that people ask of a plan beside its answer: a budget, an API's price, growth, spares, spot, a day's hours.

A plan file asks them under ``ask``. Growth and the hours of a day are further rates to buy for, a spare replica is one
that is paid for and gone, `chairlift.sim.plan.spot` answers for spot instances; what is left is arithmetic on the
answer, in `said`.

Worked example: a system of $3.60 an hour serves requests of 1000 tokens in and 100 out. An API at $0.10 and $0.40 a
million tokens takes $0.00014 a request, so that the system breaks even from 3.60 / 3600 / 0.00014 = 7.1 requests a
second on. For $200 a day one has two of them; where each sustains 10/s, they serve 2 · 10 · 86,400 requests a day.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Capacity
from chairlift.sim.plan.cheapest import Race
from chairlift.sim.plan.costs import Tokens, tokens_of
from chairlift.sim.plan.pacing import own_rate
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.arrivals import Rate
from chairlift.sim.workload.clients import Constant, Seconds
from chairlift.sim.workload.strict import Spec

Usd = Annotated[float, Field(gt=0, le=1e12)]
HOURS = 24


class Api(Spec):
    """What somebody else takes for the same tokens."""

    usd_per_million_in: Usd = Field(description="Dollars a million prompt tokens.")
    usd_per_million_out: Usd = Field(description="Dollars a million answer tokens.")

    def per_request(self, tokens: Tokens) -> float:
        """Dollars for one request (or session)."""
        return (tokens.into * self.usd_per_million_in + tokens.out * self.usd_per_million_out) / 1e6


class Growth(Spec):
    """How the load grows."""

    percent_a_month: Annotated[float, Field(gt=0, le=1000)] = Field(description="Of the load of the month before.")
    months: Annotated[int, Field(ge=1, le=120)] = Field(description="Until the date to buy for.")

    @property
    def times(self) -> float:
        """The load at that date, over today's."""
        return float((1 + self.percent_a_month / 100) ** self.months)


class Spot(Spec):
    """Spot instances, beside those on demand."""

    off_percent: Annotated[float, Field(gt=0, lt=100)] = Field(description="What they cost less than on demand.")
    hours_between_losses: Annotated[float, Field(gt=0, le=1e6)] = Field(
        description="Mean time that a replica is held until it is taken."
    )
    minutes_until_back: Annotated[float, Field(gt=0, le=1e6)] = Field(
        description="Mean time until another takes its place and has loaded."
    )

    @property
    def away(self) -> float:
        """The share of the time that a replica is not there."""
        held, gone = self.hours_between_losses * 60, self.minutes_until_back
        return gone / (held + gone)

    def gone(self, replicas: int) -> list[float]:
        """The shares of the time in which 0, 1, … of the replicas are not there."""
        away = self.away
        return [math.comb(replicas, k) * away**k * (1 - away) ** (replicas - k) for k in range(replicas + 1)]

    def __str__(self) -> str:
        often = f"each replica taken every {self.hours_between_losses:g} h for {self.minutes_until_back:g} min"
        return f"on spot at {self.off_percent:g} % less, {often}"


class Loop(Spec):
    """Clients, each of which waits for its answer, thinks, and asks again."""

    think_s: Seconds = Field(
        default=Seconds(constant=Constant(seconds=0)),
        description="Time from the end of a client's request to its next: seconds or a distribution.",
    )

    @property
    def mean_s(self) -> float:
        """Mean time that a client thinks, by 100,000 draws."""
        return float(self.think_s.sample_ps(100_000, np.random.default_rng(0)).mean()) / PS_PER_S


class Newcomer(Spec):
    """A tenant whose requests are those of the base's workload, and clusters that may take it."""

    rate_per_s: Rate = Field(description="The load that comes with it.")
    clusters: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = Field(
        description="Name → dotted keys of the scenario, among them `workload`: what the cluster serves already, at "
        "its own rate. Promises may be of the tenants `new` and `today` (or those of a mix)."
    )


class Asked(Spec):
    """Further questions."""

    budget_usd_per_day: Usd | None = Field(default=None, description="Tokens a day that each system serves for it.")
    api: Api | None = Field(default=None, description="From which load on a system costs less than an API.")
    growth: Growth | None = Field(default=None, description="Also the cheapest system for the load that is to come.")
    spares: Annotated[int, Field(ge=0, le=100)] = Field(
        default=0,
        description="Replicas of the largest group that may be gone while the promises are kept: 1 for N + 1.",
    )
    spot: Spot | None = Field(
        default=None, description="The answer's system on spot instances, with as many replicas as it takes."
    )
    clients: Loop | None = Field(
        default=None, description="How many clients in a closed loop the answer's system has room for."
    )
    tenant: Newcomer | None = Field(
        default=None, description="Which of several clusters takes a new tenant; in place of axes and rate_per_s."
    )
    hours: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(min_length=HOURS, max_length=HOURS)] | None = (
        Field(default=None, description="The load of each hour of a day, as multiples of rate_per_s.")
    )

    def rates(self, given: Sequence[float]) -> list[float]:
        """The rates to buy for: those ``given``, those of growth and those of the hours, rising and each once."""
        found = set(given)
        if self.growth is not None:
            found |= {_round(rate * self.growth.times) for rate in given}
        if self.hours is not None:
            found |= {_round(given[-1] * times) for times in self.hours} if given else set()
        return sorted(found)


def _round(rate: float) -> float:
    return float(f"{rate:.6g}")


def a_day(races: Sequence[Race], hours: Sequence[float], rate_per_s: float) -> tuple[float, float] | None:
    """Dollars a day of the cheapest system of each hour, and of the dearest of those all day; None if one has none.

    Example: $3 an hour for twelve hours and $6 for the others make $108 a day; $6 all day are $144.
    """
    usd = {race.rate_per_s: math.inf if race.winner is None else race.winner.usd_per_hour for race in races}
    hourly = [usd.get(_round(rate_per_s * times), math.inf) for times in hours]
    return (sum(hourly), HOURS * max(hourly)) if all(map(math.isfinite, hourly)) else None


def taker(capacities: Sequence[tuple[Candidate, Capacity]]) -> Candidate | None:
    """The cluster with the most room of those that are proven to keep the promises with the new tenant; None: none."""
    room = [(k.rate_per_s / own_rate(c.document), c) for c, k in capacities if own_rate(c.document) <= k.low]
    return max(room, key=lambda each: each[0])[1] if room else None


def _taken(capacities: Sequence[tuple[Candidate, Capacity]], unit: str) -> Iterator[str]:
    """What becomes of each cluster with the new tenant, a line each, and which one takes it."""
    for candidate, capacity in capacities:
        rate = own_rate(candidate.document)
        told = "kept" if rate <= capacity.low else "broken" if rate >= capacity.high else "too close to say"
        line = f"{candidate.name} with the new tenant, at {rate:g} {unit}/s: {told}"
        yield line + f", up to {capacity.rate_per_s / rate:.3g} times that load" * capacity.reached
    best = taker(capacities)
    yield "no cluster takes the new tenant" if best is None else f"the new tenant goes to {best.name}"


def said(
    ask: Asked,
    given: Sequence[float],
    unit: str,
    raced: Sequence[Race],
    capacities: Sequence[tuple[Candidate, Capacity]],
) -> Iterator[str]:
    """What the questions ``ask`` come to, a line each.

    ``given``: the rates that the file names; ``unit``: what they count, requests or sessions. ``raced``: the answers so
    far for these and for the further rates that are asked for, and ``capacities`` those that were found.
    """
    races = {race.rate_per_s: race for race in raced}
    won = [(race.rate_per_s, race.winner) for race in raced if race.winner is not None]
    if (api := ask.api) is not None:
        for rate, best in won:
            yield _against(api, best.usd_per_hour, tokens_of(best.candidate), rate, unit)
        for candidate, capacity in capacities if not won else ():
            if capacity.reached:
                yield _against(api, candidate.usd_per_hour, tokens_of(candidate), capacity.rate_per_s, unit)
    if (budget := ask.budget_usd_per_day) is not None:
        for candidate, capacity in capacities:
            each, (copies, served) = tokens_of(candidate), for_a_day(budget, candidate, capacity)
            yield (
                f"${budget:,g} a day pay for {copies} × {candidate.name}: {served:,.0f} {unit} a day, "
                f"{served * each.into / 1e6:,.4g} million tokens in and {served * each.out / 1e6:,.4g} million out"
            )
    if ask.tenant is not None and len(capacities) == len(ask.tenant.clusters):
        yield from _taken(capacities, unit)
    if (growth := ask.growth) is not None:
        for rate in given:
            if (race := races.get(_round(rate * growth.times))) is not None:
                then = "nothing will do"
                if race.winner is not None:
                    then = f"{race.winner.candidate.name}, ${race.winner.usd_per_hour:,.2f}/h"
                grown = f"{growth.percent_a_month:g} % a month make {rate:g} {unit}/s {race.rate_per_s:g}"
                yield f"{grown} in {growth.months} months: {then}"
    if ask.hours is not None and races.keys() >= set(ask.rates(given)):
        day = a_day(raced, ask.hours, given[-1])
        if day is None:
            yield "for an hour of the day nothing will do"
        else:
            yield (
                f"${day[0]:,.2f} a day where the system follows the hours, ${day[1]:,.2f} with the busiest hour's all "
                f"day: {100 * (1 - day[0] / day[1]):.3g} % less; the time that replicas take to load is not in it"
            )


def for_a_day(usd: float, candidate: Candidate, capacity: Capacity) -> tuple[int, float]:
    """How many of a system ``usd`` a day pay for, and how many requests (or sessions) a day these serve."""
    copies = int(usd / (HOURS * candidate.usd_per_hour))
    return copies, copies * capacity.rate_per_s * 3600 * HOURS


def _against(api: Api, usd_per_hour: float, tokens: Tokens, rate_per_s: float, unit: str) -> str:
    """An API's price beside that of a system that serves a rate."""
    usd = api.per_request(tokens)
    theirs, even = usd * rate_per_s * 3600, usd_per_hour / 3600 / usd
    return (
        f"at {rate_per_s:.4g} {unit}/s the API takes ${theirs:,.2f} an hour, {theirs / usd_per_hour:.3g} times the "
        f"${usd_per_hour:,.2f} of this system, which breaks even from {even:.3g} {unit}/s on"
    )
