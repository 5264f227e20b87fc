"""Routers: which replica gets a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chairlift.policies.base import NotNegativeFloat, Positive, Replicas, Request, Router

# Replicas beyond which NumPy finds the least loaded sooner: of a thousand in 1.3 µs, where `min` and `index` take 36.
# `np.argmin`, which first looks for a method of the array, takes 5.
MANY = 40


def least(counts: Sequence[int]) -> int:
    """The first position of the least of ``counts``, which are an array where there are many."""
    return int(np.asarray(counts).argmin()) if len(counts) > MANY else counts.index(min(counts))


@dataclass
class RoundRobin(Router):
    """Deal requests out in turn, whatever the replicas' load."""

    turn: int = field(default=0, init=False)

    def route(self, request: Request, replicas: Replicas) -> int:
        """The next replica in turn."""
        chosen = self.turn % len(replicas.indices)
        self.turn = chosen + 1
        return chosen


@dataclass
class RandomChoice(Router):
    """Any replica, all equally likely."""

    def route(self, request: Request, replicas: Replicas) -> int:
        """A replica by chance."""
        return self.random.randrange(len(replicas.indices))


@dataclass
class LeastOutstanding(Router):
    """The replica with the fewest requests waiting or running; the first of several."""

    def route(self, request: Request, replicas: Replicas) -> int:
        """The replica with the fewest requests."""
        return least(replicas.outstanding)


@dataclass
class LeastTokens(Router):
    """The replica with the fewest prompt tokens waiting or running; the first of several."""

    def route(self, request: Request, replicas: Replicas) -> int:
        """The replica with the fewest prompt tokens."""
        return least(replicas.outstanding_tokens)


@dataclass
class ShortestQueue(Router):
    """Join the shortest queue: the fewest requests that wait; of several the one with the fewest in all."""

    def route(self, request: Request, replicas: Replicas) -> int:
        """The replica with the shortest queue."""
        waiting = replicas.waiting
        shortest = min(waiting)
        outstanding = replicas.outstanding
        return min((i for i, n in enumerate(waiting) if n == shortest), key=outstanding.__getitem__)


@dataclass
class PowerOfTwo(Router):
    """The better of two replicas drawn by chance: the one with fewer requests.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001.
    """

    choices: Positive = 2

    def route(self, request: Request, replicas: Replicas) -> int:
        """The least loaded of the replicas drawn."""
        counts = replicas.outstanding
        drawn = self.random.sample(range(len(counts)), min(self.choices, len(counts)))
        return min(drawn, key=counts.__getitem__)


@dataclass
class SessionSticky(Router):
    """A session stays on the replica of its first turn, where its KV may still be; others go to the least loaded."""

    homes: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # session → replica

    def route(self, request: Request, replicas: Replicas) -> int:
        """The session's replica if it takes requests, else the one with the fewest, from now on the session's."""
        counts = replicas.outstanding
        if request.session < 0:
            return least(counts)
        home = self.homes.get(request.session)
        if home is not None and home in replicas.indices:
            return replicas.indices.index(home)
        chosen = least(counts)
        self.homes[request.session] = replicas.indices[chosen]
        return chosen


@dataclass
class PrefixAffinity(Router):
    """The replica that was sent the longest part of this prompt before, unless it is much busier than the others.

    It goes by the ids of the prompt's blocks (`Request.hash_ids`: a trace's own, or made from its prefix groups and
    sessions) and remembers what it sent where; it does not see the replicas' caches.
    """

    blocks: Positive = 100_000  # ids remembered for each replica, the least recently sent forgotten first
    imbalance: NotNegativeFloat = (
        1.5  # ignore a match on a replica with more than so many times the fewest requests, plus `slack`
    )
    slack: Positive = 8  # requests

    sent: dict[int, OrderedDict[int, None]] = field(default_factory=dict, init=False, repr=False)  # replica → ids

    def route(self, request: Request, replicas: Replicas) -> int:
        """The longest match among replicas that are not too busy; of several the one with the fewest requests."""
        counts = replicas.outstanding
        best, longest = least(counts), 0
        limit = counts[best] * self.imbalance + self.slack
        for position, index in enumerate(replicas.indices):
            if counts[position] <= limit:
                match = self._match(request, index)
                if match > longest or (match == longest and counts[position] < counts[best]):
                    best, longest = position, match
        self._remember(request, replicas.indices[best])
        return best

    def _match(self, request: Request, index: int) -> int:
        """Leading blocks of the prompt that the replica was sent, as far as they are remembered."""
        known = self.sent.get(index)
        if not known:
            return 0
        length = 0
        for block in request.hash_ids:
            if block not in known:
                break
            length += 1
        return length

    def _remember(self, request: Request, index: int) -> None:
        """Note a prompt's blocks, the last one first: it is forgotten first, being of no use without those before."""
        known = self.sent.setdefault(index, OrderedDict())
        for block in reversed(request.hash_ids):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self.blocks:
            known.popitem(last=False)
