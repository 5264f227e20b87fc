"""Plan files: a base scenario, what was promised, which systems one could buy and at what prices.

`read_plan` makes the `Candidate`s of one. A rate is none of the axes: the plan sets it, with `paced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from chairlift.backend import specs
from chairlift.backend.calibrated import profile
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.capacity import Effort
from chairlift.sim.plan.promises import Promise
from chairlift.sim.scenario import load
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.study import Setup
from chairlift.sim.sweep.axes import Scalar, Value, label_of
from chairlift.sim.sweep.file import Based, base_of, copied, origin_of, scenario_at
from chairlift.sim.workload.arrivals import Arrivals, Rate
from chairlift.sim.workload.named import get as named_workload
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.strict import Spec

SAMPLE = 2000  # requests of the trace that bounds are taken from
COMPARING = ("compare", "cases")


class Price(Spec):
    """What a GPU costs."""

    usd_per_gpu_hour: Annotated[float, Field(gt=0)] = Field(description="Dollars an hour.")
    date: str = Field(default="", description="When that was seen.")
    source: str = Field(default="", description="Where.")


Prices = dict[str, Price]


class Search(Spec):
    """How hard to look."""

    precision: Annotated[float, Field(ge=0.002, le=0.5)] = Field(
        default=0.02, description="Half of a capacity's interval, as a part of it."
    )
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = Field(default=0.95, description="Of intervals and proofs.")
    requests: Annotated[int, Field(ge=200, le=10**6)] = Field(
        default=2000, description="Of a replication, to begin with; runs that have not settled get longer."
    )
    most_requests: Annotated[int, Field(ge=200, le=10**7)] = Field(
        default=32_000, description="Of a replication, at most."
    )
    budget: Annotated[int, Field(ge=1000, le=10**10)] = Field(
        default=1_500_000, description="Requests for one capacity, in all; beyond, its interval stays as wide as it is."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the first replication; the others follow.")

    @model_validator(mode="after")
    def _most_is_more(self) -> Search:
        if self.most_requests < self.requests:
            raise ValueError(f"most_requests must be at least requests, {self.requests} (got {self.most_requests})")
        return self

    def effort(self, precision: float | None = None) -> Effort:
        """The same for a search; ``precision`` if a rougher one will do."""
        return Effort(precision or self.precision, self.confidence, self.requests, self.most_requests, self.budget)


class Stress(Spec):
    """What may befall a deployment that serves `rate_per_s` today."""

    growth: list[Annotated[float, Field(gt=1, le=1000)]] = Field(
        default=[1.25, 1.5, 2.0], description="Multiples of today's rate."
    )
    failed_replicas: Annotated[int, Field(ge=0)] = Field(default=1, description="N − so many, for good.")
    burst_cvs: list[Annotated[float, Field(ge=0.1, le=20)]] = Field(
        default=[2.0], description="Coefficients of variation of the gaps between requests; Poisson has 1."
    )


class PlanFile(Based):
    """What a plan YAML may say. Axes: gpu, tensor_parallel, replicas, policy.…; any dotted key of the base."""

    slo: Annotated[list[Promise], Field(min_length=1)] = Field(description="Promises, all of which are to be kept.")
    rate_per_s: Rate | Annotated[list[Rate], Field(min_length=1)] | None = Field(
        default=None, description="The load to buy for (or each of several): mean requests per second."
    )
    today: dict[str, Any] | None = Field(
        default=None, description="Dotted key → value: the deployment there is, for capacity and headroom."
    )
    headroom: Stress = Field(default=Stress(), description="What it is to be put to.")
    front: bool = Field(
        default=False, description="Also the capacity of each system that will do: cost × latency × rate."
    )
    prices: Prices | str | None = Field(
        default=None, description="GPU → price, or a YAML file of such; default: Chairlift's dated table."
    )
    search: Search = Field(default=Search(), description="How hard to look.")

    @field_validator("prices", mode="before")
    @classmethod
    def _plain_numbers(cls, prices: object) -> object:
        if isinstance(prices, dict):
            return {k: {"usd_per_gpu_hour": v} if isinstance(v, int | float) else v for k, v in prices.items()}
        return prices

    @property
    def rates(self) -> list[float]:
        """Rising."""
        given = self.rate_per_s if isinstance(self.rate_per_s, list) else [self.rate_per_s]
        return sorted({rate for rate in given if rate is not None})


@dataclass(frozen=True)
class Candidate:
    """A system that one could run."""

    labels: dict[str, Scalar]  # by axis
    document: Document  # a scenario
    folder: Path
    trust: bool
    setup: Setup | None  # with a small trace, for bounds; None: it cannot be
    misfit: str = ""  # why
    gpus: int = 0
    usd_per_hour: float = 0.0
    backend: str = ""  # how its steps are priced, in words

    @property
    def name(self) -> str:
        """``gpu h100, replicas 4``."""
        return self._said()

    @property
    def system(self) -> str:
        """The same whatever the number of replicas."""
        return self._said(but="replicas")

    def _said(self, but: str = "") -> str:
        words = [f"{axis.rpartition('.')[2]} {value}" for axis, value in self.labels.items() if axis != but]
        return ", ".join(words) or "the base"


@dataclass
class BuyingPlan:
    """A plan file, ready to be answered."""

    name: str
    spec: PlanFile
    document: Document
    candidates: list[Candidate]
    today: Candidate | None
    prices: Prices
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What a rate counts: requests, or sessions of several."""
        setups = (candidate.setup for candidate in (*self.candidates, *filter(None, [self.today])))
        return "sessions" if any(s is not None and s.trace.follows is not None for s in setups) else "requests"


