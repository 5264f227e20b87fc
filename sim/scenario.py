"""Scenario files: what a YAML may say. `sim.load` looks its names up and makes it ready to run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from backend import specs
from sim.workload import Workload

Positive = Annotated[int, Field(ge=1)]
PositiveMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TableName = Literal["throughput", "latency", "cdf"]
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


class System(Spec):
    """What serves the requests. In a variant every key is optional and replaces the scenario's own."""

    model: Choice | None = Field(None, description="A model's name, a config.json, or a shape of its own.")
    gpu: Choice | None = Field(None, description="A GPU's name, or numbers of its own.")
    tensor_parallel: Positive | None = Field(None, description="GPUs that share one replica (default 1).")
    max_model_len: Positive | None = Field(None, description="Longest sequence; default: the model's own.")
    replicas: Positive | None = Field(None, description="Equal replicas behind the router (default 1).")
    router: Choice | None = Field(None, description="Which replica gets a request (default round_robin).")
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
    cases: list[Case] = Field(default_factory=list, description="Other settings of the whole scenario, side by side.")
