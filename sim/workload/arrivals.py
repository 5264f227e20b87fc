"""Arrivals: when requests arrive, as processes that a scenario names.

The renewal processes (constant, poisson, gamma, weibull) put request k at the sum of the first k + 1 gaps: the first
request comes after the first gap, not at time 0. Gaps are summed in float seconds, and each sum is rounded to a
picosecond once.

The rate of ``diurnal``, ``spikes`` and ``stages`` changes with time. These are drawn by inverting the cumulative rate
Λ(t): the points of a Poisson process of rate 1 are put through Λ⁻¹ (Çinlar, *Introduction to Stochastic Processes*,
1975). Another mean rate scales their rates and leaves their clock as it is.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.strict import OneOf, Spec
from chairlift.sim.workload.trace import LATEST_PS, IntArray

Rate = Annotated[float, Field(ge=1e-9, le=1e12)]  # requests (or starts of sessions) a second; at most one a ps
Duration = Annotated[float, Field(ge=1e-6, le=1e9)]  # seconds

_ROUNDING = 1e-12  # relative; far below one request in a trace
_HALVINGS = 60  # of a bracket of at most 1e9 s: what is left is far below a picosecond


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

    rate_per_s: Rate = Field(description="Requests/s; with sessions, sessions/s.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Request k at (k + 1) / rate. Shape: ``(n,)``."""
        return _in_picoseconds(np.arange(1, n + 1) / self.rate_per_s)

    def rescaled(self, rate_per_s: float) -> Constant:
        """The same process at another mean rate."""
        return Constant(rate_per_s=rate_per_s)


