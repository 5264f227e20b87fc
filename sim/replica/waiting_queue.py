"""The queue of a policy that has an order of its own."""

from __future__ import annotations

from bisect import insort

from chairlift.policies.base import Request, Scheduler


class OrderedQueue(list[Request]):
    """Waiting requests sorted by a policy's own order, then by arrival; it has a deque's verbs."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._key = lambda r: (scheduler.order(r), r.arrival, r.id)

    def append(self, request: Request) -> None:
        """Put ``request`` where the order wants it."""
        insort(self, request, key=self._key)

    appendleft = append

    def popleft(self) -> Request:
        """The first in order."""
        return self.pop(0)
