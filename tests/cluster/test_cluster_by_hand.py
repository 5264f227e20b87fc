"""What clusters do to requests, worked out by hand: every step takes a STEP, whatever is in it."""

from __future__ import annotations

from typing import Any

import pytest

from chairlift.backend.base import Batch, StepCost
from chairlift.policies import routers
from chairlift.policies.base import PolicyError, Step
from chairlift.policies.sglang import Sglang
from chairlift.policies.static import Static
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.records import Status
from chairlift.sim.study import Autoscale, Failures, Limits, Outage, Planned, Setup
from kit.clusters import Served, check_endings, check_nothing_left, group, link, s, same, serve, setup_of
from kit.worlds import Affine, trace_of

STEP = 1000


class Steady(Affine):
    def step(self, batch: Batch) -> StepCost:
        return StepCost(STEP)


COST = Steady()
AHEAD = {"async_scheduling": True, "enable_prefix_caching": False}
FINISHED, REJECTED, TIMED_OUT, FAILED = Status.FINISHED, Status.REJECTED, Status.TIMED_OUT, Status.FAILED


def vllm(count: int = 1, role: str = "mixed", blocks: int = 1000, block_size: int = 16, ahead: bool = False) -> Any:
    return group(Vllm, AHEAD if ahead else None, count, role, blocks, block_size, COST)


def played(setup: Setup) -> Served:
    """A run that leaps, which a run that does not agrees with."""
    served = serve(setup)
    same(served, serve(setup, leap=False))
    check_endings(served)
    check_nothing_left(served)
    return served


def down(*outages: tuple[int, int, int | None], on_failure: Any = "retry") -> Failures:
    """(replica, at, for)."""
    schedule = [Outage(replica=r, at_s=s(at), for_s=None if away is None else s(away)) for r, at, away in outages]
    return Failures(schedule=schedule, on_failure=on_failure)


def rows(served: Served, replica: int, *names: str) -> list[tuple[int, ...]]:
    runs = served.engines[replica].records.runs()
    return list(zip(*(runs[name].tolist() for name in names), strict=True))


# failures


@pytest.mark.parametrize("ahead", [False, True])
def test_a_retried_request_keeps_its_tokens_and_computes_all_of_them_again(ahead: bool) -> None:
    # replica 0:  tokens at 1000 2000 3000 4000, then it fails at 4500 in the midst of the fifth step
    # replica 1:  4500 prompt of 4 and 4 tokens in one step, the fifth token at 5500, …, the tenth at 10500
    served = played(setup_of(trace_of([(0, 4, 10)]), [vllm(2, ahead=ahead)], failures=down((0, 4500, None))))

    got = served.columns()
    assert (got["status"], got["replica"], got["emitted_tokens"]) == ([FINISHED], [1], [10])
    assert (got["admitted_ps"], got["first_token_ps"], got["finished_ps"]) == ([0], [1000], [10500])
    assert served.steps() == [4, 6]
    assert rows(served, 1, "start_ps", "prefill_tokens")[0] == (4500, 8)
    assert served.gaps() == [[(1000, 3)], [(1000, 5), (1500, 1)]]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_fails_with_its_replica_has_the_tokens_it_had(ahead: bool) -> None:
    # tokens at 1000 2000 3000; the replica fails at 3999
    setup = setup_of(trace_of([(0, 4, 10)]), [vllm(2, ahead=ahead)], failures=down((0, 3999, 1), on_failure="fail"))
    served = played(setup)

    got = served.columns()
    assert (got["status"], got["emitted_tokens"]) == ([FAILED], [3])
    assert (got["first_token_ps"], got["finished_ps"]) == ([1000], [3999])
    assert served.steps() == [3, 0]


def test_a_step_that_ends_when_the_replica_fails_counts() -> None:
    # boundaries come before changes: the token at 3000 is out when the replica fails at 3000
    setup = setup_of(trace_of([(0, 4, 10)]), [vllm(2)], failures=down((0, 3000, None), on_failure="fail"))

    assert played(setup).columns()["emitted_tokens"] == [3]


