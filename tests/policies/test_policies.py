"""What each policy does to a handful of requests, worked out by hand; and what holds for every policy there is.

A step costs 100 ps and 1 ps for every token computed in it (prompt tokens, decodes, dead slots and padding alike)
unless a test says otherwise. In the timelines a line is a step: when it starts, what is in it, what it costs, when it
ends. `A1` means that request A emits its first token at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from chairlift.policies.base import FOREVER, PolicyError, Request, Scheduler, Step
from chairlift.policies.orca import Orca
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.sim.conformance.policy import check_policy
from chairlift.sim.results.records import Status
from chairlift.sim.scenario import plugins
from kit.by_hand import PS_IN_MS, Row, finished, first, rows, serve
from kit.worlds import World, play, sync_vllm, trace_of

# static batching


def test_static_batch_returns_as_a_whole_and_pays_for_padding_and_dead_slots() -> None:
    # A(10, 3) B(4, 2) | C(5, 1) D(5, 4), two a batch
    #   0  prompts 10 + 4, B padded by 6: 120 -> 120  A1 B1
    # 120  A B                            102 -> 222  A2 B2, B has its answer but keeps its slot
    # 222  A and a dead slot              102 -> 324  A3: the batch returns
    # 324  prompts 5 + 5                  110 -> 434  C1 D1, C has its answer
    # 434  D and a dead slot, three times 306 -> 740  D4
    world = serve([(0, 10, 3), (0, 4, 2), (0, 5, 1), (0, 5, 4)], lambda: Static(batch=2))

    assert first(world) == [120, 120, 434, 434]
    assert finished(world) == [324, 324, 740, 740]
    assert rows(world, "start_ps", "first_ps", "steps", "prefill_tokens", "decodes", "padded") == [
        (0, 120, 1, 14, 0, 6),
        (120, 102, 1, 0, 2, 0),
        (222, 102, 1, 0, 1, 1),
        (324, 110, 1, 10, 0, 0),
        (434, 102, 3, 0, 1, 1),
    ]


def test_static_global_padding_runs_every_batch_to_the_longest_answer_of_all() -> None:
    # A(5, 2) B(5, 1) | C(5, 1) D(5, 4): everybody for 4 tokens
    #   0  prompts 110 -> 110  A1 B1
    # 110  A and a dead slot     102 -> 212  A2
    # 212  two dead slots, twice 204 -> 416
    # 416  prompts 110 -> 526  C1 D1
    # 526  D and a dead slot, three times 306 -> 832  D4
    world = serve([(0, 5, 2), (0, 5, 1), (0, 5, 1), (0, 5, 4)], lambda: Static(batch=2, pad_to="global"))

    assert first(world) == [110, 110, 526, 526]
    assert finished(world) == [416, 416, 832, 832]
    assert world.engines[0].planner.steps == 2 * 4


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        # A(5, 2) at 0, B(5, 1) at 10, C(5, 1) at 20, two a batch.
        # Impatient: A alone 105 -> 105, 101 -> 206; then B C 110 -> 316.
        ("impatient", [206, 316, 316]),
        # Full: A waits for B. At 10 both 110 -> 120, A and a dead slot 102 -> 222; C is the last that will ever come
        # and goes alone: 105 -> 327.
        ("full", [222, 222, 327]),
    ],
)
def test_static_batch_starts_when_full_or_with_whoever_waits(
    start: Literal["full", "impatient"], expected: list[int]
) -> None:
    world = serve([(0, 5, 2), (10, 5, 1), (20, 5, 1)], lambda: Static(batch=2, start=start))

    assert finished(world) == expected


def test_static_batch_takes_in_the_very_last_arrival() -> None:
    # A at 0 waits for a second; B at 10 is the last. Both at 10: 110 -> 120.
    world = serve([(0, 5, 1), (10, 5, 1)], lambda: Static(batch=2))

    assert finished(world) == [120, 120]


def test_static_batch_that_is_not_full_starts_when_its_oldest_has_waited_the_window() -> None:
    # Window 1000 ps, three a batch: A at 0, B at 400 start at 1000: 110 -> 1110. C at 5000 is the last: 105 -> 5105.
    world = serve([(0, 5, 1), (400, 5, 1), (5000, 5, 1)], lambda: Static(batch=3, max_wait_ms=1000 * PS_IN_MS))

    assert finished(world) == [1110, 1110, 5105]


def test_static_window_lets_in_who_arrives_as_it_ends() -> None:
    # C arrives at 1000 sharp: arrivals come before planning. Three prompts 115 -> 1115.
    world = serve(
        [(0, 5, 1), (400, 5, 1), (1000, 5, 1), (9000, 5, 1)],
        lambda: Static(batch=4, max_wait_ms=1000 * PS_IN_MS),
    )

    assert finished(world) == [1115, 1115, 1115, 9105]


def test_static_pauses_before_every_batch_and_nowhere_else() -> None:
    # One a batch, pause 1000.
    #    0  pause, prompt 1105 -> 1105  A1
    # 1105  A              101 -> 1206  A2
    # 1206  pause, prompt 1105 -> 2311  B1
    world = serve([(0, 5, 2), (0, 5, 1)], lambda: Static(batch=1, pause_ms=1000 * PS_IN_MS))

    assert first(world) == [1105, 2311]
    assert finished(world) == [1206, 2311]


def test_static_refuses_a_request_for_its_own_length_only() -> None:
    # Pool of 30. A needs 5 + 20 = 25 and B 20 + 2 = 22: each fits alone, but not padded to 20 + 20 together.
    world = serve([(0, 5, 20), (0, 20, 2)], lambda: Static(batch=2), blocks=30)

    assert set(world.requests.status) == {Status.FINISHED}


def test_static_pads_to_the_longest_of_those_in_the_batch() -> None:
    # Pool of 30: no room for A(5, 2) and B(20, 2) padded to 20 + 2 each, so each goes alone, as it is.
    # A 105, 101 -> 206; B 120, 101 -> 427
    world = serve([(0, 5, 2), (0, 20, 2)], lambda: Static(batch=2), blocks=30)

    assert first(world) == [105, 326]
    assert finished(world) == [206, 427]


# Orca


@pytest.mark.parametrize(
    ("reserve", "three", "max_model_len"),
    [
        # Prompts of 5, outputs 2, 3 and 1, declared as 5. All three together take:
        ("declared", 3 * (5 + 5), 1000),
        ("oracle", (5 + 2) + (5 + 3) + (5 + 1), 1000),
        ("pow2", (5 + 2) + (5 + 4) + (5 + 1), 1000),
        ("max", 3 * 40, 40),
    ],
)
def test_orca_admits_while_reservations_fit(
    reserve: Literal["declared", "max", "pow2", "oracle"], three: int, max_model_len: int
) -> None:
    requests = [(0, 5, 2, 5), (0, 5, 3, 5), (0, 5, 1, 5)]

    def run(slots: int) -> World:
        return serve(requests, lambda: Orca(reserve=reserve), blocks=slots, max_model_len=max_model_len)

    # One slot short: C waits until A leaves.
    #   0  prompts of A B 110 -> 110  A1 B1
    # 110  A B            102 -> 212  A2, done
    # 212  B, prompt of C 106 -> 318  B3 C1, done
    short = run(three - 1)
    assert first(short) == [110, 110, 318]
    assert finished(short) == [212, 318, 318]
    # Room for all:
    #   0  three prompts 115 -> 115  A1 B1 C1, C done
    # 115  A B           102 -> 217  A2, done
    # 217  B             101 -> 318  B3
    room = run(three)
    assert first(room) == [115, 115, 115]
    assert finished(room) == [217, 318, 115]
    assert rows(room, "held_blocks")[0] == (three,)


def test_orca_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    # Pool 20: A reserves 5 + 3, B 11 + 2, C 1 + 1. C would fit beside A but B is before it.
    #   0  A 105, 101, 101 -> 307  A3, done
    # 307  prompts of B C, 12 tokens 112 -> 419  B1 C1
    # 419  B 101 -> 520
    world = serve([(0, 5, 3), (0, 11, 2), (0, 1, 1)], lambda: Orca(reserve="oracle"), blocks=20)

    assert first(world) == [105, 419, 419]
    assert finished(world) == [307, 520, 419]


def test_orca_joins_at_the_next_boundary_and_leaves_at_its_last_token() -> None:
    # A(5, 4) at 0, B(6, 2) at 50.
    #   0  prompt of A       105 -> 105  A1
    # 105  A, prompt of B    107 -> 212  A2 B1
    # 212  A B               102 -> 314  A3 B2, B done
    # 314  A                 101 -> 415  A4
    world = serve([(0, 5, 4), (50, 6, 2)], lambda: Orca(reserve="declared"))

    assert first(world) == [105, 212]
    assert finished(world) == [415, 314]


def test_orca_runs_at_most_max_batch() -> None:
    # One at a time: A 105, 101 -> 206; B 105 -> 311
    world = serve([(0, 5, 2), (0, 5, 1)], lambda: Orca(max_batch=1, reserve="declared"))

    assert finished(world) == [206, 311]


# text-generation-inference


@pytest.mark.parametrize(
    ("reserve", "budget"),
    [
        ("declared", 2 * (5 + 5)),
        ("max", 2 * 40),
    ],
)
def test_tgi_prefill_runs_alone_and_pauses_all_decodes(reserve: Literal["declared", "max"], budget: int) -> None:
    # Each request takes 5 + 5 of the budget, or the model's 40, so that two fit; outputs 2, 3, 1.
    #   0  prompts of A B 110 -> 110  A1 B1
    # 110  A B            102 -> 212  A2, done: now C fits
    # 212  prompt of C    105 -> 317  C1, done; B is paused
    # 317  B              101 -> 418  B3, 206 after its second token
    world = serve(
        [(0, 5, 2, 5), (0, 5, 3, 5), (0, 5, 1, 5)],
        lambda: Tgi(max_batch_total_tokens=budget, waiting_served_ratio=0, reserve=reserve),
        max_model_len=40,
    )

    assert first(world) == [110, 110, 317]
    assert finished(world) == [212, 418, 317]
    assert rows(world, "start_ps", "prefill_tokens", "decodes") == [
        (0, 10, 0),
        (110, 0, 2),
        (212, 5, 0),
        (317, 0, 1),
    ]


def test_tgi_budget_counts_prompts_as_padded_to_the_longest_of_the_new_batch() -> None:
    # A takes 8 + 2, B 4 + 2. Side by side that is 16, but padded to 8 each the prompts are 16 and the outputs 4.
    requests = [(0, 8, 2), (0, 4, 2)]

    # Budget 20: both. 8 + 4 tokens and 4 of padding 116 -> 116, 102 -> 218
    assert finished(serve(requests, lambda: Tgi(max_batch_total_tokens=20))) == [218, 218]
    # Budget 19: A alone, 108; then B (4 + 2 fits beside A's 10) may join only with int(1.2 * 1) = 1 waiting, which
    # it is: prefill 104 -> 212  B1; A B 102 -> 314
    assert finished(serve(requests, lambda: Tgi(max_batch_total_tokens=19))) == [314, 314]


def test_tgi_prefill_tokens_are_limited_apart() -> None:
    # Two prompts of 5 under a limit of 9 are prefilled one after the other: 105, 105, then both 102 -> 312.
    world = serve([(0, 5, 2), (0, 5, 2)], lambda: Tgi(max_batch_prefill_tokens=9))

    assert first(world) == [105, 210]
    assert finished(world) == [312, 312]


def test_tgi_lets_requests_join_once_enough_wait_for_the_batch() -> None:
    # Ratio 1.2 on a batch of 2: int(2.4) = 2 must wait. A B (5, 6) at 0, C (5, 2) at 150, D (5, 2) at 350.
    #   0  prompts of A B 110 -> 110  A1 B1
    # 110  A B            102 -> 212  A2 B2; C waits, alone
    # 212  A B            102 -> 314, 102 -> 416  A4 B4; C and D wait
    # 416  prompts of C D 110 -> 526  C1 D1
    # 526  all four       104 -> 630  A5 B5 C2 D2; C D done
    # 630  A B            102 -> 732  A6 B6
    world = serve([(0, 5, 6), (0, 5, 6), (150, 5, 2), (350, 5, 2)], lambda: Tgi(waiting_served_ratio=1.2))

    assert first(world) == [110, 110, 526, 526]
    assert finished(world) == [732, 732, 630, 630]


def test_tgi_joins_too_few_only_after_max_waiting_tokens() -> None:
    # As before but nobody joins C. The router's counter is 1 after a prefill and grows with every decode step, so with
    # max_waiting_tokens 3 whoever waits joins after two decode steps.
    #   0  prompts of A B 110 -> 110  A1 B1, counter 1
    # 110  A B            102 -> 212  A2 B2, counter 2
    # 212  A B            102 -> 314  A3 B3, counter 3
    # 314  prompt of C    105 -> 419  C1
    # 419  all three      103 -> 522  A4 B4 C2; C done
    # 522  A B            102 -> 624, 102 -> 726  A6 B6
    world = serve([(0, 5, 6), (0, 5, 6), (150, 5, 2)], lambda: Tgi(waiting_served_ratio=1.2, max_waiting_tokens=3))

    assert first(world) == [110, 110, 419]
    assert finished(world) == [726, 726, 522]


def test_tgi_decodes_at_least_once_between_two_joins() -> None:
    # The router's loop: check the queue once, prefill who may join, decode. A (5, 4) at 0, B (5, 3) at 50 and C (5, 2)
    # at 150; any number may join. B's prefill comes right after A's, before the first decode; C waits for a decode.
    #   0  prompt of A  105 -> 105  A1
    # 105  prompt of B  105 -> 210  B1; C came at 150
    # 210  A B          102 -> 312  A2 B2
    # 312  prompt of C  105 -> 417  C1
    # 417  A B C        103 -> 520  A3 B3 C2; B C done
    # 520  A            101 -> 621  A4
    world = serve([(0, 5, 4), (50, 5, 3), (150, 5, 2)], lambda: Tgi(waiting_served_ratio=0))

    assert first(world) == [105, 210, 417]
    assert finished(world) == [621, 520, 520]


def test_tgi_router_refuses_what_exceeds_the_whole_budget() -> None:
    world = serve([(0, 5, 2), (0, 15, 6), (0, 5, 1)], lambda: Tgi(max_batch_total_tokens=20))

    assert list(world.requests.status) == [Status.FINISHED, Status.REJECTED, Status.FINISHED]


# vLLM


def test_vllm_mixes_prompts_with_decodes_in_one_step() -> None:
    # A(5, 4) at 0, B(6, 2) at 50.
    #   0  prompt of A    105 -> 105  A1
    # 105  A, prompt of B 107 -> 212  A2 B1
    # 212  A B            102 -> 314  A3 B2, B done
    # 314  A              101 -> 415  A4
    world = serve([(0, 5, 4), (50, 6, 2)], sync_vllm, block_size=16)

    assert first(world) == [105, 212]
    assert finished(world) == [415, 314]
    assert rows(world, "start_ps", "steps", "prefill_tokens", "decodes") == [
        (0, 1, 5, 0),
        (105, 1, 6, 1),
        (212, 1, 0, 2),
        (314, 1, 0, 1),
    ]


def test_vllm_budget_serves_the_running_first_and_chunks_what_is_left() -> None:
    # Budget 8: A(5, 4) at 0, B(12, 2) at 50, C(2, 1) at 60.
    #   0  prompt of A               105 -> 105  A1
    # 105  A, 7 of B                 108 -> 213  A2; the budget is spent, C waits
    # 213  A, 5 of B, 2 of C         108 -> 321  A3 B1 C1; C done
    # 321  A B                       102 -> 423  A4 B2
    world = serve(
        [(0, 5, 4), (50, 12, 2), (60, 2, 1)],
        lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=8),
        block_size=4,
    )

    assert first(world) == [105, 321, 321]
    assert finished(world) == [423, 423, 321]
    assert rows(world, "start_ps", "chunks", "prefill_tokens", "decodes", "running", "waiting") == [
        (0, 1, 5, 0, 1, 0),
        (105, 1, 7, 1, 2, 1),
        (213, 2, 7, 1, 3, 0),
        (321, 0, 0, 2, 2, 0),
    ]


def test_vllm_splits_a_prompt_longer_than_the_budget_even_alone() -> None:
    # Budget 8, A(20, 2): 8, 8 and 4 tokens: 108, 216, 320 A1; 101 -> 421 A2
    world = serve(
        [(0, 20, 2)], lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=8)
    )

    assert (first(world), finished(world)) == ([320], [421])


def test_vllm_without_chunks_keeps_a_prompt_waiting_and_all_behind_it() -> None:
    # Budget 8: A(5, 3) B(6, 1) C(2, 1) at 0. C would fit beside A but B is before it.
    #   0  prompt of A    105 -> 105  A1
    # 105  A, prompt of B 107 -> 212  A2 B1, B done; one token is left for C's two
    # 212  A, prompt of C 103 -> 315  A3 C1
    world = serve(
        [(0, 5, 3), (0, 6, 1), (0, 2, 1)],
        lambda: Vllm(
            async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=8, enable_chunked_prefill=False
        ),
        max_model_len=8,
    )

    assert first(world) == [105, 212, 315]
    assert finished(world) == [315, 212, 315]


def test_vllm_runs_at_most_max_num_seqs() -> None:
    # A 105, 101 -> 206; then B 105 -> 311
    world = serve(
        [(0, 5, 2), (0, 5, 1)], lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_seqs=1)
    )

    assert finished(world) == [206, 311]


def test_vllm_long_prefill_threshold_limits_a_prompts_tokens_a_step() -> None:
    # Threshold 3: A(8, 1) B(5, 1)
    #   0  3 of A, 3 of B 106 -> 106
    # 106  3 of A, 2 of B 105 -> 211  B1
    # 211  2 of A         102 -> 313  A1
    world = serve(
        [(0, 8, 1), (0, 5, 1)],
        lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, long_prefill_token_threshold=3),
    )

    assert finished(world) == [313, 211]


def test_vllm_preempts_the_last_arrived_and_computes_all_its_tokens_again() -> None:
    # 4 blocks of 4. A(6, 8) B(3, 4) at 0, C(1, 1) at 250. "a7" is A's seventh token stored.
    #   0  prompts, 2 + 1 blocks             109 -> 109  A1 B1
    # 109  a7 b4                             102 -> 211  A2 B2
    # 211  a8 b5: B takes the last block     102 -> 313  A3 B3
    # 313  a9 needs a block: B gives its 2   101 -> 414  A4; one block is free
    # 414  a10, a11, a12; B, ahead of C again, needs 2 blocks for its 3 + 3 known tokens; C would fit but waits too
    #                                        303 -> 717  A7
    # 717  a13 takes the last block          101 -> 818  A8, done
    # 818  6 tokens of B and 1 of C          107 -> 925  B4 C1: its fourth token, not its first again
    world = serve([(0, 6, 8), (0, 3, 4), (250, 1, 1)], sync_vllm, blocks=4, block_size=4)

    assert first(world) == [109, 109, 925]
    assert finished(world) == [818, 925, 925]
    assert list(world.requests.preemptions) == [0, 1, 0]
    by_start = {row[0]: row[1:] for row in rows(world, "start_ps", "prefill_tokens", "decodes", "preempted")}
    assert by_start[0] == (9, 0, 0)
    assert by_start[313] == (0, 1, 1)
    assert by_start[818] == (7, 0, 0)
    gaps = world.engines[0].records.gaps()
    assert (925 - 313, 1) in zip(gaps["gap_ps"].tolist(), gaps["count"].tolist(), strict=True)


@pytest.mark.parametrize(
    ("reserve_full", "a_finished", "b_finished", "preemptions"),
    [
        # 4 blocks of 4, budget 4. A(6, 8) B(3, 4) at 0. Either way:
        #   0  4 of A                              104 -> 104
        # 104  2 of A, 2 of B                      104 -> 208  A1
        # 208  a7, the last of B                   102 -> 310  A2 B1
        # 310  a8 b4                               102 -> 412  A3 B2
        # 412  a9 takes the free block, none for b5: B gives its own. A chunk of it would fit there and then, but a
        #      step that preempted admits nobody   101 -> 513  A4; one block is free
        #
        # With all known tokens reserved, B (3 + 2 tokens, 2 blocks) waits for A:
        # 513  a10 ... a13                         404 -> 917  A8, done
        # 917  4 of B 104 -> 1021, 1 of B 101 -> 1122  B3, b6 101 -> 1223  B4
        (True, 917, 1223, 1),
        # Without, it comes and goes:
        # 513  a10, 3 of B in the free block       104 -> 617  A5
        # 617  a11; B's other 2 need a block: out  101 -> 718  A6
        # 718  a12, 3 of B                         104 -> 822  A7
        # 822  a13 needs the block: B out          101 -> 923  A8, done
        # 923  4 of B 104 -> 1027, 1 of B 101 -> 1128  B3, b6 101 -> 1229  B4
        (False, 923, 1229, 3),
    ],
)
def test_vllm_admits_nobody_in_a_step_that_preempted_and_later_with_or_without_full_room(
    reserve_full: bool, a_finished: int, b_finished: int, preemptions: int
) -> None:
    world = serve(
        [(0, 6, 8), (0, 3, 4)],
        lambda: Vllm(
            async_scheduling=False,
            enable_prefix_caching=False,
            max_num_batched_tokens=4,
            scheduler_reserve_full_isl=reserve_full,
        ),
        blocks=4,
        block_size=4,
    )

    assert first(world) == [208, 310]
    assert finished(world) == [a_finished, b_finished]
    assert list(world.requests.preemptions) == [0, preemptions]
    assert all(chunks == 0 for chunks, preempted in rows(world, "chunks", "preempted") if preempted)


def test_vllm_priority_preempts_the_least_urgent_though_it_came_first() -> None:
    # 4 blocks of 4. A(3, 8) of priority 1 at 0, B(6, 8) of priority 0 at 10.
    #   0  prompt of A                        103 -> 103  A1
    # 103  a4, prompt of B                    107 -> 210  A2 B1
    # 210  a5 takes the last block, b7        102 -> 312  A3 B2
    # 312  a6 b8                              102 -> 414  A4 B3
    # 414  b9 needs a block: A gives its 2    101 -> 515  B4
    # 515  b10 ... b13; A needs 2 for 3 + 4   404 -> 919  B8, done
    # 919  7 tokens of A                      107 -> 1026 A5
    # 1026 A                                  303 -> 1329 A8
    world = serve(
        [(0, 3, 8), (10, 6, 8)],
        lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, scheduling_policy="priority"),
        blocks=4,
        block_size=4,
        priority=[1, 0],
    )

    assert first(world) == [103, 210]
    assert finished(world) == [1329, 919]
    assert list(world.requests.preemptions) == [1, 0]


def test_vllm_priority_orders_the_queue_and_ties_go_by_arrival() -> None:
    # One at a time, all waiting behind A: 105 each, then the priorities 2, 1, 0, 1 of B ... E
    world = serve(
        [(0, 5, 1), (1, 5, 1), (2, 5, 1), (3, 5, 1), (4, 5, 1)],
        lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_seqs=1, scheduling_policy="priority"),
        priority=[0, 2, 1, 0, 1],
    )

    assert finished(world) == [105, 525, 315, 210, 420]


# what a policy may see


@dataclass
class Spy(Scheduler):
    """Serves everybody at once and writes down every number that a request shows."""

    oracle: bool = False
    seen: set[int] = field(default_factory=set)
    answers: list[int | None] = field(default_factory=list)

    def schedule(self, step: Step) -> int:
        for request in [*step.waiting, *step.running]:
            self.answers.append(request.output_tokens)
            self.seen |= {value for name in dir(request) if isinstance(value := self._look(request, name), int)}
        step.decode_all()
        while step.waiting and step.admit(step.waiting[0], step.waiting[0].prompt_tokens):
            pass
        return 1

    @staticmethod
    def _look(request: Request, name: str) -> object:
        return None if name.startswith("_") else getattr(request, name)


def test_policies_never_see_the_true_length() -> None:
    # No public number of the request is ever 37, or the 1037 that prompt and answer come to.
    spy = Spy()

    serve([(0, 1000, 37, 500)], lambda: spy, blocks=2000, block_size=16, leap=False)

    assert spy.answers == [None] * 37
    assert {1000, 500, 1035, 36} <= spy.seen  # prompt, cap, stored and emitted before the last step
    assert not spy.seen & {37, 1037}


def test_a_request_that_waits_holds_its_true_length_nowhere() -> None:
    # Private slots neither: before it runs, nothing in the object depends on the answer.
    def slots(output: int) -> list[object]:
        found: list[object] = []

        class Look(Spy):
            def schedule(self, step: Step) -> int:
                for request in step.waiting:
                    found.extend(getattr(request, name) for name in Request.__slots__)
                return super().schedule(step)

        serve([(0, 10, output, 500)], Look)
        return found

    assert slots(37) == slots(41)


def test_an_oracle_sees_the_true_length() -> None:
    spy = Spy(oracle=True)

    serve([(0, 10, 3, 500)], lambda: spy)

    assert set(spy.answers) == {3}


# what a policy may do


@dataclass
class Scripted(Scheduler):
    """Does in its n-th plan what the n-th function says, then serves everybody."""

    script: Sequence[Callable[[Step], object]] = ()
    budget: int | None = None

    def __post_init__(self) -> None:
        self._plans: Iterator[Callable[[Step], object]] = iter(self.script)

    def schedule(self, step: Step) -> int:
        act = next(self._plans, None)
        if act is not None:
            act(step)
            return 1
        step.decode_all()
        for request in step.prefilling:
            step.run(request, request.remaining)
        while step.waiting and step.admit(step.waiting[0], step.waiting[0].remaining):
            pass
        return 1


def admit_some(tokens: int) -> Callable[[Step], object]:
    return lambda step: step.admit(step.waiting[0], tokens)


def head(step: Step) -> Request:
    return next(iter(step.running))


def admit_and_run_on(step: Step) -> None:
    request = step.waiting[0]
    step.admit(request, 2)
    step.run(request, 2)


def admit_twice(step: Step) -> None:
    request = step.waiting[0]
    step.admit(request, 2)
    step.admit(request, 2)


def run_twice(step: Step) -> None:
    step.run(head(step), 1)
    step.run(head(step), 1)


def run_then_decode_all(step: Step) -> None:
    step.run(head(step), 1)
    step.decode_all()


def decode_all_then_run(step: Step) -> None:
    step.decode_all()
    step.run(head(step), 1)


def decode_all_twice(step: Step) -> None:
    step.decode_all()
    step.decode_all()


NAME = r"Request\(0, prompt 6, computed \d, emitted \d\)"
ALL_OF_IT = admit_some(6)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([admit_some(7)], rf"admit with 7 tokens of {NAME}: 6 remain"),
        ([admit_some(0)], rf"admit with 0 tokens of {NAME}: 6 remain"),
        (
            [lambda s: s.admit(s.waiting[0], 6, reserve=5)],
            rf"a reservation of 5 tokens for 6 tokens of {NAME}",
        ),
        pytest.param([lambda s: s.admit(s.waiting[0], 6, pad=-1)], r"-1"),
        ([admit_twice], rf"{NAME} is not waiting"),
        ([ALL_OF_IT, lambda s: s.admit(head(s), 1)], rf"{NAME} is not waiting"),
        ([ALL_OF_IT, lambda s: s.reject(head(s))], rf"{NAME} is not waiting"),
        ([admit_and_run_on], rf"run of {NAME} twice in one step"),
        ([admit_some(2), lambda s: s.run(head(s), 5)], rf"run of 5 tokens of {NAME}: 4 remain"),
        ([admit_some(2), lambda s: s.run(head(s), 0)], rf"run of 0 tokens of {NAME}: 4 remain"),
        ([ALL_OF_IT, lambda s: s.run(head(s), 2)], rf"run of 2 tokens of {NAME}: 1 remain"),
        ([ALL_OF_IT, run_twice], rf"run of {NAME} twice in one step"),
        ([ALL_OF_IT, decode_all_then_run], rf"run of {NAME} twice in one step"),
        ([ALL_OF_IT, run_then_decode_all], "decode_all after decodes were chosen already"),
        ([ALL_OF_IT, decode_all_twice], "decode_all after decodes were chosen already"),
        ([lambda s: s.run(s.waiting[0], 1)], rf"run of {NAME}, which is not running"),
        ([lambda s: s.preempt(s.waiting[0])], rf"preempt of {NAME}, which is not running"),
        ([lambda s: s.pause(-1)], "a pause of -1 ps"),
        ([lambda s: s.wake_at(s.now)], "wake_at 0 ps: it is 0 ps already"),
    ],
)
def test_a_verb_that_cannot_be_names_the_policy_the_number_and_the_limit(
    script: Sequence[Callable[[Step], object]], message: str
) -> None:
    with pytest.raises(PolicyError, match=rf"^policy Scripted: .*{message}"):
        serve([(0, 6, 5)], lambda: Scripted(script), block_size=4)


@pytest.mark.parametrize(
    ("script", "tokens"),
    [
        ([ALL_OF_IT], 6),
        ([lambda s: (s.admit(s.waiting[0], 3), s.admit(s.waiting[0], 3))], 6),
        ([admit_some(5), lambda s: (s.run(head(s), 1), s.admit(s.waiting[0], 5))], 6),
    ],
)
def test_a_step_over_the_budget_is_refused(script: Sequence[Callable[[Step], object]], tokens: int) -> None:
    with pytest.raises(PolicyError, match=rf"policy Scripted: step [\d,]+: a step of {tokens} tokens: its budget is 5"):
        serve([(0, 6, 5), (0, 6, 5)], lambda: Scripted(script, budget=5))


def test_verbs_say_false_and_change_nothing_where_the_pool_has_no_room() -> None:
    answers: list[object] = []

    def crowd(step: Step) -> None:
        free = step.free_blocks
        answers.append((step.admit(step.waiting[1], 6), free - step.free_blocks))  # 2 blocks of 4
        answers.append((step.admit(step.waiting[0], 6), step.free_blocks))  # 1 is left

    # 0  prompt of B in 2 of 3 blocks; A does not fit until B is done
    world = serve([(0, 6, 2), (0, 6, 1)], lambda: Scripted([crowd]), blocks=3, block_size=4)

    assert answers == [(True, 2), (False, 1)]
    assert finished(world) == [106 + 106 + 101, 106]


def test_preempting_everybody_is_not_the_end() -> None:
    # 0 prompt 106 A1; 106 preempted, and the plan is asked for again: 6 + 1 known tokens 107 -> 213 A2; 101 -> 314 A3
    world = serve([(0, 6, 3)], lambda: Scripted([ALL_OF_IT, lambda s: s.preempt(head(s))]))

    assert (first(world), finished(world)) == ([106], [314])


def test_a_decode_preempted_after_it_was_planned_leaves_no_step_behind() -> None:
    def change_of_mind(step: Step) -> None:
        step.decode_all()
        step.preempt(head(step))

    # As above: a step of nobody takes no time.
    world = serve([(0, 6, 3)], lambda: Scripted([ALL_OF_IT, change_of_mind]))

    assert finished(world) == [314]


def test_a_chunk_taken_back_takes_its_padding_back_only_if_it_had_some() -> None:
    def both(step: Step) -> None:
        step.admit(step.waiting[0], 4, pad=10)
        step.admit(step.waiting[0], 6)

    def change_of_mind(step: Step) -> None:
        step.decode_all()
        step.run(head(step), 2)
        step.preempt(head(step))

    def at_once(step: Step) -> None:
        step.admit(step.waiting[0], 6, pad=10)
        step.admit(step.waiting[0], 6)
        step.preempt(head(step))

    # 0  4 of A, padded by 10, and all of B 120; B2 101; A again 106 and B3 at once 107
    later = serve([(0, 6, 1), (0, 6, 3)], lambda: Scripted([both, change_of_mind]))
    assert finished(later) == [328, 328]
    assert rows(later, "padded") == [(10,), (0,), (0,)]

    # 0  B alone: A's padding went with A
    never = serve([(0, 6, 1), (0, 6, 1)], lambda: Scripted([at_once]))
    assert finished(never) == [212, 106]
    assert rows(never, "padded") == [(0,), (0,)]


class Idler(Scheduler):
    """Plans nothing, ever."""

    def schedule(self, step: Step) -> int:
        return 1


class Absent(Scheduler):
    """Vouches for no steps."""

    def schedule(self, step: Step) -> int:
        step.decode_all()
        while step.waiting and step.admit(step.waiting[0], step.waiting[0].prompt_tokens):
            pass
        return 0


def test_a_policy_that_serves_nobody_is_told_so_at_the_end() -> None:
    with pytest.raises(PolicyError, match=r"policy Idler: 7 requests are never served \(0, 1, 2, 3, 4, …\)"):
        serve([(10 * i, 5, 1) for i in range(7)], Idler)


@pytest.mark.parametrize(
    "leap",
    [True, pytest.param(False)],
)
def test_a_policy_that_vouches_for_no_step_is_refused(leap: bool) -> None:
    with pytest.raises(PolicyError, match="policy Absent: step 1: vouched for 0 steps"):
        serve([(0, 5, 9)], Absent, leap=leap)


# requests that can never fit


@pytest.mark.parametrize(
    ("request_row", "blocks", "max_model_len"),
    [((10, 30, 40), 4, 1000), ((10, 30, 40), 100, 69)],
    ids=["pool", "model"],
)
def test_what_can_never_fit_is_rejected_on_arrival_and_the_rest_goes_on(
    request_row: Row, blocks: int, max_model_len: int
) -> None:
    # 30 + 40 tokens: 69 of them are stored (the last one is not), in 5 blocks of 16; or the model takes 69 at most.
    # A and C: 105, then 101 and, C having come at 20, 105 + 1 -> 211 A2 C1
    world = serve(
        [(0, 5, 2), request_row, (20, 5, 1)], sync_vllm, blocks=blocks, block_size=16, max_model_len=max_model_len
    )

    assert list(world.requests.status) == [Status.FINISHED, Status.REJECTED, Status.FINISHED]
    assert finished(world) == [211, 10, 211]
    assert first(world) == [105, -1, 211]


def test_what_exactly_fits_is_served() -> None:
    # 69 tokens stored in 69 slots, and a model of 70 tokens
    world = serve([(0, 30, 40)], sync_vllm, blocks=69, block_size=1, max_model_len=70)

    assert list(world.requests.status) == [Status.FINISHED]


def test_a_reservation_larger_than_the_pool_rejects_the_request_and_the_rest_goes_on() -> None:
    # Pool 20: A declares 5 + 30, though its answer is short
    world = serve([(0, 5, 2, 30), (0, 5, 1, 5)], lambda: Orca(reserve="declared"), blocks=20)

    assert list(world.requests.status) == [Status.REJECTED, Status.FINISHED]
    assert finished(world) == [0, 105]


def test_thousands_may_be_rejected_at_once() -> None:
    world = serve([(0, 5, 1, 30)] * 3000, lambda: Orca(reserve="declared"), blocks=20)

    assert set(world.requests.status) == {Status.REJECTED}


# every policy there is


SMALL: dict[str, list[dict[str, Any]]] = {  # settings that bind on the small workload below
    "Static": [{"batch": 3}, {"batch": 3, "pad_to": "global"}, {"batch": 5, "max_wait_ms": 30}],
    "Orca": [{"max_batch": 2}, {"max_batch": 3, "reserve": "declared"}],
    "Tgi": [
        {"max_batch_total_tokens": 150, "max_waiting_tokens": 3},
        {"max_batch_total_tokens": 400, "waiting_served_ratio": 0.3, "max_batch_prefill_tokens": 60},
    ],
    "Sarathi": [{"budget": 9, "max_batch": 5}, {"budget": 16, "watermark": 0.2, "enable_prefix_caching": True}],
    "VllmV0": [
        {"max_num_seqs": 3, "preemption_mode": "swap"},
        {"watermark": 0.2},
        {"preemption_mode": "swap", "watermark": 0},
    ],
    "Sglang": [
        {"chunked_prefill_size": 12},
        {"schedule_conservativeness": 0.1, "chunked_prefill_size": 30},
        {"schedule_conservativeness": 0, "enable_mixed_chunk": True, "max_running_requests": 9},
    ],
    "Sjf": [
        {"predictions": "noisy", "tau": 0.5, "starvation_steps": 20},
        {"starvation_steps": 5, "max_batch": 3, "preemption": "swap", "quantum": 4},
        {"predictions": "buckets", "buckets": 3, "budget": 20},
    ],
    "Srpt": [
        {"preemption": "swap", "max_batch": 3},
        {"predictions": "noisy", "tau": 0.3, "keep_from": 0.5, "budget": 20},
        {"starvation_steps": 7, "quantum": 9, "keep_from": 1.0, "max_batch": 4},
    ],
    "Priority": [{"max_batch": 3}, {"preemption": "swap", "budget": 14}, {"age_s": 0.01, "max_batch": 3}],
    "Slo": [{"tpot_ms": 20, "budget": 40}, {"tpot_ms": 12, "least_chunk": 3, "max_batch": 4}],
    "Deadline": [
        {"tpot_ms": 20, "ttft_ms": [20, 80], "budget": 40},
        {"tpot_ms": 12, "least_chunk": 3, "max_batch": 4, "ttft_ms": [100]},
    ],
    "Fair": [{"max_batch": 3}, {"budget": 20, "input_weight": 3, "output_weight": 5}],
    "Mlfq": [
        {"max_batch": 3, "quantum": 4},
        {"quantum": 2, "ratio": 3, "levels": 3, "promote_steps": 9},
        {"max_batch": 4, "quantum": 3, "preemption": "recompute"},
    ],
    "Vllm": [
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"max_num_batched_tokens": 9, "max_num_seqs": 8, "long_prefill_token_threshold": 5},
        {
            "max_num_batched_tokens": 16,
            "max_num_seqs": 8,
            "scheduler_reserve_full_isl": False,
            "scheduling_policy": "priority",
        },
    ],
}

CASES = [
    pytest.param(cls, chosen, id=f"{cls.__name__}-{'-'.join(f'{k}={v}' for k, v in chosen.items()) or 'default'}")
    for cls in plugins.shipped(plugins.POLICY).values()
    for chosen in [{}, *SMALL.get(cls.__name__, [])]
]


def test_every_scheduler_of_the_package_is_found() -> None:
    assert {Static, Orca, Tgi, Vllm} <= set(plugins.shipped(plugins.POLICY).values())


@pytest.mark.parametrize(("cls", "chosen"), CASES)
def test_every_policy_keeps_its_promises(cls: type[Scheduler], chosen: dict[str, Any]) -> None:
    """With the defaults also each choice of each setting that has only a few is tried."""
    found = check_policy(cls, chosen, variants=not chosen)

    assert found.broken == []
    assert found.refused == 0
    assert {v.promise.name for v in found if v.state == "unchecked"} <= {"blind"}


def most_in_a_step(world: World) -> int:
    """Requests that the fullest step of any replica computed for."""
    runs = [engine.records.runs() for engine in world.engines]
    return max(int((each["chunks"] + each["decodes"]).max()) for each in runs)


LIMITED: dict[str, list[dict[str, Any]]] = {  # settings that let three requests into a step
    **{name: [{"max_batch": 3}, {"budget": 3}] for name in ("Sarathi", "Sjf", "Srpt", "Priority", "Slo", "Fair")},
    "Deadline": [{"max_batch": 3}, {"budget": 3}],
    "Mlfq": [{"max_batch": 3}],
    "Orca": [{"max_batch": 3}],
    "Sglang": [{"max_running_requests": 3}],
    "Static": [{"batch": 3}],
    "Vllm": [{"max_num_seqs": 3}],
    "VllmV0": [{"max_num_seqs": 3}],
}


@pytest.mark.parametrize(
    ("cls", "chosen"),
    [
        pytest.param(cls, chosen, id=f"{cls.__name__}-{next(iter(chosen))}")
        for cls in plugins.shipped(plugins.POLICY).values()
        for chosen in LIMITED.get(cls.__name__, [])
    ],
)
def test_a_policy_fills_its_steps_up_to_the_limit_that_it_says(cls: type[Scheduler], chosen: dict[str, Any]) -> None:
    crowd = trace_of([(0, 1, 5)] * 12, max_tokens=[5] * 12)
    world = play(crowd, lambda: cls(**chosen), max_model_len=120)

    assert cls(**chosen).sequence_limit == 3
    assert most_in_a_step(world) == 3


def test_every_policy_but_tgi_limits_the_requests_of_a_step() -> None:
    """TGI's limit is of tokens alone: prompts and declared outputs of the whole batch."""
    known = plugins.shipped(plugins.POLICY).values()

    assert [cls.__name__ for cls in known if cls().sequence_limit is None] == ["Tgi"]
    assert set(LIMITED) == {cls.__name__ for cls in known} - {"Tgi"}


