"""Small clusters built in Python, and what must hold of every run of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from chairlift.backend.base import Backend
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.policies.base import Scheduler
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.cluster.run import run
from chairlift.sim.replica.engine import Engine
from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.study import Link, Setup
from kit.worlds import GPU as GPU  # for those who build clusters
from kit.worlds import MODEL, Affine, Group, host_of, most, planners, sorted_gaps
from kit.worlds import setup_of as setup_of  # likewise


def group(
    scheduler: type[Scheduler] = Vllm,
    settings: dict[str, Any] | None = None,
    count: int = 1,
    role: str = "mixed",
    blocks: int = 1000,
    block_size: int = 16,
    cost: Backend | None = None,
    ranks: int = 1,
) -> Group:
    """``count`` replicas; vLLM's policy is a step at a time and without a cache unless ``settings`` say otherwise.

    ``blocks``: of each of ``ranks``.
    """
    if settings is None:
        settings = {"async_scheduling": False, "enable_prefix_caching": False} if scheduler is Vllm else {}
    if (own := scheduler(**settings).block_tokens) is not None:
        blocks, block_size = blocks * block_size // own, own
    parallel = Parallel(data=ranks)
    parts = (count, role, GPU, parallel, scheduler, settings, Efficiency(), blocks * ranks, block_size, "made up")
    return Group(*parts, *host_of(6, 1000, block_size), cost=cost or Affine())


def s(ps: float) -> float:
    """Picoseconds in the seconds that settings are given in."""
    return ps / 10**12


def link(token_ps: int, latency_ps: int = 0, shared: bool = False) -> Link:
    """A link that takes ``token_ps`` ps for the KV of a token, and ``latency_ps`` more for each transfer."""
    return Link(gb_per_s=MODEL.kv_bytes_per_token * 1000 / token_ps, latency_us=latency_ps / 10**6, shared=shared)


@dataclass
class Served:
    """A finished run, and what it left behind."""

    setup: Setup
    requests: RequestRecords
    engines: list[Engine]
    replicas: list[Replica]
    pools: list[ReplicaPool]
    endings: list[int]  # rows, as they ended
    cluster: Cluster

    def columns(self) -> dict[str, list[int]]:
        """The request columns."""
        return {name: column.tolist() for name, column in self.requests.columns().items()}

    def gaps(self) -> list[list[tuple[int, int]]]:
        """Inter-token gaps of each replica as sorted (gap, how many)."""
        return [sorted_gaps(engine) for engine in self.engines]

    def steps(self) -> list[int]:
        """Steps of each replica."""
        return [int(engine.records.runs()["steps"].sum()) for engine in self.engines]


def serve(setup: Setup, leap: bool = True, journal: bool = False) -> Served:
    """As `sim.simulate.simulate`, but hands back the cluster's parts, and in which order requests ended."""
    endings: list[int] = []

    def observe(cluster: Cluster) -> None:
        endings.clear()
        cluster.on_end = lambda request: endings.append(request.id)

    cluster = run(setup, leap, journal=journal, observe=observe)
    return Served(setup, cluster.requests, cluster.engines, cluster.replicas, cluster.pools, endings, cluster)


def check_endings(served: Served) -> None:
    """Every request ended exactly once, in a way that its cluster knows, with the tokens and times that go with it."""
    setup, r = served.setup, served.requests
    columns = served.columns()
    n = len(setup.trace)
    assert sorted(served.endings) == list(range(n))
    limits = setup.limits
    for i in range(n):
        arrival, admitted, first, finished = (
            columns[name][i] for name in ("arrival_ps", "admitted_ps", "first_token_ps", "finished_ps")
        )
        emitted, output = columns["emitted_tokens"][i], columns["output_tokens"][i]
        status = Status(columns["status"][i])
        assert status != Status.PENDING
        assert 0 <= emitted <= output
        assert finished >= max(arrival, admitted, first)
        assert (first >= 0) == (emitted > 0)
        if first >= 0:
            assert arrival <= admitted < first
        if status == Status.FINISHED:
            assert emitted == min(output, most(served.engines[columns["replica"][i]], setup.trace, i))
            assert first >= 0
        elif status == Status.TIMED_OUT:
            patience = [t for t in (limits.timeout_s, limits.queue_timeout_s) if t is not None]
            assert finished >= arrival + round(min(patience) * 10**12)
        elif status == Status.FAILED:
            assert setup.failures is not None
            assert setup.failures.on_failure == "fail"
        follows = setup.trace.follows
        if follows is not None and (before := int(follows[i])) >= 0:
            assert setup.trace.think_ps is not None
            assert arrival == r.finished[before] + int(setup.trace.think_ps[i])
        if "handed_over_ps" in columns and (sent := columns["handed_over_ps"][i]) >= 0:
            assert first <= sent
            assert columns["taken_over_ps"][i] == -1 or sent <= columns["taken_over_ps"][i] <= finished


def check_nothing_left(served: Served) -> None:
    """No request, block or count is left on any replica."""
    for replica in served.replicas:
        engine = replica.engine
        for planner in planners(engine):
            state, decodes = planner.state, planner.state.group
            assert planner.pool.free == planner.pool.total
            assert (state.kv_tokens, planner.promised, len(state.waiting), len(state.admitted)) == (0, 0, 0, 0)
            assert (decodes.context, decodes.live, decodes.dead) == (0, 0, 0)
        assert (replica.held, replica.draining) == (0, False)
    for pool in served.pools:
        assert len(set(pool.indices)) == len(pool.indices)
        assert not any(pool.outstanding)
        assert not any(pool.outstanding_tokens)


def check_tokens(served: Served) -> None:
    """Each token that a client has is a first token or ends a gap."""
    columns = served.columns()
    gaps = sum(weight for replica in served.gaps() for _, weight in replica)
    firsts = sum(first >= 0 for first in columns["first_token_ps"])
    assert gaps + firsts == sum(columns["emitted_tokens"])


def check_gap_time(served: Served) -> None:
    """Gaps telescope: if all who got tokens got all, they add up to the times from first tokens to last."""
    columns = served.columns()
    table = zip(
        *(columns[name] for name in ("status", "emitted_tokens", "first_token_ps", "finished_ps")),
        strict=True,
    )
    begun = [(status, last - first) for status, emitted, first, last in table if emitted]
    if all(status == Status.FINISHED for status, _ in begun):
        gaps = sum(gap * weight for replica in served.gaps() for gap, weight in replica)
        assert gaps == sum(span for _, span in begun)


def same(one: Served, other: Served) -> None:
    """Two runs that must agree in every request column."""
    mine, theirs = one.requests.columns(), other.requests.columns()
    for name, column in mine.items():
        assert np.array_equal(column, theirs[name]), name
    assert mine.keys() == theirs.keys()
