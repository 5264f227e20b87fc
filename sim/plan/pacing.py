"""A scenario at another rate: what its workload or mix becomes when a plan sets the load.

A plan's base says what requests are like, and how their arrivals are spread. How many come each second is for the plan
to vary. `paced` makes the scenario of one rate; of a recorded file, `chairlift.sim.plan.stretches` takes the rows.
"""

from __future__ import annotations

from typing import Any

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.named import get as named_workload
from chairlift.sim.workload.spec import Workload

SAMPLE = 2000  # requests of `sampled`
_TIMED = ("requests", "rate_per_s", "arrivals", "time_scale", "duration_s")  # what `looped` says itself


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
    data.pop("duration_s", None)
    data["mix"] = {
        # a part has some requests to spare: by chance more of one part's may come first
        name: _at_rate(
            dict(part), rate_per_s * shares[name] / total, round(requests * shares[name] / total * 1.05) + 20, cv
        )
        for name, part in data["mix"].items()
    }
    one.data["workload"] = data
    return one


def looped(document: Document, clients: int, requests: int, think_s: dict[str, Any], seed: int = 0) -> Document:
    """The scenario with its requests sent by so many clients, each of which waits for its answer and then ``think_s``.

    Raises `BadInput` where the workload cannot be sent so: a mix, or requests that follow one another.
    """
    one = document.copy()
    workload = {key: value for key, value in one.data["workload"].items() if key not in _TIMED}
    one.data["seed"] = seed
    if "mix" in workload or "sessions" in workload or "servegen" in workload or "file" in workload:
        rule = "clients of a closed loop send requests whose lengths are drawn: no mix, sessions, servegen or file"
        raise BadInput(one.problem(("workload",), rule))
    one.data["workload"] = {
        **workload,
        "requests": requests,
        "clients": {"concurrency": clients, "think_s": think_s},
    }
    return one


def own_rate(document: Document) -> float:
    """What a mix of workloads comes to each second, at its parts' own rates. Raises `BadInput` where one has none."""
    parts = document.data["workload"]["mix"]
    checked = {name: document.check(Workload, {**part, "requests": SAMPLE}) for name, part in parts.items()}
    return sum(_own_rate(part, document.problem(("workload", "mix", name), "")) for name, part in checked.items())


def joined(workload: dict[str, Any], new: dict[str, Any], rate_per_s: float) -> dict[str, Any]:
    """The mix of what a cluster serves, ``today`` unless it is a mix itself, and of a ``new`` workload at a rate."""
    parts = dict(workload["mix"]) if isinstance(workload.get("mix"), dict) else {"today": workload}
    return {"mix": {**parts, "new": _at_rate(dict(new), rate_per_s, SAMPLE, None)}}


def sampled(document: Document) -> Document:
    """The scenario with a small workload, for what does not depend on the rate: checks, bounds, memory, assumptions."""
    return paced(document, 1.0, SAMPLE)


def unloaded(document: Document) -> Document:
    """The scenario with a single request, for its system alone: what it serves is made elsewhere."""
    one = document.copy()
    one.data["workload"] = {"requests": 1, "arrivals": {"burst": {}}, "prompt_tokens": 1, "output_tokens": 1}
    return one


def _at_rate(data: dict[str, Any], rate_per_s: float, requests: int, cv: float | None) -> dict[str, Any]:
    """A workload, or one part of a mix, at another mean rate; as `paced`."""
    data["requests"] = requests
    for key in ("time_scale", "duration_s"):  # the rate and the number of requests say both
        data.pop(key, None)
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
