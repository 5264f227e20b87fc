"""Scenario files: what a YAML may say. `sim.scenario.load` looks its names up and makes it ready to run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from chairlift.backend import specs
from chairlift.sim.workload.spec import Workload

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TableName = Literal["throughput", "latency", "fleet", "tenants", "cdf"]
Choice = str | dict[str, Any]  # a name, or a mapping with `name` and settings


class Spec(BaseModel):
    """A part of a scenario file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class Slo(Spec):
    """What a request must meet to count as good; all of those given."""

    ttft_ms: PositiveMs | None = Field(None, description="Time to the first token.")
    tpot_ms: PositiveMs | None = Field(None, description="Mean time per further token.")
    e2el_ms: PositiveMs | None = Field(None, description="Time to the last token.")


class Kv(Spec):
    """The KV pool of a replica: measured (`blocks` or `tokens`), or worked out from the GPU's memory."""

    blocks: Positive | None = Field(None, description="Blocks of block_size tokens, as an engine's log says.")
    tokens: Positive | None = Field(None, description="Token slots, instead of blocks.")
    block_size: Positive = Field(16, description="Tokens a block.")
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of the memory in use.")
    reserve_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        specs.RESERVE_GIB, description="GiB a GPU keeps besides weights and KV."
    )
    host_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        4, description="Host memory for swapped KV, GiB a GPU (vLLM's swap_space)."
    )
    host_link: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of the host link's line rate that swapping reaches (an assumption)."
    )


class Group(Spec):
    """Some equal replicas of a mixed cluster; what it does not say is the scenario's."""

    count: Positive = Field(1, description="How many of them.")
    role: Literal["mixed", "prefill", "decode"] = Field(
        "mixed", description="All work, or prompts only with a hand-over of KV, or what comes after the first token."
    )
    gpu: Choice | None = Field(None, description="A GPU's name, or numbers of its own.")
    tensor_parallel: Positive | None = Field(None, description="GPUs that share one replica.")
    policy: Choice | None = Field(None, description="The scheduler.")
    backend: Choice | None = Field(None, description="What a step costs.")
    kv: Kv | None = Field(None, description="The KV pool.")


class Outage(Spec):
    """One planned failure."""

    replica: Annotated[int, Field(ge=0)] = Field(description="Which replica, from 0.")
    at_s: Seconds = Field(description="When it fails.")
    for_s: PositiveSeconds | None = Field(None, description="How long it stays away; null: for good.")


class Failures(Spec):
    """Replicas that fail and come back; what they held is lost with their KV."""

    mtbf_s: PositiveSeconds | None = Field(None, description="Mean time between failures of a replica, exponential.")
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
        return self


class Planned(Spec):
    """From a time on, so many replicas."""

    at_s: Seconds = Field(description="From when on.")
    replicas: Positive = Field(description="How many.")


class Autoscale(Spec):
    """How many of the replicas are up; they start with `replicas`. Exactly one of the targets and the schedule."""

    min: Positive = Field(1, description="At least so many.")
    max: Positive = Field(description="At most so many.")
    every_s: PositiveSeconds = Field(15, description="Time between two looks.")
    provision_s: Seconds = Field(60, description="Time from asking for a replica to having it.")
    target_outstanding: PositiveNumber | None = Field(None, description="Requests a replica should have.")
    target_waiting: PositiveNumber | None = Field(None, description="Requests that may wait at a replica.")
    schedule: list[Planned] = Field(default_factory=list, description="Numbers for set times.")

    @model_validator(mode="after")
    def _one_rule(self) -> Autoscale:
        rules = (self.target_outstanding is not None, self.target_waiting is not None, bool(self.schedule))
        if sum(rules) != 1:
            raise ValueError("must have exactly one of target_outstanding, target_waiting and schedule")
        if self.max < self.min:
            raise ValueError(f"max must be at least min, {self.min} (got {self.max})")
        return self