def test_requests_lost_together_are_planned_together() -> None:
    # 0     replica 1 is down, so all three go to replica 0: a token each at 1000
    # 1500  replica 0 fails; replica 1, up again since 1200, takes all three into one step
    served = played(setup_of(trace_of([(0, 4, 3)] * 3), [vllm(2)], failures=down((1, 0, 1200), (0, 1500, None))))

    assert rows(served, 1, "start_ps", "chunks", "prefill_tokens")[0] == (1500, 3, 15)
    assert served.columns()["finished_ps"] == [3500] * 3


@pytest.mark.parametrize(("other", "tokens"), [("sglang", 15), ("vllm", 30)])
def test_what_a_replica_allows_holds_as_long_as_it_serves_the_request(other: str, tokens: int) -> None:
    # SGLang allows an answer of 15 tokens to a prompt of 70 in 7 pages of 16: 5 hold the prompt, 1 is spare, and of the
    # last a token is. Its replica fails at 5500, when the client has 4 or 5 tokens; the other one allows what it likes
    sglang = {"page_size": 16, "schedule_policy": "fcfs"}
    groups = [group(Sglang, sglang, blocks=7, cost=COST), group(Sglang, sglang, blocks=7, cost=COST)]
    groups[1] = vllm() if other == "vllm" else groups[1]
    served = played(setup_of(trace_of([(0, 70, 30)], max_tokens=[30]), groups, failures=down((0, 5500, None))))

    assert served.columns()["replica"] == [1]
    assert served.columns()["emitted_tokens"] == [tokens]


def test_a_replica_takes_requests_again_after_repair_and_start_up() -> None:
    # 500 fails, 1500 repaired, 3500 started: A, lost at 500, and B, who came at 3000, are planned together
    failures = down((0, 500, 1000))
    served = played(setup_of(trace_of([(0, 4, 2), (3000, 4, 2)]), [vllm()], failures=failures, start_up_ps=2000))

    assert rows(served, 0, "start_ps", "chunks")[0] == (3500, 2)
    assert served.columns()["admitted_ps"] == [0, 3500]
    assert served.columns()["finished_ps"] == [5500, 5500]


def test_without_any_replica_left_the_error_says_so() -> None:
    setup = setup_of(trace_of([(0, 4, 10), (9000, 4, 10)]), [vllm()], failures=down((0, 500, None)))

    with pytest.raises(PolicyError, match="2 requests are never served: no replica takes requests any more"):
        serve(setup)


# clients that give up


def test_a_request_given_up_frees_its_blocks_at_the_next_boundary() -> None:
    # Two blocks of 4 tokens, both A's. A gives up at 2500 and leaves at 3000 with the token of that moment;
    # B, who came at 1600, runs from 3000 to 4000, before its own 4100.
    trace = trace_of([(0, 5, 4), (1600, 5, 1)])
    served = played(setup_of(trace, [vllm(blocks=2, block_size=4)], limits=Limits(timeout_s=s(2500))))

    got = served.columns()
    assert got["status"] == [TIMED_OUT, FINISHED]
    assert got["emitted_tokens"] == [3, 1]
    assert got["admitted_ps"] == [0, 3000]
    assert got["finished_ps"] == [3000, 4000]


def test_a_request_that_waits_is_given_up_at_once_and_one_that_has_started_is_not() -> None:
    # B would have to wait until 4000 for A's blocks, and gives up 1500 after it came
    trace = trace_of([(0, 5, 4), (100, 5, 1)])
    served = played(setup_of(trace, [vllm(blocks=2, block_size=4)], limits=Limits(queue_timeout_s=s(1500))))

    got = served.columns()
    assert got["status"] == [FINISHED, TIMED_OUT]
    assert (got["admitted_ps"], got["finished_ps"]) == ([0, -1], [4000, 1600])


def test_an_answer_that_comes_when_the_client_gives_up_counts() -> None:
    # boundaries come before changes
    served = played(setup_of(trace_of([(0, 4, 3)]), [vllm()], limits=Limits(timeout_s=s(3000))))

    assert served.columns()["status"] == [FINISHED]


