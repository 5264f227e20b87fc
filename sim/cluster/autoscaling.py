"""Replicas that come and go with the load, as Kubernetes' autoscalers order them.

At every look a rule says how many replicas it would have. The rules are those that people run:

- ``target_outstanding``, ``target_queued``, ``target_kv``: an HPA's ratio to a target (KEDA makes an HPA). Of n
  requests and a target of T, ceil(n / T) replicas; of a mean share u of KV over m replicas and a target of K,
  ceil(m · u / K). No change while n / T, or m · u / K, is within ``tolerance`` of the replicas there are.
- ``saturation``: llm-d's Workload Variant Autoscaler. A replica is full at ``kv`` of its pool, or with ``queue``
  waiting. One replica more where those that are not full have on average less than ``spare_kv`` or ``spare_queue`` left
  to that; one less where they would have more even with one replica fewer. Nothing while one is on its way.
- ``target_waiting`` W: with w waiting at m replicas, as many more as bring w down to W a replica, m while fewer wait,
  m − 1 if nobody does.

Then come an HPA's stabilisation windows, limits a look, ``min`` and ``max``. With ``min: 0`` the last replica goes once
nobody has been there for ``idle_s``, and the first comes when a look finds somebody waiting.

What was ordered comes ``provision_s`` later, and takes requests ``load_s`` after that; while it loads it is paid for.
Where fewer are wanted before, the last orders are withdrawn first, and only then are replicas drained that are up.

Example: at 10 s the schedule asks for 8 replicas, one is up, and 7 are ordered for 70 s. At 40 s it asks for 1: all 7
orders are withdrawn, and no replica ever comes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from chairlift.sim.cluster.clock import CHANGE
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.study import Autoscale
from chairlift.sim.units import PS_PER_S, picoseconds

ROUNDING = 1e-9  # of a ratio: 3 requests and a target of 0.1 are 30 replicas, not 31


class Autoscaler:
    """Opens and drains ``replicas``, all that ``pool`` ever has. The first few are open to begin with."""

    def __init__(self, cluster: Cluster, pool: ReplicaPool, replicas: Sequence[Replica], settings: Autoscale) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._pool = pool
        self._replicas = replicas
        self._settings = settings
        self._ordered: dict[int, int] = {}  # index of a replica that is on its way → number of its order
        self._orders = self._withdrawn = 0  # so far
        self._loading_since: dict[int, int] = {}  # index of a replica that loads → since when
        self._loaded_ps = 0  # all the time that replicas have loaded, those that load now left out
        self._wanted: deque[tuple[int, int]] = deque()  # when, how many: by the looks in the longer window
        self._shares: dict[int, float] = {}  # index of a replica → share of its KV in use, at the look under way
        self._idle_since: int | None = None
        schedule = sorted((picoseconds(p.at_s), p.replicas) for p in settings.schedule)
        for at, count in schedule:
            self._clock.after(at, CHANGE, partial(self._aim, count))
        if not schedule:
            self._clock.after(picoseconds(settings.every_s), CHANGE, self._look)

    def said(self) -> str:
        """What it ordered, and what loading took, in words."""
        now = self._clock.now
        loading = self._loaded_ps + sum(now - since for since in self._loading_since.values())
        told = f"{self._orders} orders, {self._withdrawn} of them withdrawn; a replica comes "
        told += f"{self._settings.provision_s:g} s after it is ordered"
        if self._settings.load_s:
            told += f" and loads for {self._settings.load_s:g} s, in all {loading / PS_PER_S / 3600:.3g} paid hours"
        return told

    # a look

    def _look(self) -> None:
        if self._cluster.left == 0:
            return
        if not self._ordered:  # nothing happens in a cluster that waits for its first replica
            self._cluster.watch()
        begun = self._clock.now
        if self._settings.target_kv is None and self._settings.saturation is None:
            self._decide(begun)
        else:
            self._read(partial(self._decide, begun))

    def _read(self, then: Callable[[], None]) -> None:
        """Note how much of its KV each replica uses at its next step boundary; call ``then`` after the last of them."""
        now = self._clock.now
        ends = [(replica, replica.boundary()) for replica in self._pool.replicas]
        self._shares = {}
        last = now
        for replica, end in ends:
            if end is None or end <= now:
                self._note(replica)
            else:
                self._clock.after(end - now, CHANGE, partial(self._note, replica))
                last = max(last, end)
        if last > now:
            self._clock.after(last - now, CHANGE, then)
        else:
            then()

    def _note(self, replica: Replica) -> None:
        pool = replica.engine.pool
        self._shares[replica.index] = 1 - pool.free / pool.total

    def _decide(self, begun: int) -> None:
        """Have as many replicas as the rule says, once windows and limits have had their say; look again later."""
        if self._cluster.left == 0:
            return
        settings, now = self._settings, self._clock.now
        have = len(self._pool.replicas) + len(self._ordered)
        wanted = self._by_rule(have)
        if settings.min == 0:
            wanted = self._from_zero(wanted, have)
        wanted = min(max(wanted, settings.min), settings.max)
        self._aim(self._stabilised(wanted, have, now))
        self._clock.after(max(1, begun + picoseconds(settings.every_s) - now), CHANGE, self._look)

    def _by_rule(self, have: int) -> int:
        settings, pool = self._settings, self._pool
        waiting = sum(pool.waiting) + len(pool.homeless)
        if settings.target_outstanding is not None:
            return self._by_ratio((sum(pool.outstanding) + len(pool.homeless)) / settings.target_outstanding, have)
        if settings.target_queued is not None:
            return self._by_ratio(waiting / settings.target_queued, have)
        if settings.target_kv is not None:
            shares = list(self._shares.values())
            mean = sum(shares) / len(shares) if shares else 0.0
            return self._by_ratio(have * mean / settings.target_kv, have)
        if settings.saturation is not None:
            return self._by_room(have)
        assert settings.target_waiting is not None
        now = len(pool.replicas)
        if waiting > settings.target_waiting * now:
            return int(now + -(-(waiting - settings.target_waiting * now) // max(1, settings.target_waiting)))
        return now if waiting else now - 1

    def _by_ratio(self, needed: float, have: int) -> int:
        """So many replicas, rounded up; those there are if that is within the tolerance of them."""
        if have and abs(needed / have - 1) <= self._settings.tolerance:
            return have
        return math.ceil(needed - ROUNDING)

    def _by_room(self, have: int) -> int:
        limits = self._settings.saturation
        assert limits is not None
        if self._ordered:  # wait until it has come: it may be enough
            return have
        read = [
            (self._shares[replica.index], waiting)
            for replica, waiting in zip(self._pool.replicas, self._pool.waiting, strict=True)
            if replica.index in self._shares
        ]
        roomy = [(kv, waiting) for kv, waiting in read if kv < limits.kv and waiting < limits.queue]
        if not roomy:
            return have + 1 if read else have
        kv, waiting = (sum(column) for column in zip(*roomy, strict=True))
        n = len(roomy)
        if limits.kv - kv / n < limits.spare_kv or limits.queue - waiting / n < limits.spare_queue:
            return have + 1
        less = n - 1
        if less and limits.kv - kv / less >= limits.spare_kv and limits.queue - waiting / less >= limits.spare_queue:
            return have - 1
        return have

    def _from_zero(self, wanted: int, have: int) -> int:
        """``wanted``, but none only after a while without requests, and one if there is none and somebody waits."""
        pool, now = self._pool, self._clock.now
        if sum(pool.outstanding) or pool.homeless:
            self._idle_since = None
            return max(1, wanted)
        if self._idle_since is None:
            self._idle_since = now
        idle_s = self._settings.idle_s
        assert idle_s is not None
        over = now - self._idle_since >= picoseconds(idle_s)
        return 0 if over else max(min(1, have), wanted)

    def _stabilised(self, wanted: int, have: int, now: int) -> int:
        """As an HPA: up to the least wanted in one window, down to the most wanted in the other, a few at a time."""
        settings = self._settings
        up, down = picoseconds(settings.stabilise_up_s), picoseconds(settings.stabilise_down_s)
        looks = self._wanted
        looks.append((now, wanted))
        while looks[0][0] < now - max(up, down):
            looks.popleft()
        least = min(count for at, count in looks if at >= now - up)
        most = max(count for at, count in looks if at >= now - down)
        if have < least:
            return least if settings.most_up is None else min(least, have + settings.most_up)
        if have > most:
            return most if settings.most_down is None else max(most, have - settings.most_down)
        return have

    # what is done

    def _aim(self, wanted: int) -> None:
        """Have ``wanted`` replicas: order some, or drain those that come last."""
        pool = self._pool
        have = len(pool.replicas) + len(self._ordered)
        if wanted > have:
            spare = [r for r in self._replicas if not r.takes_requests and r.index not in self._ordered]
            for replica in spare[: wanted - have]:
                if replica.draining:
                    pool.open(replica)
                    continue
                self._orders += 1
                self._ordered[replica.index] = self._orders
                come = partial(self._come, replica, self._orders)
                self._clock.after(picoseconds(self._settings.provision_s), CHANGE, come)
        for _ in range(min(have - wanted, len(self._ordered))):
            index, _order = self._ordered.popitem()  # the last order
            self._withdrawn += 1
            self._end_loading(index)
            if not self._cluster.replicas[index].takes_requests:
                self._cluster.replicas[index].go_down()
        for replica in reversed(pool.replicas[wanted:]):
            pool.shut(replica)
            replica.draining = replica.held > 0
            if not replica.draining:
                replica.go_down()

    def _come(self, replica: Replica, order: int) -> None:
        """The GPUs of a replica are there."""
        if self._ordered.get(replica.index) != order:
            return  # withdrawn; it may be on its way by a later order
        if self._settings.load_s and self._cluster.left and not replica.takes_requests:
            replica.go_up()
            self._loading_since[replica.index] = self._clock.now
            self._clock.after(picoseconds(self._settings.load_s), CHANGE, partial(self._ready, replica, order))
        else:
            self._ready(replica, order)

    def _ready(self, replica: Replica, order: int) -> None:
        """A replica has loaded its model."""
        if self._ordered.get(replica.index) != order:
            return
        self._end_loading(replica.index)
        del self._ordered[replica.index]
        if self._cluster.left and not replica.takes_requests:  # it may have been repaired meanwhile
            self._pool.open(replica)

    def _end_loading(self, index: int) -> None:
        since = self._loading_since.pop(index, None)
        if since is not None:
            self._loaded_ps += self._clock.now - since
