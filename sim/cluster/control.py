"""What happens to replicas and requests besides steps: failures, autoscaling, timeouts, hand-over of KV."""

from __future__ import annotations

from array import array
from random import Random

from chairlift.policies.base import Request
from chairlift.sim.cluster.cluster import CHANGE, Cluster, Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.results.records import HANDOVER_COLUMNS, Status
from chairlift.sim.study import Autoscale, Failures, Limits, Link
from chairlift.sim.units import PS_PER_US, picoseconds


class Breakdowns:
    """Replicas fail, at random or on schedule, and come back; what they held goes elsewhere or fails.

    ``again`` is where a request that has emitted tokens is sent: there prompt and tokens are computed again.
    """

    def __init__(
        self, cluster: Cluster, failures: Failures, chances: list[Random], start_up_ps: int, again: ReplicaPool
    ) -> None:
        self._cluster = cluster
        self._failures = failures
        self._chances = chances
        self._start_up = start_up_ps
        self._again = again
        for outage in failures.schedule:
            if outage.replica < len(cluster.replicas):
                replica = cluster.replicas[outage.replica]
                away = None if outage.for_s is None else picoseconds(outage.for_s)
                self._later(picoseconds(outage.at_s), lambda r=replica, a=away: self._fail(r, a))
        if failures.mtbf_s is not None:
            for replica in cluster.replicas:
                self._next(replica)

    def _later(self, delay: int, callback: object) -> None:
        self._cluster.after(delay, CHANGE, callback)  # type: ignore[arg-type]

    def _next(self, replica: Replica) -> None:
        chance = self._chances[replica.index]
        assert self._failures.mtbf_s is not None
        assert self._failures.mttr_s is not None
        uptime = picoseconds(chance.expovariate(1 / self._failures.mtbf_s))
        away = picoseconds(chance.expovariate(1 / self._failures.mttr_s))
        self._later(uptime, lambda: self._fail(replica, away, again=True))

    def _fail(self, replica: Replica, away: int | None, again: bool = False) -> None:
        cluster = self._cluster
        if cluster.left == 0:
            return
        cluster.watch()
        pool = replica.pool
        if pool is not None:
            pool.shut(replica)
            replica.go_down()
            self._lose(replica.fail(), pool)
            if away is not None:
                self._later(away + self._start_up, lambda: self._repair(replica, pool))
        if again:
            self._later((away or 0) + self._start_up, lambda: self._next(replica))

    def _lose(self, lost: list[Request], pool: ReplicaPool) -> None:
        if self._failures.on_failure == "retry":
            self._cluster.gather()
            for request in lost:
                (self._again if request._emitted else pool).send(request, self._cluster.now)
            return
        now = self._cluster.now
        for request in lost:
            self._cluster.requests.end(request, now, Status.FAILED)
            self._cluster.ended(request, now)

    def _repair(self, replica: Replica, pool: ReplicaPool) -> None:
        if self._cluster.left and replica.pool is None:  # an autoscaler may have replaced it
            pool.open(replica)


class Autoscaler:
    """Opens and drains the replicas of one pool, of which the first few are open to begin with."""

    def __init__(self, cluster: Cluster, pool: ReplicaPool, settings: Autoscale) -> None:
        self._cluster = cluster
        self._pool = pool
        self._settings = settings
        self._coming: set[int] = set()
        self._schedule = sorted((picoseconds(p.at_s), p.replicas) for p in settings.schedule)
        if self._schedule:
            for at, count in self._schedule:
                cluster.after(at, CHANGE, lambda n=count: self._aim(n))  # type: ignore[misc]
        else:
            cluster.after(picoseconds(settings.every_s), CHANGE, self._look)

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
        self._cluster.after(picoseconds(settings.every_s), CHANGE, self._look)

    def _aim(self, wanted: int) -> None:
        """Have ``wanted`` replicas, within the limits: order some, or drain those that came last."""
        wanted = min(max(wanted, self._settings.min), self._settings.max)
        pool = self._pool
        have = len(pool.replicas) + len(self._coming)
        if wanted > have:
            spare = [r for r in self._cluster.replicas if r.pool is None and r.index not in self._coming]
            for replica in spare[: wanted - have]:
                if replica.draining:
                    pool.open(replica)
                    continue
                self._coming.add(replica.index)
                delay = picoseconds(self._settings.provision_s)
                self._cluster.after(delay, CHANGE, lambda r=replica: self._arrive(r))  # type: ignore[misc]
        for replica in reversed(pool.replicas[wanted:]):
            pool.shut(replica)
            replica.draining = replica.held > 0
            if not replica.draining:
                replica.go_down()

    def _arrive(self, replica: Replica) -> None:
        self._coming.discard(replica.index)
        if self._cluster.left and replica.pool is None:  # it may have been repaired before
            self._pool.open(replica)


