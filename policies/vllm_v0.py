"""vLLM's first scheduler (V0): prompts before decodes, whole, in steps of their own; preemption by recompute or swap.

Source: Kwon et al., SOSP 2023, section 4.5; `vllm/core/scheduler.py` (`_schedule_default`) and `block_manager.py` of
vLLM 0.6. Not modelled: sequence groups of more than one sequence, LoRA, chunked prefill (that is `sarathi`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from chairlift.policies.base import Deployment, Positive, Preemption, Request, Scheduler, Step
from chairlift.policies.sarathi import Share


@dataclass
class VllmV0(Scheduler):
    """Prefill whoever fits before anybody decodes, first come first served; preempt the last when blocks run out.

    The best TTFT of its time. It gives up the gaps between tokens: every decode waits for every prompt that comes.
    Swapped requests come back before new ones start; the budget of host memory is the scenario's ``kv.host_gib``.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "enable_chunked_prefill": "chunked prefill of V0: use sarathi",
        "swap_space": "swap_space here: it is the scenario's kv.host_gib",
        "num_scheduler_steps": "multi-step scheduling",
        "scheduler_delay_factor": "the delay factor",
        "speculative_config": "speculative decoding",
        "enable_lora": "LoRA adapters",
    }

    max_num_batched_tokens: Positive | None = None  # of a prefill step; None: the model's length, 2048 at least
    max_num_seqs: Positive = 256
    watermark: Share = 0.01  # of the blocks stay free when a request is admitted
    preemption_mode: Preemption = "recompute"
    enable_prefix_caching: bool = False

    @property
    def prefix_caching(self) -> bool:
        """As `enable_prefix_caching` says."""
        return self.enable_prefix_caching

    @property
    def sequence_limit(self) -> int:
        """As `max_num_seqs` says."""
        return self.max_num_seqs

    @property
    def swaps(self) -> bool:
        """As `preemption_mode` says."""
        return self.preemption_mode == "swap"

    def misfits(self, deployment: Deployment) -> Iterator[tuple[str, str]]:
        """Prompts are computed whole, and a preempted request's tokens too; a request must fit the pool.

        The latter is `raise_if_cache_size_invalid` of vLLM 0.6's worker.
        """
        tokens, longest = self.max_num_batched_tokens, deployment.max_model_len
        if tokens is not None and tokens < longest:
            yield "max_num_batched_tokens", f"must be at least the model's {longest} tokens (got {tokens})"
        if (pool := deployment.pool_tokens) is not None and longest > pool:
            yield "max_model_len", f"must be at most the {pool} tokens that the KV pool holds (got {longest})"

    def schedule(self, step: Step) -> int:
        """New prompts alone, unless swapped requests wait; else decodes, then swapped ones if nobody was preempted."""
        swapped = self._swapped(step)
        if not swapped and self._prefill(step):
            return 1
        if step.free_blocks > step.decodes and step.decode_all():
            vouched = self._steps_with_spare(step)
        elif self._decode_each(step):
            return 1
        else:
            vouched = 1
        for request in swapped:
            if self._never_fits(step, request):
                step.reject(request)
                continue
            if len(step.running) >= self.max_num_seqs or not self._fits(step, request, request.remaining):
                break
            step.admit(request, 1)
        return vouched

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        return not step.waiting and len(step.running) < self.max_num_seqs

    def _prefill(self, step: Step) -> bool:
        """Start the head of the queue, as far as budget, slots and blocks reach; whether anybody started."""
        budget = self.max_num_batched_tokens or max(step.max_model_len, 2048)
        started = False
        while step.waiting and len(step.running) < self.max_num_seqs:
            request = step.waiting[0]
            if self._never_fits(step, request):
                step.reject(request)
                continue
            tokens = request.remaining - step.cached_tokens(request)
            if tokens > budget or not self._fits(step, request, request.remaining) or not step.admit(request, tokens):
                break
            budget -= tokens
            started = True
        return started

    def _decode_each(self, step: Step) -> bool:
        """V0's own loop: each in its turn must see a free block, needed or not; whether anybody was preempted."""
        running = list(step.running)
        preempted = False
        while running:
            request = running.pop(0)
            while step.free_blocks == 0:
                victim = running.pop() if running else request
                step.preempt(victim, self.preemption_mode)
                preempted = True
                if victim is request:
                    break
            else:
                step.run(request, 1)
        return preempted

    def _steps_with_spare(self, step: Step) -> int:
        """Steps for which every decode surely sees a free block: each takes at most one in ``block_size`` steps."""
        decodes = max(1, step.decodes)
        return max(1, ((step.free_blocks - 1) // decodes) * step.block_size)

    def _spare(self, step: Step) -> int:
        return int(self.watermark * step.total_blocks)

    def _never_fits(self, step: Step, request: Request) -> bool:
        """Whether not even an empty pool would take it; V0 calls such a request ignored, and it ends."""
        return -(-request.remaining // step.block_size) > step.total_blocks - self._spare(step)

    def _fits(self, step: Step, request: Request, tokens: int) -> bool:
        return step.fits(request, tokens + self._spare(step) * step.block_size)

    def _swapped(self, step: Step) -> list[Request]:
        """Who waits with its KV in host memory, in order of arrival."""
        if self.preemption_mode == "recompute":
            return []
        return sorted((r for r in step.waiting if r.swapped), key=lambda r: (r.arrival, r.id))
