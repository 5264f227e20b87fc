"""When requests arrive: processes a scenario can name, as pydantic models to draw from.

The renewal processes (constant, poisson, gamma, weibull) put request k at the sum of the first k+1 gaps: the
first request comes after the first gap, not at time 0. Gaps are summed in float seconds and rounded to a
picosecond once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.lengths import IntArray, OneOf, Spec
from chairlift.sim.workload.varying_rates import Diurnal, Rate, Seconds, Spikes, in_picoseconds


class Burst(Spec):
    """Every request at time 0."""

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` zeros."""
        return np.zeros(n, np.int64)

    def rescaled(self, rate_per_s: float) -> Burst:
        """A burst has no rate.

        Raises:
            BadInput: always.
        """
        raise BadInput(Problem("a burst has no rate to rescale", path="rate_per_s", value=rate_per_s))


class Constant(Spec):
    """Equal gaps."""

    rate_per_s: Rate = Field(description="Requests per second.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Request k at (k + 1) / rate. Shape: ``(n,)``."""
        return in_picoseconds(np.arange(1, n + 1) / self.rate_per_s)

    def rescaled(self, rate_per_s: float) -> Constant:
        """The same at another mean rate."""
        return Constant(rate_per_s=rate_per_s)


class Poisson(Spec):
    """Independent exponential gaps."""

    rate_per_s: Rate = Field(description="Mean requests per second.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``."""
        return in_picoseconds(np.cumsum(rng.exponential(1 / self.rate_per_s, n)))

    def rescaled(self, rate_per_s: float) -> Poisson:
        """The same at another mean rate."""
        return Poisson(rate_per_s=rate_per_s)


class Gamma(Spec):
    """Independent gamma gaps: burstier than Poisson when cv > 1, steadier when cv < 1."""

    rate_per_s: Rate = Field(description="Mean requests per second.")
    cv: float = Field(ge=1e-3, le=1e3, description="Coefficient of variation of the gaps; 1 is Poisson.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times; gaps have shape 1/cv² and mean 1/rate. Shape: ``(n,)``."""
        return in_picoseconds(np.cumsum(rng.gamma(self.cv**-2, self.cv**2 / self.rate_per_s, n)))

    def rescaled(self, rate_per_s: float) -> Gamma:
        """The same at another mean rate."""
        return Gamma(rate_per_s=rate_per_s, cv=self.cv)


class Weibull(Spec):
    """Independent Weibull gaps: burstier than Poisson when shape < 1."""

    rate_per_s: Rate = Field(description="Mean requests per second.")
    shape: float = Field(ge=0.05, le=1e3, description="Weibull shape of the gaps; 1 is Poisson.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times; the mean gap, scale·Γ(1 + 1/shape), is 1/rate. Shape: ``(n,)``."""
        scale = 1 / (self.rate_per_s * math.gamma(1 + 1 / self.shape))
        return in_picoseconds(np.cumsum(rng.weibull(self.shape, n) * scale))

    def rescaled(self, rate_per_s: float) -> Weibull:
        """The same at another mean rate."""
        return Weibull(rate_per_s=rate_per_s, shape=self.shape)


class OnOff(Spec):
    """Poisson while on, silent while off; both last exponential times, and time 0 begins an on period."""

    rate_per_s: Rate = Field(description="Mean requests per second while on (not over all time).")
    on_s: Seconds = Field(description="Mean length of an on period, in seconds.")
    off_s: Seconds = Field(description="Mean length of a silence, in seconds.")

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over all time."""
        return self.rate_per_s * self.on_s / (self.on_s + self.off_s)

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``.

        On a clock that runs only while on, on periods end as a Poisson process: the silences within a gap
        number Poisson(gap / on_s), and last Gamma(number, off_s) together.
        """
        gap_s = rng.exponential(1 / self.rate_per_s, n)
        silences = rng.poisson(gap_s / self.on_s)
        return in_picoseconds(np.cumsum(gap_s + rng.gamma(silences, self.off_s)))

    def rescaled(self, rate_per_s: float) -> OnOff:
        """The same picture at another mean rate: all times, on and off periods too, are stretched alike."""
        stretch = self.mean_rate_per_s / rate_per_s
        return OnOff(rate_per_s=self.rate_per_s / stretch, on_s=self.on_s * stretch, off_s=self.off_s * stretch)


class Arrivals(OneOf):
    """Arrival times: one process by name."""

    burst: Burst | None = Field(default=None, description="Everything at time 0: `burst: {}`.")
    constant: Constant | None = Field(default=None, description="Equal gaps.")
    poisson: Poisson | None = Field(default=None, description="Poisson arrivals.")
    gamma: Gamma | None = Field(default=None, description="Gamma gaps with a given variability.")
    weibull: Weibull | None = Field(default=None, description="Weibull gaps with a given shape.")
    on_off: OnOff | None = Field(default=None, description="Poisson bursts between silences.")
    diurnal: Diurnal | None = Field(default=None, description="Poisson, its rate a cosine over the day.")
    spikes: Spikes | None = Field(default=None, description="Poisson, its rate higher in spikes.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` arrival times in picoseconds, sorted. Shape: ``(n,)`` int64.

        Raises:
            BadInput: the last arrival is beyond what int64 picoseconds can say (about 106 days).
        """
        times: IntArray = self.chosen.times_ps(n, rng)
        return times

    def rescaled(self, rate_per_s: float) -> Arrivals:
        """The same process at another mean rate, in requests per second.

        Raises:
            BadInput: the process is a burst, which has no rate.
        """
        chosen: Any = self.chosen.rescaled(rate_per_s)
        name = next(iter(self.model_dump(exclude_none=True)))
        return Arrivals(**{name: chosen})