def read_plan(
    path: Path, assignments: Sequence[str] = (), rates: Sequence[float] = (), trust: bool = False
) -> BuyingPlan:
    """The plan in the file ``path``; ``rates`` take the place of its own.

    Raises `BadInput`: every value of every axis is tried once against the scenario's rules, and every GPU has a price.
    """
    document = read(path)
    if rates:
        document.put("rate_per_s", list(rates), "--rate")
    spec = document.check(PlanFile)
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
    points = spec.points()
    for point in spec.each_alone():
        load.check(paced(_at(base, point, document), 1.0, SAMPLE), folder, trust)
    today = None
    if spec.today is not None:
        now = {key: Value(value, origin=origin_of(document, ("today", key))) for key, value in spec.today.items()}
        load.check(paced(_at(base, now, document), 1.0, SAMPLE), folder, trust)
        points = [*points, now]
    prices = _prices(document, spec, path.parent)
    candidates = [_candidate(_at(base, point, document), point, folder, trust, prices, document) for point in points]
    if spec.today is not None:
        today = candidates.pop()
        if today.setup is None:
            raise BadInput(document.problem(("today",), f"cannot be: {today.misfit}"))
    return BuyingPlan(spec.name or path.stem, spec, document, candidates, today, prices, document.data)


def _at(base: Document, point: dict[str, Value], document: Document) -> Document:
    """The scenario at ``point``, priced by a calibrated profile where one fits and nothing else was said."""
    one = scenario_at(base, point, 0, document)
    one.data.pop("question", None)
    one.data.pop("name", None)
    if one.data.get("backend") is None and (fitting := _profile(one)) is not None:
        one.put("backend", fitting, "the profile chosen")
    return one


def _profile(document: Document) -> str | None:
    """The shipped profile for the model. None: none fits.

    One of vLLM, since a plan ends in its command line; of the same GPU if there is one, else to be scaled.
    """
    model = document.data.get("model")
    if not isinstance(model, str):
        return None
    groups = document.data.get("replicas")
    groups = groups if isinstance(groups, list) else [{}]
    system = document.data
    if any("parallel" in each for each in (system, *groups) if isinstance(each, dict)):
        return None
    degrees = {g.get("tensor_parallel", system.get("tensor_parallel", 1)) for g in groups if isinstance(g, dict)}
    gpus = {str(g.get("gpu", system.get("gpu"))) for g in groups if isinstance(g, dict)}
    try:
        name = specs.model(model).name
        known = {specs.gpu(gpu).name for gpu in gpus}
    except LookupError:
        return None
    fitting = [p for p in map(profile.load, profile.shipped()) if p.model == name and {p.tensor_parallel} == degrees]
    fitting.sort(key=lambda p: (not p.engine.startswith("vllm"), known != {p.gpu}))
    return fitting[0].name if fitting else None


