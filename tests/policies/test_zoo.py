"""What defines each policy of the zoo, worked out by hand: 100 ps a step and 1 ps a token, as in `by_hand`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.policies.base import Request, Scheduler, Step
from chairlift.policies.deadline import Deadline
from chairlift.policies.fair import Fair
from chairlift.policies.mlfq import Mlfq
from chairlift.policies.orca import Buddy, Orca
from chairlift.policies.priority import Priority
from chairlift.policies.sarathi import Sarathi
from chairlift.policies.sglang import Sglang
from chairlift.policies.sjf import Sjf, Srpt
from chairlift.policies.slo import Slo
from chairlift.policies.vllm_v0 import VllmV0
from chairlift.sim.replica.radix_pool import RadixPool
from chairlift.sim.workload.random_streams import stream
from kit.by_hand import PS_IN_MS, finished, first, rows, serve
from kit.worlds import World, play, sorted_gaps, trace_of

LONG_BEHIND_SHORT = [(0, 5, 4), (50, 12, 2), (60, 2, 1)]  # A decodes when a long prompt and a short one come


def test_sarathi_never_stalls_a_decode_for_a_prompt() -> None:
    # Budget 8.
    #   0  A                       105 -> 105  A1
    # 105  A2, 7 of B              108 -> 213
    # 213  A3, 5 of B, 2 of C      108 -> 321  B1 C1
    # 321  A4, B2                  102 -> 423
    world = serve(LONG_BEHIND_SHORT, lambda: Sarathi(budget=8))

    assert first(world) == [105, 321, 321]
    assert finished(world) == [423, 423, 321]


def test_vllm_v0_stalls_all_decodes_for_whole_prompts() -> None:
    #   0  A             105 -> 105  A1
    # 105  B and C       114 -> 219  B1 C1
    # 219  A2 B2         102 -> 321
    # 321  A3, A4        202 -> 523
    world = serve(LONG_BEHIND_SHORT, VllmV0)

    assert first(world) == [105, 219, 219]
    assert finished(world) == [523, 321, 219]


def test_sglang_prefills_in_chunks_that_follow_one_another() -> None:
    # Chunks of 8.
    #   0  A               105 -> 105  A1
    # 105  8 of B          108 -> 213
    # 213  4 of B and C    106 -> 319  B1 C1
    # 319  A2 B2           102 -> 421
    # 421  A3, A4          202 -> 623
    world = serve(LONG_BEHIND_SHORT, lambda: Sglang(chunked_prefill_size=8, disable_overlap_schedule=True))

    assert first(world) == [105, 319, 319]
    assert finished(world) == [623, 421, 319]


def test_sglang_plans_a_step_ahead_with_overlap() -> None:
    # As above, but A2 is planned with A1 in flight, before B and C come.
    #   0  A               105 -> 105  A1
    # 105  A2              101 -> 206
    # 206  8 of B          108 -> 314
    # 314  4 of B and C    106 -> 420  B1 C1
    # 420  A3 B2           102 -> 522
    # 522  A4              101 -> 623
    world = serve(LONG_BEHIND_SHORT, lambda: Sglang(chunked_prefill_size=8))

    assert first(world) == [105, 420, 420]
    assert finished(world) == [623, 522, 420]


def test_sglang_decodes_once_more_for_whoever_ends_by_eos_with_overlap() -> None:
    # One request of 3 tokens, of which the last is EOS (4 are allowed) or the last allowed.
    def steps(allowed: int, version: Literal["0.5.17", "0.5.23"] = "0.5.23", overlap: bool = True) -> list[int]:
        policy = lambda: Sglang(version=version, disable_overlap_schedule=not overlap)  # noqa: E731
        world = serve([(0, 5, 3, allowed)], policy)
        assert finished(world) == [105 + 2 * 101]
        return [n for count, n in rows(world, "steps", "decodes") for _ in range(count)]

    assert steps(3) == [0, 1, 1]
    assert steps(4) == [0, 1, 1, 1]
    assert steps(3, "0.5.17") == steps(4, "0.5.17") == [0, 1, 1, 1]
    assert steps(4, overlap=False) == steps(3, "0.5.17", overlap=False) == [0, 1, 1]


@pytest.mark.parametrize(
    ("policy", "worst"),
    # no gap of a decode is longer than a step of the budget; a policy that stalls decodes has one of a whole prompt
    [(lambda: Sarathi(budget=32), 100 + 32), (lambda: Slo(budget=32), 100 + 32), (VllmV0, None), (Sglang, None)],
)
def test_gaps_between_tokens(policy: Callable[[], Scheduler], worst: int | None) -> None:
    rng = stream(0, "gaps")
    table = [(int(t), int(p), int(o)) for t, p, o in zip(
        rng.integers(0, 20_000, 60).cumsum() // 10, rng.integers(50, 400, 60), rng.integers(1, 40, 60), strict=True
    )]  # fmt: skip
    world = serve(table, policy, blocks=100_000)
    gaps = [gap for gap, _ in sorted_gaps(world.engines[0])]

    if worst is not None:
        assert max(gaps) <= worst
    else:
        assert max(gaps) > 100 + 132


# Orca's buddies


def test_a_buddy_allocator_cuts_and_joins_pieces() -> None:
    # 15,700 = 8192 + 4096 + 2048 + 1024 + ...: seven pieces of 2048, the lanes of Orca (Max) in the vLLM paper
    buddy = Buddy(15_700)
    pieces = [piece for _ in range(8) if (piece := buddy.take(2048)) is not None]

    assert len(pieces) == 7
    assert len({start for start, _ in pieces}) == 7
    assert buddy.take(1025) is None
    assert buddy.take(1024) == (14_336, 1024)
    for piece in reversed(pieces):
        buddy.give(piece)
    assert buddy.take(8192) == (0, 8192)  # joined again
    assert buddy.take(4096) == (8192, 4096)


@given(st.integers(1, 5000), st.lists(st.tuples(st.booleans(), st.integers(1, 600)), max_size=60))
def test_buddies_never_overlap_and_all_comes_back(slots: int, acts: list[tuple[bool, int]]) -> None:
    buddy, fresh = Buddy(slots), Buddy(slots)
    held: list[tuple[int, int]] = []
    for give, number in acts:
        if give and held:
            buddy.give(held.pop(number % len(held)))
        elif (piece := buddy.take(number)) is not None:
            assert number <= piece[1] < 2 * number
            assert piece[0] + piece[1] <= slots
            assert all(piece[0] + piece[1] <= start or start + size <= piece[0] for start, size in held)
            held.append(piece)
    for piece in held:
        buddy.give(piece)

    assert {k: v for k, v in buddy._free.items() if v} == {k: v for k, v in fresh._free.items() if v}


def test_orca_with_buddies_admits_fewer_than_the_slots_would_hold() -> None:
    # 16 slots, 5 + 1 reserved each: two by slots (12), two by buddies (8 + 8); of 12 slots, 8 + 4, one only.
    requests = [(0, 5, 1)] * 2

    def both(slots: int, allocator: Literal["slots", "buddy"]) -> list[int]:
        return finished(serve(requests, lambda: Orca(reserve="declared", allocator=allocator), blocks=slots))

    assert both(16, "slots") == both(16, "buddy") == both(12, "slots") == [110, 110]
    assert both(12, "buddy") == [105, 210]


# cached prefixes


def test_sglang_serves_the_longest_cached_prefix_first() -> None:
    # One at a time. A(8 of group 0) leaves its prefix; B has none there, C the 8 tokens of A's group and one more.
    #   0  A 8 tokens      108 -> 108, done
    # 108  C: 8 of 9 are cached, 101 -> 209
    # 209  B 9 tokens      109 -> 318
    columns = {"prefix_group": [0, 1, 0], "prefix_tokens": [8, 8, 8]}
    requests = [(0, 8, 1), (1, 9, 1), (2, 9, 1)]

    def served(order: Literal["lpm", "fcfs"]) -> World:
        policy = lambda: Sglang(max_running_requests=1, schedule_policy=order, disable_overlap_schedule=True)  # noqa: E731
        return serve(requests, policy, **columns)

    assert finished(served("lpm")) == [108, 318, 209]
    assert finished(served("fcfs")) == [108, 217, 318]
    assert list(served("lpm").requests.cached_tokens) == [0, 0, 8]


def test_sglang_keeps_answers_and_forgets_whole_nodes() -> None:
    # 40 slots. C's prompt begins with the 8 tokens with which A's does.
    #   0  A(10, 5): 110, 4 steps of 101 -> 514, and leaves 10 + 4 tokens, in two nodes
    # 600  B(20, 5): 120, 4 steps of 101 -> 1124, and leaves 20 + 4: 2 slots are free
    # 1200 C(10, 3): 8 are cached, 2 take the last slots: 102. Its decodes want one each: A's answer goes
    columns = {"prefix_group": [0, -1, 0], "prefix_tokens": [8, 0, 8]}
    policy = lambda: Sglang(disable_overlap_schedule=True)  # noqa: E731
    world = serve([(0, 10, 5), (600, 20, 5), (1200, 10, 3)], policy, blocks=40, **columns)

    assert finished(world) == [514, 1124, 1200 + 102 + 2 * 101]
    assert list(world.requests.cached_tokens) == [0, 0, 8]
    [engine] = world.engines
    assert isinstance(engine.pool, RadixPool)
    # A's prompt, shared, 8; its own 2 tokens; B's prompt and answer, 20 and 4; C's 2 and 2 of its answer
    assert engine.pool.cached == 8 + 2 + 20 + 4 + 2 + 2


def test_sglang_retracts_who_has_the_shortest_answer_and_the_longest_prompt() -> None:
    # 33 slots; the running count for nothing, a newcomer with its whole answer and one slot more.
    #   0  A(8, 9)                 108 -> 108  A1; 18 of 33
    # 108  B(6, 9)                 106 -> 214  B1; 16 of 25
    # 214  C(5, 9)                 105 -> 319  C1; 15 of 19
    # 319  four steps of three     412 -> 731  A5 B5 C5: 12 + 10 + 9 slots
    # 731  no room for three. All have 5 tokens; A has the longest prompt and goes, to the end of the queue. The ratio
    #      is (10 + 20 · 2) / (18 + 1), at most 1: of 33 - 21 slots B and C may take 6, and A wants 13 + 4 + 1.
    #      four steps of two       408 -> 1139 B9 C9
    # 1139 13 tokens of A          113 -> 1252 A6, three steps 303 -> 1555
    requests = [(0, 8, 9), (10, 6, 9), (115, 5, 9)]
    policy = lambda: Sglang(  # noqa: E731
        schedule_conservativeness=0, disable_radix_cache=True, disable_overlap_schedule=True
    )
    world = serve(requests, policy, blocks=33)

    assert list(world.requests.preemptions) == [1, 0, 0]
    assert first(world) == [108, 214, 319]
    assert finished(world) == [1555, 1139, 1139]


# shortest first


SIZES = [(0, 5, 9), (0, 5, 5), (0, 5, 1)]


def test_sjf_serves_the_shortest_answer_first() -> None:
    # One at a time. C 105; B 105 + 4 · 101 -> 614; A 105 + 8 · 101 -> 1527
    assert finished(serve(SIZES, lambda: Sjf(max_batch=1))) == [1527, 614, 105]


def test_sjf_with_bad_predictions_serves_in_another_order() -> None:
    def order(tau: float) -> list[int]:
        return np.argsort(finished(serve(sizes, lambda: Sjf(max_batch=1, predictions="noisy", tau=tau)))).tolist()

    sizes = [(0, 5, output) for output in (9, 2, 5, 7, 1, 8)]

    assert order(1.0) == [4, 1, 2, 3, 5, 0]
    assert order(-1.0) == order(1.0)[::-1]


def test_srpt_displaces_whoever_has_more_left() -> None:
    # One at a time. A(5, 9) at 0, C(5, 2) at 300.
    #   0  A 105, 101, 101            -> 307  A3
    # 307  C has 2 left, A 6: C 105, 101 -> 513  C2
    # 513  5 + 3 tokens of A 108 -> 621  A4, then 5 · 101 -> 1126
    world = serve([(0, 5, 9), (300, 5, 2)], lambda: Srpt(max_batch=1, keep_from=1.0))

    assert finished(world) == [1126, 513]
    assert list(world.requests.preemptions) == [1, 0]


def test_srpt_leaves_alone_who_is_far_enough() -> None:
    # A has 3 of 9 tokens, more than 0.3 of them: it ends at 307 + 6 · 101 = 913; C 105, 101 -> 1119
    world = serve([(0, 5, 9), (300, 5, 2)], lambda: Srpt(max_batch=1, keep_from=0.3))

    assert finished(world) == [913, 1119]


def test_srpt_swaps_for_the_price_of_two_moves() -> None:
    # As above but A's 7 tokens go and come: 7 ps each way. 307 C 112, 101 -> 520; A4 .. A9 108 + 5 · 101 -> 1133
    world = serve([(0, 5, 9), (300, 5, 2)], lambda: Srpt(max_batch=1, keep_from=1.0, preemption="swap"), host=(50, 1))

    assert finished(world) == [1133, 520]


def test_whoever_starves_goes_first() -> None:
    # One at a time, and a short one always waits: without care the long one is last; with it, it goes first once it
    # has waited for 3 decode steps. S1 (5, 3) 105, 202 -> 307: two steps waited. S2 307, 105, 202 -> 614: four.
    requests = [(0, 5, 3), (1, 5, 9), (2, 5, 3), (3, 5, 3), (4, 5, 3)]

    assert finished(serve(requests, lambda: Sjf(max_batch=1)))[1] == 4 * 307 + 105 + 8 * 101
    assert finished(serve(requests, lambda: Sjf(max_batch=1, starvation_steps=3)))[1] == 2 * 307 + 105 + 8 * 101


# classes and targets


def test_priority_displaces_a_lower_class_and_ageing_makes_up_for_it() -> None:
    # One at a time. A(5, 4) of class 1 at 0, B(5, 1) of class 0 at 150.
    #   0  A 105, 101 -> 206  A2; B 105 -> 311; 5 + 2 tokens of A 107 -> 418  A3, 101 -> 519
    requests = [(0, 5, 4), (150, 5, 1)]
    strict = serve(requests, lambda: Priority(max_batch=1), priority=[1, 0])
    # a class is worth 100 ps: A is put off to 100, before B. It ends at 408, B at 513
    aged = serve(requests, lambda: Priority(max_batch=1, age_s=100e-12), priority=[1, 0])

    assert finished(strict) == [519, 311]
    assert finished(aged) == [408, 513]


def test_slo_fills_each_step_up_to_the_target() -> None:
    # A step may take 130 ps; A decodes: 29 tokens of B(70, 1) a step.
    #   0  A 105 -> 105;  105  29 130 -> 235, 29 130 -> 365, 12 of B  113 -> 478  B1
    world = serve([(0, 5, 9), (50, 70, 1)], lambda: Slo(tpot_ms=130 * PS_IN_MS))

    assert first(world) == [105, 478]
    assert rows(world, "prefill_tokens")[:4] == [(5,), (29,), (29,), (12,)]


def test_slo_goes_on_by_the_least_chunk_where_decodes_alone_miss_the_target() -> None:
    # 101 ps are over 90: 4 tokens a step of B(8, 1)
    world = serve([(0, 5, 9), (50, 8, 1)], lambda: Slo(tpot_ms=90 * PS_IN_MS, least_chunk=4))

    assert first(world) == [105, 105 + 2 * 105]


def test_deadline_admits_the_earliest_deadline_and_puts_off_the_hopeless() -> None:
    # One at a time: A until 4 · 101 + 105 = 509. Targets: class 0 600 ps, class 1 5000 ps.
    # Then those due at 601 -> 614, at 620 (605 is past) -> 719, at 5010 -> 824, and what is past -> 929.
    requests = [(0, 5, 5), (1, 5, 1), (5, 5, 1), (10, 5, 1), (20, 5, 1)]
    world = serve(
        requests,
        lambda: Deadline(max_batch=1, ttft_ms=[600 * PS_IN_MS, 5000 * PS_IN_MS]),
        priority=[0, 0, 0, 1, 0],
    )

    assert finished(world) == [509, 614, 929, 824, 719]


def test_deadline_lets_prompts_take_what_the_least_slack_spares() -> None:
    # Each token may take 300 ps. A(5, 20): first token at 105, the next due at 405.
    #   0  A 105; 105 A2 101 -> 206, 206 A3 -> 307. B(900, 1) came at 250. A4 is due at 105 + 3 · 300 = 1005: 698 ps are
    # 307  left: 100 + 1 + 597 tokens 698 -> 1005. A5 is due at 1305: 300 ps, 199 tokens -> 1305; then 104 -> 1510
    world = serve([(0, 5, 20), (250, 900, 1)], lambda: Deadline(tpot_ms=300 * PS_IN_MS), blocks=2000)

    assert first(world)[1] == 1510
    assert [row for row in rows(world, "prefill_tokens") if row[0]] == [(5,), (597,), (199,), (104,)]


# feedback queue


def test_mlfq_demotes_by_quantum_and_lets_a_newcomer_pass() -> None:
    # Quantum 2, then 4, one at a time; all has room, so that nothing is swapped. A(5, 6) at 0, B(5, 2) at 250.
    #   0  A1 105, A2 101 -> 206: A has used its quantum up and sinks;  A3 -> 307
    # 307  B1 105, B2 101 -> 513, done
    # 513  A4 ... A6 303 -> 816
    world = serve([(0, 5, 6), (250, 5, 2)], lambda: Mlfq(max_batch=1, quantum=2))

    assert finished(world) == [816, 513]
    assert list(world.requests.preemptions) == [0, 0]


def test_mlfq_skips_queues_whose_quantum_a_prompt_exceeds() -> None:
    # A step of a 400-token prompt takes as long as 4 decodes, more than the quantum of 2: it joins the second queue,
    # so that B, which came later, goes first once A(5, 2) is done at 206.
    world = serve([(0, 5, 2), (10, 400, 1), (20, 5, 1)], lambda: Mlfq(max_batch=1, quantum=2))

    assert finished(world) == [206, 206 + 105 + 500, 206 + 105]


def test_mlfq_swaps_out_who_is_outranked_where_there_is_no_room() -> None:
    # 10 slots. A(5, 6) as before; at 307 it has 7 tokens there, and B(5, 2) needs 5: A out 7 ps beside B's step.
    #   B1 105 -> 412, B2 101 -> 513; A in, beside its step: A4 ... A6 303 -> 816
    world = serve([(0, 5, 6), (250, 5, 2)], lambda: Mlfq(max_batch=1, quantum=2), blocks=10, host=(10, 1))

    assert finished(world) == [816, 513]
    assert list(world.requests.swaps) == [1, 0]


# fairness


@dataclass
class Watched(Fair):
    """Keeps its own account of what each tenant was served, at every step."""

    max_gap: int = 0
    most: int = 0  # tokens in the pool
    _seen: dict[int, Request] = field(default_factory=dict, init=False, repr=False)

    def schedule(self, step: Step) -> int:
        vouched = super().schedule(step)
        self._seen |= {r.id: r for r in step.running}
        self.most = max(self.most, sum(r.computed for r in step.running))
        if {r.tenant for r in step.waiting} == {0, 1}:  # both are backlogged
            served = [0, 0]
            for r in self._seen.values():
                served[r.tenant] += self.input_weight * r.prompt_tokens + self.output_weight * r.emitted
            self.max_gap = max(self.max_gap, abs(served[0] - served[1]))
        return vouched


@dataclass
class WatchedFcfs(Watched):
    """The same account of first come, first served."""

    def _next(self, step: Step) -> Request:
        return step.waiting[0]


@pytest.mark.parametrize("seed", range(5))
def test_vtc_serves_backlogged_tenants_alike_within_twice_u(seed: int) -> None:
    # Tenant 1 sends three times as many, and longer, requests; all come in at once, so that both are backlogged.
    rng = stream(seed, "fair")
    n = 160
    tenant = (rng.random(n) < 0.75).astype(int)
    prompts = rng.integers(1, 60, n) + 40 * tenant
    table = [(0, int(p), int(o)) for p, o in zip(prompts, rng.integers(1, 80, n), strict=True)]
    policies: dict[str, Any] = {}

    def keep(name: str, policy: Watched) -> Watched:
        policies[name] = policy
        return policy

    slots = 400
    for name, kind in (("vtc", Watched), ("fcfs", WatchedFcfs)):
        serve(
            table,
            lambda n=name, k=kind: keep(n, k(budget=128)),
            blocks=slots,
            tenant=tenant.tolist(),
            tenants=("a", "b"),
        )
    bound = 2 * max(1 * int(prompts.max()), 2 * slots)  # theorem 4.4: 2 · max(w_p · L_input, w_q · M)

    assert 0 < policies["vtc"].max_gap <= bound
    assert policies["fcfs"].max_gap > policies["vtc"].max_gap


def test_a_tenant_brings_no_credit_from_its_absence() -> None:
    # One at a time; a prompt counts 1, an output token 2. Tenant a has been served for 5 requests when b comes with
    # 3 at 600: b's counter is lifted to a's, so that they take turns from there on.
    requests = [(0, 5, 1)] * 9 + [(600, 5, 1)] * 3
    world = serve(requests, lambda: Fair(max_batch=1), tenant=[0] * 9 + [1] * 3, tenants=("a", "b"))
    order = np.argsort(finished(world)).tolist()
    tenants = ["a" if i < 9 else "b" for i in order]

    assert tenants[:6] == ["a"] * 6
    assert tenants[6:].count("b") == 3
    assert "".join(tenants[6:11]) in ("babab", "ababa")


# what is true of several


CONSERVING: dict[str, Callable[[], Scheduler]] = {
    "sarathi": lambda: Sarathi(budget=64, max_batch=4),
    "vllm_v0": VllmV0,
    "sglang": Sglang,
    "sjf": lambda: Sjf(max_batch=4),
    "srpt": lambda: Srpt(max_batch=4),
    "priority": lambda: Priority(max_batch=4),
    "slo": lambda: Slo(tpot_ms=200 * PS_IN_MS),
    "deadline": lambda: Deadline(tpot_ms=200 * PS_IN_MS),
    "fair": lambda: Fair(max_batch=4),
    "mlfq": lambda: Mlfq(max_batch=4, quantum=3),
}


@pytest.mark.parametrize("name", sorted(CONSERVING))
def test_no_replica_is_idle_while_anybody_is_there(name: str) -> None:
    rng = stream(3, "conserving")
    n = 60
    arrivals = rng.exponential(900, n).cumsum().astype(int)
    table = list(zip(arrivals.tolist(), rng.integers(1, 90, n).tolist(), rng.integers(1, 30, n).tolist(), strict=True))
    world = serve(table, CONSERVING[name], blocks=300, priority=rng.integers(0, 3, n).tolist())
    runs = world.engines[0].records.runs()
    ends = runs["start_ps"] + runs["first_ps"] * runs["steps"]  # steps cost the same here
    idle = list(zip(ends[:-1].tolist(), runs["start_ps"][1:].tolist(), strict=True))
    done = np.array(finished(world))

    assert any(start > end for end, start in idle)
    for end, start in idle:
        if start > end:
            assert not np.any((arrivals < start) & (done > end))


def mean_e2e(world: World) -> float:
    return float(np.mean(np.array(finished(world)) - world.requests.trace.arrival_ps))


def overload(seed: int, n: int = 200) -> list[tuple[int, int, int]]:
    rng = stream(seed, "overload")
    arrivals = rng.exponential(400, n).cumsum().astype(int)
    outputs = np.minimum(np.rint(rng.lognormal(2.7, 1.3, n)) + 1, 600).astype(int)  # heavier than exponential
    return list(zip(arrivals.tolist(), rng.integers(5, 20, n).tolist(), outputs.tolist(), strict=True))


def test_srpt_has_the_least_mean_time_and_order_follows_knowledge() -> None:
    # Eight at a time, all has room: what counts is the order alone.
    rivals: dict[str, Callable[[], Scheduler]] = {
        "srpt": lambda: Srpt(max_batch=8),
        "sjf": lambda: Sjf(max_batch=8),
        "sjf 0.5": lambda: Sjf(max_batch=8, predictions="noisy", tau=0.5),
        "mlfq": lambda: Mlfq(max_batch=8, quantum=8),
        "fcfs": lambda: Sarathi(max_batch=8),
        "vllm_v0": lambda: VllmV0(max_num_seqs=8),
        "sglang": lambda: Sglang(max_running_requests=8),
        "slo": lambda: Slo(max_batch=8),
        "deadline": lambda: Deadline(max_batch=8),
        "fair": lambda: Fair(max_batch=8),
        "priority": lambda: Priority(max_batch=8),
    }
    for seed in range(3):
        mean = {
            name: mean_e2e(play(trace_of(overload(seed)), make, blocks=100_000, block_size=1))
            for name, make in rivals.items()
        }
        assert min(mean, key=lambda name: mean[name]) == "srpt", mean
        assert mean["srpt"] < mean["sjf"] < mean["sjf 0.5"] < mean["fcfs"], mean
        assert mean["mlfq"] < mean["fcfs"], mean


def test_perfect_predictions_are_the_oracle_and_useless_ones_no_better_than_arrival_order() -> None:
    perfect, oracle = (
        play(trace_of(overload(0)), make, blocks=100_000, block_size=1)
        for make in (lambda: Sjf(max_batch=8, predictions="noisy", tau=1.0), lambda: Sjf(max_batch=8))
    )
    assert perfect.outcome() == oracle.outcome()

    gains = []
    for seed in range(12):
        table = trace_of(overload(seed))
        fcfs, guessed = (
            mean_e2e(play(table, make, blocks=100_000, block_size=1))
            for make in (
                lambda: Sarathi(max_batch=8),
                lambda: Sjf(max_batch=8, predictions="noisy", tau=0.0),
            )
        )
        gains.append(fcfs / guessed - 1)
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    assert np.mean(gains) < 2 * error  # no gain beyond the noise
    assert abs(np.mean(gains)) < 0.1
