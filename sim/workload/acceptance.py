"""How many of the drafts that a step verifies are kept: what a scenario says of it, and the draws.

A draft counts only if all drafts before it are kept, so the shares of steps in which the first, second, … draft is kept
fall. One and their sum is the accepted length: the tokens that a request gets from a step on average.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from chairlift.sim.bad_input import did_you_mean
from chairlift.sim.workload.strict import OneOf

# Accepted lengths with 1 to 8 drafts, measured by InferenceX with SPEED-Bench's coding prompts, 4,096 tokens of answer,
# on vLLM (golden_al_distribution, Apache-2.0, November 2026). A name is a file's, with "/thinking_off" where measured.
CURVES: dict[str, tuple[float, ...]] = {
    "dsv4_mtp": (1.79, 2.27, 2.49, 2.54, 2.55, 2.55, 2.54, 2.58),
    "dsv4_mtp/thinking_off": (1.92, 2.61, 2.97, 3.00, 3.10, 3.16, 3.00, 3.11),
    "glm5.2_mtp": (1.84, 2.50, 2.99, 3.33, 3.61, 3.78, 3.91, 4.06),
    "kimik2.5_eagle3": (1.83, 2.43, 2.88, 3.24, 3.46, 3.62, 3.71, 3.77),
    "kimik2.5_eagle3/thinking_off": (1.80, 2.33, 2.75, 3.06, 3.25, 3.43, 3.46, 3.51),
    "minimaxm3_eagle3": (1.78, 2.38, 2.83, 3.11, 3.35, 3.45, 3.53, 3.74),
    "minimaxm3_eagle3/thinking_off": (1.84, 2.52, 2.93, 3.41, 3.59, 3.57, 3.85, 4.06),
    "minimaxm3_eagle3_gqa": (1.79, 2.39, 2.78, 3.02, 3.21, 3.30, 3.52, 3.51),
    "minimaxm3_eagle3_gqa/thinking_off": (1.83, 2.46, 2.97, 3.29, 3.72, 3.76, 3.75, 3.93),
    "qwen3.5_mtp": (1.93, 2.73, 3.39, 3.97, 4.41, 4.80, 5.04, 5.21),
    "qwen3.5_mtp/thinking_off": (1.92, 2.70, 3.33, 3.83, 4.20, 4.48, 4.73, 4.71),
}

Rate = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(ge=1)]


class Acceptance(OneOf):
    """How many drafts are kept: exactly one of these."""

    length: Length | None = Field(
        default=None, description="Tokens a step on average, each draft kept as often as the one before it was."
    )
    rates: list[Rate] | None = Field(
        default=None, description="Share of the steps that keep the first draft, the second, …: they fall."
    )
    synthetic: Length | None = Field(
        default=None,
        description="Tokens a step on average, as evenly as can be: vLLM's synthetic_acceptance_length.",
    )
    curve: str | None = Field(
        default=None,
        description="The name of a measured curve of tokens a step by number of drafts.",
        json_schema_extra={"enum": [*CURVES, None]},
    )

    lengths: Annotated[list[Length], Field(min_length=1, max_length=32)] | None = Field(
        default=None, description="A curve of one's own: tokens a step on average with 1 draft, with 2, …"
    )
    file: str | None = Field(
        default=None,
        description="Such a curve in a YAML file, as InferenceX has them (1: 1.8, 2: 2.4, …); FILE:LABEL of several.",
    )

    @field_validator("curve")
    @classmethod
    def _known_curve(cls, name: str | None) -> str | None:
        if name is not None and name not in CURVES:
            raise ValueError(f"no such curve{did_you_mean(name, list(CURVES))}")
        return name

    def of(self, drafts: int) -> tuple[float, ...]:
        """The shares of steps that keep the first, second, … of so many drafts. Raises ValueError, one sentence."""
        if self.rates is not None:
            if len(self.rates) < drafts:
                raise ValueError(f"rates must have one for each of the {drafts} drafts (got {len(self.rates)})")
            if any(after > before for before, after in zip(self.rates, self.rates[1:], strict=False)):
                raise ValueError("rates must not rise: a draft is kept only if all before it are")
            return tuple(self.rates[:drafts])
        if self.curve is not None or self.lengths is not None:
            lengths = CURVES[self.curve] if self.curve is not None else tuple(self.lengths or ())
            what = f"curve {self.curve} ends" if self.curve is not None else "lengths end"
            if drafts > len(lengths):
                raise ValueError(f"{what} at {len(lengths)} drafts (tokens is {drafts})")
            if drafts and lengths[drafts - 1] > 1 + drafts:
                most = f"at most {1 + drafts} with {drafts} drafts (got {lengths[drafts - 1]:g})"
                raise ValueError(f"lengths must be {most}")
            return _of_curve(lengths[:drafts]) if drafts else ()
        name = "length" if self.length is not None else "synthetic"
        more = (self.length or self.synthetic or 1.0) - 1
        if more > drafts:
            raise ValueError(f"{name} must be at most 1 + tokens, {drafts + 1} (got {more + 1:g})")
        if name == "synthetic":
            return tuple(min(1.0, max(0.0, more - j)) for j in range(drafts))
        return _geometric(more, drafts)


def named_curve(text: str) -> tuple[str, str]:
    """``own.yaml:thinking_off`` → ``("own.yaml", "thinking_off")``; no label: ``""``."""
    found = re.fullmatch(r"(.*\.(?:ya?ml|json)):(.+)", text)
    return (text, "") if found is None else (found[1], found[2])


def curve_in(data: Mapping[str, Any], label: str) -> list[float]:
    """The curve in a file of ``data``: lengths by number of drafts, alone or under labels, of which ``label`` is one.

    Raises ValueError, one sentence, if there is no such curve, or it lacks a number of drafts.
    """
    curves = list(_curves(data, ""))
    found = [curve for known, curve in curves if label in ("", known)]
    if len(found) != 1:
        known = ", ".join(known for known, _ in curves) or "none"
        asked = f"one curve {label}" if label else "one curve alone, so say which as FILE:LABEL"
        raise ValueError(f"does not hold {asked} (got {known})")
    curve = found[0]
    given = sorted(curve)
    if given != list(range(1, len(given) + 1)):
        raise ValueError(f"a curve must have the lengths with 1, 2, … drafts, none left out (got those with {given})")
    return [curve[drafts] for drafts in given]


def _curves(data: Mapping[str, Any], label: str) -> Iterator[tuple[str, dict[int, float]]]:
    """Each curve within ``data``, which stands at ``label``, with the last label that leads to it."""
    numbers = {key: value for key, value in data.items() if isinstance(key, str) and key.isdecimal()}
    if numbers:
        for key, value in data.items():
            if key not in numbers or isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"a curve must hold numbers by number of drafts (got {key}: {value!r})")
        yield label, {int(key): float(value) for key, value in numbers.items()}
        return
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _curves(value, key)


def _geometric(more: float, drafts: int) -> tuple[float, ...]:
    """Shares r, r², … of so many drafts that add up to ``more``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**j for j in range(1, drafts + 1)) < more:
            low = middle
        else:
            high = middle
    return tuple(high**j for j in range(1, drafts + 1))