class Link(Spec):
    """What KV goes through from a prefill replica to a decode replica: one transfer at a time, first come first served.

    KV is staged in the memory of the decode replica's host, so that no transfer waits for room in its pool.
    """

    gb_per_s: PositiveNumber = Field(description="Bandwidth, 1e9 bytes a second.")
    latency_us: Seconds = Field(10, description="Added to every transfer, microseconds.")
    shared: bool = Field(False, description="One link for all prefill replicas, instead of one each.")


class Limits(Spec):
    """When requests are refused or given up."""

    queue: Positive | None = Field(None, description="Refuse a request whose replica has so many waiting already.")
    queue_timeout_s: PositiveSeconds | None = Field(None, description="Give up a request that has not started by then.")
    timeout_s: PositiveSeconds | None = Field(None, description="The client gives up a request not answered by then.")


class System(Spec):
    """What serves the requests. In a variant every key is optional and replaces the scenario's own."""

    model: Choice | None = Field(None, description="A model's name, a config.json, or a shape of its own.")
    gpu: Choice | None = Field(None, description="A GPU's name, or numbers of its own.")
    tensor_parallel: Positive | None = Field(None, description="GPUs that share one replica (default 1).")
    max_model_len: Positive | None = Field(None, description="Longest sequence; default: the model's own.")
    replicas: Positive | list[Group] | None = Field(
        None, description="Replicas behind the router (default 1): how many equal ones, or groups that differ."
    )
    router: Choice | None = Field(None, description="Which replica gets a request (default round_robin).")
    router_stale_ms: Milliseconds | None = Field(None, description="How old the router's view of replicas may be.")
    link: Link | None = Field(None, description="Between prefill and decode replicas.")
    failures: Failures | None = Field(None, description="Replicas that fail.")
    start_up_s: Seconds | None = Field(None, description="Time from a repair to the first request (default 0).")
    autoscale: Autoscale | None = Field(None, description="Replicas that come and go with the load.")
    limits: Limits | None = Field(None, description="Queue limits and timeouts.")
    policy: Choice | None = Field(None, description="The scheduler: its name, or name and settings.")
    backend: Choice | None = Field(None, description="What a step costs (default roofline).")
    kv: Kv | None = Field(None, description="The KV pool; default: worked out from the GPU's memory.")
    slo: Slo | None = Field(None, description="What a good request must meet.")


class Variant(System):
    """One line of a comparison."""

    name: Annotated[str, Field(min_length=1)] = Field(description="What the table calls it.")
    note: str | None = Field(None, description="Said under the table.")
    published: float | None = Field(None, description="A published ratio to the first variant, shown beside ours.")


class Rung(Spec):
    """One rung of a waterfall: what is gained from the rung above."""

    variant: str = Field(description="A variant's name.")
    because: str = Field("", description="What makes the difference to the rung before.")


class Claim(Spec):
    """A published number, shown beside ours."""

    says: str = Field(description="What was published, and where.")
    published: float | tuple[float, float] = Field(description="The number, or the least and the most.")
    metric: str = Field("request_throughput", description="A field of summary.json, or offered_rate, or slo_missed.")
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


class Case(Spec):
    """The whole comparison once more under changed keys."""

    name: Annotated[str, Field(min_length=1)] = Field(description="What the table calls it.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted key → value, as with --set.")


class Scenario(System):
    """A scenario file."""

    name: str | None = Field(None, description="Default: the file's name.")
    question: str | None = Field(None, description="What this scenario answers, and what one should see.")
    workload: Workload = Field(description="What arrives; all variants share it.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of everything random.")
    compare: list[Variant] = Field(default_factory=list, description="Variants to run on the same workload.")
    baseline: list[str] = Field(
        default_factory=list, description="Variants to give throughput ratios over; default: the first."
    )
    tables: list[TableName] = Field(["throughput", "latency"], description="What a comparison prints.")
    waterfall: list[Rung] = Field(default_factory=list, description="Variants, each a step on from the one before.")
    claims: list[Claim] = Field(default_factory=list, description="Published numbers to show ours beside.")
    cases: list[Case] = Field(default_factory=list, description="Other settings of the whole scenario, side by side.")
