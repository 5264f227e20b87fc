"""Queues of waiting requests that a `deque` does not serve: of a policy's own order, and left from the middle."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from chairlift.policies.base import Scheduler
from chairlift.sim.replica.request import Live

LONG = 256  # requests; in a shorter queue a walk costs less than what spares it


class OrderedQueue(list[Live]):
    """Waiting requests sorted by a policy's own order, then by arrival; it has a deque's verbs."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._key = lambda r: (scheduler.order(r), r.arrival, r.row)

    def append(self, request: Live) -> None:
        """Put ``request`` where the order wants it."""
        insort(self, request, key=self._key)

    appendleft = append

    def popleft(self) -> Live:
        """The first in order."""
        return self.pop(0)


class OpenQueue(Sequence[Live]):
    """Waiting requests as in a deque, with its verbs, that leave from the middle as fast as from an end.

    A deque walks to whom it removes, so a policy that admits from anywhere pays for the length of its queue with every
    admission. Here the ends are slower to look at. A place inside is looked up in a list, which is made when it is
    asked for and thrown away when the queue changes.

    Example: of a, b, c, d the policy admits c. A deque compares it with a and b first; here c is found by its hash, and
    a, b, d remain in that order.
    """

    def __init__(self, requests: Iterable[Live] = ()) -> None:
        self._requests = OrderedDict.fromkeys(requests)
        self._list: list[Live] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Live]:
        return iter(self._requests)

    def __reversed__(self) -> Iterator[Live]:
        return reversed(self._requests)

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    @overload
    def __getitem__(self, place: int) -> Live: ...

    @overload
    def __getitem__(self, place: slice) -> list[Live]: ...

    def __getitem__(self, place: int | slice) -> Live | list[Live]:
        if self._requests and (place == 0 or place == -1):
            return next(iter(self._requests) if place == 0 else reversed(self._requests))
        if self._list is None:
            self._list = list(self._requests)
        return self._list[place]

    def append(self, request: Live) -> None:
        """Put ``request`` at the end."""
        self._requests[request] = None
        self._list = None

    def appendleft(self, request: Live) -> None:
        """Put ``request`` at the head."""
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)
        self._list = None

    def popleft(self) -> Live:
        """Take the head out. Raises KeyError if nobody waits."""
        self._list = None
        return self._requests.popitem(last=False)[0]

    def remove(self, request: Live) -> None:
        """Take ``request`` out. Raises ValueError if it does not wait."""
        try:
            del self._requests[request]
        except KeyError:
            raise ValueError(f"{request} is not in the queue") from None
        self._list = None
