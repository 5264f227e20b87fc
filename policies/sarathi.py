"""Stall-free batching under a token budget, and what policies that admit or preempt in another order share with it.

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024,
Algorithm 3; watermark and whole-prompt allocation as in its code, `sarathi/core/scheduler/sarathi_scheduler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from chairlift.policies.base import FOREVER, Positive, Preemption, Request, Scheduler, Step

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass
class Sarathi(Scheduler):
    """Everyone decodes in every step; prompts come in chunks of what the token budget has left.

    No decode ever waits for a prompt. It gives up TTFT: a long prompt takes several steps, and each of them reads the
    weights, and its own KV, again.
    """

    budget: Positive = 512  # tokens a step; the paper's strict setting, 2048 is its relaxed one
    max_batch: Positive = 256  # requests running at once
    watermark: Share = 0.01  # of the blocks stay free when a request is admitted
    enable_prefix_caching: bool = False

    @property
    def prefix_caching(self) -> bool:
        """As `enable_prefix_caching` says."""
        return self.enable_prefix_caching

    @property
    def sequence_limit(self) -> int:
        """`max_batch`, or `budget` where that is smaller: each request of a step takes a token of it."""
        return min(self.max_batch, self.budget)

    def schedule(self, step: Step) -> int:
        """Decodes, then prompts begun, then the queue."""
        if self._decode(step):
            return 1  # whoever was preempted does not come back in the same step
        room = self._go_on(step, self._room(step))
        while step.waiting and self._has_slot(step):
            request = self._next(step)
            tokens = min(request.remaining - step.cached_tokens(request), room)
            if tokens < 1 or not self._admit(step, request, tokens):
                break
            room -= tokens
        return self._vouch(step)

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        return self._has_slot(step) and (self.sorts() or not step.waiting)

    # what policies that build on this one may do in their own way

    def _room(self, step: Step) -> int:
        """Tokens for prompts in this step."""
        return self.budget - step.decodes

    def _next(self, step: Step) -> Request:
        """Who is admitted next."""
        return step.waiting[0]

    def _victim(self, step: Step) -> Request:
        """Who is preempted when decodes find no block."""
        return next(reversed(step.running))

    def _vouch(self, step: Step) -> int:
        """For how many steps of decodes the same answer stays right: blocked now is blocked until somebody leaves."""
        return FOREVER

    # the parts

    def _has_slot(self, step: Step) -> bool:
        return len(step.running) < self.sequence_limit

    def _decode(self, step: Step, how: Preemption = "recompute") -> bool:
        """Plan all decodes; whether somebody had to be preempted for it."""
        preempted = False
        while not step.decode_all():
            step.preempt(self._victim(step), how)
            preempted = True
        return preempted

    def _go_on(self, step: Step, room: int) -> int:
        """Plan the next chunks of prompts begun, which have their blocks already; the tokens left."""
        for request in step.prefilling:
            tokens = min(request.remaining, room)
            if tokens < 1 or not step.run(request, tokens):
                break
            room -= tokens
        return room

    def _admit(self, step: Step, request: Request, tokens: int) -> bool:
        """Start a request with blocks for all that is known of it, if the watermark allows."""
        known = request.remaining
        spare = int(self.watermark * step.total_blocks) * step.block_size if step.running else 0
        return step.fits(request, known + spare) and step.admit(request, tokens, reserve=known)
