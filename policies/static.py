"""Static batching: a batch starts together and returns together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chairlift.policies.base import FOREVER, NotNegativeFloat, Positive, Scheduler, Step

MS = 1_000_000_000  # ps


@dataclass
class Static(Scheduler):
    """Run a batch to its end before the next one starts, as Hugging Face pipelines and FasterTransformer do.

    Prompts are padded to the batch's longest; a request that has its answer keeps its slot, and is paid for, until
    the whole batch returns. KV is set aside for each request's longest possible answer.
    """

    batch: Positive = 8  # requests a batch
    pad_to: Literal["batch", "global"] = "batch"  # decode to the batch's longest answer, or to the longest declared
    start: Literal["full", "impatient"] = "full"  # wait for a full batch, or start with whoever waits
    max_wait_ms: NotNegativeFloat | None = None  # a batch that is not full starts when its oldest waited this long
    pause_ms: NotNegativeFloat = 0.0  # the launcher sleeps this long before every batch

    block_tokens: ClassVar[int | None] = 1
    batch_synchronous: ClassVar[bool] = True

    _longest: int = field(default=0, init=False, repr=False)  # output tokens, the longest declared so far
    _last_step: int = field(default=0, init=False, repr=False)  # decode step that ends a globally padded batch

    @property
    def sequence_limit(self) -> int:
        """As `batch` says."""
        return self.batch

    def schedule(self, step: Step) -> int:
        """Go on with the batch, or form the next one."""
        if step.running:
            step.decode_all()
            return FOREVER
        if step.held:
            left = self._last_step - step.decode_steps
            if left > 0:
                step.decode_all()  # dead slots alone, up to the global longest
                return left
            step.release()
        if self._ready(step):
            self._form(step)
        return 1

    def heeds_arrival(self, step: Step) -> bool:
        """A batch under way hears nothing."""
        return False

    def _ready(self, step: Step) -> bool:
        waiting = len(step.waiting)
        if not waiting:
            return False
        if waiting >= self.batch or self.start == "impatient" or not step.more_arrivals:
            return True
        if self.max_wait_ms is None:
            return False
        deadline = step.waiting[0].arrival + round(self.max_wait_ms * MS)
        if step.now >= deadline:
            return True
        step.wake_at(deadline)
        return False

    def _form(self, step: Step) -> None:
        """Start the longest head of the queue, up to a batch, whose padded prompts and answers have room."""
        if self.pad_to == "global":
            self._longest = max(self._longest, max(r.max_tokens for r in step.waiting))
        room = step.free_blocks * step.block_size
        for size in range(min(self.batch, len(step.waiting)), 0, -1):
            chosen = [step.waiting[i] for i in range(size)]
            prompt = max(r.remaining for r in chosen)  # its prompt, and what it has if it comes from a lost replica
            output = self._longest or max(r.max_tokens for r in chosen)
            reserve = min(prompt + output, step.max_model_len)
            if size * reserve <= room:
                break
        else:
            step.reject(step.waiting[0])
            return
        for request in chosen:
            tokens = request.remaining - step.cached_tokens(request)
            step.admit(request, tokens, max(reserve, request.remaining), pad=prompt - request.remaining)
        self._last_step = step.decode_steps + (output - 1 if self._longest else 0)  # the prefill emits the first token
        if self.pause_ms:
            step.pause(round(self.pause_ms * MS))
