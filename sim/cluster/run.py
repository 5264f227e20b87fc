"""Serving the trace of one `Setup` to its end."""

from __future__ import annotations

from collections.abc import Callable

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
    before it runs, so once or twice. Raises as `build` and `Cluster.run` do.
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
        return cluster
