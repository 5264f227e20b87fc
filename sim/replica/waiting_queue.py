"""The queue of a policy that has an order of its own."""

from __future__ import annotations

from bisect import insort

from chairlift.policies.base import Scheduler
from chairlift.sim.replica.request import Live


class OrderedQueue(list[Live]):
    """Waiting requests sorted by a policy's own order, then by arrival; it has a deque's verbs."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._key = lambda r: (scheduler.order(r), r.arrival, r.id)

    def append(self, request: Live) -> None:
        """Put ``request`` where the order wants it."""
        insort(self, request, key=self._key)

    appendleft = append

    def popleft(self) -> Live:
        """The first in order."""
        return self.pop(0)
