"""How the engines that were simulated are started: their command lines, and what no flag of theirs says.

`launches` makes a `Launch` for each group of replicas. All that differs from the engine's defaults is in its `argv`, or
in its `notes`, or in `beside` where it is a matter of the cluster. `chairlift.sim.plan.emit` writes them as a shell, as
Docker or as Kubernetes wants them.

The flags are those of ``vllm serve`` (vllm/engine/arg_utils.py, 0.23 to 0.33) and ``sglang.launch_server``
(sglang/srt/server_args.py, 0.5.17 and 0.5.23). Tests parse the lines back and compare them with what was simulated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chairlift.backend import memory, specs
from chairlift.policies import routers
from chairlift.policies.base import Scheduler
from chairlift.policies.sglang import RANKS_RATIO, Sglang
from chairlift.policies.vllm import Vllm
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.study import Autoscale, Kv, ReplicaGroup, Setup

VLLM_OPTIONAL = (  # settings whose flags are left out where they are vLLM's defaults
    "scheduling_policy",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "watermark",
    "max_num_scheduled_tokens",
    "max_num_active_seqs",
    "prefill_schedule_interval",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "disable_hybrid_kv_cache_manager",
    "prefix_cache_retention_interval",
)
SGLANG_SHARED = ("chunked_prefill_size", "max_running_requests")
SGLANG_ALWAYS = ("schedule_policy", "schedule_conservativeness", "chunked_prefill_size", "max_prefill_tokens")
CONNECTOR = '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'  # a router says which replica prefills

BALANCERS = {  # router → what deals requests out so in a cluster
    routers.RoundRobin: "any load balancer that deals requests out in turn",
    routers.RandomChoice: "a Kubernetes Service does",
    routers.LeastOutstanding: "a load balancer by least connections does (nginx least_conn, HAProxy leastconn)",
    routers.LeastTokens: "a router that counts tokens does (llm-d, vLLM's production stack)",
    routers.ShortestQueue: "a router that reads the engines' vllm:num_requests_waiting does (llm-d, production stack)",
    routers.PowerOfTwo: "a load balancer with random two least_conn does (nginx), or SGLang's router (power_of_two)",
    routers.SessionSticky: "sticky sessions do: the same client, or session header, to the same replica",
    routers.PrefixAffinity: "a prefix-aware router does (llm-d, production stack prefixaware, SGLang's cache_aware)",
}


@dataclass(frozen=True)
class Launch:
    """One engine, to be started ``count`` times."""

    count: int
    role: str  # "mixed", "prefill" or "decode"
    gpu: str  # its name
    gpus: int  # of one replica
    engine: str  # "vLLM 0.33"; "" where no engine has the policy
    image: str  # of the engine, for containers; "" where no engine has the policy
    argv: tuple[str, ...]  # the words of the command line; none where no engine has the policy
    notes: tuple[str, ...]  # what the line does not say
    autoscale: Autoscale | None = None  # what orders its replicas


def launches(setup: Setup, kv: Sequence[Kv] | None = None) -> list[Launch]:
    """How each group of replicas is started; ``kv``: of each group, as the scenario has it (`kv_of`)."""
    found = []
    for group, pool in zip(setup.groups, kv or [Kv()] * len(setup.groups), strict=True):
        policy = group.make_scheduler()
        model, quantized, notes = _weights(setup)
        if isinstance(policy, Vllm):
            engine, image = f"vLLM {policy.version}", f"vllm/vllm-openai:v{policy.version}.0"
            argv = ["vllm", "serve", model, *quantized, *_vllm(setup, group, policy, pool)]
        elif isinstance(policy, Sglang):
            engine, image = f"SGLang {policy.version}", f"lmsysorg/sglang:v{policy.version}"
            argv = ["python3", "-m", "sglang.launch_server", "--model-path", model, *quantized]
            argv += _sglang(setup, group, policy)
        else:
            engine, image, argv, notes = "", "", [], [f"policy {group.scheduler.__name__}: none of vLLM's or SGLang's"]
        notes += _notes(setup, group, policy, pool) if argv else []
        gpus = group.parallel.gpus
        found.append(
            Launch(
                *(group.count, group.role, group.gpu.name, gpus, engine, image, tuple(argv), tuple(notes)),
                setup.scale_of(group),
            )
        )
    return found


def kv_of(document: Document, groups: int) -> list[Kv]:
    """The ``kv`` of each group of replicas of a scenario without ``compare``."""
    own = document.data.get("replicas")
    parts: list[Any] = own if isinstance(own, list) else [{}] * groups
    return [Kv.model_validate(part.get("kv") or document.data.get("kv") or {}) for part in parts]


def beside(setup: Setup) -> list[str]:
    """What was simulated around the engines, and has to be set up beside them, a line each."""
    found = []
    replicas = sum(group.count for group in setup.groups)
    scales = [scale for group in setup.groups if (scale := setup.scale_of(group)) is not None]
    if replicas > 1 or scales:
        own = ", ".join(f"{key} {value}" for key, value in setup.router_settings.items())
        kind = next((said for known, said in BALANCERS.items() if setup.router is known), "")
        told = f"in front of the replicas: {setup.router.__name__}" + f" ({own})" * bool(own)
        told += f", which sees them as they were {setup.router_stale_ps / 1e9:g} ms ago" * bool(setup.router_stale_ps)
        found.append(told + (f": {kind}" if kind else ", a router of your own"))
    if setup.link is not None:
        rate = f"{setup.link.gb_per_s:g} GB/s"
        found.append(f"KV goes from prefill to decode replicas at {rate} {'in all' * setup.link.shared or 'each'}")
        found.append("a router sends each prompt to a prefill replica first (llm-d, or vLLM's disaggregated proxy)")
    for name, limit in setup.limits.model_dump(exclude_none=True).items():
        found.append(f"limits.{name} {limit:g}: of the gateway in front, not of the engine")
    for scale in scales:
        rule = scale.model_dump(exclude_none=True, exclude_defaults=True)
        found.append("autoscaling: " + ", ".join(f"{key} {value}" for key, value in rule.items()))
    return found


def _weights(setup: Setup) -> tuple[str, list[str], list[str]]:
    """The checkpoint of the model, flags of its format, and what they do not say."""
    model = setup.model
    repository = model.repository
    notes: list[str] = []
    flags: list[str] = []
    _, weighed, asked = model.source.rpartition(", weights in ")
    asked = asked if weighed else ""
    if asked.startswith("fp8"):
        flags = ["--quantization", "fp8"]  # both engines make them from BF16 weights as they load
    elif asked:
        notes.append(f"weights in {asked}: name such a checkpoint instead of {repository}")
    if repository is None:
        repository = model.name.partition(" (")[0]
        own = repository.endswith(".json")  # of the user's, whose folder is a checkpoint's
        flags = ["--quantization", "fp8"] if model.bytes_per_param == 1 or model.quantization == "fp8" else []
        if own:
            notes.append(f"the model is the folder of {Path(repository).name}: its weights must lie there")
            repository = Path(repository).parent.as_posix()
        else:
            notes.append(f"no published checkpoint is known for {model.name}: name yours instead of {repository}")
    if model.kv_bytes_per_element == 1:
        flags += ["--kv-cache-dtype", "fp8_e4m3"]
    elif model.kv_bytes_per_element != 2:
        notes.append(f"KV of {model.kv_bytes_per_element:g} bytes an element: no flag of the engine's")
    if changed := _changed(setup):
        notes.append(f"the model was simulated with {changed}: no flag says that")
    return repository, flags, notes


def _changed(setup: Setup) -> str:
    """Numbers of the model that differ from those of the published one of its name, in words."""
    model = setup.model
    try:
        known = specs.model(model.name.partition(" (")[0])
    except LookupError:
        return ""
    told = {"name", "source", "kv_bytes_per_element"}
    names = [f.name for f in dataclasses.fields(model) if f.name not in told]
    return ", ".join(f"{n} {getattr(model, n)}" for n in names if getattr(model, n) != getattr(known, n))


def _vllm(setup: Setup, group: ReplicaGroup, policy: Vllm, kv: Kv) -> Iterator[str]:
    """Flags of ``vllm serve``. Its limits and its pool are those of one rank of data parallelism, as here."""
    ranks = group.parallel.data
    longest = min(setup.max_model_len, group.room(setup.max_model_len))
    yield from ("--tensor-parallel-size", str(group.parallel.tensor), "--max-model-len", str(longest))
    for degree, flag in ((group.parallel.pipeline, "pipeline"), (ranks, "data")):
        yield from (f"--{flag}-parallel-size", str(degree)) if degree > 1 else ()
    if group.parallel.expert > 1:
        yield "--enable-expert-parallel"
    yield from ("--max-num-batched-tokens", str(policy.max_num_batched_tokens))
    yield from ("--max-num-seqs", str(policy.max_num_seqs))
    yield from ("--gpu-memory-utilization", f"{kv.memory_utilization:g}", "--block-size", str(group.block_size))
    if _pool_is_given(policy, kv):
        yield from ("--num-gpu-blocks-override", str(group.blocks // ranks + 1))  # with the null block
    for on, flag in (
        (policy.enable_prefix_caching, "enable-prefix-caching"),
        (policy.enable_chunked_prefill, "enable-chunked-prefill"),
        (policy.async_scheduling, "async-scheduling"),
    ):
        yield f"--{'' if on else 'no-'}{flag}"
    if not policy.scheduler_reserve_full_isl:
        yield "--no-scheduler-reserve-full-isl"
    for name in VLLM_OPTIONAL:
        if (value := getattr(policy, name)) != getattr(Vllm, name):
            yield f"--{name.replace('_', '-')}"
            if value is not True:
                said = f"{value:.17g}" if isinstance(value, float) else str(value)
                yield "None" if value == "dense" else said
    if (speculate := setup.speculate) is not None:
        told: dict[str, Any] = {"method": speculate.method, "num_speculative_tokens": speculate.tokens}
        if (drafter := _drafter(setup)) is not None:
            told["model"] = drafter
        yield from ("--speculative-config", json.dumps(told))
    if (graphs := _graphs(group)) is not None:
        yield from ("--max-cudagraph-capture-size", str(graphs))
    if group.role != "mixed":
        yield from ("--kv-transfer-config", CONNECTOR)


def _sglang(setup: Setup, group: ReplicaGroup, policy: Sglang) -> Iterator[str]:
    """Flags of ``sglang.launch_server``. The pool is given in tokens, with the share of memory that it takes."""
    parallel = group.parallel
    yield from ("--tp-size", str(parallel.tensor * parallel.data), "--context-length", str(setup.max_model_len))
    if parallel.pipeline > 1:
        yield from ("--pp-size", str(parallel.pipeline))
    if parallel.data > 1:
        yield from ("--dp-size", str(parallel.data), "--enable-dp-attention")
    if parallel.expert > 1:
        yield from ("--ep-size", str(parallel.expert))
    tokens = group.blocks * group.block_size // parallel.data
    yield from ("--page-size", str(policy.page_size), "--max-total-tokens", str(tokens))
    held = memory.weight_bytes(setup.model, parallel)
    held += tokens * setup.model.kv_bytes_per_token_on(parallel.tensor) // parallel.pipeline
    share = min(0.98, math.ceil(1000 * held / group.gpu.memory_bytes) / 1000)
    yield from ("--mem-fraction-static", f"{share:g}")
    for each in dataclasses.fields(policy):
        value = getattr(policy, each.name)
        if not each.init or each.name in ("version", "page_size") or value is None:
            continue
        if parallel.data > 1:
            value = _of_all_ranks(each.name, value, parallel.data)
        if value is True:
            yield f"--{each.name.replace('_', '-')}"
        elif each.name in SGLANG_ALWAYS or value != each.default:
            yield from (f"--{each.name.replace('_', '-')}", f"{value:.17g}" if isinstance(value, float) else str(value))
    if (graphs := _graphs(group)) is not None:
        yield from ("--cuda-graph-max-bs", str(graphs))
    if group.role != "mixed":
        yield from ("--disaggregation-mode", group.role)


def _drafter(setup: Setup) -> str | None:
    """The checkpoint of the model that drafts; None: none is known, or the served one's has it."""
    draft = setup.speculate.draft if setup.speculate is not None else None
    if not isinstance(draft, str):
        return None
    if draft.endswith(".json"):  # of the user's, whose folder is a checkpoint's
        return Path(draft).parent.as_posix()
    try:
        return specs.model(draft).repository
    except LookupError:
        return None


