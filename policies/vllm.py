"""vLLM's V1 scheduler, decision for decision: paged growth, one token budget, recompute preemption, prefix caching.

Equal to the `Scheduler` and `AsyncScheduler` of vLLM 0.23 to 0.33 (`tests/ledger.py` replays their ledgers);
`policies.vllm_versions` says by which rules they differ. Sources: Kwon et al., SOSP 2023, for paging;
`vllm/v1/core/sched/scheduler.py` for the order of things.

Not modelled, and refused as settings: what `Vllm.not_modelled` lists, and what the version at hand lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval

from chairlift.policies.base import (
    Deployment,
    HybridCache,
    NotNegative,
    Positive,
    Request,
    Scheduler,
    Speculation,
    Step,
)
from chairlift.policies.vllm_turn import Cadence, VllmTurn
from chairlift.policies.vllm_versions import NEWEST, RULES, SETTINGS, named

GIB = 2**30


@dataclass
class Vllm(Scheduler):
    """Serve running requests first under one token budget, then admit; preempt when blocks run out.

    Settings bear vLLM's names and its server's defaults; `sized` says which of them depend on the GPU. ``block_size``
    and ``num_gpu_blocks`` override the scenario's ``kv``; of ``num_gpu_blocks`` one is vLLM's null block.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "enable_lora": "LoRA adapters",
        "max_loras": "LoRA adapters",
        "speculative_config": "drafts here: they are the scenario's speculate",
        "num_speculative_tokens": "drafts here: they are the scenario's speculate",
        "num_lookahead_slots": "drafts here: they are the scenario's speculate",
        "kv_transfer_config": "KV connectors and offloading",
        "kv_connector": "KV connectors and offloading",
        "cpu_offload_gb": "KV connectors and offloading",
        "swap_space": "swapping: V1 only recomputes",
        "preemption_mode": "swapping: V1 only recomputes",
        "max_num_encoder_input_tokens": "multimodal encoders and their budget",
        "encoder_cache_size": "multimodal encoders and their budget",
        "limit_mm_per_prompt": "multimodal encoders and their budget",
        "max_num_partial_prefills": "concurrent partial prefills, which V1 takes as a setting only",
        "max_long_partial_prefills": "concurrent partial prefills, which V1 takes as a setting only",
        "num_scheduler_steps": "multi-step scheduling of V0",
        "pipeline_parallel_size": "parallelism here: it is the scenario's parallel.pipeline",
        "data_parallel_size": "parallelism here: it is the scenario's parallel.data",
        "decode_context_parallel_size": "context parallelism",
        "prefill_context_parallel_size": "context parallelism",
        "mamba_cache_mode": "Mamba and other layers without attention",
        "kv_cache_dtype": "quantised KV: give the model's kv_bytes_per_element instead",
        "prefix_caching_hash_algo": "hash collisions",
        "scheduler_cls": "schedulers of vLLM's users: write a policy",
        "scheduler_delay_factor": "the delay factor of V0",
        "structured_outputs_config": "structured outputs",
        "enforce_eager": "CUDA graphs: a matter of the cost model, not of the scheduler",
        "gpu_memory_utilization": "memory here: it is kv.memory_utilization",
        "max_model_len": "the model's length here: it is the scenario's max_model_len",
        "tensor_parallel_size": "parallelism here: it is the scenario's tensor_parallel",
    }

    fills_pipelines: ClassVar[bool] = True
    verifies_drafts: ClassVar[bool] = True
    switched: ClassVar[Mapping[str, bool]] = {}  # rules of `RULES` that hold, or not, whatever the version

    version: str | float = NEWEST  # of vLLM, by whose rules it decides: 0.23 … 0.33
    max_num_batched_tokens: Positive = 2048  # tokens a step
    max_num_seqs: Positive = 256
    block_size: Positive | None = None
    num_gpu_blocks: Annotated[int, Ge(2)] | None = None  # one of them is the null block
    enable_chunked_prefill: bool = True  # False: a prompt that exceeds the budget left waits for the next step
    long_prefill_token_threshold: NotNegative = 0  # tokens of one prompt a step; 0: no limit
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    scheduler_reserve_full_isl: bool = True  # admit only where all known tokens would fit
    enable_prefix_caching: bool = True
    disable_hybrid_kv_cache_manager: bool = False  # layers with windows keep KV as all others
    prefix_cache_retention_interval: NotNegative | Literal["dense"] | None = None  # see `hybrid`
    async_scheduling: bool = True  # plan step n+1 before step n's output is in
    watermark: Annotated[float, Interval(ge=0, lt=1)] = 0.0  # of all blocks stay free when a request joins others
    max_num_scheduled_tokens: Positive | None = None  # tokens a step, if fewer than max_num_batched_tokens
    max_num_active_seqs: Positive | None = None  # requests that may run; None: max_num_seqs
    long_prefill_token_threshold_adaptive: bool = False  # the threshold is at least an equal share of the budget
    prefill_schedule_interval: Positive = 1  # steps from one with prefill to the next, while others decode
    max_num_queued_reqs: NotNegative | None = None  # unfinished requests, at which new ones are refused
    max_num_queued_tokens: NotNegative | None = None  # tokens of prompts not computed yet, at which they are refused

    def __post_init__(self) -> None:
        self.version = version = named(self.version)
        for name, rule in SETTINGS.items():
            if not rule.holds(version) and getattr(self, name, None) != getattr(type(self), name, None):
                raise ValueError(f"{name} exists {rule.span()} (version is {version})")
        self._by_priority = self.scheduling_policy == "priority"
        self._budget = min(self.max_num_batched_tokens, self.max_num_scheduled_tokens or self.max_num_batched_tokens)
        self._limit = min(self.max_num_seqs, self.max_num_active_seqs or self.max_num_seqs)
        interval = self.prefill_schedule_interval
        self._turn = VllmTurn(
            budget=self._budget,
            limit=self._limit,
            by_priority=self._by_priority,
            chunked=self.enable_chunked_prefill,
            whole=self.scheduler_reserve_full_isl,
            watermark=self.watermark,
            threshold=self.long_prefill_token_threshold,
            shared_by=self.max_num_batched_tokens if self.long_prefill_token_threshold_adaptive else 0,
            # Where blocks without a hash are reused first, it matters that the first decodes take their blocks before a
            # victim gives its own back: the running then take their turns one by one. So they do where layers have
            # windows, because those before the victim give blocks back as well.
            one_by_one=self.enable_prefix_caching and self.uncached_first,
            uncapped_alone=self.holds("uncapped_alone", version),
            any_victim_shifts=self.holds("any_victim_shifts", version),
            on_after_itself=self.holds("on_after_itself", version),
            pads_joining=self.holds("pads_joining", version),
            cadence=Cadence(interval) if interval > 1 else None,
        )

    @classmethod
    def holds(cls, rule: str, version: str) -> bool:
        """Whether ``version`` has the rule of `RULES`, unless a subclass has `switched` it to see what it does."""
        return cls.switched.get(rule, RULES[rule].holds(version))

    @classmethod
    def refused(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """What is not modelled, and what the version lacks."""
        found = super().refused(given)
        try:
            version = named(given.get("version", NEWEST))
        except ValueError:
            return found  # `__post_init__` says so
        for name in given.keys() & SETTINGS.keys():
            if not SETTINGS[name].holds(version):
                found[name] = f"exists {SETTINGS[name].span()}, and the version is {version}"
        return found

    @classmethod
    def sized(cls, given: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
        """Budget and sequences as vLLM's API server sets them: `EngineArgs.get_batch_defaults` and what follows it."""
        version = named(given.get("version", NEWEST))
        if deployment.gpu_bytes >= 160 * GIB and cls.holds("largest_gpus", version):
            tokens, sequences = 16384, 1024
        elif deployment.gpu_bytes >= 70 * GIB and "a100" not in deployment.gpu.lower():
            tokens, sequences = 8192, 1024
        else:
            tokens, sequences = 2048, 256
        if not given.get("enable_chunked_prefill", True):
            tokens = max(tokens, deployment.max_model_len)
        sequences = given.get("max_num_seqs", sequences)
        tokens = given.get("max_num_batched_tokens", min(tokens, sequences * deployment.max_model_len))
        sequences = given.get("max_num_seqs", min(sequences, tokens))
        return {**given, "version": version, "max_num_batched_tokens": tokens, "max_num_seqs": sequences}

    def assumptions(self) -> dict[str, str]:
        """The version, and the limits that its server sizes by the GPU."""
        limits = f"at most {self._budget} tokens and {self._limit} requests a step"
        return {"scheduler": f"vLLM {self.version}, {limits}"}

    @property
    def uncached_first(self) -> bool:
        """Since 0.24."""
        return self.holds("uncached_first", str(self.version))

    @property
    def overtakes_flight(self) -> bool:
        """Until 0.26."""
        return not self.holds("waits_for_flight", str(self.version))

    @property
    def asynchronous(self) -> bool:
        """As `async_scheduling` says."""
        return self.async_scheduling

    @property
    def prefix_caching(self) -> bool:
        """As `enable_prefix_caching` says."""
        return self.enable_prefix_caching

    @property
    def hybrid(self) -> HybridCache | None:
        """With `prefix_cache_retention_interval`: ``dense`` is vLLM's null; None: 0 since 0.29, before that dense."""
        if self.disable_hybrid_kv_cache_manager:
            return None
        version = str(self.version)
        retention = self.prefix_cache_retention_interval
        if retention is None:
            retention = 0 if self.holds("retains_little", version) else "dense"
        in_flight = self.max_num_batched_tokens * (2 if self.async_scheduling else 1)
        null_counts = not self.holds("null_block_apart", version)
        return HybridCache(in_flight, None if retention == "dense" else retention, null_counts)

    @property
    def token_limit(self) -> int:
        """Tokens a step."""
        return self._budget

    @property
    def sequence_limit(self) -> int:
        """As `max_num_seqs` and `max_num_active_seqs` say."""
        return self._limit

    @property
    def pool_blocks(self) -> int | None:
        """`num_gpu_blocks` without vLLM's null block."""
        return None if self.num_gpu_blocks is None else self.num_gpu_blocks - 1

    @property
    def pool_block_size(self) -> int | None:
        """As `block_size` says."""
        return self.block_size

    def misfits(self, deployment: Deployment) -> Iterator[tuple[str, str]]:
        """vLLM's own checks, by which it does not start: `SchedulerConfig.verify_max_model_len`, and
        `_check_enough_kv_cache_memory`, by which one request of ``max_model_len`` tokens must fit the pool, and
        `_validate_prefix_cache_retention_interval` (0.33).

        Without chunks a sequence must fit a step, or it can never be computed again after a preemption.
        """
        tokens, longest = self.max_num_batched_tokens, deployment.max_model_len
        if not self.enable_chunked_prefill and tokens < longest:
            rule = f"must be at least the model's {longest} tokens without chunked prefill (got {tokens})"
            yield "max_num_batched_tokens", rule
        if tokens < self.max_num_seqs:
            yield "max_num_batched_tokens", f"must be at least max_num_seqs, {self.max_num_seqs} (got {tokens})"
        if (active := self.max_num_active_seqs or 0) > self.max_num_seqs:
            yield "max_num_active_seqs", f"must be at most max_num_seqs, {self.max_num_seqs} (got {active})"
        if (threshold := self.long_prefill_token_threshold) > longest:
            yield "long_prefill_token_threshold", f"must be at most max_model_len, {longest} (got {threshold})"
        if (pool := deployment.pool_tokens) is not None and longest > pool:
            yield "max_model_len", f"must be at most the {pool} tokens that the KV pool holds (got {longest})"
        if isinstance(every := self.prefix_cache_retention_interval, int) and every:
            key, size = "prefix_cache_retention_interval", deployment.block_size
            if deployment.sliding is False or self.disable_hybrid_kv_cache_manager:
                yield key, f"must be 0 where no layer keeps a sliding window (got {every})"
            elif size is not None and every % size:
                yield key, f"must be a multiple of the block size, {size} (got {every})"

    def speculation(self, method: str, drafts: int) -> Speculation:
        """Slots ahead for layers that draft (`num_lookahead_tokens`). For those of EAGLE and MTP, which read states of
        the model, the prefix cache looks a token ahead (`num_hash_lookahead_tokens`), or gives a block less.
        """
        lookahead, version = 0 if method == "ngram" else drafts, str(self.version)
        prefix: Literal["lookahead", "drop", "plain"] = "plain"
        if method in ("eagle3", "mtp") and self.enable_prefix_caching:
            prefix = "lookahead" if self.holds("hashes_ahead", version) else "drop"
        skips = lookahead > 0 and self.holds("skips_drafts", version)
        at_once = self.holds("finds_kept_drafts", version)
        return Speculation(drafts, lookahead, prefix=prefix, skips=skips, at_once=at_once)

    @property
    def limits_arrivals(self) -> bool:
        """With either limit of the queue."""
        return self.max_num_queued_reqs is not None or self.max_num_queued_tokens is not None

    def turns_away(self, unfinished: int, prompt_tokens: int) -> bool:
        """`AsyncLLM.check_admission`, with an API server for each replica."""
        requests, tokens = self.max_num_queued_reqs, self.max_num_queued_tokens
        return (requests is not None and unfinished >= requests) or (tokens is not None and prompt_tokens >= tokens)

    def schedule(self, step: Step) -> int:
        """As `VllmTurn` says."""
        return self._turn.schedule(step)

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        return self._turn.heeds_arrival(step)

    def order(self, request: Request) -> Any:
        """Priority, if that is the policy; ties go to the earlier arrival."""
        return request.priority

    def sorts(self) -> bool:
        """Only under the priority policy."""
        return self._by_priority
