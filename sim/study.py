"""One run, ready to simulate, and the study that holds all runs of a scenario file. `sim.scenario.load` makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chairlift.backend import specs
from chairlift.backend.base import Backend, Settings
from chairlift.policies.base import Router, Scheduler
from chairlift.sim.replica.host_memory import HostMemory, host_memory
from chairlift.sim.scenario.schema import Autoscale, Claim, Failures, Limits, Link, Rung, Slo
from chairlift.sim.workload.trace import Trace


@dataclass
class ReplicaGroup:
    """Some equal replicas."""

    count: int
    role: str  # "mixed", "prefill" or "decode"
    gpu: specs.GPU
    tensor_parallel: int
    scheduler: type[Scheduler]
    scheduler_settings: dict[str, Any]
    backend: Settings
    blocks: int  # usable blocks of a replica's pool
    block_size: int  # tokens
    kv_source: str  # where that number comes from
    host_gib: float = 4  # a GPU's share of host memory for swapped KV
    host_link: float = 0.8  # of the host link's line rate

    def make_scheduler(self) -> Scheduler:
        """A fresh policy object, for one replica."""
        return self.scheduler(**self.scheduler_settings)

    def make_host(self, model: specs.Model) -> HostMemory:
        """Fresh host memory, for one replica."""
        kv_bytes = model.kv_bytes_per_token_on(self.tensor_parallel)
        rate = self.gpu.host_gb_per_s * self.host_link
        return host_memory(self.host_gib, kv_bytes, rate, self.block_size, self.scheduler.overlaps_swaps)

    def make_backend(self, model: specs.Model) -> Backend:
        """A fresh backend, for one replica."""
        return self.backend.build(model, self.gpu, self.tensor_parallel)


@dataclass
class Setup:
    """One run, ready to simulate: everything looked up and checked. All of it pickles."""

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
    router_stale_ps: int = 0
    start_up_ps: int = 0
    link: Link | None = None
    failures: Failures | None = None
    autoscale: Autoscale | None = None
    note: str = ""
    published: float | None = None

    @property
    def executes(self) -> bool:
        """Whether steps really run instead of being priced."""
        return any(getattr(group.backend, "executes", False) for group in self.groups)

    def make_router(self) -> Router:
        """A fresh router."""
        return self.router(**self.router_settings)


@dataclass
class Study:
    """All runs that a scenario file asks for, and how to present them."""

    name: str
    question: str
    setups: list[Setup]  # case by case, variants in order
    baseline: list[str] = field(default_factory=list)
    waterfall: list[Rung] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    tables: list[str] = field(default_factory=lambda: ["throughput", "latency"])
    resolved: dict[str, Any] = field(default_factory=dict)  # the file's content with --set applied