def test_a_request_given_up_in_the_step_in_which_its_replica_fails_ends_then() -> None:
    # 3200 the client gives up, to take effect at 4000; 3700 the replica fails. Nothing happens at 3000.
    failures = down((0, 3700, None), on_failure="fail")
    served = played(setup_of(trace_of([(0, 4, 10)]), [vllm(2)], failures=failures, limits=Limits(timeout_s=s(3200))))

    got = served.columns()
    assert (got["status"], got["emitted_tokens"], got["finished_ps"]) == ([TIMED_OUT], [3], [3700])


def test_a_request_that_waits_for_its_static_batch_is_given_up_with_its_whole_answer() -> None:
    # A has its two tokens at 2000, but the batch returns with B's last at 9000; both clients give up at 5500:
    # A leaves at once, B, who runs, with the token of 6000
    statics = group(Static, {"batch": 2}, cost=COST)
    trace = trace_of([(0, 4, 2), (0, 4, 9)], max_tokens=[2, 9])
    served = played(setup_of(trace, [statics], limits=Limits(timeout_s=s(5500))))

    got = served.columns()
    assert (got["status"], got["emitted_tokens"]) == ([TIMED_OUT] * 2, [2, 6])
    assert got["finished_ps"] == [5500, 6000]


def test_a_request_given_up_while_no_replica_is_up_is_served_by_none_later() -> None:
    # down from 50 to 2600; A gives up at 2100; B, who came at 1700, runs alone from 2600 to 3600
    setup = setup_of(
        trace_of([(100, 4, 1), (1700, 4, 1)]),
        [vllm()],
        failures=down((0, 50, 2550)),
        limits=Limits(timeout_s=s(2000)),
    )
    served = played(setup)

    assert served.columns()["status"] == [TIMED_OUT, FINISHED]
    assert served.columns()["finished_ps"] == [2100, 3600]
    assert rows(served, 0, "start_ps", "chunks") == [(2600, 1)]


def test_a_full_queue_refuses() -> None:
    # One request at a time: A runs, B waits, C finds B waiting at 200 and is refused there and then.
    one = group(Vllm, {"async_scheduling": False, "enable_prefix_caching": False, "max_num_seqs": 1}, cost=COST)
    served = played(setup_of(trace_of([(0, 4, 2), (100, 4, 2), (200, 4, 2)]), [one], limits=Limits(queue=1)))

    got = served.columns()
    assert got["status"] == [FINISHED, FINISHED, REJECTED]
    assert got["finished_ps"] == [2000, 4000, 200]


# hand-over of KV


@pytest.mark.parametrize(("shared", "second"), [(True, 4050), (False, 3050)])
def test_transfers_take_turns_on_a_link_that_is_shared(shared: bool, second: int) -> None:
    # Prompts of 10 and 20 tokens are done at 1000 on prefill replicas 0 and 1; 100 ps a token, 50 more a transfer.
    # shared: A 1000–2000, there at 2050, B 2000–4000, there at 4050; a link each: B 1000–3000, there at 3050
    # Decoding begins on arrival, with the first token's successor: a chunk of one token.
    groups = [vllm(2, "prefill"), vllm(1, "decode")]
    served = played(setup_of(trace_of([(0, 10, 2), (0, 20, 2)]), groups, link=link(100, 50, shared)))

    got = served.columns()
    assert got["handed_over_ps"] == got["first_token_ps"] == [1000, 1000]
    assert got["taken_over_ps"] == [2050, second]
    assert got["finished_ps"] == [3050, second + STEP]
    assert (got["prefill_replica"], got["replica"]) == ([0, 1], [2, 2])
    assert [tokens for (tokens,) in rows(served, 2, "prefill_tokens")] == [1, 1]
    assert served.gaps() == [[], [], sorted([(2050, 1), (second, 1)])]


def test_a_request_with_one_token_is_never_handed_over() -> None:
    served = played(setup_of(trace_of([(0, 10, 1)]), [vllm(1, "prefill"), vllm(1, "decode")], link=link(100)))

    got = served.columns()
    assert (got["finished_ps"], got["handed_over_ps"], got["replica"]) == ([1000], [-1], [0])