class Patience:
    """Clients that give up: after a while in all, or after a while without the request being started."""

    def __init__(self, cluster: Cluster, limits: Limits) -> None:
        self._cluster = cluster
        self._total = None if limits.timeout_s is None else picoseconds(limits.timeout_s)
        self._queue = None if limits.queue_timeout_s is None else picoseconds(limits.queue_timeout_s)

    def arrived(self, request: Request) -> None:
        """Set the alarms of a request that arrives now."""
        if self._total is not None:
            self._cluster.after(self._total, CHANGE, lambda: self._give_up(request))
        if self._queue is not None:
            self._cluster.after(self._queue, CHANGE, lambda: self._give_up_waiting(request))

    def _give_up_waiting(self, request: Request) -> None:
        if self._cluster.requests.admitted[request.id] < 0:
            self._give_up(request)

    def _give_up(self, request: Request) -> None:
        cluster = self._cluster
        if cluster.requests.status[request.id] != Status.PENDING:
            return
        if request._at >= 0:
            cluster.replicas[request._at].cancel(request)
            return
        # it has no replica, or is on its way between two: whoever would send it on finds it ended
        cluster.requests.end(request, cluster.now, Status.TIMED_OUT)
        cluster.ended(request, cluster.now)


class Handover:
    """KV goes from prefill replicas to a pool of decode replicas, through links that serve one transfer at a time."""

    def __init__(self, cluster: Cluster, link: Link, bytes_per_token: int, pool: ReplicaPool) -> None:
        self._cluster = cluster
        self._pool = pool
        self._token_ps = bytes_per_token / link.gb_per_s * 1000  # ps a token
        self._latency = round(link.latency_us * PS_PER_US)
        self._shared = link.shared
        self._free_at: dict[int, int] = {}  # link → when it has sent all it was given
        n = len(cluster.requests.trace)
        self._sent, self._come, self._from = (array("q", [-1]) * n for _ in HANDOVER_COLUMNS)
        cluster.requests.extra.update(zip(HANDOVER_COLUMNS, (self._sent, self._come, self._from), strict=True))

    def take(self, request: Request) -> bool:
        """Take a request over whose prompt is done; False if its first token was its last."""
        cluster = self._cluster
        if cluster.requests.trace.output_tokens[request.id] <= request._emitted:
            return False
        replica = cluster.replicas[request._at]
        replica.left(request)
        request.restart()
        now = cluster.now
        lane = -1 if self._shared else replica.index
        start = max(now, self._free_at.get(lane, 0))
        self._free_at[lane] = sent = start + round(self._token_ps * request.prompt_tokens)
        self._sent[request.id] = now
        self._from[request.id] = replica.index
        cluster.after(sent + self._latency - now, CHANGE, lambda: self._arrive(request))
        return True

    def _arrive(self, request: Request) -> None:
        if self._cluster.requests.status[request.id] != Status.PENDING:
            return  # its client has given up
        self._come[request.id] = self._cluster.now
        request._loaded = request.prompt_tokens
        self._pool.send(request, self._cluster.now)
