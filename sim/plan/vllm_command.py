"""The command lines that start vLLM with the settings that were simulated."""

from __future__ import annotations

import shlex

from chairlift.backend.shapes import Model
from chairlift.policies.vllm import Vllm
from chairlift.sim.study import ReplicaGroup, Setup

UTILIZATION = 0.9  # as scenarios have it where they say nothing
OPTIONAL = (  # settings whose flags are left out where they are vLLM's defaults
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


def commands(setup: Setup, utilization: float = UTILIZATION) -> list[str]:
    """A line ``vllm serve … # vLLM 0.33`` for each group of replicas, with flags of the version that was simulated.

    A line that begins with # says what the command does not: how often to run it, what to add by hand. ``utilization``:
    share of the GPU's memory that vLLM may take, as the size of the KV pool was worked out.
    """
    found = []
    for group in setup.groups:
        if len(setup.groups) > 1 or group.count > 1:
            each = f"{group.parallel.gpus} × {group.gpu.name} each"
            found.append(f"# {group.count} {group.role} replica{'s' * (group.count > 1)}, {each}")
        if group.role != "mixed":
            found.append("# needs a KV connector of yours: --kv-transfer-config '{…}'")
        if not issubclass(group.scheduler, Vllm):
            found.append(f"# policy {group.scheduler.__name__}: none of vLLM's")
            continue
        if 1 < group.parallel.expert < group.parallel.ranks:
            told = f"vLLM has {group.parallel.ranks} groups of experts, of which {group.parallel.expert} were simulated"
            found.append(f"# {told}")
        policy = group.make_scheduler()
        assert isinstance(policy, Vllm)
        found.append(f"{shlex.join(_serve(setup, group, policy, utilization))}  # vLLM {policy.version}")
    return found


def _repository(model: Model) -> str | None:
    """Where the weights are published, whose config.json says how they are quantised; None: nobody has said."""
    repository, found, _ = model.source.partition(" config.json")
    return repository if found and "/" in repository else None


def _quantization(model: Model) -> str | None:
    """What vLLM must be told to quantise weights of 16 bits to; None if the weights themselves say it."""
    narrow = model.bytes_per_param == 1 or model.quantization == "fp8"
    return "fp8" if narrow and _repository(model) is None else None


def _serve(setup: Setup, group: ReplicaGroup, policy: Vllm, utilization: float) -> list[str]:
    """The words of one command. A length that no request can have in this pool is cut to the pool: vLLM insists."""
    longest = min(setup.max_model_len, group.room(setup.max_model_len))
    line = ["vllm", "serve", _repository(setup.model) or setup.model.name]
    line += ["--tensor-parallel-size", str(group.parallel.tensor), "--max-model-len", str(longest)]
    for degree, flag in ((group.parallel.pipeline, "pipeline"), (group.parallel.data, "data")):
        line += [f"--{flag}-parallel-size", str(degree)] if degree > 1 else []
    line += ["--enable-expert-parallel"] if group.parallel.expert > 1 else []
    ranks = group.parallel.data  # vLLM's limits are a rank's
    line += ["--max-num-batched-tokens", str(policy.max_num_batched_tokens // ranks)]
    line += ["--max-num-seqs", str(policy.max_num_seqs // ranks)]
    if (kind := _quantization(setup.model)) is not None:
        line += ["--quantization", kind]
    if setup.model.kv_bytes_per_element == 1:
        line += ["--kv-cache-dtype", "fp8"]
    line += ["--gpu-memory-utilization", f"{utilization:g}", "--block-size", str(group.block_size)]
    if policy.num_gpu_blocks is not None:
        line += ["--num-gpu-blocks-override", str(policy.num_gpu_blocks)]
    for on, flag in (
        (policy.enable_prefix_caching, "enable-prefix-caching"),
        (policy.enable_chunked_prefill, "enable-chunked-prefill"),
        (policy.async_scheduling, "async-scheduling"),
    ):
        line.append(f"--{'' if on else 'no-'}{flag}")
    if not policy.scheduler_reserve_full_isl:
        line.append("--no-scheduler-reserve-full-isl")
    for name in OPTIONAL:
        if (value := getattr(policy, name)) != getattr(Vllm, name):
            line.append(f"--{name.replace('_', '-')}")
            if value is not True:
                said = f"{value:g}" if isinstance(value, float) else str(value)
                line.append("None" if value == "dense" else said)
    return line
