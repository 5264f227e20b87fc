"""What policies share that let an urgent request take the place of one that runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from chairlift.policies.base import Preemption, Request, Step
from chairlift.policies.sarathi import Sarathi


@dataclass
class Preemptive(Sarathi):
    """Stall-free batching whose queue is sorted by `urgency`, and whose most urgent requests displace others."""

    preemption: Literal["none", "recompute", "swap"] = "recompute"  # of whoever is displaced

    @abstractmethod
    def urgency(self, request: Request) -> Any:
        """A key, smaller for the more urgent. It may only fall while a request runs, and stays while it waits."""

    def order(self, request: Request) -> Any:
        """Most urgent first."""
        return self.urgency(request)

    def schedule(self, step: Step) -> int:
        """Decodes, then prompts begun, then the queue, displacing who is less urgent."""
        if self._decode(step, self._how):
            return 1
        room = self._go_on(step, self._room(step))
        while step.waiting:
            request = self._next(step)
            if room < 1 and not self._displaces(step, request):
                break
            room += self._make_place(step, request)
            tokens = min(request.remaining - step.cached_tokens(request), room)
            if tokens < 1 or not self._has_slot(step) or not self._admit(step, request, tokens):
                break
            room -= tokens
        return self._vouch(step)

    def heeds_arrival(self, step: Step) -> bool:
        """An urgent arrival may displace somebody however full the batch is."""
        return True

    def protected(self, request: Request) -> bool:
        """Whether a running request may not be displaced."""
        return False

    def outranks(self, request: Request, other: Request) -> bool:
        """Whether a waiting ``request`` may displace ``other``."""
        return bool(self.urgency(request) < self.urgency(other))

    @property
    def _how(self) -> Preemption:
        return "swap" if self.preemption == "swap" else "recompute"

    def _victim(self, step: Step) -> Request:
        return max(step.running, key=lambda r: (self.urgency(r), r.arrival, r.id))

    def _displaces(self, step: Step, request: Request) -> bool:
        return self.preemption != "none" and next(self._candidates(step, request), None) is not None

    def _candidates(self, step: Step, request: Request) -> Iterator[Request]:
        """Decoding requests that ``request`` outranks, the least urgent first."""
        found = [r for r in step.running if r.decoding and not self.protected(r) and self.outranks(request, r)]
        yield from sorted(found, key=lambda r: (self.urgency(r), r.arrival, r.id), reverse=True)

    def _make_place(self, step: Step, request: Request) -> int:
        """Displace as many as ``request`` needs, or nobody if that would not do; the decodes taken back.

        The blocks that a victim gives are counted as if it shared none with others.
        """
        known = request.remaining
        size = step.block_size
        spare = int(self.watermark * step.total_blocks) * size
        if self.preemption == "none" or (self._has_slot(step) and step.fits(request, known + spare)):
            return 0
        missing = -(-known // size) + spare // size - step.free_blocks - step.cached_tokens(request) // size
        if request.swapped:
            missing += request.swapped // size  # they lie in host memory
        victims = []
        for victim in self._candidates(step, request):
            victims.append(victim)
            missing -= victim.computed // size + 1  # with that of the token just planned
            if missing <= 0:
                break
        if missing > 0 or not victims:
            return 0
        for victim in victims:
            step.preempt(victim, self._how)
        return len(victims)
