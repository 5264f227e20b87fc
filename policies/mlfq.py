"""FastServe: a skip-join multi-level feedback queue that preempts after every step.

Source: Wu et al., "Fast Distributed Inference Serving for Large Language Models", arXiv:2305.05920 (v1), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from chairlift.policies.base import FOREVER, NotNegative, Positive, Preemption, Request, Scheduler, Step


@dataclass
class Mlfq(Scheduler):
    """Serve the highest queue first; a request joins one by its prompt and sinks as it uses its tokens there up.

    Approaches shortest-first without knowing lengths. A request outranked keeps its KV on the GPU while there is
    room, and is swapped out to make room. It gives up long answers' time between tokens, and moves much KV.
    """

    max_batch: Positive = 256  # requests that compute in one step
    levels: Positive = 8
    quantum: Positive = 16  # tokens in the highest queue; each one below has `ratio` times those of the one above
    ratio: Positive = 2
    promote_steps: NotNegative = 0  # whoever waited so many decode steps goes to the highest queue; 0: never
    preemption: Preemption = "swap"

    overlaps_swaps: ClassVar[bool] = True  # the paper's proactive swapping

    _level: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _entered: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # emitted tokens it came with
    _since: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # decode step its waiting began

    @property
    def sequence_limit(self) -> int:
        """As `max_batch` says."""
        return self.max_batch

    def schedule(self, step: Step) -> int:
        """The highest in rank compute, as far as the batch and the pool reach."""
        self._sink(step)
        self._promote(step)
        ranked = sorted((*step.running, *step.waiting), key=self._rank)
        chosen = self._fitting(step, ranked)
        everyone = all(r.decoding for r in chosen) and {r.id for r in chosen} == {r.id for r in step.running}
        if everyone and step.decode_all():
            return self._vouch(step)
        self._run(step, chosen)
        return 1

    def heeds_arrival(self, step: Step) -> bool:
        """An arrival outranks whoever has sunk."""
        return True

    def _rank(self, request: Request) -> tuple[int, int, int]:
        return (self._level[request.id], request.arrival, request.id)

    def _quantum(self, level: int) -> int:
        tokens: int = self.quantum * self.ratio**level
        return tokens

    def _sink(self, step: Step) -> None:
        """Note newcomers, by their first step's time in steps of one decode; let those sink who used theirs up."""
        here = (*step.running, *step.waiting)
        if len(self._level) > 2 * len(here) + 1000:  # most have left
            known = {r.id for r in here}
            self._level = {i: level for i, level in self._level.items() if i in known}
            self._entered = {i: tokens for i, tokens in self._entered.items() if i in known}
        for request in here:
            number = request.id
            level = self._level.get(number)
            if level is None:
                token = max(1, step.price([(request.prompt_tokens, 1)], 0))
                worth = step.price([(0, request.prompt_tokens)], 0) // token
                level = next((k for k in range(self.levels) if worth <= self._quantum(k)), self.levels - 1)
                self._level[number], self._entered[number] = level, request.emitted
            while level < self.levels - 1 and request.emitted - self._entered[number] >= self._quantum(level):
                self._entered[number] += self._quantum(level)
                level += 1
                self._level[number] = level

    def _promote(self, step: Step) -> None:
        if not self.promote_steps:
            return
        now = step.decode_steps
        self._since = {r.id: self._since.get(r.id, now) for r in step.waiting}
        for request in step.waiting:
            if now - self._since[request.id] >= self.promote_steps:
                self._level[request.id], self._entered[request.id] = 0, request.emitted

    def _fitting(self, step: Step, ranked: Sequence[Request]) -> list[Request]:
        """Who computes in this step: the first of the ranked that the whole pool can hold together."""
        size, blocks = step.block_size, step.total_blocks
        chosen: list[Request] = []
        for request in ranked:
            need = -(-(request.computed + request.remaining) // size)
            if need <= blocks:  # else somebody smaller may use the room until it is free
                blocks -= need
                chosen.append(request)
                if len(chosen) == self.max_batch:
                    break
        return chosen

    def _run(self, step: Step, chosen: list[Request]) -> None:
        """Plan ``chosen`` in order; those outside give their blocks, the last in rank first, where they are needed."""
        inside = {r.id for r in chosen}
        outside = sorted((r for r in step.running if r.id not in inside), key=self._rank)
        waiting = {r.id for r in step.waiting}
        for request in chosen:
            while not self._start(step, request, request.id in waiting):
                if not outside:
                    return
                step.preempt(outside.pop(), self.preemption)

    @staticmethod
    def _start(step: Step, request: Request, waits: bool) -> bool:
        if waits:
            return step.admit(request, request.remaining - step.cached_tokens(request))
        return step.run(request, 1 if request.decoding else request.remaining)

    def _vouch(self, step: Step) -> int:
        """Steps until the first of the running sinks or of the waiting is promoted; for ever if nobody waits."""
        if not step.waiting:
            return FOREVER
        left = [
            self._quantum(self._level[r.id]) - (r.emitted - self._entered[r.id])
            for r in step.running
            if self._level[r.id] < self.levels - 1
        ]
        if self.promote_steps:
            left += [self._since[r.id] + self.promote_steps - step.decode_steps for r in step.waiting]
        return min((steps for steps in left if steps > 0), default=FOREVER)
