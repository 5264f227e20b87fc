"""Paired differences between two systems that met the same random numbers.

With common random numbers both systems serve the same requests at each seed, so the difference within a seed varies
far less than either figure (Law, *Simulation Modeling and Analysis*, 5th ed., section 11.2). The interval is Student's
t over the differences of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and where its mean lies with the confidence asked for; NaN bounds: one seed tells nothing of it."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent ``values`` with its two-sided t interval."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student(0.5 + confidence / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def surely_below(a: Sequence[float], b: Sequence[float], risk: float) -> bool:
    """Whether the mean of ``a`` is below that of ``b``, wrong with probability ``risk`` at most (one-sided, paired)."""
    differences = np.subtract(a, b)
    n = len(differences)
    if n < 2:
        return False
    spread = float(np.std(differences, ddof=1))
    mean = float(np.mean(differences))
    if spread == 0:
        return mean < 0
    return mean + student(1 - risk, n - 1) * spread / math.sqrt(n) < 0


def undominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Of each point whether it is on the Pareto front: no other is at least as great in all numbers and another point.

    Equal points are both on it: of (1, 2), (2, 1), (2, 1) and (1, 1) all but the last.
    """
    return [
        not any(all(x >= y for x, y in zip(other, point, strict=True)) and other != point for other in points)
        for point in points
    ]


@lru_cache(maxsize=256)
def student(level: float, freedom: float) -> float:
    """Quantile of Student's t with ``freedom`` degrees of freedom: ``level`` 0.975 for a two-sided interval of 95 %."""
    from scipy.special import stdtrit  # here: costs a second to import

    return float(stdtrit(freedom, level))
