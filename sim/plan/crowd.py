"""The largest concurrency: how many clients in a closed loop a system has room for.

A client waits for its answer, thinks, and asks again. So a closed loop never has more requests in the system than
clients, and slows down with the system (Schroeder, Wierman and Harchol-Balter, NSDI 2006): its limit is a number of
clients, not a rate.

The first number is Little's law applied to the whole loop (the interactive response time law, Denning and Buzen, ACM
Computing Surveys 10, 1978): N = X · (R + Z), at X requests a second that stay for R seconds and a thinking time of Z.
Each further one is chosen where a line through the gaps of those before says that the promises begin to break, half of
`NEAR` to either side of it: two numbers will do where the line is right.

Worked example: one server takes a second for each request, and nobody thinks. Each of N clients waits for the N − 1
others and itself, N seconds. With "90 % of requests: E2E ≤ 4.5 s" four clients keep the promise, and five break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import Effort, Measure, decide
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.verdict import Verdict

FEW = 8  # replications that one number of clients is worth
NEAR = 0.1  # an interval is no narrower than this part of its lower end
FAR = 2.0  # from one number that is tried to the next, at most
STEEP, FLAT = 8.0, 2.0  # slope of the gap over the logarithm of the number: where no two show it, and at least
WORST = 4.0  # gap, either way: beyond, it says nothing of how far off a number is
MOST = 2**20  # clients


@dataclass(frozen=True)
class Crowd:
    """How many clients keep the promises."""

    candidate: Candidate
    kept: int  # clients, proven; 0: not even one
    broken: float  # the fewest that are proven to break a promise; inf: none were

    def __str__(self) -> str:
        if self.kept == 0:
            return f"{self.candidate.name}: not even one client keeps the promises"
        until = f"{self.broken:g} break one" if math.isfinite(self.broken) else "more were not tried"
        usd = self.candidate.usd_per_hour / self.kept
        return f"{self.candidate.name} keeps the promises with {self.kept} clients, ${usd:,.3g}/h each; {until}"


def crowd(
    candidate: Candidate,
    measure: Measure,
    promises: Sequence[Promise],
    guess: float,
    effort: Effort,
    told: Callable[[str], None] = lambda _: None,
) -> Crowd:
    """The most clients with which the promises are kept; ``measure`` takes their number for a rate.

    Numbers are tried from ``guess`` on, until one is proven kept, one is proven broken and the interval between them is
    `NEAR`, or one that is too close to say has been tried on either side.
    """
    seen: dict[int, Verdict] = {}
    low, high = 0, math.inf
    clients = max(1, round(guess))
    while 0 < clients <= MOST and clients not in seen:
        told(f"{clients:,} clients")
        verdict = seen[clients] = decide(measure, promises, clients, effort, FEW)
        if verdict.proof > 0:
            low = max(low, clients)
        elif verdict.proof < 0:
            high = min(high, clients)
        if low and math.isfinite(high) and high - low <= max(1, NEAR * low):
            break
        clients = _next(seen, low, high)
    return Crowd(candidate, low, high)


def _next(seen: Mapping[int, Verdict], low: int, high: float) -> int:
    """The number of clients to try next; 0: there is none."""
    at = _crossing(seen)
    unsure = [n for n, verdict in seen.items() if low < n < high and not verdict.proof]  # the first of them leads
    if not low:  # nothing is proven kept
        least = min(seen)
        return min(least - 1, max(round(min(math.exp(at - NEAR / 2), least * math.exp(-NEAR))), int(least / FAR)))
    if math.isinf(high):
        most = max(seen)
        return max(most + 1, min(round(max(math.exp(at + NEAR / 2), most * math.exp(NEAR))), math.ceil(most * FAR)))
    begin, end = math.log(low), math.log(high)
    if unsure:
        wanted = [x for x in (math.log(unsure[0]) - NEAR, math.log(unsure[0]) + NEAR) if begin < x < end]
    elif end - begin > NEAR:
        middle, apart = (begin + end) / 2, 0.15 * (end - begin)
        sides = [min(max(x, begin + apart), end - apart) for x in (at - NEAR / 2, at + NEAR / 2)]
        wanted = [min(sides, key=lambda x: abs(x - middle))]
    else:
        wanted = [(begin + end) / 2]
    numbers = (min(max(round(math.exp(x)), low + 1), int(high) - 1) for x in wanted)
    return next((n for n in numbers if n not in seen), 0)


def _crossing(seen: Mapping[int, Verdict]) -> float:
    """Logarithm of the number of clients at which the promises begin to break, by the two verdicts nearest to that."""
    gaps = ((math.log(n), min(max(v.gap, -WORST), WORST)) for n, v in seen.items())
    (x, gap), *others = sorted(gaps, key=lambda each: abs(each[1]))
    slope = max((others[0][1] - gap) / (others[0][0] - x), FLAT) if others else STEEP
    return x - gap / slope