def _of_curve(lengths: tuple[float, ...]) -> tuple[float, ...]:
    """The shares of a curve: what each draft adds to the accepted length, made to fall, their sum as it was.

    Where a draft adds more than the one before it, both count as their mean (pooling of adjacent violators); where it
    takes something away, as nothing. Lengths 1.8, 2.3 and 2.9 have additions of 0.8, 0.5 and 0.6: shares of 0.8, 0.55
    and 0.55.
    """
    pools: list[list[float]] = []  # sum, how many
    for before, after in zip((1.0, *lengths), lengths, strict=False):
        pools.append([after - before, 1])
        while len(pools) > 1 and pools[-1][0] / pools[-1][1] > pools[-2][0] / pools[-2][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    shares = [max(0.0, total / count) for total, count in pools for _ in range(int(count))]
    scale = (lengths[-1] - 1) / sum(shares)
    return tuple(min(1.0, scale * share) for share in shares)


_MASK = (1 << 64) - 1


class Draws:
    """How many drafts are kept: a number drawn for each request and position of its answer, whatever is planned.

    ``shares``: of steps that keep the first, second, … draft. Equal seeds give equal draws; no draw depends on another,
    so that policies that verify at the same positions keep the same drafts. Two rounds of splitmix64 (Steele 2014).
    """

    def __init__(self, shares: tuple[float, ...], seed: int) -> None:
        self._above = [1 - share for share in shares]  # rising: the first draft is kept where the draw is above it
        self._seed = seed
        self._of: dict[int, int] = {}  # request → its first round

    def __call__(self, request: int, position: int, drafts: int) -> int:
        """How many of ``drafts`` are kept of a request that has ``position`` tokens of its answer."""
        first = self._of.get(request)
        if first is None:
            first = self._of[request] = _mixed(self._seed + request * 0x9E3779B97F4A7C15)
        x = _mixed(first + position * 0xD1B54A32D192ED03)
        return min(drafts, bisect_right(self._above, (x >> 11) / (1 << 53)))

    def along(self, request: int, start: int, stop: int, drafts: int) -> list[int]:
        """The same at each position from ``start`` to before ``stop``."""
        x = np.arange(start, stop, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x += np.uint64(_mixed(self._seed + request * 0x9E3779B97F4A7C15))
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        kept = np.searchsorted(self._above, (x >> np.uint64(11)) / (1 << 53), side="right")
        found: list[int] = np.minimum(kept, drafts).tolist()
        return found


def _mixed(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
