"""Plan files: a base scenario, what is promised, which systems one could buy, and at what prices.

`read_plan` makes a `BuyingPlan`, with a `Candidate` for every system. A rate is no axis of a plan: the plan sets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from chairlift.backend import specs
from chairlift.backend.checked import a_file, unreadable
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.candidates import Candidate, Price, Prices, candidate, held_to_one_loop, scenario_of
from chairlift.sim.plan.deciding import Effort
from chairlift.sim.plan.pacing import SAMPLE, joined, looped, own_rate, sampled
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.questions import Asked, Newcomer
from chairlift.sim.plan.stretches import FIRST_SHARE, LEAST, MOST_SHARE, recorded, rows_of
from chairlift.sim.scenario import load
from chairlift.sim.scenario.schema import results_name
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.sweep.axes import Value
from chairlift.sim.sweep.file import Based, base_of, hidden_by_axes, of_another_kind, origin_of
from chairlift.sim.workload.arrivals import Rate
from chairlift.sim.workload.strict import Spec

MOST_SYSTEMS = 10_000  # some minutes, until all of them are checked and bounded
COMPARING = ("compare", "cases")  # keys of a scenario that make it several systems
_OURS = (  # keys of a scenario that a plan says itself, and where
    (r"slo(\..*)?", "slo"),
    (r"seed", "search.seed"),
    (r"workload\.(mix\.[^.]*\.)?requests", "search.requests"),
    (r"workload\.(rate_per_s|time_scale|arrivals\.[^.]*\.rate_per_s)", "rate_per_s"),
)


class Search(Spec):
    """How hard to look."""

    precision: Annotated[float, Field(ge=0.002, le=0.5)] = Field(
        default=0.02,
        description="Half of the width of a capacity's interval, as a fraction of it; where the file does not say it, "
        "no less than half of the width by the step costs' errors.",
    )
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = Field(default=0.95, description="Of intervals and proofs.")
    requests: Annotated[int, Field(ge=200, le=10**6)] = Field(
        default=2000, description="Of a replication, to begin with; replications that have not settled get longer."
    )
    most_requests: Annotated[int, Field(ge=200, le=10**7)] = Field(
        default=32_000, description="Of a replication, at most."
    )
    budget_requests: Annotated[int, Field(ge=1000, le=10**10)] = Field(
        default=1_500_000, description="Requests for one capacity, in all; its interval stays as wide as it is then."
    )
    draws: Annotated[int, Field(ge=0, le=64)] = Field(
        default=8, description="Draws of the step costs' errors, for the second width of an answer; 0: none."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the first replication; the others follow.")

    @model_validator(mode="after")
    def _most_is_more(self) -> Search:
        if self.most_requests < self.requests:
            raise ValueError(f"most_requests must be at least requests, {self.requests} (got {self.most_requests})")
        return self

    def effort(self, precision: float | None = None, rows: int | None = None) -> Effort:
        """What a search is told of this; ``precision``, if given, in place of the plan's.

        ``rows``: of the recorded file whose stretches are the replications, `chairlift.sim.plan.stretches`.
        """
        requests, most = self.requests, self.most_requests
        if rows is not None:
            most = min(most, rows // MOST_SHARE)
            requests = min(requests, most, max(LEAST, rows // FIRST_SHARE))
        return Effort(precision or self.precision, self.confidence, requests, most, self.budget_requests, self.draws)


class Stress(Spec):
    """What may befall a deployment that serves ``rate_per_s`` today."""

    growth: list[Annotated[float, Field(gt=1, le=1000)]] = Field(
        default=[1.25, 1.5, 2.0], description="Multiples of today's rate."
    )
    failed_replicas: Annotated[int, Field(ge=0)] = Field(default=1, description="Replicas that fail, for good.")
    burst_cvs: list[Annotated[float, Field(ge=0.1, le=20)]] = Field(
        default=[2.0], description="Coefficients of variation of the gaps between requests; Poisson has 1."
    )


class PlanFile(Based):
    """What a plan YAML may say. Axes: gpu, tensor_parallel, replicas, policy.…; any dotted key of the base."""

    slo: Annotated[list[Promise], Field(min_length=1)] = Field(description="Promises, all of which are to be kept.")
    rate_per_s: Rate | Annotated[list[Rate], Field(min_length=1)] | None = Field(
        default=None,
        description="The load to buy for (or each of several): mean requests/s; with sessions, sessions/s.",
    )
    today: dict[str, Any] | None = Field(
        default=None, description="Dotted key → value: the deployment there is, for capacity and headroom."
    )
    headroom: Stress = Field(default=Stress(), description="What today's deployment is put to.")
    front: bool = Field(
        default=False, description="Also the capacity of each system that will do: cost × latency × rate."
    )
    prices: Prices | str | None = Field(
        default=None, description="GPU → price, or a YAML file of such; default: Chairlift's dated table."
    )
    ask: Asked = Field(
        default=Asked(),
        description="Further questions: a budget, an API's price, growth, spares, spot, hours, clients, a tenant.",
    )
    search: Search = Field(default=Search(), description="How hard to look.")

    @field_validator("prices", mode="before")
    @classmethod
    def _plain_numbers(cls, prices: object) -> object:
        if isinstance(prices, dict):
            return {
                k: {"usd_per_gpu_hour": v} if isinstance(v, int | float) and not isinstance(v, bool) else v
                for k, v in prices.items()
            }
        return prices

    @property
    def given(self) -> list[float]:
        """The rates that the file names, rising and each once."""
        given = self.rate_per_s if isinstance(self.rate_per_s, list) else [self.rate_per_s]
        return sorted({rate for rate in given if rate is not None})

    @property
    def rates(self) -> list[float]:
        """The rates to buy for, rising and each once."""
        return self.ask.rates(self.given)


@dataclass
class BuyingPlan:
    """A plan file, ready to be answered."""

    name: str
    spec: PlanFile
    document: Document  # the plan file itself, for messages that name its lines
    candidates: list[Candidate]  # one for each point of the axes
    today: Candidate | None  # the deployment there is, if the plan names one
    prices: Prices
    rows: int | None = None  # of the shortest recorded file that a system serves; None: there is none

    @cached_property
    def systems(self) -> list[Candidate]:
        """All systems in order of price, as tables and ``plan.json`` number them from 1; today's is the last."""
        ordered = sorted(self.candidates, key=lambda c: (c.usd_per_hour, c.name))
        return [*ordered, *filter(None, [self.today])]

    def number(self, candidate: Candidate) -> int:
        """The number of a system."""
        return next(i for i, each in enumerate(self.systems, 1) if each is candidate)

    def effort(self, precision: float | None = None) -> Effort:
        """How hard a search looks; ``precision``, if given, in place of the plan's."""
        return self.spec.search.effort(precision, self.rows)

    @property
    def unit(self) -> str:
        """What a rate counts: ``requests``, or ``sessions`` where requests follow one another."""
        setups = (candidate.setup for candidate in (*self.candidates, *filter(None, [self.today])))
        return "sessions" if any(s is not None and s.trace.follows is not None for s in setups) else "requests"


