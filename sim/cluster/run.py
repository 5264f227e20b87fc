"""Serving the trace of one `Setup` to its end."""

from __future__ import annotations

from collections.abc import Callable

from chairlift.policies.base import PolicyError
from chairlift.sim.cluster.audit import audit
from chairlift.sim.cluster.build import build
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.replica.counting_pool import PrefixCacheMatters
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.study import Setup


def run(
    setup: Setup,
    leap: bool = True,
    progress: Callable[[int], None] | None = None,
    journal: bool = False,
    observe: Callable[[Cluster], None] | None = None,
) -> Cluster:
    """The cluster that has served ``setup``'s trace: its records, replicas, engines and pools as the run left them.

    Blocks of a prefix cache are only counted where no two requests can share one; should a preemption make them matter
    all the same, the run starts again with blocks that are known one by one. ``observe`` is called with each cluster
    before it runs, so once or twice. Raises as `build` and `Cluster.run` do, and PolicyError if a policy broke its own
    limit of a step's requests.
    """
    identify = setup.executes or Identity.shares(setup.trace)
    while True:
        cluster = build(setup, leap, progress, journal, identify)
        if observe is not None:
            observe(cluster)
        try:
            cluster.run()
        except PrefixCacheMatters:
            identify = True
            continue
        finally:
            for engine in cluster.engines:
                engine.backend.close()
        audit(cluster)
        _within_limits(cluster)
        return cluster


def _within_limits(cluster: Cluster) -> None:
    """Raise PolicyError if a policy put more requests into a step than it says that it ever does.

    The memory of its activations was kept for no more, and bounds of plans rest on it. In two steps with a
    ``sequence_limit`` of 3: one with 2 chunks and 1 decode is within it, one with 2 chunks and 2 decodes is not.
    """
    for engine in cluster.engines:
        limit, ranks = engine.scheduler.sequence_limit, engine.planner.count
        most = max(int((runs["chunks"] + runs["decodes"]).max(initial=0)) for runs in engine.records.run_parts())
        if limit is not None and most > limit * ranks:
            name = type(engine.scheduler).__name__
            raise PolicyError(f"policy {name}: a step of {most} requests: its sequence_limit is {limit}")