def _prices(document: Document, spec: PlanFile, folder: Path) -> Prices:
    if isinstance(spec.prices, dict):
        return spec.prices
    if isinstance(spec.prices, str):
        table = read(folder / spec.prices)
        for gpu, price in table.data.items():
            if isinstance(price, int | float):
                table.data[gpu] = {"usd_per_gpu_hour": price}
        return table.check(Prices)
    return {
        name: Price(usd_per_gpu_hour=g.usd_per_gpu_hour, date=g.price_date, source=g.price_source)
        for name, g in specs.GPUS.items()
        if g.usd_per_gpu_hour is not None
    }


def _candidate(
    document: Document, point: dict[str, Value], folder: Path, trust: bool, prices: Prices, plan: Document
) -> Candidate:
    labels = {key: _label(key, value) for key, value in point.items() if value.value is not None}
    try:
        setup = load.prepare(paced(document, 1.0, SAMPLE), folder, trust)
    except BadInput as error:
        if any(p.path.startswith("workload") for p in error.problems):
            raise
        return Candidate(labels, document, folder, trust, None, "; ".join(p.rule for p in error.problems))
    usd, gpus = 0.0, 0
    for group in setup.groups:
        price = price_of(prices, group.gpu.name)
        if price is None:
            known = specs.GPUS.get(group.gpu.name)
            hint = (
                f"; Chairlift's own table says {known.usd_per_gpu_hour:g} (seen {known.price_date})"
                if known and known.usd_per_gpu_hour
                else ""
            )
            rule = f"has no price for {group.gpu.name}: add {group.gpu.name}: {{usd_per_gpu_hour: …}}{hint}"
            raise BadInput(plan.problem(("prices",), rule))
        gpus += group.count * group.parallel.gpus
        usd += group.count * group.parallel.gpus * price.usd_per_gpu_hour
    return Candidate(labels, document, folder, trust, setup, "", gpus, usd, _priced_by(setup))


def _label(key: str, value: Value) -> Scalar:
    """Groups of replicas in words: ``2 prefill + 6 decode``."""
    groups = value.value
    if key != "replicas" or not isinstance(groups, list) or value.label != label_of(groups):
        return value.label
    kinds = [(g.get("count", 1), g.get("gpu"), g.get("role", "mixed")) for g in groups]
    return " + ".join(" ".join(str(part) for part in kind if part is not None) for kind in kinds)


def price_of(prices: Prices, gpu: str) -> Price | None:
    """The price of a GPU, which ``prices`` may call by any of its names."""
    return next((price for name, price in prices.items() if name == gpu or _same(name, gpu)), None)


def _same(name: str, gpu: str) -> bool:
    try:
        return specs.gpu(name).name == gpu
    except LookupError:
        return False


def _priced_by(setup: Setup) -> str:
    kinds = []
    for group in setup.groups:
        backend = group.make_backend(setup.model)
        calibrated = getattr(backend, "profile", None)
        if calibrated is None:
            kinds.append(f"{backend.name}, assumed efficiencies")
        else:
            kinds.append("profile, scaled" if calibrated.scaled else "profile, measured")
    return " + ".join(dict.fromkeys(kinds))


def paced(document: Document, rate_per_s: float, requests: int, cv: float | None = None, seed: int = 0) -> Document:
    """The scenario with its workload at another mean rate and size; ``cv``: with gamma gaps of that variability.

    Raises `BadInput` where a workload has no rate.
    """
    one = copied(document)
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
        name: _at_rate(
            dict(part), rate_per_s * shares[name] / total, round(requests * shares[name] / total * 1.05) + 20, cv
        )
        for name, part in data["mix"].items()
    }
    one.data["workload"] = data
    return one


def _at_rate(data: dict[str, Any], rate_per_s: float, requests: int, cv: float | None) -> dict[str, Any]:
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
    if part.rate_per_s is not None:
        return part.rate_per_s
    arrivals = part.arrivals or (named_workload(part.name).arrivals if part.name else None)
    chosen: Any = None if arrivals is None else arrivals.chosen
    rate = getattr(chosen, "mean_rate_per_s", None) or getattr(chosen, "rate_per_s", None)
    if rate is None:
        raise BadInput(problem._replace(rule="has no rate of its own: give rate_per_s, its share of the load"))
    return float(rate)


def replays(document: Document) -> bool:
    """Whether the workload is a file with its own times: then seeds do not make it another."""
    workload = document.data.get("workload")
    return isinstance(workload, dict) and "file" in workload and workload.get("arrivals") is None
