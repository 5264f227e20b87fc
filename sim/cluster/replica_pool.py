"""The replicas that one router sends requests to, and what the router sees of them, perhaps a little late."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from random import Random
from typing import Any

from chairlift.policies.base import PolicyError, Router
from chairlift.sim.cluster.clock import Clock
from chairlift.sim.cluster.replica import Loads, Replica
from chairlift.sim.replica.request import Live
from chairlift.sim.replica.users_code import blame, name_of
from chairlift.sim.results.records import RequestRecords, Status


class ReplicaPool:
    """The replicas that one router sends requests to, as that router sees them (`policies.base.Replicas`).

    ``chance`` is the router's source of chance. ``stale_ps``: the router looks at the replicas at most once in so many
    ps, and goes by its last look in between. ``queue_limit``: a request whose replica has so many waiting already is
    handed to ``refuse`` instead.
    """

    def __init__(
        self,
        clock: Clock,
        requests: RequestRecords,
        router: Router,
        chance: Random,
        refuse: Callable[[Live, int], None],
        stale_ps: int = 0,
        queue_limit: int | None = None,
    ) -> None:
        self.router = router
        router.random = chance
        self.replicas: list[Replica] = []  # that take requests now, by index; a replica's place here is its position
        self.indices: list[int] = []
        self.outstanding, self.outstanding_tokens = array("q"), array("q")
        self.now = 0
        self.homeless: list[Live] = []  # arrived while no replica took requests
        self._clock = clock
        self._requests = requests
        self._refuse = refuse
        self._stale_ps = stale_ps
        self._queue_limit = queue_limit
        self._seen: _Look | None = None

    @property
    def waiting(self) -> list[int]:
        """Requests waiting at each replica."""
        return [len(replica.engine.state.queue) for replica in self.replicas]

    def open(self, *replicas: Replica) -> None:
        """These replicas take requests from now on; those that found none before are sent."""
        for replica in replicas:
            replica.draining = False
            replica.go_up()
        self._stand([*self.replicas, *replicas])
        homeless, self.homeless = self.homeless, []
        self._clock.hold_plans()
        for request in homeless:
            if self._requests.status[request.row] == Status.PENDING:  # else its client has given up
                self.send(request, self._clock.now)

    def shut(self, replica: Replica) -> None:
        """A replica takes no requests for now."""
        replica.leave()
        self._stand([r for r in self.replicas if r is not replica])

    def send(self, request: Live, now: int) -> None:
        """Route a request, or keep it until a replica comes up; refuse it where its queue is full.

        Raises `PolicyError` if the router names a position at which there is no replica.
        """
        replicas = self.replicas
        if not replicas:
            self.homeless.append(request)
            return
        self.now = now
        router: Any = self.router  # which may answer anything
        try:
            position = router.route(request, self._last_look() if self._stale_ps else self)
        except BaseException as error:
            blame(error, self.router)
            raise
        if not isinstance(position, int) or not 0 <= position < len(replicas):
            what = f"position {position!r}: there are {len(replicas)} replicas, from 0"
            raise PolicyError(what, name_of(self.router))
        chosen = replicas[position]
        if self._queue_limit is not None and len(chosen.engine.state.queue) >= self._queue_limit:
            self._refuse(request, now)
            return
        chosen.submit(request, now)

    def _stand(self, replicas: list[Replica]) -> None:
        """Take ``replicas`` as those that take requests now: each gets its position, and counts there what it holds."""
        self.replicas = sorted(replicas, key=lambda r: r.index)
        self.indices = [r.index for r in self.replicas]
        held, tokens = [r.held for r in self.replicas], [r.held_tokens for r in self.replicas]
        loads = Loads(array("q", held), array("q", tokens))
        for position, replica in enumerate(self.replicas):
            replica.enter(loads, position)
        self.outstanding, self.outstanding_tokens = loads.outstanding, loads.outstanding_tokens
        self._seen = None

    def _last_look(self) -> _Look:
        """What the router saw last, not older than it may be."""
        seen = self._seen
        if seen is None or self.now >= seen.taken + self._stale_ps:
            self._seen = seen = _Look(self)
        seen.now = self.now
        return seen


class _Look:
    """A `ReplicaPool` as it was when it was ``taken``."""

    def __init__(self, pool: ReplicaPool) -> None:
        self.now = self.taken = pool.now
        self.indices = pool.indices
        self.outstanding, self.outstanding_tokens = pool.outstanding[:], pool.outstanding_tokens[:]
        self.waiting = pool.waiting