def read_plan(
    path: Path, assignments: Sequence[str] = (), rates: Sequence[float] = (), trust: bool = False
) -> BuyingPlan:
    """The plan in the file ``path``; ``rates`` (per second) take the place of its own.

    ``assignments`` (``KEY=VALUE``) change keys of the base. Raises `BadInput`: every value of every axis is tried once
    against the scenario's rules, and every GPU must have a price.
    """
    document = read(path)
    of_another_kind(document, "plan")
    if rates:
        document.put("rate_per_s", list(rates), "--rate")
    spec = document.check(PlanFile)
    rule = "is of a load to buy for: give rate_per_s"
    lost = [key for key in ("growth", "hours", "spares", "spot") if getattr(spec.ask, key) and not spec.given]
    if spec.ask.budget_usd_per_day is not None and spec.given and spec.today is None:
        lost, rule = ["budget_usd_per_day"], "is of capacities: leave out rate_per_s, or give today"
    if lost:
        raise BadInput([document.problem(("ask", key), rule) for key in lost])
    if spec.ask.tenant is not None and (spec.keys() or spec.given or spec.today is not None):
        rule = "chooses among its clusters: leave out axes, today and rate_per_s"
        raise BadInput(document.problem(("ask", "tenant"), rule))
    base, folder = base_of(document, spec, path)
    for key, value in spec.set.items():
        base.assign(key, value, origin_of(document, ("set", key)))
    base.set(assignments)
    problems = [
        base.problem((key,), "a plan's base must be one system; leave it out with set: {" + key + ": []}")
        for key in COMPARING
        if base.data.get(key)
    ]
    if "seed" in base.data:
        problems.append(base.problem(("seed",), "must not be given: search.seed is that of the first replication"))
    if problems:
        raise BadInput(problems)
    given = [(key, document.problem((part, key), "")) for part in ("set", "today") for key in getattr(spec, part) or ()]
    varying = spec.keys()
    given += [(key, document.problem(("axes", key), "", key)) for key in varying]
    given += [(key, Problem("", f"--set {text}")) for text in assignments for key in [text.partition("=")[0].strip()]]
    if problems := [found._replace(rule=rule) for key, found in given if (rule := _ours(key))]:
        raise BadInput(problems)
    if (size := spec.size()) > MOST_SYSTEMS:
        rule = f"must make at most {MOST_SYSTEMS:,} systems: each is looked at before any is simulated (got {size:,})"
        raise BadInput(document.problem(("axes",), rule))
    if problems := hidden_by_axes(document, spec, assignments, varying):
        raise BadInput(problems)
    points = spec.points() if spec.ask.tenant is None else list(_clusters(spec.ask.tenant, base, document))
    for point in spec.each_alone():
        load.check(sampled(scenario_of(base, point, document)), folder, trust)
    today = None
    if spec.today is not None:
        now = {key: Value(value, origin=origin_of(document, ("today", key))) for key, value in spec.today.items()}
        load.check(sampled(scenario_of(base, now, document)), folder, trust)
        points = [*points, now]
    prices = _prices(document, spec, path.parent)
    candidates = [
        candidate(scenario_of(base, point, document), point, folder, trust, prices, document) for point in points
    ]
    if spec.ask.tenant is not None:
        named = zip(candidates, spec.ask.tenant.clusters, strict=True)
        candidates = [replace(each, labels={"cluster": name}) for each, name in named]
        for each in candidates:
            own_rate(each.document)
    if (loop := spec.ask.clients) is not None:
        for each in candidates:
            looped(each.document, 1, SAMPLE, loop.think_s.model_dump(exclude_none=True))
    candidates = held_to_one_loop(candidates)
    if spec.today is not None:
        today = candidates.pop()
        if today.setup is None:
            raise BadInput(document.problem(("today",), f"cannot be: {today.misfit}"))
    rows = _rows([*candidates, *filter(None, [today])], document)
    return BuyingPlan(results_name(spec.name, path), spec, document, candidates, today, prices, rows)