@dataclass
class ShortestPrompt(Scheduler):
    """Serve the shortest prompt first: a policy as a user would write it."""

    budget: int = 128  # a whole request, should it be preempted at its end

    def schedule(self, step: Step) -> int:
        while not step.decode_all():
            step.preempt(max(step.running, key=lambda r: r.prompt_tokens))
        room = self.budget - step.decodes
        for request in sorted(step.waiting, key=lambda r: r.remaining):
            if request.remaining > room or not step.admit(request, request.remaining):
                break
            room -= request.remaining
        return 1 if step.waiting else FOREVER


@dataclass
class OneByOne(Scheduler):
    """Takes turns: every step runs one request for a token, or a prompt for at most three."""

    _turn: int = field(default=0, init=False, repr=False)

    def schedule(self, step: Step) -> int:
        while step.waiting and step.admit(step.waiting[0], 1, reserve=step.max_model_len):
            pass
        if running := [r for r in step.running if r.computed]:  # not those of this plan
            self._turn += 1
            request = running[self._turn % len(running)]
            step.run(request, min(3, request.remaining))
        return 1


@pytest.mark.parametrize(("cls", "chosen"), [(ShortestPrompt, {}), (ShortestPrompt, {"budget": 1000}), (OneByOne, {})])
def test_a_users_own_policy_keeps_its_promises(cls: type[Scheduler], chosen: dict[str, Any]) -> None:
    found = check_policy(cls, chosen)

    assert [verdict.state for verdict in found] == ["kept"] * len(list(found))
    assert found.refused == 0
