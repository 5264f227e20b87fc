"""The replicas that one router sends requests to, and what the router sees of them, perhaps a little late."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from chairlift.policies.base import PolicyError, Request, Router
from chairlift.sim.results.records import Status

if TYPE_CHECKING:
    from chairlift.sim.cluster.cluster import Cluster, Replica


class ReplicaPool:
    """The replicas that one router sends requests to; what the router sees of them (`policies.base.Replicas`)."""

    def __init__(self, cluster: Cluster, router: Router, chance: Random, stale_ps: int = 0) -> None:
        cluster.pools.append(self)
        self.router = router
        router.random = chance
        self.replicas: list[Replica] = []
        self.indices: list[int] = []
        self.outstanding: list[int] = []
        self.outstanding_tokens: list[int] = []
        self.now = 0
        self._cluster = cluster
        self.homeless: list[Request] = []  # arrived while no replica took requests
        self._stale_ps = stale_ps
        self._seen: _Snapshot | None = None

    @property
    def waiting(self) -> list[int]:
        """Requests waiting at each replica."""
        return [len(replica.engine.state.waiting) for replica in self.replicas]

    def open(self, replica: Replica) -> None:
        """A replica takes requests from now on; those that found none before are sent."""
        replica.pool = self
        replica.draining = False
        replica.go_up()
        self._rebuild([*self.replicas, replica])
        homeless, self.homeless = self.homeless, []
        self._cluster.gather()
        for request in homeless:
            if self._cluster.requests.status[request.id] == Status.PENDING:  # else its client has given up
                self.send(request, self._cluster.now)

    def shut(self, replica: Replica) -> None:
        """A replica takes no requests for now."""
        replica.pool = None
        self._rebuild([r for r in self.replicas if r is not replica])

    def send(self, request: Request, now: int) -> None:
        """Route a request, or keep it until a replica comes up; refuse it where its queue is full.

        Raises `PolicyError` where the router's answer is no position of a replica.
        """
        replicas = self.replicas
        if not replicas:
            self.homeless.append(request)
            return
        if len(self._cluster.replicas) == 1:
            chosen = replicas[0]
        else:
            self.now = now
            position = self.router.route(request, self._view() if self._stale_ps else self)
            if not isinstance(position, int) or not 0 <= position < len(replicas):
                name = type(self.router).__name__
                raise PolicyError(f"router {name}: position {position!r}: there are {len(replicas)} replicas, from 0")
            chosen = replicas[position]
        limit = self._cluster.queue_limit
        if limit is not None and len(chosen.engine.state.waiting) >= limit:
            self._cluster.refuse(request, now)
            return
        chosen.submit(request, now)

    def _rebuild(self, replicas: list[Replica]) -> None:
        self.replicas = sorted(replicas, key=lambda r: r.index)
        for position, replica in enumerate(self.replicas):
            replica.position = position
        self.indices = [r.index for r in self.replicas]
        self.outstanding = [r.held for r in self.replicas]
        self.outstanding_tokens = [r.held_tokens for r in self.replicas]
        self._seen = None

    def _view(self) -> _Snapshot:
        """What the router saw last, not older than it may be."""
        seen = self._seen
        if seen is None or self.now >= seen.taken + self._stale_ps:
            self._seen = seen = _Snapshot(self)
        seen.now = self.now
        return seen


class _Snapshot:
    """A `ReplicaPool` as it was."""

    def __init__(self, pool: ReplicaPool) -> None:
        self.now = self.taken = pool.now
        self.indices = pool.indices
        self.outstanding = list(pool.outstanding)
        self.outstanding_tokens = list(pool.outstanding_tokens)
        self.waiting = pool.waiting
