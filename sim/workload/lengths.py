"""Lengths: how many tokens a prompt or an output has, as distributions that a scenario names.

In YAML a distribution is a mapping of one key, its name: ``{exponential: {mean: 128, cap: 1536}}``. A bare number
gives every request that many tokens. Each class checks its mapping (pydantic), draws lengths (``sample``) and knows
its mean (``mean_tokens``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.strict import OneOf, Spec, or_number
from chairlift.sim.workload.trace import IntArray

MOST_TOKENS = 2**31 - 1  # a Trace keeps tokens in int32

Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class Constant(Spec):
    """The same number of tokens for everyone."""

    tokens: Tokens = Field(description="Tokens of every request.")

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths; draws nothing from ``rng``."""
        return np.full(n, self.tokens, np.int64)

    def mean_tokens(self) -> float:
        """The constant."""
        return float(self.tokens)


class Uniform(Spec):
    """Whole numbers from ``low`` to ``high``, both included, equally likely."""

    low: Tokens = Field(description="Smallest length, in tokens.")
    high: Tokens = Field(description="Largest length, in tokens (included).")

    @field_validator("high")
    @classmethod
    def _ordered(cls, high: int, info: ValidationInfo) -> int:
        low = info.data.get("low", high)
        if high < low:
            raise ValueError(f"must be at least low, which is {low}")
        return high

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths."""
        return rng.integers(self.low, self.high, n, endpoint=True)

    def mean_tokens(self) -> float:
        """(low + high) / 2."""
        return (self.low + self.high) / 2


class Exponential(Spec):
    """Exponential lengths, rounded to the nearest whole number; 0 becomes 1.

    The Anyscale benchmark of continuous batching (June 2023) draws its output lengths from this distribution, with
    mean 128 and a cap of 32 to 1536. The benchmark draws again when a length rounds to more than the cap, and its
    clients send a 0 as 1.
    """

    mean: float = Field(gt=0, le=MOST_TOKENS, description="Mean before rounding and capping, in tokens.")
    cap: Tokens | None = Field(default=None, description="Largest length, in tokens; null: no cap.")
    over_cap: Literal["redraw", "clip"] = Field(
        default="redraw",
        description="A draw that rounds to more than the cap is drawn again, or cut to the cap.",
    )

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths, one uniform draw each.

        ``redraw`` inverts the truncated distribution function. The lengths have the same distribution as those of a
        loop that rejects, and the time is bounded even when the cap is far below the mean.
        """
        u = rng.random(n)
        if self.cap is not None and self.over_cap == "redraw":
            u *= -math.expm1(-(self.cap + 0.5) / self.mean)  # P(rounds to at most cap)
        lengths = np.rint(-self.mean * np.log1p(-u))
        return _whole(lengths if self.cap is None else np.minimum(lengths, self.cap))

    def mean_tokens(self) -> float:
        """The exact mean: the sum over k of P(length >= k), with P(round(X) >= k) = e^(-(k - ½)/mean)."""
        step, half = 1 / self.mean, math.exp(-0.5 / self.mean)
        terms = 1.0 if self.cap is None else -math.expm1(-self.cap * step)
        tail_sum = half * terms / -math.expm1(-step)  # sum over k = 1 .. cap
        zero = -math.expm1(-0.5 * step)  # P(rounds to 0), which counts as 1
        if self.cap is None or self.over_cap == "clip":
            return tail_sum + zero
        over = math.exp(-(self.cap + 0.5) * step)
        return (tail_sum - self.cap * over + zero) / -math.expm1(-(self.cap + 0.5) * step)


class Lognormal(Spec):
    """exp(Normal(mu, sigma)), rounded to the nearest whole number; 0 becomes 1, a draw over ``cap`` becomes the cap."""

    mu: float = Field(ge=-10, le=20, description="Mean of the logarithm (natural) of the tokens.")
    sigma: float = Field(ge=0, le=10, description="Standard deviation of the logarithm of the tokens.")
    cap: Tokens | None = Field(default=None, description="Largest length, in tokens; longer draws are cut to it.")

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths.

        Raises:
            BadInput: a draw does not fit in 32 bits; a cap prevents that.
        """
        lengths = np.rint(rng.lognormal(self.mu, self.sigma, n))
        return _whole(lengths if self.cap is None else np.minimum(lengths, self.cap))

    def mean_tokens(self) -> float:
        """The mean before rounding, with the cap: E[min(X, cap)]."""
        mean = math.exp(self.mu + self.sigma**2 / 2)
        if self.cap is None:
            return mean
        if self.sigma == 0:
            return min(mean, float(self.cap))
        z = (math.log(self.cap) - self.mu) / self.sigma
        return mean * _normal_cdf(z - self.sigma) + self.cap * _normal_cdf(-z)


class Normal(Spec):
    """Normal lengths between bounds, rounded to the nearest whole number; a draw outside becomes the bound.

    So GuideLLM (``prompt_tokens_stdev``, ``_min``, ``_max``), inference-perf (``input_distribution`` with ``mean``,
    ``std``, ``min``, ``max``) and AIPerf (``--prompt-input-tokens-mean``, ``-stddev``) ask for lengths: all three draw
    from the normal distribution and cut what lies outside.
    """

    mean: float = Field(gt=0, le=MOST_TOKENS, description="Mean before bounds and rounding, in tokens.")
    std: float = Field(ge=0, le=MOST_TOKENS, description="Standard deviation before bounds and rounding, in tokens.")
    min: Tokens = Field(default=1, description="Smallest length, in tokens.")
    max: Tokens | None = Field(default=None, description="Largest length, in tokens; null: no bound.")

    @model_validator(mode="after")
    def _ordered(self) -> Normal:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max must be at least min, {self.min} (got {self.max})")
        return self

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths, one normal draw each."""
        drawn = np.clip(rng.normal(self.mean, self.std, n), self.min, self.max)
        return _whole(np.rint(drawn))

    def mean_tokens(self) -> float:
        """The mean before rounding, with the bounds: E[min(max(X, min), max)]."""
        return self.min + self._above(self.min) - (0.0 if self.max is None else self._above(self.max))

    def _above(self, bound: float) -> float:
        """E[max(X - bound, 0)]."""
        excess = self.mean - bound
        if self.std == 0:
            return max(0.0, excess)
        z = excess / self.std
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return excess * _normal_cdf(z) + self.std * density


