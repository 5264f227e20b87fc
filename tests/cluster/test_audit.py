"""The audit of every run finds a fault where one is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chairlift.sim.cluster.audit import audit
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.run import run
from chairlift.sim.results.records import RUN_COLUMNS
from kit.clusters import group, setup_of
from kit.worlds import trace_of


@pytest.fixture
def cluster() -> Cluster:
    trace = trace_of([(0, 8, 20), (500, 30, 9), (900, 8, 1), (70_000, 4, 4)])
    return run(setup_of(trace, [group(count=2)]))


def too_long_inside(cluster: Cluster) -> None:
    cluster.requests.finished[0] += 1


def a_token_too_many(cluster: Cluster) -> None:
    cluster.requests.emitted[3] += 1


def a_step_too_long(cluster: Cluster) -> None:
    cluster.replicas[0].records.rows[RUN_COLUMNS.index("first_ps")] += 10**6


def a_last_step_too_long(cluster: Cluster) -> None:
    rows = cluster.replicas[0].records.rows
    rows[len(rows) - len(RUN_COLUMNS) + RUN_COLUMNS.index("first_ps")] += 1


def a_block_kept(cluster: Cluster) -> None:
    cluster.engines[1].pool.free -= 1


def a_swapped_block_kept(cluster: Cluster) -> None:
    cluster.engines[1].state.host.free -= 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (too_long_inside, "Little's law: .* ps by the records, .* ps by the clock"),
        (a_token_too_many, "35 tokens, 4 of them first ones, 30 gaps"),
        (a_last_step_too_long, "gaps of .* ps in all, .* ps from first tokens to latest"),
        (a_step_too_long, "replica 0: two steps at once"),
        (a_block_kept, "replica 1: blocks are left behind"),
        (a_swapped_block_kept, "replica 1: swapped blocks are left behind"),
    ],
)
def test_a_fault_is_found(cluster: Cluster, fault: Callable[[Cluster], None], message: str) -> None:
    audit(cluster)  # as it was served it is in order
    fault(cluster)

    with pytest.raises(AssertionError, match=message):
        audit(cluster)
