"""The systems that a plan chooses from: each a scenario, with what it costs and how its steps are priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from chairlift.backend import specs
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.pacing import sampled
from chairlift.sim.plan.stretches import recorded, whole
from chairlift.sim.scenario import load
from chairlift.sim.scenario.loops import may_differ, synchronous
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.study import Setup
from chairlift.sim.sweep.axes import Scalar, Value, label_of
from chairlift.sim.sweep.file import scenario_at
from chairlift.sim.workload.strict import Spec

POOL_ERROR = 0.02  # of a KV pool that is worked out: of nine recorded engines, one had 1.2 % less than predicted


LONG = 6  # times that an autoscaler takes to act, in a run: the first of them are its warm-up


class Price(Spec):
    """What a GPU costs."""

    usd_per_gpu_hour: Annotated[float, Field(gt=0)] = Field(description="Dollars an hour.")
    date: str = Field(default="", description="When that was seen.")
    source: str = Field(default="", description="Where.")


Prices = dict[str, Price]  # by any name of a GPU


@dataclass(frozen=True)
class Candidate:
    """A system that one could run."""

    labels: dict[str, Scalar]  # axis → what tables call its value
    document: Document  # the scenario; the rate it names is never used, see `sim.plan.pacing`
    folder: Path  # where the scenario's relative paths start
    trust: bool  # whether policy files may run their code
    setup: Setup | None  # with the workload of `sampled`, or a whole recorded file; None: this system cannot be
    misfit: str = ""  # why it cannot be
    gpus: int = 0  # at most
    usd_per_hour: float = 0.0  # where replicas come and go, of the fewest there may be: what they cost is measured
    backend: str = ""  # how its steps are priced, in words
    notes: tuple[str, ...] = ()  # what was changed so that its engines start
    usd_of_replica: tuple[float, ...] = ()  # of each group, dollars an hour
    synchronous: bool = False  # compared with policies that plan no step ahead (`sim.scenario.loops`)

    @property
    def scales(self) -> bool:
        """Whether some of its replicas come and go."""
        setup = self.setup
        return setup is not None and any(setup.scale_of(group) for group in setup.groups)

    @property
    def least_s(self) -> float:
        """Seconds that a run must show at least: of an autoscaler `LONG` of the times that it takes to act."""
        if self.setup is None:
            return 0.0
        scales = filter(None, map(self.setup.scale_of, self.setup.groups))
        acts = (s.every_s + s.provision_s + s.load_s + max(s.stabilise_up_s, s.stabilise_down_s) for s in scales)
        return LONG * max(acts, default=0.0)

    @property
    def name(self) -> str:
        """What tables call it: ``gpu h100, replicas 4``."""
        return self._said()

    @property
    def system(self) -> str:
        """The name without the number of replicas."""
        return self._said(but="replicas")

    def _said(self, but: str = "") -> str:
        words = [f"{axis.rpartition('.')[2]} {value}" for axis, value in self.labels.items() if axis != but]
        return ", ".join(words) or "the base"


def scenario_of(base: Document, point: dict[str, Value], plan: Document) -> Document:
    """The scenario of the system at ``point``: ``base`` with the keys of ``point`` changed.

    Where nothing says how steps are priced, ``backend: auto`` does.
    """
    one = scenario_at(base, point, 0, plan)
    one.data.pop("question", None)
    one.data.pop("name", None)
    if one.data.get("backend") is None:
        one.put("backend", "auto", "a plan's default")
    return one


def candidate(
    document: Document, point: dict[str, Value], folder: Path, trust: bool, prices: Prices, plan: Document
) -> Candidate:
    """The system that ``document`` describes. Raises `BadInput` for a bad workload, or a GPU without a price.

    A system that cannot be, such as a model that does not fit the GPU's memory, is a candidate without a setup.
    """
    labels = {key: _label(key, value) for key, value in point.items() if value.value is not None}
    notes: tuple[str, ...] = ()
    try:
        setup = load.prepare(sampled(document), folder, trust)
        if (room := _room(setup)) is not None:
            notes = (f"max_model_len cut from {setup.max_model_len:,} to {room:,}, for which the KV pool has room",)
            document = document.copy()
            document.put("max_model_len", room, "cut to the KV pool")
            setup = load.prepare(sampled(document), folder, trust)
        if recorded(document) and (trace := whole(document, folder)) is not None:
            setup = replace(setup, trace=trace)
    except BadInput as error:
        if any(p.path.startswith("workload") for p in error.problems):
            raise
        return Candidate(labels, document, folder, trust, None, "; ".join(map(_short, error.problems)))
    usd, gpus = 0.0, 0
    each: list[float] = []
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
        scale = setup.scale_of(group)
        gpus += setup.most(group) * group.parallel.gpus
        each.append(group.parallel.gpus * price.usd_per_gpu_hour)
        usd += (group.count if scale is None else scale.min) * each[-1]
    return Candidate(labels, document, folder, trust, setup, "", gpus, usd, _priced_by(setup), notes, tuple(each))


def _room(setup: Setup) -> int | None:
    """The longest request with which engines of ``setup`` start that need room for it; None: they start as they are."""
    rooms = []
    for group in setup.groups:
        if group.caution:
            blocks = group.room(setup.max_model_len) // group.block_size
            given = group.kv_source.startswith("given") or group.make_scheduler().pool_blocks is not None
            rooms.append(int(blocks * (1 if given else 1 - POOL_ERROR)) * group.block_size)
    return max(1, min(rooms)) if rooms else None


def _short(problem: Problem) -> str:
    """A problem without its file and line: ``policy.max_num_batched_tokens: must be …``."""
    return ": ".join(filter(None, (problem.path, problem.rule)))


def held_to_one_loop(candidates: Sequence[Candidate]) -> list[Candidate]:
    """``candidates`` as one compares them: their engines run the same loop, as far as policies leave it open."""
    setups = [each.setup for each in candidates if each.setup is not None]
    if not may_differ([(group.scheduler, group.scheduler_settings) for setup in setups for group in setup.groups]):
        return list(candidates)
    for setup in setups:
        synchronous(setup)
    return [replace(each, synchronous=True) for each in candidates]


def _label(key: str, value: Value) -> Scalar:
    """What tables call a value; groups of replicas are told in words, ``2 prefill + 6 decode``."""
    groups = value.value
    if key != "replicas" or not isinstance(groups, list) or value.label != label_of(groups):
        return value.label
    kinds = [(g.get("count", 1), g.get("gpu"), g.get("role", "mixed")) for g in groups]
    return " + ".join(" ".join(str(part) for part in kind if part is not None) for kind in kinds)


def price_of(prices: Prices, gpu: str) -> Price | None:
    """The price of a GPU, by whichever of its names ``prices`` has it; None: it has none."""
    return next((price for name, price in prices.items() if name == gpu or _same(name, gpu)), None)


def _same(name: str, gpu: str) -> bool:
    try:
        return specs.gpu(name).name == gpu
    except LookupError:
        return False


def _priced_by(setup: Setup) -> str:
    """How the steps of each group of replicas are priced, in words."""
    kinds = []
    for group in setup.groups:
        backend = group.make_backend(setup.model)
        calibrated = getattr(backend, "profile", None)
        if calibrated is None:
            kinds.append(f"{backend.name}, assumed efficiencies")
        else:
            kinds.append("profile, scaled" if calibrated.scaled else "profile, measured")
    return " + ".join(dict.fromkeys(kinds))
