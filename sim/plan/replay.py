"""A system of a plan, run again by itself: ``chairlift run DIR/plan.json --system 3``.

`replayed` makes the run that was the first replication of that system at one rate. Simulated, it gives that
replication's figures to the last digit, since plans and runs price steps and draw requests alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from chairlift.backend.checked import UNREADABLE, a_file, once, text_of, wrong
from chairlift.sim.bad_input import BadInput, Problem, reading
from chairlift.sim.plan.pacing import paced
from chairlift.sim.plan.promises import Promise, measured
from chairlift.sim.plan.replications import Replication, prepared
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.policy_files import Trust
from chairlift.sim.scenario.resolved import resolved
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.study import Study


@dataclass(frozen=True)
class Replay:
    """One replication of a plan, ready to run."""

    study: Study  # of the one run
    promises: tuple[Promise, ...]
    rate_per_s: float
    system: str  # what the plan calls it
    figures: dict[str, float]  # of the plan's first replication; empty where it did not simulate the system so

    def compared(self, outcome: Outcome) -> list[tuple[str, float, float]]:
        """Each figure's name, what the plan had, and what ``outcome`` has."""
        here = measured(self.promises, outcome.requests, outcome.runs, 0.0).figures
        return [(name, there, here[name]) for name, there in self.figures.items() if name in here]


_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
_Requests = Annotated[int, Field(ge=1, le=10**9)]


@with_config(_STRICT)
class _Look(TypedDict):
    """A verdict on one system at one rate."""

    rate_per_s: Annotated[float, Field(gt=0, le=1e12)]
    requests: _Requests
    first: dict[str, float | None]


@with_config(_STRICT)
class _System(TypedDict):
    system: str
    synchronous: bool
    scenario: dict[str, Any]


@with_config(_STRICT)
class _Capacity(TypedDict):
    number: int
    rates: list[_Look]


@with_config(_STRICT)
class _Entry(TypedDict):
    number: int
    verdict: NotRequired[_Look]


@with_config(_STRICT)
class _Race(TypedDict):
    systems: list[_Entry]


@with_config(_STRICT)
class _Plan(TypedDict):
    """What is read of a ``plan.json``."""

    name: str
    seed: Annotated[int, Field(ge=0)]
    requests: _Requests
    promises: Annotated[list[Promise], Field(min_length=1)]
    spares: int | None
    systems: list[_System]
    capacities: list[_Capacity]
    cheapest: list[_Race]


_PLAN: TypeAdapter[_Plan] = TypeAdapter(_Plan)


def is_plan(path: Path) -> bool:
    """Whether the file is the ``plan.json`` of a plan's results."""
    return path.suffix == ".json" and _read(path) is not None


def replayed(path: Path, number: int, rate_per_s: float | None, trust: Trust = False) -> Replay:
    """The run of the system with this number in the ``plan.json`` at ``path``.

    ``rate_per_s``: None for the last rate at which the plan simulated it. Raises `BadInput` where there is no such
    system, or it cannot be.
    """
    with reading(path):
        a_file(path)
    data = _read(path)
    if data is None:
        raise BadInput(Problem("is no plan.json of this version: run the plan again", file=str(path)))
    systems = data["systems"]
    if not 1 <= number <= len(systems):
        rule = f"no such system: {path} has {len(systems)}, numbered from 1"
        raise BadInput(Problem(rule, file="--system", value=number))
    system = systems[number - 1]
    looks = list(_looks(data, number))
    if rate_per_s is None:
        if not looks:
            rule = f"{path} has no simulation of {system['system']}: say at which load, with --rate"
            raise BadInput(Problem(rule, file="--system", value=number))
        rate_per_s = looks[-1]["rate_per_s"]
    known = next((look for look in reversed(looks) if look["rate_per_s"] == rate_per_s), None)
    requests = data["requests"] if known is None else known["requests"]
    promises = tuple(data["promises"])
    document = paced(Document(system["scenario"], {}, str(path)), rate_per_s, requests, None, data["seed"])
    seed, alike = data["seed"], system["synchronous"]
    run = Replication(document, path.parent, {}, seed, trust, promises, rate_per_s, requests, synchronous=alike)
    setup, parts = prepared(run)
    one = resolved(document, path, [], [], [], None)
    if parts:  # no scenario says which stretch of a file is served
        one["question"] = f"Rows {parts[0].first + 1:,} and on of its file, as {path.name} replays system {number}."
    name = f"{data['name']}-{number}"
    study = Study(name, f"{system['system']} at {rate_per_s:g}/s", [setup], resolved={**one, "name": name})
    figures = {} if known is None else {k: v for k, v in known["first"].items() if v is not None}
    return Replay(study, promises, rate_per_s, system["system"], figures)


def _looks(data: _Plan, number: int) -> Iterator[_Look]:
    """All verdicts of a plan on a system, those of races last."""
    for capacity in data["capacities"]:
        if capacity["number"] == number:
            yield from capacity["rates"]
    for race in data["cheapest"] if not data["spares"] else ():  # those ran without the spares
        for entry in race["systems"]:
            if entry["number"] == number and "verdict" in entry:
                yield entry["verdict"]


def _read(path: Path) -> _Plan | None:
    """The content of a ``plan.json``; None if the file is anything else. Raises `BadInput` for a damaged one."""
    try:
        text = text_of(path)
        data = json.loads(text, object_pairs_hook=once)
    except UNREADABLE:
        return None
    if not isinstance(data, dict) or not {"systems", "promises", "capacities", "cheapest"} <= data.keys():
        return None
    try:
        return _PLAN.validate_json(text)
    except ValidationError as error:
        raise BadInput(Problem(f"is damaged: {wrong(error)}", file=str(path))) from None
