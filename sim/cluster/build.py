"""From a `Setup` to a `Cluster` ready to run: replicas with their engines, routers, and what else the setup asks for.

The only place where an `Engine` of a simulated cluster is made.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from chairlift.backend.base import Backend, Executor
from chairlift.backend.machine import check_memory
from chairlift.policies.base import FOREVER, KvGroups, Scheduler, Speculation
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cluster.autoscaling import Autoscaler
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.failures import Breakdowns
from chairlift.sim.cluster.kv_transfer import Handover
from chairlift.sim.cluster.replica import Replica
from chairlift.sim.cluster.replica_pool import ReplicaPool
from chairlift.sim.cluster.requests import request_maker
from chairlift.sim.cluster.timeouts import Patience
from chairlift.sim.replica.counting_pool import CountingPool, StandInPool
from chairlift.sim.replica.drafts import DraftedPool, DraftedTablePool
from chairlift.sim.replica.engine import Engine, make_engine
from chairlift.sim.replica.executing import Execution
from chairlift.sim.replica.host_memory import HostMemory, host_memory
from chairlift.sim.replica.hybrid_pool import DraftedHybridPool, HybridPool, HybridStandIn
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.prefix_pool import PrefixPool, TablePool
from chairlift.sim.replica.radix_pool import RadixPool
from chairlift.sim.replica.ranks import RankBackend, Ranks, rank_records
from chairlift.sim.replica.stages import Staged, StagedPlanner, StagedVerifyingPlanner
from chairlift.sim.replica.verifying import VerifyingPlanner
from chairlift.sim.results.records import RequestRecords
from chairlift.sim.study import Autoscale, ReplicaGroup, Setup
from chairlift.sim.workload.acceptance import Draws
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.trace import Trace

# Measured: 640 to 2,200 bytes of records and traces a request, 48 of lists a block.
BYTES_A_REQUEST, BYTES_A_BLOCK = 600, 48
EXECUTED_BLOCK = 16  # tokens; how finely prompts are told apart where steps run on a pool that only counts its blocks


def build(
    setup: Setup,
    leap: bool = True,
    progress: Callable[[int], None] | None = None,
    journal: bool = False,
    identify: bool = True,
) -> Cluster:
    """The cluster that ``setup`` describes, its replicas up and empty, before the first arrival.

    ``leap``, ``progress`` and ``journal`` are as in `sim.simulate.simulate`. ``identify``: prefix caching, where a
    policy has it, knows each block. Without, blocks are only counted, which is faster, and the run raises
    `PrefixCacheMatters` should that not be enough. Raises `PolicyError` if the replicas' policies want different
    predictions, `BadInput` if a backend cannot run here, and MemoryError if all this takes more than the machine has.
    """
    _check_memory(setup, identify)
    identities: dict[tuple[int, int], Identity] | None = {} if identify else None
    records = RequestRecords(setup.trace)
    cluster = Cluster(records, request_maker(setup, records.arrival, identities), progress)
    cluster.front = decode = _pool(cluster, setup, "router")
    handover = None
    if setup.link is not None:
        decode = _pool(cluster, setup, "decode router")
        handover = Handover(cluster, setup.link, setup.model.kv_bytes_per_token, decode)
    engines = _Engines(setup, cluster, handover, leap, journal, identities)
    homes: list[ReplicaPool] = []  # of each replica
    scaled: list[tuple[ReplicaPool, list[Replica], Autoscale]] = []
    for group in setup.groups:
        home = decode if group.role == "decode" else cluster.front
        own = len(cluster.replicas)
        for _ in range(setup.most(group)):
            replica = Replica(cluster.clock, len(cluster.replicas), partial(engines.make, group), cluster.ended)
            cluster.replicas.append(replica)
            homes.append(home)
        home.open(*cluster.replicas[own : own + group.count])  # at once: one by one a thousand would take their square
        if (scale := setup.scale_of(group)) is not None:
            scaled.append((home, cluster.replicas[own:], scale))
    if setup.failures is not None:
        chances = [_chance(setup, f"failures of replica {r.index}") for r in cluster.replicas]
        Breakdowns(cluster, setup.failures, homes, chances, setup.start_up_ps, decode)
    cluster.scalers = [Autoscaler(cluster, home, replicas, scale) for home, replicas, scale in scaled]
    if setup.limits.timeout_s is not None or setup.limits.queue_timeout_s is not None:
        cluster.on_arrival = Patience(cluster, setup.limits).arrived
    return cluster


def _check_memory(setup: Setup, identify: bool) -> None:
    """Raise MemoryError where the records, or blocks that are known one by one, take more than the machine has."""
    requests, blocks = len(setup.trace), 0
    for group in setup.groups:
        scheduler = group.make_scheduler()
        if identify and scheduler.prefix_caching and scheduler.radix is None:
            blocks += group.blocks * (group.count if setup.autoscale is None else setup.autoscale.max)
    what = f"{requests:,} requests" + (f" and {blocks:,} blocks of a prefix cache" if blocks else "")
    check_memory(requests * BYTES_A_REQUEST + blocks * BYTES_A_BLOCK, what)


def _pool(cluster: Cluster, setup: Setup, purpose: str) -> ReplicaPool:
    """A pool, still without replicas, with a router of its own; ``purpose`` names that router's source of chance."""
    router, chance = setup.make_router(), _chance(setup, purpose)
    limit = setup.limits.queue
    pool = ReplicaPool(cluster.clock, cluster.requests, router, chance, cluster.refuse, setup.router_stale_ps, limit)
    cluster.pools.append(pool)
    return pool


