"""What a run is made of: `Setup`, ready to simulate, and `Study`, all runs of a scenario file and how to show them.

`sim.scenario.load` makes them from a file; a script may make them itself. Parts that a scenario file describes in the
very words that a run needs (SLO, limits, link, failures, …) are pydantic models, read from the file as they stand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from chairlift.backend import specs
from chairlift.backend.base import Backend, Settings
from chairlift.backend.parallel import Parallel
from chairlift.policies.base import KvGroups, Router, Scheduler, Speculation
from chairlift.sim.workload.acceptance import Acceptance
from chairlift.sim.workload.strict import Spec
from chairlift.sim.workload.trace import Trace

# Bounds keep a slip of the pen from taking hours or all memory; each is far beyond what anybody has built.
Positive = Annotated[int, Field(ge=1, le=10**9)]
Fleet = Annotated[int, Field(ge=1, le=10_000)]  # replicas; each is an engine with a KV pool of its own
Gpus = Annotated[int, Field(ge=1, le=1024)]  # that share one replica
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
PositiveMs = Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)]
Gib = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Slo(Spec):
    """What a request must meet to count as good; all of those given."""

    ttft_ms: PositiveMs | None = Field(None, description="Time to the first token.")
    tpot_ms: PositiveMs | None = Field(None, description="Mean time per further token.")
    e2el_ms: PositiveMs | None = Field(None, description="Time to the last token.")


class Kv(Spec):
    """The KV pool of a replica: measured (`blocks` or `tokens`), or worked out from the GPU's memory.

    With ranks of DP-attention (`parallel.data`) what is measured is of each.
    """

    blocks: Positive | None = Field(
        None, description="Blocks of block_size tokens, as an engine's log says; of each rank of parallel.data."
    )
    tokens: Positive | None = Field(None, description="Token slots, instead of blocks.")
    block_size: Positive = Field(16, description="Tokens a block.")
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of the memory in use.")
    reserve_gib: Gib | None = Field(
        None, description="GiB a GPU keeps besides weights and KV; default: worked out, 1.9 at least."
    )
    host_gib: Gib = Field(4, description="Host memory for swapped KV, GiB a GPU (vLLM's swap_space).")
    host_link: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of the host link's line rate that swapping reaches (an assumption)."
    )


class Limits(Spec):
    """When requests are refused or given up."""

    queue: Positive | None = Field(None, description="Refuse a request whose replica has so many waiting already.")
    queue_timeout_s: PositiveSeconds | None = Field(None, description="Give up a request that has not started by then.")
    timeout_s: PositiveSeconds | None = Field(None, description="The client gives up a request not answered by then.")


class Link(Spec):
    """What KV goes through from a prefill replica to a decode replica: one transfer at a time, first come first served.

    KV is staged in the memory of the decode replica's host, so that no transfer waits for room in its pool.
    """

    gb_per_s: Annotated[float, Field(ge=1e-3, le=1e12)] = Field(description="Bandwidth, 1e9 bytes a second.")
    latency_us: Seconds = Field(10, description="Added to every transfer, microseconds.")
    shared: bool = Field(False, description="One link for all prefill replicas, instead of one each.")


class Speculate(Spec):
    """Drafts of the next tokens, which a step verifies beside computing its own."""

    method: Literal["eagle3", "mtp", "draft_model", "ngram"] = Field(
        description="What drafts: a layer trained for it, the model's own last layer, a small model, or the prompt."
    )
    tokens: Annotated[int, Field(ge=0, le=32)] = Field(description="Drafts of a request and step; 0: none.")
    acceptance: Acceptance = Field(description="How many of them are kept.")
    draft: str | dict[str, Any] | None = Field(
        None,
        description="The drafting model: a name with draft_model; else numbers of the drafting layer that are not the "
        "model's own, such as {vocab: 32000}.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Speculate:
        if self.method == "draft_model" and self.draft is None:
            raise ValueError("draft is required with draft_model: the name of a model, or its numbers")
        if self.method == "ngram" and self.draft is not None:
            raise ValueError("draft must not be given with ngram, which drafts from the prompt")
        if self.acceptance.file is None:  # else once that is read
            self.acceptance.of(self.tokens)
        return self

    @property
    def said(self) -> dict[str, str]:
        """What results rest on with these drafts: a word → one line."""
        shares = ", ".join(f"{share:.0%}" for share in self.acceptance.of(self.tokens))
        return {"drafts": f"{self.tokens} by {self.method}, kept in {shares} of the steps (as given)"}


class Outage(Spec):
    """One planned failure."""

    replica: Annotated[int, Field(ge=0)] = Field(description="Which replica, from 0.")
    at_s: Seconds = Field(description="When it fails.")
    for_s: PositiveSeconds | None = Field(None, description="How long it stays away; null: for good.")


class Failures(Spec):
    """Replicas that fail and come back; what they held is lost with their KV."""

    mtbf_s: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="Mean time between failures of a replica, exponential."
    )
    mttr_s: PositiveSeconds | None = Field(None, description="Mean time to repair, exponential.")
    schedule: list[Outage] = Field(default_factory=list, description="Failures at set times.")
    on_failure: Literal["retry", "fail"] = Field(
        "retry",
        description="Send the requests elsewhere, where prompt and tokens so far are computed again; or fail them.",
    )

    @model_validator(mode="after")
    def _both_means(self) -> Failures:
        if (self.mtbf_s is None) != (self.mttr_s is None):
            raise ValueError("mtbf_s and mttr_s must be given together")
        if self.mtbf_s is None and not self.schedule:
            raise ValueError("must have mtbf_s and mttr_s, or a schedule")
        return self

    @model_validator(mode="after")
    def _up_before_it_fails(self) -> Failures:
        """No outage is without effect because the replica is away at its time."""
        ordered = sorted(self.schedule, key=lambda outage: (outage.replica, outage.at_s))
        for before, outage in itertools.pairwise(ordered):
            if before.replica != outage.replica:
                continue
            back = math.inf if before.for_s is None else before.at_s + before.for_s
            if outage.at_s < back:
                until = "for good" if math.isinf(back) else f"until {back:g} s"
                rule = f"schedule: replica {outage.replica} cannot fail at {outage.at_s:g} s"
                raise ValueError(f"{rule}: it is away from {before.at_s:g} s on, {until}")
        return self


class Planned(Spec):
    """From a time on, so many replicas."""

    at_s: Seconds = Field(description="From when on.")
    replicas: Fleet = Field(description="How many.")


class Saturation(Spec):
    """When llm-d's Workload Variant Autoscaler adds a replica, and when it takes one away; its defaults."""

    kv: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="A replica is full at this share of its KV,")
    queue: PositiveNumber = Field(5, description="or with so many waiting.")
    spare_kv: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="One more where the mean of kv − share,")
    spare_queue: Annotated[float, Field(ge=0)] = Field(3, description="or of queue − waiting, falls below this.")


