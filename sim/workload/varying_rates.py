"""Poisson arrivals whose rate changes with time: by the hour of the day, or in spikes.

Both are drawn by inverting the cumulative rate Λ(t): points of a Poisson process of rate 1, put through Λ⁻¹ (Çinlar,
*Introduction to Stochastic Processes*, 1975). Another mean rate scales the rates and leaves the clock as it is.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.lengths import IntArray, Spec
from chairlift.sim.workload.trace import LATEST_PS

Rate = Annotated[float, Field(ge=1e-9, le=1e12)]  # at most one request a picosecond
Seconds = Annotated[float, Field(ge=1e-6, le=1e9)]

_HALVINGS = 60  # of a bracket of at most 1e9 s: far below a picosecond's share of it


class Diurnal(Spec):
    """A rate that rises and falls as a cosine, as with the hour of the day."""

    rate_per_s: Rate = Field(description="Mean requests per second, over whole periods.")
    swing: float = Field(default=0.5, ge=0, le=1, description="Peak rate is (1 + swing) × mean, lowest (1 − swing) ×.")
    period_s: Seconds = Field(default=86_400, description="Time from peak to peak.")
    peak_at_s: float = Field(default=0, ge=0, le=1e9, description="Time of a peak.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``."""
        mass = np.cumsum(rng.exponential(1.0, n)) / self.rate_per_s  # seconds, if the rate were always the mean
        omega = 2 * math.pi / self.period_s
        lead = math.sin(omega * self.peak_at_s)
        low = np.maximum(0, mass - 2 * self.swing / omega)
        high = mass + 2 * self.swing / omega
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            short = middle + self.swing / omega * (np.sin(omega * (middle - self.peak_at_s)) + lead) < mass
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        return in_picoseconds(np.maximum.accumulate((low + high) / 2))

    def rescaled(self, rate_per_s: float) -> Diurnal:
        """The same day at another mean rate."""
        return self.model_copy(update={"rate_per_s": rate_per_s})


class Spikes(Spec):
    """A steady rate, many times higher in spikes that come again and again."""

    rate_per_s: Rate = Field(description="Requests per second between spikes.")
    factor: float = Field(ge=1, le=1e6, description="The rate in a spike is so many times higher.")
    every_s: Seconds = Field(description="Time from the start of a spike to the next.")
    for_s: Seconds = Field(description="How long a spike lasts.")
    first_at_s: float = Field(default=0, ge=0, le=1e9, description="Start of the first spike.")

    @model_validator(mode="after")
    def _apart(self) -> Spikes:
        if self.for_s >= self.every_s:
            raise ValueError(f"for_s must be below every_s, {self.every_s:g} (got {self.for_s:g})")
        return self

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over whole cycles."""
        return self.rate_per_s * (1 + (self.factor - 1) * self.for_s / self.every_s)

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``."""
        mass = np.cumsum(rng.exponential(1.0, n)) / self.rate_per_s  # seconds outside of spikes
        before, inside = self.first_at_s, self.factor * self.for_s
        cycles, left = np.divmod(np.maximum(mass - before, 0), inside + self.every_s - self.for_s)
        within: npt.NDArray[np.float64] = np.where(left < inside, left / self.factor, self.for_s + left - inside)
        return in_picoseconds(np.where(mass < before, mass, before + cycles * self.every_s + within))

    def rescaled(self, rate_per_s: float) -> Spikes:
        """The same spikes at another mean rate."""
        return self.model_copy(update={"rate_per_s": self.rate_per_s * rate_per_s / self.mean_rate_per_s})


def in_picoseconds(times_s: npt.NDArray[np.float64]) -> IntArray:
    """Sorted float seconds to int64 picoseconds, each rounded once."""
    times = np.rint(times_s * PS_PER_S)
    if not times[-1] < LATEST_PS:  # also true of NaN, from infinite gaps
        rule = "arrivals run past what the clock can say (106 days); raise the rate or ask for fewer requests"
        raise BadInput(Problem(rule, path="rate_per_s"))
    return times.astype(np.int64)
