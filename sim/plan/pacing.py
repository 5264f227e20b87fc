"""A scenario at another rate: what its workload, mix or recorded file becomes when a plan sets the load.

A plan's base says what requests are like, and how their arrivals are spread. How many come each second is for the plan
to vary. `paced` makes the scenario of one rate, `replayed` and `turned` those of a recorded file with its own times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.named import get as named_workload
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import Trace

SAMPLE = 2000  # requests of `sampled`
_GOLDEN = 0.6180339887498949  # steps of this fraction of a circle are spread evenly, however many there are
_PACE = ("requests", "rate_per_s", "time_scale")  # keys of a workload that say how many requests come, and how fast


def paced(document: Document, rate_per_s: float, requests: int, cv: float | None = None, seed: int = 0) -> Document:
    """The scenario with ``requests`` requests at a mean of ``rate_per_s`` each second.

    A mix keeps its parts' shares of the load. ``cv``: gaps are gamma with that coefficient of variation, instead of
    what the scenario says. Raises `BadInput` where the workload, or a part of the mix, has no rate.
    """
    one = document.copy()
    workload = one.data.get("workload")
    one.data["seed"] = seed
    if not isinstance(workload, dict):
        return one
    whole = {**workload, "requests": requests}
    if workload.get("mix") is not None:
        whole["mix"] = {
            name: {**part, "requests": requests} if isinstance(part, dict) else part
            for name, part in dict(workload["mix"]).items()
        }
    elif not {"arrivals", "clients", "rate_per_s"} & workload.keys() and {"name", "servegen"} & workload.keys():
        whole["rate_per_s"] = rate_per_s
    checked = one.check(Workload, whole, ("workload",))
    if "clients" in workload or any("clients" in part for part in (workload.get("mix") or {}).values()):
        rule = "a closed loop of clients has no rate that one could plan for: give arrivals"
        raise BadInput(one.problem(("workload", "clients"), rule))
    data = dict(workload)
    if checked.mix is None:
        one.data["workload"] = _at_rate(data, rate_per_s, requests, cv)
        return one
    shares = {name: _own_rate(part, one.problem(("workload", "mix", name), "")) for name, part in checked.mix.items()}
    total = sum(shares.values())
    data["requests"] = requests
    data["mix"] = {
        # a part has some requests to spare: by chance more of one part's may come first
        name: _at_rate(
            dict(part), rate_per_s * shares[name] / total, round(requests * shares[name] / total * 1.05) + 20, cv
        )
        for name, part in data["mix"].items()
    }
    one.data["workload"] = data
    return one


def sampled(document: Document) -> Document:
    """The scenario with a small workload, for what does not depend on the rate: checks, bounds, memory, assumptions."""
    return paced(document, 1.0, SAMPLE)


def _at_rate(data: dict[str, Any], rate_per_s: float, requests: int, cv: float | None) -> dict[str, Any]:
    """A workload, or one part of a mix, at another mean rate; as `paced`."""
    data["requests"] = requests
    data.pop("time_scale", None)
    if cv is not None:
        data.pop("rate_per_s", None)
        data["arrivals"] = {"gamma": {"rate_per_s": rate_per_s, "cv": cv}}
    elif data.get("arrivals") is not None:
        arrivals = Arrivals.model_validate(data["arrivals"])
        data["arrivals"] = arrivals.rescaled(rate_per_s).model_dump(exclude_none=True)
    else:
        data["rate_per_s"] = rate_per_s
    return data


def _own_rate(part: Workload, problem: Problem) -> float:
    """The rate per second that a part of a mix has in the scenario. Raises ``problem`` as `BadInput` if it has none."""
    if part.rate_per_s is not None:
        return part.rate_per_s
    arrivals = part.arrivals or (named_workload(part.name).arrivals if part.name else None)
    rate = None if arrivals is None else arrivals.mean_rate_per_s
    if rate is None:
        raise BadInput(problem._replace(rule="has no rate of its own: give rate_per_s, its share of the load"))
    return rate


def replays(document: Document) -> bool:
    """Whether the workload is a recorded file with its own arrival times, which no seed changes."""
    workload = document.data.get("workload")
    return isinstance(workload, dict) and "file" in workload and workload.get("arrivals") is None


def replayed(document: Document, seed: int) -> Document:
    """The scenario that reads its whole file as recorded, for `turned` to change."""
    one = document.copy()
    one.data["seed"] = seed
    one.data["workload"] = {key: value for key, value in one.data["workload"].items() if key not in _PACE}
    return one


def turned(trace: Trace, seed: int, requests: int, rate_per_s: float) -> Trace:
    """``requests`` rows of ``trace``, from a row that ``seed`` chooses on, with gaps stretched to a mean rate.

    After the last row comes the first again. Seeds begin at rows far from one another, so that replications of one
    recorded day are different stretches of it: of 1000 rows, the seeds 0, 1, 2 begin at rows 0, 618 and 236. Raises
    `BadInput` where requests follow one another, or all arrive at once.
    """
    if trace.follows is not None or trace.session is not None:
        rule = "a file whose requests follow one another cannot be replayed at another rate: give workload.arrivals"
        raise BadInput(Problem(rule, path="workload.file"))
    n = len(trace)
    span = int(trace.arrival_ps[-1] - trace.arrival_ps[0])
    if n < 2 or span == 0:
        raise BadInput(Problem("all requests of the file arrive at once: give workload.arrivals", path="workload.file"))
    rows = (int((seed * _GOLDEN) % 1 * n) + np.arange(requests)) % n
    gaps = np.diff(trace.arrival_ps, prepend=trace.arrival_ps[0]).astype(np.float64)
    gaps[0] = span / (n - 1)  # from the last row around to the first
    stretch = (n - 1) / (span / PS_PER_S) / rate_per_s
    columns: dict[str, Any] = {"arrival_ps": np.cumsum(gaps[rows] * stretch).astype(np.int64)}
    for name in ("prompt_tokens", "output_tokens", "max_tokens", "priority", "tenant", "prefix_group", "prefix_tokens"):
        if (column := getattr(trace, name)) is not None:
            columns[name] = column[rows]
    if trace.hash_ids is not None:
        parts = [trace.hash_ids.row(int(i)) for i in rows]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        columns["hash_ids"] = type(trace.hash_ids)(np.concatenate(parts), offsets)
    return dataclasses.replace(trace, **columns)