def _of_all_ranks(name: str, value: Any, ranks: int) -> Any:
    """A setting of each of SGLang's ranks as its flag has it: those that the ranks share out, for all of them."""
    if name == "schedule_conservativeness":
        return value / RANKS_RATIO
    return value * ranks if name in SGLANG_SHARED and value > 0 else value


def _notes(setup: Setup, group: ReplicaGroup, policy: Scheduler, kv: Kv) -> list[str]:
    """What a line of an engine does not say of a group."""
    found = []
    if (speculate := setup.speculate) is not None:
        found.append(f"drafts: how many are kept was given, {speculate.acceptance.model_dump(exclude_none=True)}")
        if speculate.method in ("eagle3", "draft_model") and _drafter(setup) is None:
            found.append('drafts: say the checkpoint that drafts as "model" in --speculative-config')
    parallel = group.parallel
    if 1 < parallel.expert < parallel.ranks and isinstance(policy, Vllm):
        found.append(f"vLLM has {parallel.ranks} groups of experts, of which {parallel.expert} were simulated")
    if setup.max_model_len > group.blocks // parallel.data * group.block_size and isinstance(policy, Vllm):
        longest = group.blocks // parallel.data * group.block_size
        found.append(f"max_model_len cut from {setup.max_model_len:,} to {longest:,}, which the KV pool has room for")
    if not _pool_is_given(policy, kv) and isinstance(policy, Vllm):
        tokens = group.blocks // parallel.data * group.block_size
        rank = " a rank" if parallel.data > 1 else ""
        found.append(f"its log should say: GPU KV cache size: {tokens:,} tokens{rank} (worked out, not measured)")
    return found


def _pool_is_given(policy: Scheduler, kv: Kv) -> bool:
    """Whether the pool is a number that was given, not what the engine finds when it starts."""
    return not (policy.pool_blocks is None and kv.blocks is None and kv.tokens is None and kv.reserve_gib is None)


def _graphs(group: ReplicaGroup) -> int | None:
    """Tokens of the largest captured CUDA graph, where the scenario asks for another size than the backend assumes."""
    backend = getattr(group.backend, "settings", group.backend)  # with drafts: those of the model served
    asked = getattr(backend, "graph_tokens", None)
    usual = getattr(type(backend), "graph_tokens", None)
    return None if asked == usual else asked
