"""Autoscalers as HPA, KEDA and llm-d run them, worked out by hand: every step takes a STEP, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chairlift.backend.base import Batch, StepCost
from chairlift.policies.vllm import Vllm
from chairlift.sim.bad_input import BadInput
from chairlift.sim.results.records import Status
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Autoscale, Planned, Saturation
from kit.clusters import Served, check_endings, check_nothing_left, group, link, s, same, serve, setup_of
from kit.worlds import Affine, trace_of

STEP = 1000


class Steady(Affine):
    def step(self, batch: Batch) -> StepCost:
        return StepCost(STEP)


def vllm(count: int = 1, role: str = "mixed", blocks: int = 1000, **settings: Any) -> Any:
    return group(
        Vllm, {"async_scheduling": False, "enable_prefix_caching": False, **settings}, count, role, blocks, 4, Steady()
    )


def scale(most: int, every: int = 2000, provision: int = 0, **rule: Any) -> Autoscale:
    times = {key: s(value) for key, value in rule.items() if key.endswith("_s")}
    return Autoscale(max=most, every_s=s(every), provision_s=s(provision), **{**rule, **times})


def played(rows: list[tuple[int, int, int]], groups: list[Any], **more: Any) -> Served:
    """A run that leaps, which a run that does not agrees with."""
    setup = setup_of(trace_of(rows), groups, **more)
    served = serve(setup)
    same(served, serve(setup, leap=False))
    check_endings(served)
    check_nothing_left(served)
    return served


def ups(served: Served) -> list[int]:
    return [replica.up_ps for replica in served.replicas]


# ---- an HPA's ratio ----


@pytest.mark.parametrize(
    ("target", "tolerance", "comes"),
    [
        (2, 0, True),  # 3 / 2 = 1.5: two replicas
        (2, 0.49, True),
        (2, 0.5, False),  # within the tolerance of one
        (3, 0, False),
        (1.2, 0, True),  # 2.5: three, of which there are two at most
    ],
)
def test_replicas_by_requests_of_each(target: float, tolerance: float, comes: bool) -> None:
    """Three requests of ten steps from 0 on; a look at 2000 decides whether a replica comes at 2000 + 3000."""
    auto = scale(2, provision=3000, target_outstanding=target, tolerance=tolerance)
    served = played([(0, 4, 10)] * 3, [vllm()], autoscale=auto)

    assert ups(served) == [10_000, 5_000 if comes else 0]


def test_replicas_by_requests_that_wait() -> None:
    """Five requests, of which two run at a time: three wait at the first look, 3 / 1.5 are two replicas."""
    auto = scale(4, provision=1000, target_queued=1.5, stabilise_down_s=100_000)
    served = played([(0, 4, 5)] * 5 + [(3500, 4, 5)], [vllm(max_num_seqs=2)], autoscale=auto)

    assert ups(served)[1] > 0
    assert ups(served)[2:] == [0, 0]
    assert served.columns()["replica"] == [0] * 5 + [1]  # it comes at 3000


def test_replicas_by_their_share_of_kv() -> None:
    """20 blocks of 4 tokens; a prompt of 44 has 11 of them at first, 12 after its second token: 0.6 of the pool.

    At the look at 2000 that is 0.6 / 0.3: two replicas. With a target of 0.65 one is enough, as it is later on, when 13
    blocks are in use.
    """
    rows = [(0, 44, 8), (2500, 4, 4)]
    two = played(rows, [vllm(blocks=20)], autoscale=scale(2, target_kv=0.3, stabilise_down_s=100_000))
    one = played(rows[:1], [vllm(blocks=20)], autoscale=scale(2, target_kv=0.65, stabilise_down_s=100_000))

    assert two.columns()["replica"] == [0, 1]
    assert ups(two)[1] == ups(two)[0] - 2000
    assert ups(one) == [8000, 0]


def test_it_goes_down_to_the_most_that_was_wanted_in_the_window() -> None:
    """Looks at 2000, 4000, …; two requests until 8000 want two replicas, one from then on wants one."""
    rows = [(0, 4, 8), (0, 4, 40)]
    quick = played(rows, [vllm(2)], autoscale=scale(2, target_outstanding=1))
    slow = played(rows, [vllm(2)], autoscale=scale(2, target_outstanding=1, stabilise_down_s=9_000))

    # drained at the look at 8000 (the last replica is the second, which has the long request), done with it at 40,000
    assert ups(quick) == [40_000, 40_000]
    assert quick.replicas[1].takes_requests is False
    # the look at 6000 still wanted two; that at 16,000 is the first without it in its window, 7000 to 16,000
    late = played([*rows, (14_500, 4, 1)], [vllm(2)], autoscale=scale(2, target_outstanding=1, stabilise_down_s=9_000))
    assert slow.columns()["replica"] == [0, 1]
    assert late.columns()["replica"][2] == 0
    assert quick.pools[0].indices == [0]


def test_it_goes_up_to_the_least_that_was_wanted_in_the_window() -> None:
    """Two requests from 3000 on: looks at 4000 and 6000 want two, and only at 8000 no look since 3000 wanted one."""
    rows = [(0, 4, 30), (3000, 4, 30)]
    served = played(rows, [vllm()], autoscale=scale(2, target_outstanding=1, stabilise_up_s=5_000))
    at_once = played(rows, [vllm()], autoscale=scale(2, target_outstanding=1))

    assert ups(at_once)[1] == 30_000 - 4_000  # at 30,000 one is left, and one wanted
    assert ups(served)[1] == 30_000 - 8_000


def test_a_few_at_a_look() -> None:
    auto = scale(8, target_outstanding=1, most_up=2, most_down=1)
    served = played([(0, 4, 20)] * 8, [vllm()], autoscale=auto)

    # 3 at 2000, 5 at 4000, 7 at 6000, 8 at 8000
    assert ups(served) == [20_000, 18_000, 18_000, 16_000, 16_000, 14_000, 14_000, 12_000]


# ---- llm-d ----


@pytest.mark.parametrize(
    ("waiting", "comes"),
    [(1, False), (2, False), (3, True), (9, True)],
    ids=["4 spare", "3 spare", "2 spare", "full"],
)
def test_one_more_where_little_room_is_left(waiting: int, comes: bool) -> None:
    """A queue counts as full at 5, and one more comes below 3 spare places; all replicas full: one more as well."""
    rows = [(0, 4, 12)] * (1 + waiting)
    served = played(
        rows, [vllm(max_num_seqs=1)], autoscale=scale(3, every=5000, provision=500, saturation=Saturation())
    )

    assert (ups(served)[1] > 0) == comes


def test_one_less_where_the_others_have_room_for_all() -> None:
    """Two replicas, a request each: one alone would have 5 − 0 places and 0.8 − 2 · 0.05 of KV."""
    rows = [(0, 4, 30), (0, 4, 30), (9_000, 4, 2)]
    served = played(rows, [vllm(2, blocks=200)], autoscale=scale(2, saturation=Saturation()))
    tight = played(rows, [vllm(2, blocks=200)], autoscale=scale(2, saturation=Saturation(kv=0.105, spare_kv=0.1)))

    assert served.pools[0].indices == [0]
    assert served.columns()["replica"] == [0, 1, 0]
    assert tight.pools[0].indices == [0, 1]


def test_nothing_more_while_one_is_on_its_way() -> None:
    """Twelve requests fill the only replica from 0 to 120,000; the second comes at 32,000, and has room."""
    auto = scale(5, provision=30_000, saturation=Saturation())
    served = played([(0, 4, 10)] * 12, [vllm(max_num_seqs=1)], autoscale=auto)

    assert served.cluster.scalers[0].said().startswith("1 orders, ")


# ---- loading is paid for ----


def test_a_replica_is_paid_for_while_it_loads_and_takes_nobody() -> None:
    """Ordered at 2000, its GPUs are there at 5000, and it takes requests from 9000 on."""
    auto = scale(2, provision=3000, load_s=4000, target_outstanding=1, stabilise_down_s=100_000)
    rows = [(0, 4, 15), (0, 4, 15), (8_900, 4, 2), (9_100, 4, 2)]
    served = played(rows, [vllm()], autoscale=auto)

    assert served.columns()["replica"] == [0, 0, 0, 1]
    assert ups(served) == [15_000, 10_000]
    assert served.cluster.scalers[0].said().endswith("in all 1.11e-12 paid hours")  # 4000 ps


def test_an_order_withdrawn_while_it_loads_is_paid_for_until_then() -> None:
    schedule = [Planned(at_s=s(1000), replicas=2), Planned(at_s=s(6000), replicas=1)]
    auto = Autoscale(max=2, provision_s=s(2000), load_s=s(9000), schedule=schedule)
    served = played([(0, 4, 20)], [vllm()], autoscale=auto)

    assert ups(served) == [20_000, 3_000]  # from 3000 to 6000
    assert "1 orders, 1 of them withdrawn" in served.cluster.scalers[0].said()


# ---- none while nobody asks ----


def test_the_last_replica_goes_after_a_while_and_comes_when_somebody_waits() -> None:
    """Idle from 3000 on, seen at 4000; 6000 later, at 10,000, the last goes. A request at 11,500 is seen at 12,000."""
    auto = scale(2, provision=3000, load_s=1000, min=0, idle_s=6000, target_outstanding=4)
    served = played([(0, 4, 3), (11_500, 4, 2)], [vllm()], autoscale=auto)
    got = served.columns()

    assert got["status"] == [Status.FINISHED] * 2
    assert got["finished_ps"] == [3_000, 16_000 + 2_000]
    assert ups(served)[0] + ups(served)[1] == 10_000 + 1_000 + 2_000


def test_whoever_comes_in_time_keeps_it() -> None:
    auto = scale(1, min=0, idle_s=6000, target_outstanding=4)
    served = played([(0, 4, 3), (9_500, 4, 2)], [vllm()], autoscale=auto)

    assert ups(served) == [11_500]


def test_a_long_wait_for_the_first_replica_is_no_deadlock() -> None:
    auto = scale(1, every=1000, provision=5_000_000, min=0, idle_s=0, target_outstanding=4)
    served = played([(0, 4, 1), (10_000, 4, 1)], [vllm()], autoscale=auto)

    assert served.columns()["status"] == [Status.FINISHED] * 2


# ---- prefill and decode apart ----


def test_decode_replicas_scale_by_themselves() -> None:
    decode = vllm(1, "decode")
    decode.autoscale = scale(3, every=5000, target_outstanding=2, stabilise_down_s=10**6)
    served = played([(i * 1000, 4, 30) for i in range(6)], [vllm(1, "prefill"), decode], link=link(1))

    assert [len(pool.replicas) for pool in served.pools] == [1, 3]
    assert ups(served)[0] == ups(served)[1]
    assert ups(served)[1] > ups(served)[2] > 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({}, "must have exactly one of target_outstanding, target_queued, target_kv, saturation, target_waiting and"),
        ({"target_kv": 0.5, "target_queued": 2}, "must have exactly one of"),
        ({"target_waiting": 2, "tolerance": 0.1}, "tolerance must not be given with target_waiting"),
        ({"saturation": {}, "tolerance": 0.1}, "tolerance must not be given with saturation"),
        ({"target_kv": 0.5, "min": 0}, "idle_s and min: 0 must be given together"),
        ({"target_kv": 0.5, "idle_s": 5}, "idle_s and min: 0 must be given together"),
        ({"schedule": [{"at_s": 1, "replicas": 2}], "most_up": 1}, "most_up must not be given with a schedule"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Autoscale.model_validate({"max": 4, **keys})


WORKLOAD = {"requests": 40, "arrivals": {"constant": {"rate_per_s": 2}}, "prompt_tokens": 100, "output_tokens": 20}
BASE = {"model": "llama-3.1-8b", "gpu": "h100", "policy": "vllm", "workload": WORKLOAD}
OWN = {"max": 3, "target_outstanding": 2}


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"replicas": [{"count": 1, "autoscale": OWN}], "autoscale": OWN}, "beside the scenario's own autoscale"),
        ({"replicas": [{"count": 4, "autoscale": OWN}]}, "replicas.0.autoscale: must start from replicas between"),
        ({"replicas": [{"autoscale": OWN}, {"gpu": "h200"}]}, "must not be given where another group is mixed too"),
        ({"replicas": [{}, {"gpu": "h200"}], "autoscale": OWN}, "for groups that differ: give each group its own"),
    ],
)
def test_groups_that_cannot_be_scaled_are_told(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        prepare(Document({**BASE, **keys}, {}, "s.yaml"), Path())


def test_a_scenario_scales_prefill_and_decode_and_says_so() -> None:
    groups = [
        {"role": "prefill", "autoscale": {**OWN, "every_s": 1, "provision_s": 2, "load_s": 1}},
        {"role": "decode", "autoscale": {"max": 2, "target_kv": 0.5, "every_s": 1}},
    ]
    outcome = simulate(prepare(Document({**BASE, "replicas": groups, "link": {"gb_per_s": 50}}, {}, "s.yaml"), Path()))

    assert outcome.summary["completed"] == 40
    assert outcome.assumptions["autoscaling"].count("orders") == 2