class Autoscale(Spec):
    """How many of the replicas are up; they start with `replicas`. Exactly one rule: a target, or the schedule."""

    min: Annotated[int, Field(ge=0, le=10_000)] = Field(1, description="At least so many; 0: none while nobody asks.")
    max: Fleet = Field(description="At most so many.")
    every_s: PositiveSeconds = Field(15, description="Time between two looks.")
    provision_s: Seconds = Field(60, description="Time from asking for a replica to having its GPUs, or the replica.")
    load_s: Seconds = Field(0, description="Then time to load the model, paid for, until it takes requests.")
    target_outstanding: PositiveNumber | None = Field(None, description="Requests a replica should have.")
    target_queued: PositiveNumber | None = Field(
        None, description="Waiting requests a replica should have, as KEDA reads vllm:num_requests_waiting."
    )
    target_kv: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of its KV pool that a replica should use, as an HPA reads vllm:kv_cache_usage_perc."
    )
    saturation: Saturation | None = Field(None, description="By full replicas and spare room, as llm-d does.")
    target_waiting: PositiveNumber | None = Field(None, description="Requests that may wait at a replica.")
    schedule: list[Planned] = Field(default_factory=list, description="Numbers for set times.")
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="With a target: no change while the signal is within this share of it (an HPA's is 0.1)."
    )
    stabilise_up_s: Seconds = Field(0, description="Go up only to the least wanted for so long (an HPA's is 0).")
    stabilise_down_s: Seconds = Field(0, description="Go down only to the most wanted for so long (an HPA's is 300).")
    most_up: Positive | None = Field(None, description="More replicas at one look, at most; null: no limit.")
    most_down: Positive | None = Field(None, description="Fewer replicas at one look, at most; null: no limit.")
    idle_s: Seconds | None = Field(
        None, description="With min 0: the last replica goes after so long without a request (KEDA's cooldown is 300)."
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Autoscale:
        rules = [name for name in RULES if getattr(self, name)]
        if len(rules) != 1:
            raise ValueError(f"must have exactly one of {', '.join(RULES[:-1])} and {RULES[-1]}")
        if self.max < self.min:
            raise ValueError(f"max must be at least min, {self.min} (got {self.max})")
        for name in ("every_s", *_OF_LOOKS):
            if self.schedule and name in self.model_fields_set:
                raise ValueError(f"{name} must not be given with a schedule, which says when replicas come and go")
        if self.tolerance and rules[0] not in _BY_RATIO:
            raise ValueError(f"tolerance must not be given with {rules[0]}, which has no ratio to a target")
        if (self.idle_s is not None) != (self.min == 0 and not self.schedule):
            raise ValueError("idle_s and min: 0 must be given together, without a schedule")
        return self

    @model_validator(mode="after")
    def _schedule_can_be_kept(self) -> Autoscale:
        for planned in self.schedule:
            if not self.min <= planned.replicas <= self.max:
                wanted = f"{planned.replicas} replicas from {planned.at_s:g} s on"
                raise ValueError(f"schedule: {wanted} are not between min, {self.min}, and max, {self.max}")
        times = [planned.at_s for planned in self.schedule]
        if twice := [at for at in times if times.count(at) > 1]:
            raise ValueError(f"schedule: two entries are for {twice[0]:g} s")
        return self


RULES = ("target_outstanding", "target_queued", "target_kv", "saturation", "target_waiting", "schedule")
_BY_RATIO = RULES[:3]
_OF_LOOKS = ("tolerance", "stabilise_up_s", "stabilise_down_s", "most_up", "most_down", "idle_s")


class Rung(Spec):
    """One rung of a waterfall: what is gained from the rung above."""

    variant: str = Field(description="A variant's name.")
    because: str = Field("", description="What makes the difference to the rung before.")


class Claim(Spec):
    """A published number, shown beside ours."""

    says: str = Field(description="What was published, and where.")
    published: float | Annotated[tuple[float, float], Strict(False)] = Field(
        description="The number, or the least and the most."
    )
    metric: str = Field("request_throughput", description="A field of summary.json.")
    of: str = Field(description="The variant that it is of.")
    over: str | None = Field(None, description="The variant that it is a ratio to.")
    case: str | None = Field(None, description="In which case; default: the last.")
    within: dict[str, PositiveNumber] = Field(
        default_factory=dict,
        description="Instead of a case: the most of the metric, between the cases too, at which these are at most so.",
    )
    because: str = Field("", description="Why ours differs.")

    @model_validator(mode="after")
    def _one_place(self) -> Claim:
        if self.case is not None and self.within:
            raise ValueError("case and within must not both be given")
        return self


@dataclass
class ReplicaGroup:
    """Some equal replicas, their KV pool already worked out."""

    count: int  # that are up to begin with; an autoscaler may order more
    role: str  # "mixed", "prefill" (prompts only, their KV is handed over) or "decode" (what comes after)
    gpu: specs.GPU
    parallel: Parallel
    scheduler: type[Scheduler]
    scheduler_settings: dict[str, Any]
    backend: Settings
    blocks: int  # usable blocks of a replica's pool
    block_size: int  # tokens
    kv_source: str  # where that number comes from
    host_gib: float = 4  # a GPU's share of host memory for swapped KV
    host_link: float = 0.8  # share of the host link's line rate that swapping reaches
    autoscale: Autoscale | None = None  # of this group alone; None: as `Setup.autoscale` says
    loop_is_said: bool = False  # the settings given for the policy say whether it plans a step ahead
    caution: str = ""  # why the engine itself does not start with what the scenario leaves open
    kv_groups: KvGroups | None = None  # of the model's layers, where the pool tells them apart
    speculation: Speculation | None = None  # how its policy plans drafts, if the scenario has any

    @property
    def stages(self) -> int:
        """Steps of a replica that are under way at a time, each in another stage of its pipeline.

        1 where that is not modelled: a step then passes all stages before the next begins.
        """
        fills = self.scheduler.fills_pipelines and self.kv_groups is None and self.role == "mixed"
        return self.parallel.pipeline if fills and self.parallel.data == 1 else 1

    @property
    def said(self) -> dict[str, str]:
        """What results rest on with its pipeline, if it has one: a word → one line."""
        if self.parallel.pipeline == 1:
            return {}
        if self.stages == 1:
            return {"pipeline": "a step passes all stages before the next begins: more at a time is not modelled here"}
        executes = getattr(self.backend, "executes", False)
        more = "" if executes else ", which take equal times"
        if self.speculation is not None:
            more += ", the last one its passes that draft besides"
        if executes and self.make_scheduler().overtakes_flight:
            more += "; who is preempted waits for its tokens in flight, since steps are executed"
        return {"pipeline": f"a step under way in each of {self.stages} stages{more}"}

    @property
    def tables(self) -> int:
        """Tables of blocks that a request has: a block in each holds ``block_size`` tokens of some of the layers."""
        return 1 if self.kv_groups is None else len(self.kv_groups.windows)

    def room(self, max_model_len: int) -> int:
        """Tokens of one request that the pool has room for."""
        blocks = self.blocks // self.parallel.data  # of the rank that serves it
        if self.kv_groups is None or (cache := self.make_scheduler().hybrid) is None:
            return blocks * self.block_size
        return cache.room(self.kv_groups, blocks, self.block_size, max_model_len)

    def make_scheduler(self) -> Scheduler:
        """A fresh policy object, for one replica."""
        return self.scheduler(**self.scheduler_settings)

    def make_backend(self, model: specs.Model) -> Backend:
        """A fresh backend, for one replica."""
        return self.backend.build(model, self.gpu, self.parallel)


def loop_of(asynchronous: Iterable[bool]) -> str:
    """``synchronous``, ``asynchronous`` (each step is planned while the one before runs), or ``mixed``."""
    found = set(asynchronous)
    return "mixed" if len(found) > 1 else "asynchronous" if True in found else "synchronous"


@dataclass
class Setup:
    """One run, ready to simulate: everything looked up and checked. A setup can be pickled, for other processes."""

    variant: str  # "" when the scenario compares nothing
    case: str  # "" without cases
    trace: Trace
    model: specs.Model
    max_model_len: int
    groups: list[ReplicaGroup]
    router: type[Router]
    router_settings: dict[str, Any]
    slo: Slo
    seed: int
    limits: Limits
    router_stale_ps: int = 0  # how old the router's view of the replicas may be
    start_up_ps: int = 0  # from a replica's repair to its first request
    link: Link | None = None  # between prefill and decode replicas; None where all are mixed
    failures: Failures | None = None
    autoscale: Autoscale | None = None
    speculate: Speculate | None = None  # with drafts
    note: str = ""  # said under a comparison's table
    published: float | None = None  # a published ratio to the first variant

    @property
    def unused(self) -> list[str]:
        """What was set and changes nothing in this cluster, with the reason."""
        roles: dict[str, int] = {}
        for group in self.groups:
            roles[group.role] = roles.get(group.role, 0) + self.most(group)
        told = []
        if max(roles.values()) == 1:
            why = "one replica" if len(roles) == 1 else "one replica of each role"
            if self.router.__name__ != "RoundRobin":  # the default
                told.append(f"router {self.router.__name__} ({why})")
            if self.router_stale_ps:
                told.append(f"router_stale_ms {self.router_stale_ps / 1e9:g} ({why})")
        if self.start_up_ps and self.failures is None:
            told.append(f"start_up_s {self.start_up_ps / 1e12:g} (no failures)")
        return told

    def scale_of(self, group: ReplicaGroup) -> Autoscale | None:
        """What scales a group; None: it stays as it is."""
        return group.autoscale or self.autoscale

    def most(self, group: ReplicaGroup) -> int:
        """Replicas that a group may have at most."""
        scale = self.scale_of(group)
        return group.count if scale is None else scale.max

    @property
    def executes(self) -> bool:
        """Whether steps really run instead of being priced."""
        return any(getattr(group.backend, "executes", False) for group in self.groups)

    @property
    def loop(self) -> str:
        """The engine loop of its replicas, as `loop_of` names it."""
        return loop_of(group.make_scheduler().asynchronous for group in self.groups)

    def make_router(self) -> Router:
        """A fresh router."""
        return self.router(**self.router_settings)


@dataclass
class Study:
    """All runs that a scenario file asks for, and how to show them."""

    name: str
    question: str
    setups: list[Setup]  # case by case, variants in order
    baseline: list[str] = field(default_factory=list)  # variants that throughput ratios are given over
    waterfall: list[Rung] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    tables: list[str] = field(default_factory=lambda: ["throughput", "latency"])
    resolved: dict[str, Any] = field(default_factory=dict)  # the file's content with --set applied