def test_a_request_handed_over_ends_no_gap_where_its_prompt_was_computed() -> None:
    # A prompt a step on the prefill replica, which plans ahead: A at 1000, B 2000, C 3000, D 4000. D's one token is not
    # known to be its last when its decode is planned at 3000, and comes 4000 to 5000 for nothing. A came to the decode
    # replica at 1016, has its tokens at 2016, 3016 and 4016: three gaps, of 1016, 1000 and 1000
    policy = group(Sglang, {"page_size": 16, "chunked_prefill_size": 16}, role="prefill", cost=Affine(1000, 0, 0))
    groups = [policy, vllm(1, "decode")]
    trace = trace_of([(0, 16, 4), (0, 16, 1), (0, 16, 1), (0, 16, 1)], max_tokens=[4, 1, 1, 2])
    served = played(setup_of(trace, groups, link=link(1)))

    assert served.gaps() == [[], [(1000, 2), (1016, 1)]]
    assert rows(served, 0, "start_ps", "decodes", "late_decodes")[-1] == (4000, 1, 1)


def test_a_request_whose_decode_replica_fails_is_computed_again_on_another() -> None:
    # 0–1000 prompt; 1000–1400 transfer of 4 tokens; 1400 second token under way on decode replica 1, out at 2400;
    # 3000 replica 1 fails; 3000 replica 2 computes 4 + 2 tokens, third token at 4000, fourth at 5000
    groups = [vllm(1, "prefill"), vllm(2, "decode")]
    served = played(setup_of(trace_of([(0, 4, 4)]), groups, link=link(100), failures=down((1, 3000, None))))

    got = served.columns()
    assert (got["replica"], got["first_token_ps"], got["finished_ps"]) == ([2], [1000], [5000])
    assert rows(served, 2, "start_ps", "prefill_tokens")[0] == (3000, 6)
    assert served.gaps() == [[], [(1400, 1)], [(1000, 1), (1600, 1)]]


def test_a_client_that_gives_up_in_the_very_step_that_hands_over_is_heard() -> None:
    # 500 gives up, to take effect at 1000, when the prompt is done and its KV begins to move; no one decodes it
    groups = [vllm(1, "prefill"), vllm(1, "decode")]
    served = played(setup_of(trace_of([(0, 4, 5)]), groups, link=link(100), limits=Limits(timeout_s=s(500))))

    got = served.columns()
    assert (got["status"], got["finished_ps"], got["emitted_tokens"]) == ([TIMED_OUT], [1000], [1])
    assert served.steps() == [1, 0]


def test_a_request_given_up_while_all_decode_replicas_are_down_is_not_decoded_later() -> None:
    # A is handed over at 1000 and gives up at 6500; the decode replica is down until 9000 and then serves B,
    # which came at 7000, alone: tokens at 8000, 10000, 11000
    groups = [vllm(1, "prefill"), vllm(1, "decode")]
    setup = setup_of(
        trace_of([(0, 4, 3), (7000, 4, 3)]),
        groups,
        link=link(100),
        failures=down((1, 0, 9000)),
        limits=Limits(timeout_s=s(6500)),
    )
    served = played(setup)

    got = served.columns()
    assert got["status"] == [TIMED_OUT, FINISHED]
    assert got["finished_ps"] == [6500, 11000]
    assert served.steps() == [2, 2]


# replicas that come and go


def test_a_replica_that_is_drained_takes_nobody_and_finishes_whom_it_has() -> None:
    # 0: A on replica 0, B on replica 1; 1500: replica 1 drains; 2000: C, whose turn is replica 0's anyway, and D
    schedule = Autoscale(max=2, schedule=[Planned(at_s=s(1500), replicas=1)])
    trace = trace_of([(0, 4, 5), (0, 4, 5), (2000, 4, 5), (2000, 4, 5)])
    served = played(setup_of(trace, [vllm(2)], autoscale=schedule))

    got = served.columns()
    assert got["replica"] == [0, 1, 0, 0]
    assert got["finished_ps"] == [5000, 5000, 7000, 7000]
    assert [replica.up_ps for replica in served.replicas] == [7000, 5000]


