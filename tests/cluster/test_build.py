"""What `build` makes of a setup: replicas, pools and engines, before the first arrival."""

from __future__ import annotations

import pytest

from chairlift.policies.base import PolicyError
from chairlift.policies.routers import LeastOutstanding
from chairlift.policies.sjf import Sjf
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster.build import build, make_host
from chairlift.sim.replica.counting_pool import CountingPool, StandInPool
from chairlift.sim.replica.prefix_pool import PrefixPool
from chairlift.sim.results.records import Status
from chairlift.sim.study import Autoscale
from kit.clusters import group, link, setup_of
from kit.worlds import trace_of

TRACE = trace_of([(0, 8, 4), (10, 8, 4)])
CACHED = {"async_scheduling": False}


def test_replicas_are_up_and_empty_and_stand_in_their_pools() -> None:
    groups = [group(count=1, role="prefill"), group(count=2, role="decode", blocks=9)]
    cluster = build(setup_of(TRACE, groups, LeastOutstanding, link=link(10)))
    front, decode = cluster.pools

    assert cluster.front is front
    assert [r.index for r in front.replicas] == [0]
    assert [r.index for r in decode.replicas] == [1, 2]
    assert front.router is not decode.router
    assert [engine.pool.total for engine in cluster.engines] == [1000, 9, 9]
    assert [replica.held for replica in cluster.replicas] == [0, 0, 0]
    assert all(engine.records is r.records for engine, r in zip(cluster.engines, cluster.replicas, strict=True))
    assert (cluster.clock.now, cluster.left, set(cluster.requests.status)) == (0, 2, {Status.PENDING})


def test_of_an_autoscaled_group_all_replicas_are_made_and_the_first_few_take_requests() -> None:
    setup = setup_of(TRACE, [group(count=2)], autoscale=Autoscale(max=4, target_outstanding=1))
    cluster = build(setup)

    assert [replica.takes_requests for replica in cluster.replicas] == [True, True, False, False]


def test_what_was_built_runs_once_and_can_be_looked_into() -> None:
    cluster = build(setup_of(TRACE, [group(count=2)]))
    ended: list[int] = []
    cluster.on_end = lambda request: ended.append(request.id)

    cluster.run()

    assert sorted(ended) == [0, 1]
    assert cluster.left == 0
    assert list(cluster.requests.replica) == [0, 1]
    assert [int(engine.records.runs()["steps"].sum()) for engine in cluster.engines] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "identify", "kind"),
    [(None, True, CountingPool), (CACHED, False, StandInPool), (CACHED, True, PrefixPool)],
)
def test_blocks_are_known_one_by_one_only_where_that_is_wanted(
    settings: dict[str, bool] | None, identify: bool, kind: type[CountingPool]
) -> None:
    [engine] = build(setup_of(TRACE, [group(Vllm, settings)]), identify=identify).engines

    assert type(engine.pool) is kind


def test_host_memory_is_the_gpus_share_of_it_over_the_gpus_link() -> None:
    # OPT-13B: 819,200 bytes a token, 16 tokens a block. 1 GiB holds 81 blocks; 80 % of 31.5e9 bytes a second.
    one = group()
    one.host_gib, one.host_link = 1, 0.8
    host = make_host(setup_of(TRACE, [one]), one)

    assert host.blocks == 81
    assert host.block_ps == pytest.approx(16 * 819_200 / (0.8 * 31.5e9) * 1e12, rel=1e-6)


def test_policies_that_want_different_predictions_are_refused() -> None:
    groups = [group(Sjf, {"predictions": "noisy", "tau": tau}) for tau in (0.5, 0.9)]

    with pytest.raises(PolicyError, match="want different predictions"):
        build(setup_of(TRACE, groups))
