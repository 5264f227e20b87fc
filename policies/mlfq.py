"""FastServe: a skip-join multi-level feedback queue that preempts after every step.

Source: Wu et al., "Fast Distributed Inference Serving for Large Language Models", arXiv:2305.05920 (v1), section 4.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from typing import ClassVar

from chairlift.policies.backlog import Backlog
from chairlift.policies.base import FOREVER, NotNegative, Positive, Preemption, Request, Scheduler, Step

Ranked = tuple[int, int, Request]  # arrival, number, request: among requests of one level, the order of rank


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
    _backlog: Backlog = field(default_factory=Backlog, init=False, repr=False)
    # Who waits, by level and by the blocks that its known tokens need, in order of rank: `Ranked`.
    _queues: dict[tuple[int, int], list[Ranked]] = field(default_factory=dict, init=False, repr=False)
    _places: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)  # key in `_queues`
    _since: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # decode step its waiting began
    _oldest: deque[tuple[int, Request]] = field(default_factory=deque, init=False, repr=False)  # by that step

    @property
    def sequence_limit(self) -> int:
        """As `max_batch` says."""
        return self.max_batch

    def schedule(self, step: Step) -> int:
        """The highest in rank compute, as far as the batch and the pool reach."""
        self._look(step)
        self._promote(step)
        chosen, outside = self._fitting(step)
        everyone = all(r.decoding for r in chosen) and {r.id for r in chosen} == {r.id for r in step.running}
        if everyone and step.decode_all():
            return self._vouch(step)
        self._run(step, chosen, outside)
        return 1

    def heeds_arrival(self, step: Step) -> bool:
        """An arrival outranks whoever has sunk."""
        return True

    def _quantum(self, level: int) -> int:
        tokens: int = self.quantum * self.ratio**level
        return tokens

    def _look(self, step: Step) -> None:
        """Note who has come and gone, and let those sink who used the tokens of their level up.

        Only running requests get tokens, so of the waiting only those have to be looked at that have just come.
        """
        head, tail, left = self._backlog.look(step.waiting)
        here = len(step.running) + len(self._backlog)
        if len(self._level) > 2 * here + 1000:  # most have left
            known = {r.id for r in (*step.running, *step.waiting)}
            self._level = {i: level for i, level in self._level.items() if i in known}
            self._entered = {i: tokens for i, tokens in self._entered.items() if i in known}
        for request in left:
            self._remove(request)
        levels, entered = self._level, self._entered
        quanta = [self._quantum(level) for level in range(self.levels - 1)]
        quanta.append(FOREVER)  # nobody sinks from the lowest
        for request in step.running:
            number = request.id
            if request.emitted - entered[number] >= quanta[levels[number]]:
                self._sink(step, request)
        for request in (*head, *tail):
            self._sink(step, request)
            self._insert(step, request)
            if self.promote_steps:
                self._since[request.id] = step.decode_steps
                self._oldest.append((step.decode_steps, request))

    def _sink(self, step: Step, request: Request) -> None:
        """Give a newcomer its level, by its first step's time in steps of one decode; lower that of others."""
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

    def _insert(self, step: Step, request: Request) -> None:
        """Put a waiting request into the queue of its level and size."""
        place = (self._level[request.id], self._blocks(step, request))
        self._places[request.id] = place
        insort(self._queues.setdefault(place, []), (request.arrival, request.id, request))

    def _remove(self, request: Request) -> None:
        """Take out a request that waits no longer."""
        place = self._places.pop(request.id)
        queue = self._queues[place]
        del queue[bisect_left(queue, (request.arrival, request.id))]
        if not queue:
            del self._queues[place]
        self._since.pop(request.id, None)

    def _promote(self, step: Step) -> None:
        """Bring those to the highest level that have waited for `promote_steps`."""
        while self._oldest:
            since, request = self._oldest[0]
            if self._since.get(request.id) == since:
                if step.decode_steps - since < self.promote_steps:
                    break
                self._level[request.id], self._entered[request.id] = 0, request.emitted
                self._remove(request)
                self._insert(step, request)
            self._oldest.popleft()

    @staticmethod
    def _blocks(step: Step, request: Request) -> int:
        """Blocks that the known tokens of a request need, the next one's included."""
        return -(-(request.computed + request.remaining) // step.block_size)

    def _fitting(self, step: Step) -> tuple[list[Request], list[Request]]:
        """Who computes in this step, and who of the running does not, both in order of rank.

        The first in rank compute that the whole pool can hold together.

        A request that has no room is passed over, for a smaller one behind it may use the room until it is free. Of the
        waiting, a whole queue is passed over at once: all its requests need the same number of blocks.
        """
        blocks = step.total_blocks
        chosen: list[Request] = []
        outside: list[Request] = []
        levels = self._level
        running = sorted([(levels[number := r.id], r.arrival, number, r) for r in step.running])
        # One entry a queue, and one for the running: rank, request, blocks, the queue and the place in it.
        heads: list[tuple[int, int, int, Request, int, list[Ranked], int]] = []
        for (level, need), queue in self._queues.items():
            arrival, number, request = queue[0]
            heads.append((level, arrival, number, request, need, queue, 0))
        heapify(heads)
        at = 0
        while (heads or at < len(running)) and len(chosen) < self.max_batch:
            if at < len(running) and (not heads or running[at][:3] < heads[0][:3]):
                request = running[at][3]
                at += 1
                need = self._blocks(step, request)
                if need <= blocks:
                    blocks -= need
                    chosen.append(request)
                else:
                    outside.append(request)
                continue
            level, _, _, request, need, queue, place = heads[0]
            if need > blocks:  # the room only shrinks
                heappop(heads)
                continue
            blocks -= need
            chosen.append(request)
            if place + 1 < len(queue):
                arrival, number, following = queue[place + 1]
                heapreplace(heads, (level, arrival, number, following, need, queue, place + 1))
            else:
                heappop(heads)
        outside += [ranked[3] for ranked in running[at:]]
        return chosen, outside

    def _run(self, step: Step, chosen: list[Request], outside: list[Request]) -> None:
        """Plan ``chosen`` in order; ``outside`` give their blocks, the last in rank first, where they are needed."""
        for request in chosen:
            while not self._start(step, request):
                if not outside:
                    return
                step.preempt(outside.pop(), self.preemption)

    def _start(self, step: Step, request: Request) -> bool:
        if request in self._backlog:
            if not step.admit(request, request.remaining - step.cached_tokens(request)):
                return False
            self._backlog.take(request)
            self._remove(request)
            return True
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
        if self._oldest:
            left.append(self._oldest[0][0] + self.promote_steps - step.decode_steps)
        return min((steps for steps in left if steps > 0), default=FOREVER)
