"""vLLM's V1 scheduler, decision for decision: paged growth, one token budget, recompute preemption, prefix caching.

Equal to vLLM 0.23.0's `Scheduler` and `AsyncScheduler` (`tests/ledger.py` replays their ledgers). Sources: Kwon et al.,
SOSP 2023, for paging; `vllm/v1/core/sched/scheduler.py` of vLLM 0.23.0 for the order of things.

Not modelled, and refused as settings: what `Vllm.not_modelled` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from chairlift.policies.base import FOREVER, NotNegative, Positive, Request, Scheduler, Step


@dataclass
class Vllm(Scheduler):
    """Serve running requests first under one token budget, then admit; preempt when blocks run out.

    Settings bear vLLM's names and, but for the two that it sizes by the GPU, its defaults. ``block_size`` and
    ``num_gpu_blocks`` override the scenario's ``kv``; of ``num_gpu_blocks`` one is vLLM's null block.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "enable_lora": "LoRA adapters",
        "max_loras": "LoRA adapters",
        "speculative_config": "speculative decoding",
        "num_speculative_tokens": "speculative decoding",
        "num_lookahead_slots": "speculative decoding",
        "kv_transfer_config": "KV connectors and offloading",
        "kv_connector": "KV connectors and offloading",
        "cpu_offload_gb": "KV connectors and offloading",
        "swap_space": "swapping: V1 only recomputes",
        "preemption_mode": "swapping: V1 only recomputes",
        "max_num_encoder_input_tokens": "multimodal encoders and their budget",
        "encoder_cache_size": "multimodal encoders and their budget",
        "limit_mm_per_prompt": "multimodal encoders and their budget",
        "max_num_partial_prefills": "concurrent partial prefills of V0",
        "max_long_partial_prefills": "concurrent partial prefills of V0",
        "num_scheduler_steps": "multi-step scheduling of V0",
        "pipeline_parallel_size": "pipeline parallelism",
        "data_parallel_size": "data parallelism: use replicas",
        "decode_context_parallel_size": "context parallelism",
        "prefill_context_parallel_size": "context parallelism",
        "disable_hybrid_kv_cache_manager": "sliding windows, Mamba and other layers without full attention",
        "mamba_cache_mode": "sliding windows, Mamba and other layers without full attention",
        "kv_cache_dtype": "quantised KV: give the model's kv_bytes_per_element instead",
        "prefix_caching_hash_algo": "hash collisions",
        "scheduler_cls": "schedulers of vLLM's users: write a policy",
        "watermark": "a watermark of free blocks other than vLLM's default of none",
        "scheduler_delay_factor": "the delay factor of V0",
        "structured_outputs_config": "structured outputs",
        "enforce_eager": "CUDA graphs: a matter of the cost model, not of the scheduler",
        "gpu_memory_utilization": "memory here: it is kv.memory_utilization",
        "max_model_len": "the model's length here: it is the scenario's max_model_len",
        "tensor_parallel_size": "parallelism here: it is the scenario's tensor_parallel",
    }

    max_num_batched_tokens: Positive = 2048  # tokens a step
    max_num_seqs: Positive = 256
    block_size: Positive | None = None
    num_gpu_blocks: Annotated[int, Ge(2)] | None = None  # one of them is the null block
    enable_chunked_prefill: bool = True  # False: a prompt that exceeds the budget left waits for the next step
    long_prefill_token_threshold: NotNegative = 0  # tokens of one prompt a step; 0: no limit
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    scheduler_reserve_full_isl: bool = True  # admit only where all known tokens would fit
    enable_prefix_caching: bool = True
    async_scheduling: bool = True  # plan step n+1 before step n's output is in

    def __post_init__(self) -> None:
        self._by_priority = self.scheduling_policy == "priority"

    @property
    def asynchronous(self) -> bool:
        """As `async_scheduling` says."""
        return self.async_scheduling

    @property
    def prefix_caching(self) -> bool:
        """As `enable_prefix_caching` says."""
        return self.enable_prefix_caching

    @property
    def token_limit(self) -> int:
        """Tokens a step."""
        return self.max_num_batched_tokens

    @property
    def sequence_limit(self) -> int:
        """As `max_num_seqs` says."""
        return self.max_num_seqs

    @property
    def pool_blocks(self) -> int | None:
        """`num_gpu_blocks` without vLLM's null block."""
        return None if self.num_gpu_blocks is None else self.num_gpu_blocks - 1

    @property
    def pool_block_size(self) -> int | None:
        """As `block_size` says."""
        return self.block_size

    def misfit(self, max_model_len: int) -> str | None:
        """Without chunks a sequence must fit a step, or it can never be computed again after a preemption."""
        if self.enable_chunked_prefill or self.max_num_batched_tokens >= max_model_len:
            return None
        return (
            f"without chunked prefill max_num_batched_tokens must be at least the model's {max_model_len} tokens"
            f" (got {self.max_num_batched_tokens})"
        )

    def schedule(self, step: Step) -> int:
        """Running first, in order; then the head of the queue, unless somebody was preempted."""
        budget = self.max_num_batched_tokens
        unfinished = step.prefilling
        decodes = step.decodes
        if not unfinished and decodes <= budget and not self._by_priority and step.decode_all():
            budget -= decodes  # by far the most common step
            preempted = False
        elif decodes <= budget and not self._by_priority and self._in_one_go(step, unfinished):
            budget, preempted = self._run_all(step, budget)
        else:
            budget, preempted = self._run_each(step, budget)
        if preempted:
            return 1
        waiting = step.waiting
        running = step.running
        while waiting and budget > 0 and len(running) < self.max_num_seqs:
            request = waiting[0]
            known = request.remaining
            left = tokens = known - step.cached_tokens(request)
            if 0 < self.long_prefill_token_threshold < tokens:
                tokens = self.long_prefill_token_threshold
            if tokens > budget:
                if not self.enable_chunked_prefill:
                    break
                tokens = budget
            if tokens < left and self.scheduler_reserve_full_isl and not step.fits(request, known):
                break  # else `admit` asks for just this room
            if not step.admit(request, tokens):
                break
            budget -= tokens
        return FOREVER

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        if len(step.running) >= self.max_num_seqs:
            return False
        return not step.waiting or self._by_priority

    def order(self, request: Request) -> Any:
        """Priority, if that is the policy; ties go to the earlier arrival."""
        return request.priority

    def sorts(self) -> bool:
        """Only under the priority policy."""
        return self._by_priority

    def _chunk(self, tokens: int, budget: int) -> int:
        threshold = self.long_prefill_token_threshold
        if 0 < threshold < tokens:
            tokens = threshold
        return tokens if tokens < budget else budget

    @staticmethod
    def _in_one_go(step: Step, unfinished: Sequence[Request]) -> bool:
        """Whether the order of the running cannot matter but for who is preempted, the last admitted.

        So it is where all decodes fit the budget and whoever lacks prompt tokens was admitted after all of them.
        """
        return all(map(is_, reversed(unfinished), reversed(step.running)))

    def _run_all(self, step: Step, budget: int) -> tuple[int, bool]:
        preempted = False
        while not step.decode_all():
            step.preempt(_last(step))
            preempted = True
        budget -= step.decodes
        gone: set[int] = set()
        for request in step.prefilling:
            tokens = self._chunk(request.remaining, budget)
            if tokens == 0 or request.id in gone:
                break
            while not step.run(request, tokens):
                victim = _last(step)
                step.preempt(victim)
                gone.add(victim.id)
                if victim is request:
                    return budget, True
            budget -= tokens
        return budget, preempted or bool(gone)

    def _run_each(self, step: Step, budget: int) -> tuple[int, bool]:
        """vLLM's loop as it stands, its index too.

        A victim that was passed over before (its last token is under way) does not move the index back, so that
        whoever comes after the request at hand is passed over as well.
        """
        running = list(step.running)
        planned: dict[int, int] = {}
        preempted = False
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            index += 1
            tokens = self._chunk(request.remaining, budget)
            if tokens == 0:
                continue
            while not step.run(request, tokens):
                victim = self._victim(step)
                running.remove(victim)
                if victim.id in planned:
                    budget += planned.pop(victim.id)
                    index -= 1
                step.preempt(victim)
                preempted = True
                if victim is request:
                    return budget, True
            planned[request.id] = tokens
            budget -= tokens
        return budget, preempted

    def _victim(self, step: Step) -> Request:
        if self._by_priority:
            return max(step.running, key=lambda r: (r.priority, r.arrival, r.id))
        return _last(step)


def _last(step: Step) -> Request:
    """The request admitted last."""
    return next(reversed(step.running))
