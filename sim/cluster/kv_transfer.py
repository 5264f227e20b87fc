"""The hand-over of KV from prefill replicas to decode replicas, where the two are apart."""

from __future__ import annotations

from array import array
from functools import partial

from chairlift.sim.cluster.clock import CHANGE
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import HANDOVER_COLUMNS, Status
from chairlift.sim.study import Link
from chairlift.sim.units import PS_PER_NS, PS_PER_US


class Handover:
    """Sends the KV of prompts from prefill replicas to ``pool``, the decode replicas, through ``link``.

    A lane of the link, one a prefill replica or one for all, serves one transfer at a time, first come first served. A
    transfer occupies its lane for bytes / bandwidth, and its KV has come the link's latency later. An example with 10
    ps a token, a latency of 3 ps and prompts of 4 and 6 tokens that are done at 100 and 110: the first occupies the
    lane from 100 to 140 and has come at 143; the second occupies the lane from 140 to 200 and has come at 203.
    """

    def __init__(self, cluster: Cluster, link: Link, bytes_per_token: int, pool: ReplicaPool) -> None:
        self._cluster = cluster
        self._clock = cluster.clock
        self._pool = pool
        self._token_ps = bytes_per_token / link.gb_per_s * PS_PER_NS  # 1e9 bytes a second are one a nanosecond
        self._latency = round(link.latency_us * PS_PER_US)
        self._shared = link.shared
        self._free_at: dict[int, int] = {}  # lane → when it has sent all that it was given
        n = len(cluster.requests.trace)
        self._sent, self._come, self._from = (array("q", [-1]) * n for _ in HANDOVER_COLUMNS)
        cluster.requests.extra.update(zip(HANDOVER_COLUMNS, (self._sent, self._come, self._from), strict=True))

    def take(self, request: Live) -> bool:
        """Take a request over whose prompt is done; False if its first token was its last."""
        cluster = self._cluster
        if cluster.requests.trace.output_tokens[request.row] <= request.produced:
            return False
        replica = cluster.replicas[request.at]
        replica.left(request)
        request.depart()
        now = self._clock.now
        lane = -1 if self._shared else replica.index
        start = max(now, self._free_at.get(lane, 0))
        self._free_at[lane] = sent = start + round(self._token_ps * request.prompt)
        self._sent[request.row] = now
        self._from[request.row] = replica.index
        self._clock.after(sent + self._latency - now, CHANGE, partial(self._arrive, request))
        return True

    def _arrive(self, request: Live) -> None:
        if self._cluster.requests.status[request.row] != Status.PENDING:
            return  # its client has given up
        self._come[request.row] = self._clock.now
        request.load(request.prompt)
        self._pool.send(request, self._clock.now)
