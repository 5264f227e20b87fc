"""The queue as a policy sees it change, for policies that keep an order of their own over many waiting requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from chairlift.policies.base import Request


class Changes(NamedTuple):
    """What is new in a queue since the last look."""

    head: list[Request]  # that now stand at the head, in order: the preempted
    tail: list[Request]  # that now stand at the end, in order: the arrivals
    left: list[Request]  # that are gone, but for those that `Backlog.take` was told of: given up or refused


class Backlog:
    """Who waits, kept up to date from the two ends of `Step.waiting`.

    Requests come to a queue at its ends only, so a look takes as long as there are new ones, and not as long as the
    queue is. Those that the policy itself admits are told to `take`. Where others have left, the whole queue is walked.

    Example: the queue is a, b, c; b is admitted, d arrives, and a request x is preempted. The next look at x, a, c, d
    reads x and a from the front, d and c from the back, and stops at a and c, which it knows.
    """

    def __init__(self) -> None:
        self._known: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._known

    def take(self, request: Request) -> None:
        """``request`` has left the queue."""
        del self._known[request.id]

    def look(self, waiting: Sequence[Request]) -> Changes:
        """What has changed since the last look at ``waiting``, which is `Step.waiting` in order of arrival."""
        known = self._known
        head: list[Request] = []
        for request in waiting:
            if request.id in known:
                break
            head.append(request)
        tail: list[Request] = []
        if len(head) < len(waiting):
            for request in reversed(waiting):
                if request.id in known:
                    break
                tail.append(request)
            tail.reverse()
        known.update((request.id, request) for request in chain(head, tail))
        left: list[Request] = []
        if len(known) != len(waiting):
            here = {request.id for request in waiting}
            left = [request for number, request in known.items() if number not in here]
            for request in left:
                del known[request.id]
        return Changes(head, tail, left)