class Quantiles(Spec):
    """Lengths by their quantiles: linear between the levels given, rounded to a whole number; 0 becomes 1."""

    levels_pct: list[float] = Field(description="Levels in percent, rising from 0 to 100.", min_length=2)
    tokens: list[Annotated[float, Field(ge=0, le=MOST_TOKENS)]] = Field(
        description="Tokens at each level, never falling.", min_length=2
    )

    @model_validator(mode="after")
    def _a_distribution(self) -> Quantiles:
        levels = self.levels_pct
        if levels[0] != 0 or levels[-1] != 100 or any(b <= a for a, b in pairwise(levels)):
            raise ValueError("levels_pct must rise from 0 to 100")
        if len(self.tokens) != len(levels):
            raise ValueError(f"tokens must have one number a level ({len(levels)}), not {len(self.tokens)}")
        if any(b < a for a, b in pairwise(self.tokens)):
            raise ValueError("tokens must not fall from one level to the next")
        return self

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths, one uniform draw each."""
        return _whole(np.rint(np.interp(100 * rng.random(n), self.levels_pct, self.tokens)))

    def mean_tokens(self) -> float:
        """The mean before rounding: the area under the quantile function, trapezoid by trapezoid."""
        levels, tokens = np.array(self.levels_pct), np.array(self.tokens)
        return float(np.sum(np.diff(levels) * (tokens[1:] + tokens[:-1]) / 2) / 100)


class Mixture(Spec):
    """One of several distributions, drawn by weight for each request."""

    weights: list[Annotated[float, Field(gt=0)]] = Field(
        description="Weight of each part; they need not add up to 1.", min_length=1
    )
    parts: list[Lengths] = Field(description="The distributions.", min_length=1)

    @model_validator(mode="after")
    def _one_weight_a_part(self) -> Mixture:
        if len(self.weights) != len(self.parts):
            raise ValueError(f"weights must have one number a part ({len(self.parts)}), not {len(self.weights)}")
        return self

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths. The parts of all requests are drawn first, then the lengths of each part in turn."""
        edges = np.cumsum(self.weights)
        part = np.searchsorted(edges[:-1], rng.random(n) * edges[-1], side="right")
        lengths = np.empty(n, np.int64)
        for i, distribution in enumerate(self.parts):
            mine = part == i
            lengths[mine] = distribution.sample(int(np.count_nonzero(mine)), rng)
        return lengths

    def mean_tokens(self) -> float:
        """Weighted mean of the parts' means."""
        means = [part.mean_tokens() for part in self.parts]
        return sum(w * m for w, m in zip(self.weights, means, strict=True)) / sum(self.weights)


class Lengths(OneOf):
    """Token counts of requests: a whole number, or one distribution by name."""

    model_config = ConfigDict(json_schema_extra=or_number({"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}))

    constant: Constant | None = Field(default=None, description="The same for every request.")
    uniform: Uniform | None = Field(default=None, description="Whole numbers, equally likely.")
    exponential: Exponential | None = Field(default=None, description="Exponential, with an optional cap.")
    lognormal: Lognormal | None = Field(default=None, description="Lognormal, with an optional cap.")
    normal: Normal | None = Field(default=None, description="Mean, standard deviation and bounds.")
    quantiles: Quantiles | None = Field(default=None, description="An empirical distribution by its quantiles.")
    mixture: Mixture | None = Field(default=None, description="A weighted mixture of distributions.")
    values: Annotated[list[Tokens], Field(min_length=1)] | None = Field(
        default=None, description="These lengths in this order, from the top again when they run out."
    )

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"constant": {"tokens": value}}
        if not isinstance(value, Mapping | Lengths):
            raise ValueError("must be a whole number, or one distribution by its name")
        return value

    def sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` lengths >= 1. Shape: ``(n,)`` int64.

        Raises:
            BadInput: a draw does not fit in 32 bits.
        """
        if self.values is not None:
            return np.resize(np.array(self.values, np.int64), n)
        lengths: IntArray = self.chosen.sample(n, rng)
        return lengths

    def mean_tokens(self) -> float:
        """The expected length in tokens, in closed form. Lognormal, normal and quantiles leave the rounding out."""
        return float(np.mean(self.values)) if self.values is not None else float(self.chosen.mean_tokens())


def _whole(lengths: npt.NDArray[np.float64]) -> IntArray:
    """Rounded floats as int64, at least 1. Raises `BadInput` if one does not fit in 32 bits."""
    if lengths.size and not lengths.max() <= MOST_TOKENS:
        rule = f"a length drawn is over {MOST_TOKENS} tokens; give the distribution a cap"
        raise BadInput(Problem(rule, value=float(lengths.max())))
    return np.maximum(lengths, 1).astype(np.int64)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
