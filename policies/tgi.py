"""Hugging Face text-generation-inference, and Ray Serve's re-implementation of its logic, as of mid 2023.

Source: the router's queue and batching loop of text-generation-inference v0.9 (`router/src/{queue,infer}.rs`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chairlift.policies.base import FOREVER, NotNegative, NotNegativeFloat, Positive, Request, Scheduler, Step


@dataclass
class Tgi(Scheduler):
    """Continuous batching under a token budget on prompt + max_new_tokens; a prefill pauses all decodes.

    New requests join when enough of them wait (`waiting_served_ratio` times the batch), or whoever fits once
    `max_waiting_tokens` decode steps have passed without anybody joining.
    """

    max_batch_total_tokens: Positive = 16000  # Σ prompt + max_new_tokens of the batch
    max_batch_prefill_tokens: Positive | None = None  # padded prompt tokens of one prefill; None: no limit
    waiting_served_ratio: NotNegativeFloat = 1.2
    max_waiting_tokens: NotNegative = 20  # decode steps
    reserve: Literal["declared", "max"] = (
        "declared"  # a request's cost: prompt + max_new_tokens, or the longest there is
    )

    block_tokens: ClassVar[int | None] = 1

    _joined: int = field(default=0, init=False, repr=False)  # decode steps when somebody joined last
    _owes: bool = field(default=False, init=False, repr=False)  # the batch decodes before anybody else may join
    _full: bool = field(default=False, init=False, repr=False)  # the head of the queue does not fit the budget

    def schedule(self, step: Step) -> int:
        """Prefill a new batch on its own if one may join, else decode."""
        while step.waiting and self._cost(step.waiting[0], step) > self.max_batch_total_tokens:
            step.reject(step.waiting[0])  # the router refuses what can never fit
        self._full = False
        wait = FOREVER
        running = len(step.running)
        if step.waiting:
            batch = self._fitting(step)
            self._full = not batch
            waited = step.decode_steps - self._joined + 1  # the router counts from 1
            patient = running > 0 and waited < self.max_waiting_tokens
            least = int(running * self.waiting_served_ratio) if patient else 1
            owes = self._owes and running > 0 and step.decode_steps == self._joined
            if batch and len(batch) >= least and not owes and self._prefill(step, batch):
                self._joined = step.decode_steps
                self._owes = running > 0
                return 1
            if patient:
                wait = self.max_waiting_tokens - waited
            if owes:
                wait = 1
        step.decode_all()
        return wait

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a head that does not fit nobody joins."""
        return not self._full

    def _fitting(self, step: Step) -> list[Request]:
        """The head of the queue, as far as the budgets reach. A new batch is padded to its longest prompt."""
        budget = self.max_batch_total_tokens - sum(self._cost(r, step) for r in step.running)
        batch: list[Request] = []
        longest = outputs = 0
        for request in step.waiting:
            longest = max(longest, request.prompt_tokens)
            outputs += self._cost(request, step) - request.prompt_tokens
            prompts = longest * (len(batch) + 1)
            limit = self.max_batch_prefill_tokens
            if prompts + outputs > budget or (limit is not None and prompts > limit and batch):
                break
            batch.append(request)
        return batch

    def _prefill(self, step: Step, batch: list[Request]) -> bool:
        longest = max(r.prompt_tokens for r in batch)
        joined = False
        for request in batch:
            pad = longest - request.prompt_tokens
            tokens = request.remaining - step.cached_tokens(request)
            if not step.admit(request, tokens, self._cost(request, step), pad=pad):
                break
            joined = True
        return joined

    def _cost(self, request: Request, step: Step) -> int:
        """Tokens of the budget that a request takes for its whole life."""
        if self.reserve == "max":
            return max(step.max_model_len, request.prompt_tokens + request.max_tokens)
        return request.prompt_tokens + request.max_tokens
