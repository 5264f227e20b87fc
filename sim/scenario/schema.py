"""Scenario files: what a YAML may say. `sim.scenario.load` looks its names up and makes it ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from chairlift.backend.parallel import Parallel
from chairlift.sim.bad_input import BadInput, Problem, names_a_file
from chairlift.sim.study import (
    Autoscale,
    Claim,
    Failures,
    Fleet,
    Gpus,
    Kv,
    Limits,
    Link,
    Milliseconds,
    Positive,
    Rung,
    Seconds,
    Slo,
    Speculate,
)
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.strict import Spec

TableName = Literal["throughput", "latency", "fleet", "tenants", "cdf"]
Choice = str | dict[str, Any]  # a name, or a mapping with `name` and settings

MOST_BYTES = 200  # of a folder's name; file systems take 255, and a name for the time of writing is longer


def _folder_name(name: str) -> str:
    """``name``, if ``runs/<name>`` is a folder in ``runs`` on every system. Raises ValueError with the rule broken."""
    if not names_a_file(name):
        raise ValueError("must be a folder's name, without / or \\ or control characters: results go to runs/<name>")
    if len(name.encode("utf-8", "replace")) > MOST_BYTES:
        raise ValueError(f"must be at most {MOST_BYTES} bytes long: results go to runs/<name>")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


def results_name(given: str | None, path: Path) -> str:
    """The name of the results of the file ``path``: the ``given`` one, or else the file's.

    Raises `BadInput` if the file's own name, which no schema has checked, would lead out of ``runs``.
    """
    if given is not None:
        return given
    try:
        return _folder_name(path.stem)
    except ValueError as error:
        rule = f"{error}; say name: in the file"
        raise BadInput(Problem(rule, file=str(path), path="name", value=path.stem)) from None


class Group(Spec):
    """Some equal replicas of a mixed cluster; what it does not say is the scenario's."""

    count: Fleet = Field(1, description="How many of them.")
    role: Literal["mixed", "prefill", "decode"] = Field(
        "mixed", description="All work, or prompts only with a hand-over of KV, or what comes after the first token."
    )
    gpu: Choice | None = Field(None, description="A GPU's name, or numbers of its own.")
    tensor_parallel: Gpus | None = Field(None, description="GPUs that share one replica: parallel.tensor alone.")
    parallel: Parallel | None = Field(None, description="How the GPUs of one replica share the model.")
    policy: Choice | None = Field(None, description="The scheduler.")
    backend: Choice | None = Field(None, description="What a step costs.")
    kv: Kv | None = Field(None, description="The KV pool.")
    autoscale: Autoscale | None = Field(None, description="Replicas of this group that come and go with its load.")


class System(Spec):
    """What serves the requests. In a variant every key is optional and replaces the scenario's own."""

    model: Choice | None = Field(None, description="A model's name, a config.json, or a shape of its own.")
    gpu: Choice | None = Field(None, description="A GPU's name, or numbers of its own.")
    tensor_parallel: Gpus | None = Field(
        None, description="GPUs that share one replica (default 1): parallel.tensor alone."
    )
    parallel: Parallel | None = Field(None, description="How the GPUs of one replica share the model.")
    max_model_len: Positive | None = Field(None, description="Longest sequence; default: the model's own.")
    replicas: Fleet | list[Group] | None = Field(
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
    speculate: Speculate | None = Field(None, description="Speculative decoding: drafts that a step verifies.")
    kv: Kv | None = Field(None, description="The KV pool; default: worked out from the GPU's memory.")
    slo: Slo | None = Field(None, description="What a good request must meet.")


class Variant(System):
    """One line of a comparison."""

    name: Annotated[str, Field(min_length=1)] = Field(description="What the table calls it.")
    note: str | None = Field(None, description="Said under the table.")
    published: float | None = Field(None, description="A published ratio to the first variant, shown beside ours.")


class Case(Spec):
    """The whole comparison once more under changed keys."""

    name: Annotated[str, Field(min_length=1)] = Field(description="What the table calls it.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted key → value, as with --set.")


class Scenario(System):
    """A scenario file."""

    name: FolderName | None = Field(None, description="Results go to runs/<name>. Default: the file's name.")
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
    provenance: dict[str, Any] | None = Field(
        None, description="What a run noted of its inputs when it wrote this file; not read."
    )
