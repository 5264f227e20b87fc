"""Clients that give up."""

from __future__ import annotations

from functools import partial

from chairlift.sim.cluster.clock import CHANGE
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import Status
from chairlift.sim.study import Limits
from chairlift.sim.units import picoseconds


class Patience:
    """Ends a request that is not answered within ``timeout_s``, or not started within ``queue_timeout_s``."""

    def __init__(self, cluster: Cluster, limits: Limits) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._total = None if limits.timeout_s is None else picoseconds(limits.timeout_s)
        self._queue = None if limits.queue_timeout_s is None else picoseconds(limits.queue_timeout_s)

    def arrived(self, request: Live) -> None:
        """Set the alarms of a request that arrives now."""
        if self._total is not None:
            self._clock.after(self._total, CHANGE, partial(self._give_up, request))
        if self._queue is not None:
            self._clock.after(self._queue, CHANGE, partial(self._give_up_waiting, request))

    def _give_up_waiting(self, request: Live) -> None:
        if self._cluster.requests.admitted[request.row] < 0:
            self._give_up(request)

    def _give_up(self, request: Live) -> None:
        cluster, now = self._cluster, self._clock.now
        if cluster.requests.status[request.row] != Status.PENDING:
            return
        if request.at >= 0:
            cluster.replicas[request.at].cancel(request)
            return
        # It has no replica, or is on its way between two: whoever would send it on finds that it has ended.
        cluster.requests.end(request, now, Status.TIMED_OUT)
        cluster.ended(request, now)
