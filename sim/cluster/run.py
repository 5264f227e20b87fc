"""Serving the trace of one `Setup` to its end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from chairlift.policies.base import PolicyError
from chairlift.sim.cluster.audit import audit
from chairlift.sim.cluster.build import build
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.replica.counting_pool import PrefixCacheMatters
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.users_code import blame, name_of
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
        except BaseException as error:
            for subject in (*(pool.router for pool in cluster.pools), *(e.scheduler for e in cluster.engines)):
                blame(error, subject)
            raise
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
        limit, ranks, done = engine.scheduler.sequence_limit, engine.planner.count, 0
        if limit is None:
            continue
        for runs in engine.records.run_parts():
            sizes = runs["chunks"] + runs["decodes"]
            if (over := np.flatnonzero(sizes > limit * ranks)).size:
                step = done + int(runs["steps"][: over[0]].sum()) + 1
                what = f"a step of {sizes[over[0]]} requests: its sequence_limit is {limit}"
                raise PolicyError(what, name_of(engine.scheduler), step)
            done += int(runs["steps"].sum())
