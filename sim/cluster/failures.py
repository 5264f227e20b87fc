"""Replicas that fail, by chance or on schedule, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from chairlift.sim.cluster.clock import CHANGE
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import Status
from chairlift.sim.study import Failures
from chairlift.sim.units import PS_PER_S, picoseconds


class Breakdowns:
    """Lets replicas fail as ``failures`` says. Requests there lose their KV: they go elsewhere, or fail with it.

    By replica index: ``homes`` is the pool that a replica takes requests from, ``chances`` its source of chance. After
    a failure a replica is repaired, starts for ``start_up_ps``, and takes requests again. ``again`` is the pool that a
    lost request goes to which has emitted tokens: there its prompt and tokens are computed again.
    """

    def __init__(
        self,
        cluster: Cluster,
        failures: Failures,
        homes: Sequence[ReplicaPool],
        chances: Sequence[Random],
        start_up_ps: int,
        again: ReplicaPool,
    ) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._failures = failures
        self._homes = homes
        self._chances = chances
        self._start_up = start_up_ps
        self._again = again
        for outage in failures.schedule:  # of replicas that exist: the loader refuses others
            away = None if outage.for_s is None else picoseconds(outage.for_s)
            fail = partial(self._fail, cluster.replicas[outage.replica], away)
            self._clock.after(picoseconds(outage.at_s), CHANGE, fail)
        if failures.mtbf_s is not None:
            for replica in cluster.replicas:
                self._draw(replica)

    def _draw(self, replica: Replica) -> None:
        """Draw when a replica that is up fails next, and for how long."""
        chance = self._chances[replica.index]
        assert self._failures.mtbf_s is not None
        assert self._failures.mttr_s is not None
        uptime = picoseconds(chance.expovariate(1 / self._failures.mtbf_s))
        away = picoseconds(chance.expovariate(1 / self._failures.mttr_s))
        self._clock.after(uptime, CHANGE, partial(self._fail, replica, away, drawn=True))

    def _fail(self, replica: Replica, away: int | None, drawn: bool = False) -> None:
        """A replica fails for ``away`` ps, None: for good; if ``drawn``, the next failure is drawn for its return."""
        cluster = self._cluster
        if cluster.left == 0:
            return
        cluster.watch()
        if replica.takes_requests:
            self._homes[replica.index].shut(replica)
            replica.go_down()
            self._lose(replica.fail(), self._homes[replica.index])
            if away is not None:
                self._clock.after(away + self._start_up, CHANGE, partial(self._repair, replica))
        elif not drawn:
            at = self._clock.now / PS_PER_S
            cluster.notes.append(f"replica {replica.index} could not fail at {at:g} s: it was not up")
        if drawn:
            self._clock.after((away or 0) + self._start_up, CHANGE, partial(self._draw, replica))

    def _lose(self, lost: list[Live], pool: ReplicaPool) -> None:
        now = self._clock.now
        if self._failures.on_failure == "retry":
            self._clock.hold_plans()
            for request in lost:
                (self._again if request.produced else pool).send(request, now)
            return
        for request in lost:
            self._cluster.requests.end(request, now, Status.FAILED)
            self._cluster.ended(request, now)

    def _repair(self, replica: Replica) -> None:
        if self._cluster.left and not replica.takes_requests:  # an autoscaler may have ordered it meanwhile
            self._homes[replica.index].open(replica)
