"""Orca: iteration-level scheduling with KV reserved ahead.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
Algorithm 1; the three reservations, and the buddy allocator, as in Kwon et al. (vLLM), SOSP 2023, section 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chairlift.policies.base import FOREVER, Positive, Request, Scheduler, Step


class Buddy:
    """A buddy allocator over ``slots`` addresses, cut into the largest powers of two that they hold.

    Source: Knowlton, "A Fast Storage Allocator", *Communications of the ACM* 8(10), 1965.
    """

    def __init__(self, slots: int) -> None:
        self.largest = 1 << (slots.bit_length() - 1)
        self._free: dict[int, set[int]] = {}  # size → where free pieces of it begin
        start = 0
        while slots:
            size = 1 << (slots.bit_length() - 1)
            self._free.setdefault(size, set()).add(start)
            start += size
            slots -= size

    def take(self, slots: int) -> tuple[int, int] | None:
        """A piece of at least ``slots``: where it begins, and its size; None if there is none."""
        wanted = 1 << (slots - 1).bit_length()
        size = min((s for s, free in self._free.items() if free and s >= wanted), default=0)
        if not size:
            return None
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free.setdefault(size, set()).add(start + size)
        return start, size

    def give(self, piece: tuple[int, int]) -> None:
        """Take a piece back, and join it with its buddy for as long as that is free."""
        start, size = piece
        while (start ^ size) in self._free.get(size, ()):
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(start)


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

    allocator: Literal["slots", "buddy"] = "slots"
    # slots: any that are free; buddy: one piece of memory for each request, its size a power of two

    block_tokens: ClassVar[int | None] = 1

    _buddy: Buddy | None = field(default=None, init=False, repr=False)
    _held: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)  # request → its piece

    def __post_init__(self) -> None:
        self.oracle = self.reserve in ("pow2", "oracle")

    @property
    def sequence_limit(self) -> int:
        """As `max_batch` says."""
        return self.max_batch

    def schedule(self, step: Step) -> int:
        """Decode everyone; admit from the head of the queue while reservations fit."""
        step.decode_all()
        if self.allocator == "buddy":
            self._sweep(step)
        while step.waiting and len(step.running) < self.max_batch:
            request = step.waiting[0]
            slots = self._slots(request, step)
            piece = None
            if self._buddy is not None:
                if slots > self._buddy.largest:
                    step.reject(request)
                    continue
                piece = self._buddy.take(slots)
                if piece is None:
                    break
            if not step.admit(request, request.remaining - step.cached_tokens(request), slots):
                if self._buddy is not None and piece is not None:
                    self._buddy.give(piece)
                break
            if piece is not None:
                self._held[request.id] = piece
        return FOREVER

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        return not step.waiting and len(step.running) < self.max_batch

    def _sweep(self, step: Step) -> None:
        """Take back the pieces of requests that have left."""
        if self._buddy is None:
            self._buddy = Buddy(step.total_blocks)
        if self._held and step.waiting:
            here = {r.id for r in step.running}
            for number in [i for i in self._held if i not in here]:
                self._buddy.give(self._held.pop(number))

    def _slots(self, request: Request, step: Step) -> int:
        output = request.output_tokens
        if self.reserve == "max":
            return max(step.max_model_len, request.prompt_tokens)
        if self.reserve == "declared" or output is None:
            return request.prompt_tokens + request.max_tokens
        if self.reserve == "pow2":
            return request.prompt_tokens + (1 << (output - 1).bit_length())
        return request.prompt_tokens + output
