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
    """

    def __init__(self, cluster: Cluster, pool: ReplicaPool, settings: Autoscale) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._pool = pool
        self._settings = settings
        self._ordered: set[int] = set()  # indices of replicas that are on their way
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
                self._ordered.add(replica.index)
                self._clock.after(picoseconds(self._settings.provision_s), CHANGE, partial(self._come, replica))
        for replica in reversed(pool.replicas[wanted:]):
            pool.shut(replica)
            replica.draining = replica.held > 0
            if not replica.draining:
                replica.go_down()

    def _come(self, replica: Replica) -> None:
        self._ordered.discard(replica.index)
        if self._cluster.left and not replica.takes_requests:  # it may have been repaired meanwhile
            self._pool.open(replica)