def _chance(setup: Setup, purpose: str) -> Random:
    return Random(int(stream(setup.seed, purpose).integers(1 << 62)))


@dataclass
class _Engines:
    """Makes the engines of a cluster: one for each replica, and a fresh one after each failure."""

    setup: Setup
    cluster: Cluster
    handover: Handover | None
    leap: bool
    journal: bool
    identities: dict[tuple[int, int], Identity] | None  # see `make_pool`

    def __post_init__(self) -> None:
        self._outputs = array("i", self.setup.trace.output_tokens.tobytes())
        speculate = self.setup.speculate
        self._accepts: Draws | None = None
        if speculate is not None:
            seed = int(stream(self.setup.seed, "acceptance").integers(1 << 62))
            self._accepts = Draws(speculate.acceptance.of(speculate.tokens), seed)
        self._first_only = array("b", [1]) * len(self._outputs)  # what a prefill replica has to emit

    def make(self, group: ReplicaGroup, replica: Replica) -> Engine:
        """A fresh engine for a replica of ``group``. Raises `BadInput` where its backend cannot serve it."""
        ranks = group.parallel.data
        if ranks == 1:
            planner = self._planner(group, replica, group.blocks)
            executes = isinstance(planner.backend, Executor)
            execution = Execution(planner, self._identity(planner.pool, group)) if executes else None
            return Staged(planner, execution) if isinstance(planner, StagedPlanner) else make_engine(planner, execution)
        backend = _backend(self.setup, group)
        each = (self._planner(group, replica, group.blocks // ranks, RankBackend(backend, ranks)) for _ in range(ranks))
        return make_engine(Ranks(list(each), backend, replica.records))

    def _planner(self, group: ReplicaGroup, replica: Replica, blocks: int, backend: Backend | None = None) -> Planner:
        """A planner with a pool of so many blocks; ``backend``: of a rank, else the replica's own."""
        setup, cluster = self.setup, self.cluster
        prefills = group.role == "prefill"
        scheduler = group.make_scheduler()
        more = (setup.executes, group.kv_groups, setup.max_model_len, group.speculation)
        pool = make_pool(scheduler, setup.trace, blocks, group.block_size, self.identities, *more)
        backend = backend or _backend(setup, group, pool)
        outputs = self._first_only if prefills else self._outputs

        executes = isinstance(backend, Executor)
        kind: Callable[..., Planner] = Planner
        staged = group.stages > 1
        if group.speculation is not None and self._accepts is not None:
            verifying = StagedVerifyingPlanner if staged else VerifyingPlanner
            kind = partial(verifying, group.speculation, self._accepts)
        elif staged:
            kind = StagedPlanner
        planner = kind(
            scheduler,
            backend,
            pool,
            cluster.requests,
            outputs,
            setup.max_model_len,
            replica.index,
            leap=self.leap and not executes,
            finish=replica.finish,
            host=None if executes else make_host(setup, group),
            records=replica.records if group.parallel.data == 1 else rank_records(replica.records),
            handover=self.handover.take if prefills and self.handover is not None else None,
            journal=self.journal,
            stages=group.stages,
        )
        planner.ends_in_plan = replica.ends_in_plan
        planner.state.expect(cluster.more_arrivals)
        return planner

    def _identity(self, pool: CountingPool, group: ReplicaGroup) -> Identity:
        """Which prompts of an executed run have tokens in common: the pool's own idea, if it has one."""
        known = (self.identities or {}).get((pool.block_size, _ahead(group.speculation))) if pool.tracks else None
        return known or Identity(self.setup.trace, EXECUTED_BLOCK)


def _backend(setup: Setup, group: ReplicaGroup, pool: CountingPool | None = None) -> Backend:
    """A backend for one replica, and its pool if it has one alone. Raises `BadInput` where it cannot serve that."""
    try:
        backend = group.make_backend(setup.model)
        if isinstance(backend, Executor) and pool is not None:
            backend.prepare(pool.total, pool.block_size, setup.max_model_len, pool.tracks)
    except ValueError as error:
        raise BadInput(Problem(str(error), path="backend")) from None
    return backend


def make_host(setup: Setup, group: ReplicaGroup) -> HostMemory:
    """Fresh host memory for the swapped KV of one replica."""
    kv_bytes = setup.model.kv_bytes_per_token_on(group.parallel.tensor)
    line_rate = group.gpu.host_gb_per_s
    rate = None if line_rate is None else line_rate * group.host_link
    return host_memory(group.host_gib, kv_bytes, rate, group.block_size, group.scheduler.overlaps_swaps)


def _ahead(speculation: Speculation | None) -> int:
    """Tokens behind a block that its hash covers too."""
    return int(speculation is not None and speculation.prefix == "lookahead")


def make_pool(
    scheduler: Scheduler,
    trace: Trace,
    blocks: int,
    block_size: int,
    identities: dict[tuple[int, int], Identity] | None,
    executes: bool = False,
    groups: KvGroups | None = None,
    max_model_len: int = FOREVER,
    speculation: Speculation | None = None,
) -> CountingPool:
    """The KV pool that ``scheduler`` needs: it knows each block only where prefix caching or windows can matter.

    ``identities``: by block size and tokens that hashes look ahead, what all replicas share of the trace, filled as
    needed; None where blocks are only counted (`build`). ``executes``: steps really run. ``groups``: of the model's
    layers, if some have a window. ``speculation``: drafts that its decodes verify.
    """

    def identity() -> Identity:
        known = {} if identities is None else identities
        ahead = _ahead(speculation)
        if (block_size, ahead) not in known:
            known[block_size, ahead] = Identity(trace, block_size, ahead)
        return known[block_size, ahead]

    if groups is not None and (cache := scheduler.hybrid) is not None:
        parts = (blocks, block_size, groups, cache, max_model_len, scheduler.asynchronous, scheduler.uncached_first)
        if speculation is not None:
            finds = identity() if scheduler.prefix_caching and identities is not None else None
            return DraftedHybridPool(*parts, finds, stands_in=scheduler.prefix_caching and identities is None)
        if not scheduler.prefix_caching:
            return HybridPool(*parts)
        return HybridStandIn(*parts) if identities is None else HybridPool(*parts, identity())
    if not scheduler.prefix_caching:
        return CountingPool(blocks, block_size)
    if (tree := scheduler.radix) is not None:
        return RadixPool(blocks, block_size, identity(), tree.unified, numbered=executes)
    if identities is None:
        return StandInPool(blocks, block_size)
    if speculation is not None:
        settings = (scheduler.asynchronous, scheduler.uncached_first)
        drafted = DraftedTablePool if executes else DraftedPool
        return drafted(blocks, block_size, identity(), *settings, drops_last=speculation.prefix == "drop")
    kind = TablePool if executes else PrefixPool
    return kind(blocks, block_size, identity(), scheduler.asynchronous, scheduler.uncached_first)
