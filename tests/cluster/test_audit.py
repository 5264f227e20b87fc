"""The audit of every run finds a fault where one is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from chairlift.sim.cluster.audit import audit
from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.cluster.run import run
from chairlift.sim.results.records import RUN_COLUMNS, Rows
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
    make_longer(cluster, 0, 10**6)


def a_last_step_too_long(cluster: Cluster) -> None:
    make_longer(cluster, -1, 1)


def make_longer(cluster: Cluster, row: int, ps: int) -> None:
    """One of the first replica's runs of steps takes so much longer."""
    records = cluster.replicas[0].records
    table = np.stack(list(records.runs().values()), axis=1)
    table[row, RUN_COLUMNS.index("first_ps")] += ps
    records.rows = Rows(RUN_COLUMNS)
    for each in table:
        records.rows.frombytes(each.tobytes())
        records.rows.pack()


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


@pytest.mark.parametrize("packed", [1, 2, 3])
def test_two_steps_at_once_are_found_among_packed_rows(
    cluster: Cluster, packed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chairlift.sim.results.records.PACKED_ROWS", packed)
    make_longer(cluster, 0, 0)  # as it was, but packed
    audit(cluster)
    monkeypatch.setattr("chairlift.sim.cluster.audit._gaps_add_up", lambda *_: None)  # it would find them first
    idle = 10**9
    for row in range(len(cluster.replicas[0].records.rows) - 1):
        make_longer(cluster, row, idle)
        with pytest.raises(AssertionError, match="replica 0: two steps at once"):
            audit(cluster)
        make_longer(cluster, row, -idle)