def test_a_replica_ordered_comes_after_the_time_it_takes_and_before_arrivals_of_that_instant() -> None:
    schedule = Autoscale(max=2, provision_s=s(3000), schedule=[Planned(at_s=s(1000), replicas=2)])
    trace = trace_of([(3999, 4, 1), (4000, 4, 1), (4001, 4, 1)])
    served = played(setup_of(trace, [vllm()], autoscale=schedule))

    assert served.columns()["replica"] == [0, 1, 0]


@pytest.mark.parametrize("provision", [0, 2500])
def test_a_replica_that_is_both_repaired_and_replaced_counts_once(provision: int) -> None:
    # 1000 replica 1 fails; 2000 it is ordered anew, and comes at 2000 or 4500; 4000 it is repaired
    schedule = Autoscale(max=2, provision_s=s(provision), schedule=[Planned(at_s=s(2000), replicas=2)])
    trace = trace_of([(k * 500, 4, 4) for k in range(20)])
    served = played(setup_of(trace, [vllm(2)], autoscale=schedule, failures=down((1, 1000, 3000))))

    assert served.pools[0].indices == [0, 1]


# ties


def test_of_two_replicas_that_end_steps_at_one_instant_the_first_goes_first() -> None:
    # Replica 0, steps of 1000, and replica 1, steps of 2000, answer A and B at 11,000. What follows A is then sent
    # before what follows B, however long ago the ends of their runs were foreseen.
    slow = group(cost=Affine(fixed=2 * STEP, token=0, context=0))
    trace = trace_of([(0, 4, 11), (0, 4, 1), (1000, 4, 5), (1000, 4, 1)], follows=[-1, 0, -1, 2], think_ps=[0, 0, 0, 0])
    served = played(setup_of(trace, [vllm(), slow]))

    assert served.columns()["arrival_ps"] == [0, 11000, 1000, 11000]
    assert served.columns()["replica"] == [0, 0, 1, 1]


def test_arrivals_at_the_end_of_a_step_join_the_next() -> None:
    # boundary, arrivals, plan: B and C, at 2000, are in the step from 2000 to 3000, together
    served = played(setup_of(trace_of([(0, 4, 5), (2000, 4, 1), (2000, 4, 1)]), [vllm()]))

    assert served.columns()["finished_ps"] == [5000, 3000, 3000]


class Idle(Vllm):
    """Plans nothing."""

    def schedule(self, step: Step) -> int:
        return 1


@pytest.mark.parametrize("leap", [True, False])
def test_a_cluster_that_only_fails_and_recovers_is_found_to_be_stuck(leap: bool) -> None:
    failures = Failures(mtbf_s=s(5000), mttr_s=s(100))
    setup = setup_of(trace_of([(0, 4, 10)]), [group(Idle, None, 2, "mixed", 100, 16, COST)], failures=failures)

    with pytest.raises(PolicyError, match="policy Idle: 1 requests are never served"):
        serve(setup, leap)


def test_who_is_sent_while_a_later_replica_plans_joins_the_step_after_the_one_just_planned() -> None:
    # Replica 1 answers a batch of two at its boundary of 5000, and returns it when it plans, behind replica 0: what
    # follows it at once meets a step of replica 0 that began at 5000, and joins the one from 6000 on.
    trace = trace_of(
        [(0, 4, 20), (0, 4, 1), (0, 4, 5), (0, 4, 1)],
        follows=[-1, -1, -1, 1],
        think_ps=[0, 0, 0, 0],
        session=[0, 1, 1, 0],
    )
    static = group(Static, {"batch": 2, "start": "impatient"}, 1, "mixed", 1000, 16, COST)
    served = played(setup_of(trace, [vllm(), static], routers.SessionSticky))

    assert served.columns()["replica"] == [0, 1, 1, 0]
    assert served.columns()["arrival_ps"][3] == 5000
    assert served.columns()["finished_ps"][3] == 7000