class Poisson(Spec):
    """Independent exponential gaps."""

    rate_per_s: Rate = Field(description="Mean requests/s; with sessions, sessions/s.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``."""
        return _in_picoseconds(np.cumsum(rng.exponential(1 / self.rate_per_s, n)))

    def rescaled(self, rate_per_s: float) -> Poisson:
        """The same process at another mean rate."""
        return Poisson(rate_per_s=rate_per_s)


class Gamma(Spec):
    """Independent gamma gaps: burstier than Poisson when cv > 1, steadier when cv < 1."""

    rate_per_s: Rate = Field(description="Mean requests/s; with sessions, sessions/s.")
    cv: float = Field(ge=1e-3, le=1e3, description="Coefficient of variation of the gaps; 1 is Poisson.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times; gaps have shape 1/cv² and mean 1/rate. Shape: ``(n,)``."""
        return _in_picoseconds(np.cumsum(rng.gamma(self.cv**-2, self.cv**2 / self.rate_per_s, n)))

    def rescaled(self, rate_per_s: float) -> Gamma:
        """The same process at another mean rate."""
        return Gamma(rate_per_s=rate_per_s, cv=self.cv)


class Weibull(Spec):
    """Independent Weibull gaps: burstier than Poisson when shape < 1."""

    rate_per_s: Rate = Field(description="Mean requests/s; with sessions, sessions/s.")
    shape: float = Field(ge=0.05, le=1e3, description="Weibull shape of the gaps; 1 is Poisson.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times; the mean gap, scale·Γ(1 + 1/shape), is 1/rate. Shape: ``(n,)``."""
        scale = 1 / (self.rate_per_s * math.gamma(1 + 1 / self.shape))
        return _in_picoseconds(np.cumsum(rng.weibull(self.shape, n) * scale))

    def rescaled(self, rate_per_s: float) -> Weibull:
        """The same process at another mean rate."""
        return Weibull(rate_per_s=rate_per_s, shape=self.shape)


class OnOff(Spec):
    """Poisson while on, silent while off; both last exponential times, and time 0 begins an on period."""

    rate_per_s: Rate = Field(description="Mean requests/s while on (not over all time); with sessions, sessions/s.")
    on_s: Duration = Field(description="Mean length of an on period, in seconds.")
    off_s: Duration = Field(description="Mean length of a silence, in seconds.")

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over all time."""
        return self.rate_per_s * self.on_s / (self.on_s + self.off_s)

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times. Shape: ``(n,)``.

        On a clock that runs only while the process is on, on periods end as a Poisson process of rate 1/on_s. So the
        number of silences within a gap is Poisson(gap / on_s), and these last Gamma(number, off_s) together.
        """
        gap_s = rng.exponential(1 / self.rate_per_s, n)
        silences = rng.poisson(gap_s / self.on_s)
        return _in_picoseconds(np.cumsum(gap_s + rng.gamma(silences, self.off_s)))

    def rescaled(self, rate_per_s: float) -> OnOff:
        """The same process at another mean rate: gaps, on periods and silences are stretched by one factor."""
        stretch = self.mean_rate_per_s / rate_per_s
        return OnOff(rate_per_s=self.rate_per_s / stretch, on_s=self.on_s * stretch, off_s=self.off_s * stretch)


class Diurnal(Spec):
    """Poisson arrivals whose rate is a cosine of time, as with the hour of the day."""

    rate_per_s: Rate = Field(description="Mean requests/s, over whole periods; with sessions, sessions/s.")
    swing: float = Field(default=0.5, ge=0, le=1, description="Peak rate is (1 + swing) × mean, lowest (1 − swing) ×.")
    period_s: Duration = Field(default=86_400, description="Time from peak to peak.")
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
        return _in_picoseconds(np.maximum.accumulate((low + high) / 2))

    def rescaled(self, rate_per_s: float) -> Diurnal:
        """The same day at another mean rate; the period stays as long as it is."""
        return self.model_copy(update={"rate_per_s": rate_per_s})


class Spikes(Spec):
    """Poisson arrivals at a steady rate, which is ``factor`` times higher in spikes that come periodically."""

    rate_per_s: Rate = Field(description="Requests/s between spikes; with sessions, sessions/s.")
    factor: float = Field(ge=1, le=1e6, description="The rate in a spike is so many times higher.")
    every_s: Duration = Field(description="Time from the start of a spike to the next.")
    for_s: Duration = Field(description="How long a spike lasts.")
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
        return _in_picoseconds(np.where(mass < before, mass, before + cycles * self.every_s + within))

    def rescaled(self, rate_per_s: float) -> Spikes:
        """The same spikes at another mean rate; they come as often and last as long as before."""
        return self.model_copy(update={"rate_per_s": self.rate_per_s * rate_per_s / self.mean_rate_per_s})


class Stage(Spec):
    """A time at one rate, or one in which the rate rises or falls evenly."""

    rate: Annotated[float, Field(ge=0, le=1e12)] = Field(
        description="Requests/s, at its start; with sessions, sessions/s."
    )
    to: Annotated[float, Field(ge=0, le=1e12)] | None = Field(
        default=None,
        description="Requests/s at its end, which the rate goes to evenly (with sessions, sessions/s); null: as at its "
        "start.",
    )
    duration: Duration = Field(description="How long it lasts, in seconds.")

    @property
    def last(self) -> float:
        """The rate at its end."""
        return self.rate if self.to is None else self.to

    @property
    def mass(self) -> float:
        """The mean number of requests in it."""
        return (self.rate + self.last) / 2 * self.duration


class Stages(Spec):
    """Rates one after the other, each for its time, and then no requests any more.

    ``stages`` may stand as a list in place of this mapping. The keys are those of ``load`` in inference-perf's
    configuration (github.com/kubernetes-sigs/inference-perf, CONFIG.md), whose ``stages`` can be copied as they are; a
    stage may also have ``to``, for a ramp. inference-perf waits 1 s between stages unless ``interval`` says otherwise;
    here the time between stages is 0 unless it does.

    Example: ``[{rate: 1, duration: 30}, {rate: 1, to: 9, duration: 10}]``, with equal gaps, are 30 requests in the
    first 30 s and 50 in the 10 s after these.
    """

    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="The stages, in order.")
    type: Literal["constant", "poisson"] = Field(
        default="constant", description="Equal gaps, or gaps of a Poisson process, at the rate of the time."
    )
    interval: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=0.0, description="Seconds without requests between two stages."
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_stages(cls, value: object) -> object:
        return {"stages": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _some_rate(self) -> Stages:
        if not any(stage.mass for stage in self.stages):
            raise ValueError("a stage must have a rate above 0")
        return self

    @property
    def length_s(self) -> float:
        """From the start of the first stage to the end of the last, in seconds."""
        return sum(stage.duration for stage in self.stages) + self.interval * (len(self.stages) - 1)

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over all that time."""
        return sum(stage.mass for stage in self.stages) / self.length_s

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """Sorted times; requests that no stage has room for come 1 s after the end of the last. Shape: ``(n,)``."""
        gaps = rng.exponential(1.0, n) if self.type == "poisson" else np.ones(n)
        mass = np.cumsum(gaps)
        times = np.full(n, self.length_s + 1)
        start = done = 0.0
        for stage in self.stages:
            full = done + stage.mass
            # The last of equal gaps is the end of its stage, but for rounding.
            inside = (mass > done * (1 + _ROUNDING)) & (mass <= full * (1 + _ROUNDING))
            times[inside] = np.minimum(start + _time_of(stage, mass[inside] - done), start + stage.duration)
            done = full
            start += stage.duration + self.interval
        return _in_picoseconds(times)

    def rescaled(self, rate_per_s: float) -> Stages:
        """The same stages at another mean rate, over all their time; they last as long as before."""
        stretch = rate_per_s * self.length_s / sum(stage.mass for stage in self.stages)
        scaled = [
            Stage(rate=s.rate * stretch, to=None if s.to is None else s.to * stretch, duration=s.duration)
            for s in self.stages
        ]
        return self.model_copy(update={"stages": scaled})


def _time_of(stage: Stage, mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """When, in seconds from its start, a stage has had ``mass`` requests: the root of rate·t + slope·t²/2 = mass."""
    slope = (stage.last - stage.rate) / stage.duration
    if slope == 0:
        return mass / stage.rate
    root = np.sqrt(np.maximum(0.0, stage.rate**2 + 2 * slope * mass))
    times: npt.NDArray[np.float64] = 2 * mass / (stage.rate + root)
    return times


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
    stages: Stages | None = Field(default=None, description="Rates one after the other, and ramps between rates.")

    def times_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` arrival times in picoseconds, sorted. Shape: ``(n,)`` int64.

        Raises:
            BadInput: the last arrival is beyond what int64 picoseconds can say (about 106 days).
        """
        times: IntArray = self.chosen.times_ps(n, rng)
        return times

    @property
    def length_s(self) -> float | None:
        """Seconds after which no request comes any more; None: requests come for ever."""
        return None if self.stages is None else self.stages.length_s

    @property
    def mean_rate_per_s(self) -> float | None:
        """Arrivals per second over all their time: requests, or with sessions the starts of these. None: a burst."""
        return getattr(self.chosen, "mean_rate_per_s", None) or getattr(self.chosen, "rate_per_s", None)

    def rescaled(self, rate_per_s: float) -> Arrivals:
        """The same process at another mean rate, in requests per second.

        Raises:
            BadInput: the process is a burst, which has no rate.
        """
        chosen: Any = self.chosen.rescaled(rate_per_s)
        name = next(iter(self.model_dump(exclude_none=True)))
        return Arrivals(**{name: chosen})


def _in_picoseconds(times_s: npt.NDArray[np.float64]) -> IntArray:
    """Sorted float seconds to int64 picoseconds, each rounded once."""
    times = np.rint(times_s * PS_PER_S)
    if not times[-1] < LATEST_PS:  # also true of NaN, from infinite gaps
        rule = "arrivals run past what the clock can say (106 days); raise the rate or ask for fewer requests"
        raise BadInput(Problem(rule, path="rate_per_s"))
    return times.astype(np.int64)
