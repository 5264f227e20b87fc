"""The largest concurrency: how many clients in a closed loop a system has room for.

A client waits for its answer, thinks, and asks again. So a closed loop never has more requests in the system than
clients, and slows down with the system (Schroeder, Wierman and Harchol-Balter, NSDI 2006): its limit is a number of
clients, not a rate.

Worked example: one server takes a second for each request, and nobody thinks. Each of N clients waits for the N − 1
others and itself, N seconds. With "90 % of requests: E2E ≤ 4.5 s" four clients keep the promise, and five break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import Effort, Measure, decide
from chairlift.sim.plan.promises import Promise

FEW = 8  # replications that one number of clients is worth
STEP = 1.2  # from the first number that is tried to the next
NEAR = 0.1  # an interval is no narrower than this part of its lower end
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

    Numbers grow, or fall, from ``guess`` on by `STEP`, its square and so on, until one is proven kept and one broken;
    then the interval is halved (in the logarithm) until it is `NEAR`, or one that is too close to say has been tried on
    either side.
    """
    factor = STEP
    proofs: dict[int, int] = {}

    def proof(clients: int) -> int:
        if clients not in proofs:
            told(f"{clients:,} clients")
            proofs[clients] = decide(measure, promises, clients, effort, FEW).proof
        return proofs[clients]

    low, high = 0, math.inf
    clients = max(1, round(guess))
    while low == 0 or math.isinf(high):
        if proof(clients) > 0:
            low = max(low, clients)
        elif proof(clients) < 0:
            high = min(high, clients)
        if low == 0 and clients > 1:
            clients = max(1, min(clients - 1, int(min(proofs) / factor)))
        elif low > 0 and math.isinf(high) and max(proofs) < MOST:
            clients = max(max(proofs) + 1, round(factor * max(proofs)))
        else:
            break
        factor *= factor
    while low and math.isfinite(high) and high - low > max(1, NEAR * low):
        unsure = [n for n in proofs if low < n < high]
        middles = [math.sqrt(low * unsure[0]), math.sqrt(unsure[0] * high)] if unsure else [math.sqrt(low * high)]
        untried = [n for n in (min(max(round(n), low + 1), int(high) - 1) for n in middles) if n not in proofs]
        if not untried:
            break
        if proof(untried[0]) > 0:
            low = untried[0]
        elif proof(untried[0]) < 0:
            high = untried[0]
    return Crowd(candidate, low, high)
