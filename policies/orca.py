"""Orca: iteration-level scheduling with KV reserved ahead.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
Algorithm 1; the three reservations as in Kwon et al. (vLLM), SOSP 2023, section 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from policies.base import FOREVER, Positive, Request, Scheduler, Step


@dataclass
class Orca(Scheduler):
    """Join and leave the batch at every step, first come first served, with KV reserved for the whole life.

    Prompts are computed whole, in the same step as the others' decodes. Nothing is ever preempted; the price is a
    reservation that mostly stays empty.
    """

    max_batch: Positive = 256  # requests running at once (the paper's max_bs)
    reserve: Literal["max", "declared", "pow2", "oracle"] = "max"
    # max: the model's longest sequence; declared: prompt + the client's max_tokens (the paper's own);
    # pow2: prompt + true output rounded up to a power of two; oracle: prompt + true output

    block_tokens: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        self.oracle = self.reserve in ("pow2", "oracle")

    def schedule(self, step: Step) -> int:
        """Decode everyone; admit from the head of the queue while reservations fit."""
        step.decode_all()
        while step.waiting and len(step.running) < self.max_batch:
            request = step.waiting[0]
            if not step.admit(request, request.remaining - step.cached_tokens(request), self._slots(request, step)):
                break
        return FOREVER

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        return not step.waiting and len(step.running) < self.max_batch

    def _slots(self, request: Request, step: Step) -> int:
        output = request.output_tokens
        if self.reserve == "max":
            return max(step.max_model_len, request.prompt_tokens)
        if self.reserve == "declared" or output is None:
            return request.prompt_tokens + request.max_tokens
        if self.reserve == "pow2":
            return request.prompt_tokens + (1 << (output - 1).bit_length())
        return request.prompt_tokens + output
