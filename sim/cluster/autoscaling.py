"""Replicas that come and go with the load."""

from __future__ import annotations

from functools import partial

from chairlift.sim.cluster.clock import CHANGE
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.study import Autoscale
from chairlift.sim.units import picoseconds


class Autoscaler:
    """Opens and drains the replicas of ``pool``, the only one of the cluster. The first few are open to begin with.

    By schedule, or at every look as many as a target asks for. ``target_outstanding`` T: with n requests waiting or
    running, ceil(n / T) replicas. ``target_waiting`` W: with w requests waiting at m replicas, as many more as bring
    w down to W a replica, m while fewer wait, m - 1 if nobody does.

    A replica that is ordered comes `Autoscale.provision_s` later, unless fewer are wanted before: then the last orders
    are withdrawn first, and only then are replicas drained that are up.

    Example: at 10 s the schedule asks for 8 replicas, one is up, and 7 are ordered for 70 s. At 40 s it asks for 1: all
    7 orders are withdrawn, and no replica ever comes.
    """

    def __init__(self, cluster: Cluster, pool: ReplicaPool, settings: Autoscale) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._pool = pool
        self._settings = settings
        self._ordered: dict[int, int] = {}  # index of a replica that is on its way → number of its order
        self._orders = 0  # so far
        schedule = sorted((picoseconds(p.at_s), p.replicas) for p in settings.schedule)
        for at, count in schedule:
            self._clock.after(at, CHANGE, partial(self._aim, count))
        if not schedule:
            self._clock.after(picoseconds(settings.every_s), CHANGE, self._look)

    def _look(self) -> None:
        if self._cluster.left == 0:
            return
        self._cluster.watch()
        settings, pool = self._settings, self._pool
        if settings.target_outstanding is not None:
            wanted = -(-sum(pool.outstanding) // settings.target_outstanding)
        else:
            assert settings.target_waiting is not None
            waiting = sum(pool.waiting)
            now = len(pool.replicas)
            if waiting > settings.target_waiting * now:
                wanted = now + -(-(waiting - settings.target_waiting * now) // max(1, settings.target_waiting))
            else:
                wanted = now if waiting else now - 1
        self._aim(int(wanted))
        self._clock.after(picoseconds(settings.every_s), CHANGE, self._look)

    def _aim(self, wanted: int) -> None:
        """Have ``wanted`` replicas, within the limits: order some, or drain those that come last."""
        wanted = min(max(wanted, self._settings.min), self._settings.max)
        pool = self._pool
        have = len(pool.replicas) + len(self._ordered)
        if wanted > have:
            spare = [r for r in self._cluster.replicas if not r.takes_requests and r.index not in self._ordered]
            for replica in spare[: wanted - have]:
                if replica.draining:
                    pool.open(replica)
                    continue
                self._orders += 1
                self._ordered[replica.index] = self._orders
                come = partial(self._come, replica, self._orders)
                self._clock.after(picoseconds(self._settings.provision_s), CHANGE, come)
        for _ in range(min(have - wanted, len(self._ordered))):
            self._ordered.popitem()  # the last order
        for replica in reversed(pool.replicas[wanted:]):
            pool.shut(replica)
            replica.draining = replica.held > 0
            if not replica.draining:
                replica.go_down()

    def _come(self, replica: Replica, order: int) -> None:
        if self._ordered.get(replica.index) != order:
            return  # withdrawn; it may be on its way by a later order
        del self._ordered[replica.index]
        if self._cluster.left and not replica.takes_requests:  # it may have been repaired meanwhile
            self._pool.open(replica)
