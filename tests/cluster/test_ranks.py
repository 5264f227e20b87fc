"""Ranks of DP-attention: whose steps end together, and which of them a request goes to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chairlift.backend.base import Host, StepCost, slowest
from chairlift.policies.base import FOREVER
from chairlift.policies.sglang import Sglang
from chairlift.policies.static import Static
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.records import Status
from chairlift.sim.study import Limits, Setup, Speculate
from chairlift.sim.workload.acceptance import Acceptance
from kit.clusters import Served, check_endings, check_nothing_left, group, s, same, serve, setup_of
from kit.worlds import Affine, check_places, shares, trace_of

COST = Affine(fixed=1000, token=10, context=0)
MS = 10**9


def vllm(ranks: int, blocks: int = 1000, cost: Affine = COST, **more: Any) -> Any:
    chosen = {"async_scheduling": False, "enable_prefix_caching": False, **more}
    return group(Vllm, chosen, blocks=blocks, cost=cost, ranks=ranks)


def played(rows: list[tuple[int, int, int]], replica: Any, **more: Any) -> Served:
    """A run that leaps, which a run that does not agrees with, in what is held and stored too."""
    return checked(setup_of(trace_of(rows), [replica], **more))


def checked(setup: Setup) -> Served:
    """As `played`, of a setup."""
    served, stepped = serve(setup), serve(setup, leap=False)
    same(served, stepped)
    assert [shares(engine) for engine in served.engines] == [shares(engine) for engine in stepped.engines]
    check_endings(served)
    check_nothing_left(served)
    check_places(served.engines[0])
    return served


def rows_of(served: Served, *names: str) -> list[tuple[int, ...]]:
    runs = served.engines[0].records.runs()
    return list(zip(*(runs[name].tolist() for name in names), strict=True))


def test_a_step_ends_with_the_slowest_rank_and_idle_ranks_wait() -> None:
    # rank 0:  0 prompt of 4 (1040)   1040 decode            2540 decode         3550 decode, done at 4560
    # rank 1:                         1040 prompt of 50 (1500)  2540 decode, done    a token for nothing
    served = played([(0, 4, 4), (500, 50, 2)], vllm(2))

    got = served.columns()
    assert got["rank"] == [0, 1]
    assert got["first_token_ps"] == [1040, 2540]
    assert got["finished_ps"] == [4560, 3550]
    names = ("start_ps", "first_ps", "steps", "prefill_tokens", "decodes", "running")
    assert rows_of(served, *names) == [
        (0, 1040, 1, 4, 0, 1),
        (1040, 1500, 1, 50, 1, 2),
        (2540, 1010, 1, 0, 2, 2),
        (3550, 1010, 1, 0, 1, 1),
    ]
    assert served.gaps() == [[(1010, 3), (1500, 1)]]


def test_ranks_have_limits_and_pools_of_their_own() -> None:
    # one request a step on each rank: of four that come at once two run, and the others when those have ended
    served = played([(0, 8, 2)] * 4, vllm(2, blocks=1, max_num_seqs=1))

    got = served.columns()
    assert got["rank"] == [0, 1, 0, 1]
    assert got["first_token_ps"] == [1080, 1080, 3170, 3170]
    # 17 tokens of KV fit on neither rank, though the two have 32
    served = played([(0, 8, 2), (0, 17, 2)], vllm(2, blocks=1))
    assert served.columns()["status"] == [Status.FINISHED, Status.REJECTED]


def test_with_steps_planned_ahead_a_rank_that_is_idle_takes_part_in_the_step_in_flight() -> None:
    # rank 0: prompt 0-1040; decodes planned ahead from 1040 on. B comes at 1500: the step in flight (1040-2050) and the
    # one behind it (2050-3060) are A's alone, then B's prompt takes all of 3060-4560; its client has the token then
    served = played([(0, 4, 5), (1500, 50, 1)], vllm(2, async_scheduling=True))

    got = served.columns()
    assert (got["rank"], got["first_token_ps"][1]) == ([0, 1], 4560)


def test_a_request_goes_to_the_rank_with_least_of_four_times_waiting_and_running_as_of_100_ms_ago() -> None:
    # steps take 1 ms. At 0 all ranks are empty: ties go to the first; each that is sent counts as one more that waits.
    # At 50 ms nothing newer is known than (2 0), (1 0), (1 0) waiting: rank 1. At 150 ms the front end looks anew:
    # rank 0 has 2 running, rank 1 has 2, rank 2 has 1, so rank 2 (then as 4 · 1 + 1), rank 0 (2), rank 1 (2)
    cost = Affine(fixed=MS, token=0, context=0)
    at = [0, 0, 0, 0, 50 * MS, 150 * MS, 150 * MS, 150 * MS]
    served = played([(t, 4, 1000) for t in at], vllm(3, cost=cost))

    assert served.columns()["rank"] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_sglang_deals_requests_to_its_ranks_in_turn() -> None:
    replica = group(Sglang, {"page_size": 16}, cost=COST, ranks=3)
    served = played([(k * 100, 4, 50) for k in range(7)], replica)
    assert served.columns()["rank"] == [0, 1, 2, 0, 1, 2, 0]


def test_a_rank_that_waits_for_a_time_is_asked_while_others_run() -> None:
    # rank 0 has a full batch of two: prompts 0-1080, decodes of 1020. Rank 1 has one request, and its policy starts a
    # part of a batch once that has waited for 3000: at the first boundary from then on, 3120. One is still to come
    chosen = {"batch": 2, "max_wait_ms": 3e-6}
    rows = [(0, 4, 20), (0, 4, 20), (0, 4, 20), (50_000, 4, 1)]
    served = played(rows, group(Static, chosen, cost=COST, ranks=2))
    got = served.columns()
    assert (got["rank"][:3], got["admitted_ps"][:3]) == ([0, 1, 0], [0, 3120, 0])


def test_an_arrival_to_an_idle_rank_ends_a_run_at_its_next_boundary() -> None:
    # a batch of one decodes on rank 0 and lets nobody in before it has ended; rank 1 is free for who comes at 1500
    served = played([(0, 4, 100), (1500, 4, 1)], group(Static, {"batch": 1}, cost=COST, ranks=2))
    got = served.columns()
    assert (got["rank"], got["admitted_ps"]) == ([0, 1], [0, 2050])


def test_a_client_that_gives_up_leaves_its_rank() -> None:
    served = played([(0, 4, 100), (0, 4, 100), (0, 4, 3)], vllm(2), limits=Limits(timeout_s=s(20_000)))
    got = served.columns()
    assert [Status(status) for status in got["status"]] == [Status.TIMED_OUT, Status.TIMED_OUT, Status.FINISHED]


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=12),
    ahead=st.booleans(),
    ranks=st.integers(2, 3),
    host=st.sampled_from([Host(), Host(schedule=5, launch=40, update=7), Host(200, 600, 400)]),
    blocks=st.integers(6, 30),
)
def test_ranks_with_equal_work_are_as_one_replica_with_the_work_of_one(
    requests: list[tuple[int, int, int]], ahead: bool, ranks: int, host: Host, blocks: int
) -> None:
    # each request comes once for each rank, at the same instant, so that each rank does what one replica does
    cost = Affine(fixed=997, token=10, context=1, host=host)
    chosen = {"async_scheduling": ahead, "max_num_batched_tokens": 20, "max_num_seqs": 4, "cost": cost}
    rows = sorted((at * 1000, prompt, output) for at, prompt, output in requests)
    one = played(rows, vllm(1, blocks, **chosen)).columns()
    all_of_them = played([row for row in rows for _ in range(ranks)], vllm(ranks, blocks, **chosen)).columns()

    assert all_of_them["rank"] == list(range(ranks)) * len(rows)
    for name in ("status", "admitted_ps", "first_token_ps", "finished_ps", "preemptions", "emitted_tokens"):
        assert all_of_them[name] == [value for value in one[name] for _ in range(ranks)], name


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_ranks_with_equal_drafts_are_as_one_replica_with_the_drafts_of_one(kept: float, ahead: bool) -> None:
    # all drafts are kept, or none, so that what comes twice does the same on both ranks
    cost = Affine(fixed=997, token=10, context=1)
    rows = [(k * 700, 3 + 5 * k % 40, 1 + 7 * k % 30) for k in range(15)]
    found = []
    for ranks in (1, 2):
        replica = vllm(ranks, 30, cost, async_scheduling=ahead, enable_prefix_caching=True, max_num_batched_tokens=24)
        replica.speculation = replica.make_scheduler().speculation("mtp", 3)
        trace = trace_of([row for row in rows for _ in range(ranks)])
        speculate = Speculate(method="mtp", tokens=3, acceptance=Acceptance(rates=[kept] * 3))
        served = serve(setup_of(trace, [replica], speculate=speculate))
        check_endings(served)
        check_nothing_left(served)
        found.append(served.columns())
    one, two = found

    assert two["rank"] == [0, 1] * len(rows)
    for name in ("status", "first_token_ps", "finished_ps", "preemptions", "draft_tokens", "accepted_tokens"):
        assert two[name] == [value for value in one[name] for _ in range(2)], name
    assert (sum(one["accepted_tokens"]) > 0) == (kept > 0)
    assert sum(one["draft_tokens"]) > 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_each_rank_has_a_prefix_cache_of_its_own(kind: str, ahead: bool) -> None:
    # groups of prompts that begin alike come one after the other; who finds his prefix depends on the rank
    rows = [(k * 2500, 40 + k % 7, 5 + 11 * k % 30) for k in range(24)]
    trace = trace_of(rows, prefix_group=[k % 3 for k in range(24)], prefix_tokens=[32] * 24)
    if kind == "vllm":
        replica = group(Vllm, {"async_scheduling": ahead, "max_num_seqs": 4}, blocks=20, cost=COST, ranks=3)
    else:
        chosen = {"page_size": 16, "disable_overlap_schedule": not ahead, "max_running_requests": 4}
        replica = group(Sglang, chosen, blocks=20, cost=COST, ranks=3)
    got = checked(setup_of(trace, [replica])).columns()

    seen: set[tuple[int, int]] = set()
    for k in sorted(range(24), key=lambda k: got["admitted_ps"][k]):
        place = (got["rank"][k], k % 3)
        assert got["cached_tokens"][k] == 0 or place in seen  # nobody else has put it there
        seen.add(place)
    assert sum(tokens > 0 for tokens in got["cached_tokens"]) > 5


costs = st.builds(
    StepCost,
    st.integers(1, 300),
    st.integers(0, 30),
    st.sampled_from([1, 7, FOREVER]),
    st.sampled_from([Host(), Host(1, 2, 3), Host(3, 0, 0, 5)]),
)


@given(st.lists(costs, min_size=1, max_size=4))
def test_what_ends_last_is_vouched_for_as_long_as_it_does(each: list[StepCost]) -> None:
    found = slowest(each)
    assert 1 <= found.steps <= min(cost.steps for cost in each)
    for step in {*range(min(found.steps, 50)), found.steps - 1}:
        assert found.first + found.slope * step == max(cost.first + cost.slope * step for cost in each)
    assert found.host == Host(*(max(kind) for kind in zip(*(cost.host for cost in each), strict=True)))


def test_one_rank_overtakes_another_as_its_context_grows() -> None:
    assert slowest([StepCost(100, 3), StepCost(94, 5)]) == StepCost(100, 3, 4)
    assert slowest([StepCost(100, 3), StepCost(100, 5)]) == StepCost(100, 5)
