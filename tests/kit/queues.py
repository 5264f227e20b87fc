"""Queues whose capacity under a promise is known in closed form, simulated by recursions of a few lines.

Each is a `sim.plan.capacity.Measure`: replication r has random numbers of its own, the same at every rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heapreplace

import numpy as np
import numpy.typing as npt

from chairlift.sim.plan.promises import Latency, Promise, Sample, sample_of

Floats = npt.NDArray[np.float64]


class Queue:
    """First come, first served; services of mean 1 s; the time to the first token is the wait, to the last the stay."""

    def __init__(self, promises: Sequence[Promise], seed: int, servers: int = 1, service: str = "exponential") -> None:
        self.promises, self.seed, self.servers, self.service = promises, seed, servers, service
        self.served = 0

    def waits(self, arrivals: Floats, services: Floats, work: Floats) -> Floats:
        """Seconds that each customer waits, shape (n,); ``work``: the services of all who came before, added up."""
        if self.servers == 1:  # Lindley, in closed form: how far the walk is above its lowest point so far
            walk = work - arrivals
            return walk - np.minimum.accumulate(walk)
        free = [0.0] * self.servers  # a heap of the times when servers become free
        waits = []
        for arrival, service in zip(arrivals.tolist(), services.tolist(), strict=True):
            start = max(arrival, free[0])
            heapreplace(free, start + service)
            waits.append(start - arrival)
        return np.array(waits)

    def __call__(self, rate: float, requests: int, replications: int) -> list[Sample]:
        found = []
        self.served += requests * replications
        for r in range(replications):
            since, services, work = _draws(self.seed, r, self.service).first(requests)
            arrivals = since / rate
            waits = self.waits(arrivals, services, work)
            stays = 1e3 * (waits + services)
            ms = {"ttft": 1e3 * waits, "tpot": np.zeros(requests), "e2el": stays}
            times = Latency(arrivals, ms, np.zeros(requests, dtype=bool))
            found.append(sample_of(self.promises, times))
        return found


class _Draws:
    """One replication's customers, as many as were asked for so far: the first n are the same, however many follow."""

    def __init__(self, seed: int, replication: int, service: str) -> None:
        self.seed, self.service = [seed, replication], service
        self.columns: tuple[Floats, ...] = (np.empty(0),)

    def first(self, n: int) -> tuple[Floats, ...]:
        """Arrivals at rate 1, services, and the services of all who came before, added up; shape (n,) each."""
        known = len(self.columns[0])
        if known < n:
            size = max(n, 2 * known)
            streams = np.random.default_rng(self.seed).spawn(2)
            gaps = np.ones(size) if self.service == "all constant" else streams[0].exponential(size=size)
            services = streams[1].exponential(size=size) if self.service == "exponential" else np.ones(size)
            self.columns = np.cumsum(gaps), services, np.cumsum(services) - services
        return tuple(column[:n] for column in self.columns)


_draws = lru_cache(maxsize=64)(_Draws)


def root(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``below``, true at ``low``, becomes false."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def mm1_capacity(share: float, stay_s: float) -> float:
    """M/M/1: the stay is exponential with rate 1 − λ."""
    return 1 + math.log(1 - share) / stay_s


def mmc_capacity(share: float, wait_s: float, servers: int) -> float:
    """M/M/c: P(wait > t) = C(c, λ) e^(−(c − λ) t), C being Erlang's."""

    def ok(rate: float) -> bool:
        inverse = 1.0
        for k in range(1, servers + 1):  # of Erlang's B
            inverse = 1 + inverse * k / rate
        b = 1 / inverse
        c = b / (1 - rate / servers * (1 - b))
        return c * math.exp(-(servers - rate) * wait_s) < 1 - share

    return root(ok, 1e-9, servers - 1e-9)


def md1_capacity(share: float, wait_s: float) -> float:
    """M/D/1 (Erlang, 1909): P(wait ≤ t) = (1 − λ) Σ_k≤t (−λ(t − k))^k / k! · e^(λ(t − k))."""

    def ok(rate: float) -> bool:
        from decimal import Decimal, getcontext  # the sum alternates

        getcontext().prec = 60
        total = Decimal(0)
        lam, t = Decimal(rate), Decimal(wait_s)
        for k in range(int(wait_s) + 1):
            x = lam * (t - k)
            total += (-x) ** k / math.factorial(k) * x.exp() if (k or x) else Decimal(1)
        return float((1 - lam) * total) > share

    return root(ok, 1e-9, 1 - 1e-9)