def _clusters(tenant: Newcomer, base: Document, plan: Document) -> Iterator[dict[str, Value]]:
    """The keys of each cluster, its workload being what it serves already and the base's at the new tenant's rate."""
    for name, keys in tenant.clusters.items():
        at = ("ask", "tenant", "clusters", name)
        own = keys.get("workload")
        if not isinstance(own, dict) or "new" in (own.get("mix") or {}):
            rule = "must have a workload, what the cluster serves already; in a mix no part may be called new"
            raise BadInput(plan.problem(at, rule))
        wrong = [key for key in keys if key.startswith("workload.") or (key != "workload" and _ours(key))]
        if wrong:
            raise BadInput(plan.problem((*at, wrong[0]), "is none of a cluster's keys: workload says the load"))
        values = {**keys, "workload": joined(own, base.data.get("workload") or {}, tenant.rate_per_s)}
        yield {key: Value(value, origin=origin_of(plan, (*at, key))) for key, value in values.items()}


def _rows(candidates: Sequence[Candidate], plan: Document) -> int | None:
    """Rows of the shortest recorded file that a system serves, or None. Raises `BadInput` if those are too few."""
    files = [(c.document, c.folder) for c in candidates if c.setup is not None and recorded(c.document)]
    if not files:
        return None
    rows = min(rows_of(*each) for each in files)
    if rows < LEAST * MOST_SHARE:
        rule = (
            f"has {rows:,} requests, and so short a file proves nothing however often it goes round: "
            f"{LEAST * MOST_SHARE} are needed, {MOST_SHARE} stretches of {LEAST}. Or say what requests are like: "
            "prompt_tokens and output_tokens as quantiles, with arrivals"
        )
        raise BadInput(plan.problem(("base", "workload", "file"), rule))
    return rows


def _ours(key: str) -> str:
    """Why ``key`` of the base must not be changed: the plan says it itself. "" if it may be."""
    said = next((own for pattern, own in _OURS if re.fullmatch(pattern, key)), None)
    return f"{key} of the base does not count in a plan, whose own {said} says it" if said else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _prices(document: Document, spec: PlanFile, folder: Path) -> Prices:
    """The plan's own prices, those of the file it names, or Chairlift's table."""
    if isinstance(spec.prices, dict):
        return spec.prices
    if isinstance(spec.prices, str):
        path = folder / spec.prices
        try:
            a_file(path)
        except OSError as error:
            raise BadInput(document.problem(("prices",), unreadable(error)[0], spec.prices)) from None
        table = read(path)
        for gpu, price in table.data.items():
            if _is_number(price):
                table.data[gpu] = {"usd_per_gpu_hour": price}
        return table.check(Prices)
    return {
        name: Price(usd_per_gpu_hour=g.usd_per_gpu_hour, date=g.price_date, source=g.price_source)
        for name, g in specs.GPUS.items()
        if g.usd_per_gpu_hour is not None
    }
