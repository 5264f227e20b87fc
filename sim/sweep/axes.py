"""The axes of a sweep: which keys of a scenario take which values.

An axis is a list of values, a range, or values with names of their own. The axes of a sweep make a grid; keys that
are zipped go together; random points are drawn once and crossed with the grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, field_validator, model_validator

from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.strict import OneOf, Spec

Scalar = str | int | float | bool | None
Count = Annotated[int, Field(ge=1, le=10**6)]
SHOWN = ("name", "question", "tables", "baseline", "waterfall", "claims")  # keys of a scenario that change no run
MOST_RUNS = 10**6


class Value:
    """What stands at a key in some runs, and what tables call it."""

    __slots__ = ("label", "origin", "value")

    def __init__(self, value: object, label: Scalar = None, origin: str = "") -> None:
        self.value = value
        self.origin = origin  # where it was said, if not in the sweep file
        self.label = label_of(value) if label is None else label


def same_as(value: object) -> str:
    """A text that is equal for two values which a scenario takes for the same: 5 and 5.0, mappings in any order."""

    def plain(value: object) -> object:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, Mapping):
            return {str(key): plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return json.dumps(plain(value), sort_keys=True)


def _each_once(values: list[Any]) -> list[Any]:
    """``values``, if no two are the same. Raises ValueError."""
    known: set[str] = set()
    for value in values:
        if (text := same_as(value)) in known:
            raise ValueError(f"{label_of(value)!r} stands twice: each value makes points of its own")
        known.add(text)
    return values


def label_of(value: object) -> Scalar:
    """A number or a text as it is; ``{name: orca, reserve: max}`` as ``orca reserve=max``; lists as JSON."""
    if isinstance(value, str | int | float | bool):
        return value
    if not isinstance(value, Mapping):
        return json.dumps(value)
    named = [value["name"]] if isinstance(value.get("name"), str) else []
    rest = {k: v for k, v in value.items() if not (named and k == "name")}
    return " ".join([*named, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in rest.items())])


class Log(Spec):
    """Equal ratios from ``low`` to ``high``, both included."""

    low: float = Field(gt=0, description="First value.")
    high: float = Field(gt=0, description="Last value.")
    points: Count = Field(description="How many values.")
    whole: bool = Field(default=False, description="Round to whole numbers; equal ones count once.")

    def values(self) -> list[Value]:
        """In order, exact at both ends."""
        found = np.geomspace(self.low, self.high, self.points).tolist()
        return _numbers(found, self.low, self.high, self.whole)


class Linear(Spec):
    """Equal differences from ``low`` to ``high``, both included."""

    low: float = Field(description="First value.")
    high: float = Field(description="Last value.")
    points: Count = Field(description="How many values.")
    whole: bool = Field(default=False, description="Round to whole numbers; equal ones count once.")

    def values(self) -> list[Value]:
        """In order, exact at both ends."""
        found = np.linspace(self.low, self.high, self.points).tolist()
        return _numbers(found, self.low, self.high, self.whole)


def _numbers(found: list[float], low: float, high: float, whole: bool) -> list[Value]:
    # Twelve digits: NumPy's rounding would make two names for one value.
    numbers = [float(f"{x:.12g}") for x in found]
    numbers[0] = low
    if len(numbers) > 1:
        numbers[-1] = high
    if whole:
        numbers = [round(x) for x in numbers]
    return [Value(x) for x in dict.fromkeys(numbers)]


class Axis(OneOf):
    """The values of one key: a list, or one of these by name."""

    values: Annotated[list[Any], AfterValidator(_each_once)] | None = Field(
        default=None, min_length=1, description="These values, each once."
    )
    named: dict[str, Any] | None = Field(
        default=None, min_length=1, description="Values with names of their own, which tables show."
    )
    log: Log | None = Field(default=None, description="Equal ratios.")
    linear: Linear | None = Field(default=None, description="Equal differences.")

    @model_validator(mode="before")
    @classmethod
    def _list_is_values(cls, value: object) -> object:
        if isinstance(value, list):
            return {"values": value}
        if not isinstance(value, Mapping | Axis):
            raise ValueError("must be a list of values, or one of values, named, log and linear")
        return value

    def points(self) -> list[Value]:
        """The values in order, each once."""
        if self.named is not None:
            return [Value(value, name) for name, value in self.named.items()]
        return [Value(v) for v in self.values] if self.values is not None else self.chosen.values()


class LogUniform(Spec):
    """The logarithm uniform from that of ``low`` to that of ``high``."""

    low: float = Field(gt=0, description="Smallest value.")
    high: float = Field(gt=0, description="Largest value.")
    whole: bool = Field(default=False, description="Round to whole numbers.")

    def draw(self, n: int, rng: np.random.Generator) -> list[Value]:
        """``n`` values."""
        found = np.exp(rng.uniform(math.log(self.low), math.log(self.high), n)).tolist()
        return [Value(round(x) if self.whole else float(f"{x:.6g}")) for x in found]


class Uniform(Spec):
    """Uniform from ``low`` to ``high``."""

    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    whole: bool = Field(default=False, description="Round to whole numbers.")

    def draw(self, n: int, rng: np.random.Generator) -> list[Value]:
        """``n`` values."""
        found = rng.uniform(self.low, self.high, n).tolist()
        return [Value(round(x) if self.whole else float(f"{x:.6g}")) for x in found]


class Drawn(OneOf):
    """Values of one key drawn at random."""

    uniform: Uniform | None = Field(default=None, description="Uniform.")
    log_uniform: LogUniform | None = Field(default=None, description="Uniform in the logarithm.")
    choice: list[Any] | None = Field(default=None, min_length=1, description="One of these, equally likely.")

    def draw(self, n: int, rng: np.random.Generator) -> list[Value]:
        """``n`` values."""
        if self.choice is not None:
            return [Value(self.choice[i]) for i in rng.integers(len(self.choice), size=n)]
        drawn: list[Value] = self.chosen.draw(n, rng)
        return drawn


class RandomPoints(Spec):
    """Points drawn once from the whole of a space (random search), the same for the same seed."""

    points: Count = Field(description="How many points.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the draws; the runs have seeds of their own.")
    keys: dict[str, Drawn] = Field(min_length=1, description="Dotted key → what to draw.")

    def draw(self) -> list[dict[str, Value]]:
        """One mapping a point; each key has a random stream of its own."""
        columns = {key: drawn.draw(self.points, stream(self.seed, key)) for key, drawn in self.keys.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(self.points)]


Zip = dict[str, list[Any]]


class Grid(Spec):
    """What varies in a sweep. `points` is every combination."""

    axes: dict[str, Axis] = Field(default_factory=dict, description="Dotted key → its values; every combination runs.")
    zip: list[Zip] = Field(
        default_factory=list, description="Keys whose values go together, first with first; each entry is one axis."
    )
    random: RandomPoints | None = Field(default=None, description="Points drawn at random, each crossed with the grid.")

    @field_validator("zip")
    @classmethod
    def _equally_long(cls, groups: list[Zip]) -> list[Zip]:
        for group in groups:
            lengths = {key: len(values) for key, values in group.items()}
            if not lengths or min(lengths.values()) < 1:
                raise ValueError("must have keys with at least one value each")
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{key} has {n}" for key, n in lengths.items())
                raise ValueError(f"zipped keys must have equally many values ({told})")
            rows = [dict(zip(group, row, strict=True)) for row in zip(*group.values(), strict=True)]
            if len({same_as(row) for row in rows}) < len(rows):
                raise ValueError(f"the same values of {', '.join(group)} stand twice")
        return groups

    @model_validator(mode="after")
    def _each_key_once(self) -> Grid:
        keys = self.keys()
        for key in keys:
            if not all(key.split(".")):
                raise ValueError(f"a key must be names with dots between (got {key!r})")
            if key == "seed":
                raise ValueError("seed is no axis: say how many with seeds, so that all points share them")
            if key.split(".")[0] in SHOWN:
                raise ValueError(f"{key} is no axis: it says what is shown of a run, and changes none")
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{', '.join(twice)} stands in several axes")
        most = self.size()
        if most > MOST_RUNS:
            raise ValueError(f"the axes make {most:,} points; at most {MOST_RUNS:,} can be run")
        return self

    def keys(self) -> list[str]:
        """All keys that vary, in order."""
        drawn = [] if self.random is None else list(self.random.keys)
        return [*self.axes, *(key for group in self.zip for key in group), *drawn]

    def size(self) -> int:
        """How many points there are."""
        return math.prod(map(len, self._factors()))

    def points(self) -> list[dict[str, Value]]:
        """Every combination, the last axis changing fastest."""
        found: list[dict[str, Value]] = [{}]
        for factor in self._factors():
            found = [before | point for before in found for point in factor]
        return found

    def each_alone(self) -> list[dict[str, Value]]:
        """The first point, and it with each value of each axis in turn: enough to try every value once."""
        factors = self._factors()
        first = {key: value for factor in factors for key, value in factor[0].items()}
        return [first, *(first | point for factor in factors for point in factor[1:])]

    def _factors(self) -> list[list[dict[str, Value]]]:
        factors = [[{key: value} for value in axis.points()] for key, axis in self.axes.items()]
        for group in self.zip:
            columns = [[(key, Value(v)) for v in values] for key, values in group.items()]
            factors.append([dict(row) for row in zip(*columns, strict=True)])
        if self.random is not None:
            factors.append(self.random.draw())
        return factors
