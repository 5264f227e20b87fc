"""The pool of layers with windows, by hand: what a request holds, gives back, keeps for others and finds.

Blocks hold 4 tokens. Two groups of layers unless a test says otherwise: one with a window, then one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ledger
from chairlift.policies.base import HybridCache, KvGroups
from chairlift.sim.replica.decode_group import Decodes
from chairlift.sim.replica.hybrid_pool import HybridPool
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live, at
from kit.places import TESTS
from kit.vllm_replay import groups_of
from kit.worlds import trace_of

LEDGERS = sorted((TESTS / "data").glob("vllm-*-hybrid.jsonl.gz"))
BLOCK = 4


class Player:
    """Requests on a pool: each is computed at once, and then decodes step by step."""

    def __init__(
        self,
        groups: KvGroups,
        prompts: Sequence[int],
        shared: Sequence[int] | None = None,
        blocks: int = 100,
        retention: int | None = None,
    ) -> None:
        n = len(prompts)
        tokens = list(shared or [0] * n)
        trace = trace_of([(0, p, 50) for p in prompts], prefix_group=[0] * n, prefix_tokens=tokens)
        cache, identity = HybridCache(1000, retention), Identity(trace, BLOCK)
        self.pool = HybridPool(blocks, BLOCK, groups, cache, 1000, identity=identity)
        self.group = Decodes(BLOCK, track=True)
        self.requests = [Live(i, 0, prompt, 50) for i, prompt in enumerate(prompts)]
        self.rank = 0

    def start(self, number: int, tokens: int | None = None) -> int:
        """Admit a request and compute so many of its tokens, or all of its prompt; tokens that it found."""
        request, pool = self.requests[number], self.pool
        hit = pool.hit(request)
        upto = request.prompt_tokens + request.produced if tokens is None else hit + tokens
        assert pool.need(request, upto) <= pool.free
        pool.open(request, upto)
        pool.computed(request, upto)
        self.rank += 1
        request.admit(hit, self.rank)
        self._compute(request, upto - hit)
        return hit

    def chunk(self, number: int, tokens: int) -> bool:
        """Compute so many more tokens of a prompt; whether there was room."""
        request = self.requests[number]
        if not self.pool.extend(request, request.stored + tokens):
            return False
        self.pool.computed(request, request.stored + tokens)
        self._compute(request, tokens)
        return True

    def _compute(self, request: Live, tokens: int) -> None:
        if request.compute(tokens, at(0)):
            self.group.join(request)

    def decode(self, steps: int = 1) -> None:
        """All that decode get so many tokens."""
        self.pool.decode_all(self.group, range(steps))
        self.group.steps += steps

    def leave(self, number: int, preempt: bool = False) -> None:
        """A request ends, or loses its blocks."""
        request = self.requests[number]
        if preempt:
            self.pool.preempted(request, request.group is not None, False)
        if request.group is not None:
            self.group.leave(request, request.phase, None)
        self.pool.close(request, request.stored)
        if preempt:
            request.requeue()


def test_a_window_holds_what_the_next_token_looks_back_on() -> None:
    """The module's own example: a prompt of 8 tokens, a window of 4."""
    player = Player(KvGroups((4, 0)), [8])
    player.start(0)
    assert player.pool.held() == [2, 2]

    held = []
    for _ in range(5):
        player.decode()
        held.append(player.pool.held())

    # tokens 8 to 12: 8 drops 0-3 and opens a block; 11 drops 4-7; 12 opens the next
    assert held == [[2, 3], [2, 3], [2, 3], [1, 3], [2, 4]]
    assert player.pool.free == 100 - 6


def test_steps_in_one_go_are_the_same_steps() -> None:
    one, other = (Player(KvGroups((6, 6, 0)), [9, 14]) for _ in range(2))
    for player in (one, other):
        player.start(0)
        player.start(1)
    one.decode(11)
    for _ in range(11):
        other.decode()

    assert one.pool.held() == other.pool.held()
    assert list(one.pool._queue) == list(other.pool._queue)


def test_a_chunk_drops_what_its_first_token_no_longer_sees() -> None:
    """Of 20 tokens, 12 are computed; the next one looks back on 6 to 12, so block 0 (0 to 3) goes, and no more."""
    player = Player(KvGroups((7, 0)), [20])
    player.start(0, 12)
    assert player.chunk(0, 8)

    assert player.pool.held() == [4, 5]


def test_blocks_go_back_even_if_there_is_no_room_then() -> None:
    """Eight blocks: three in each group, two more. 16 tokens need four in each: the window's first goes, in vain."""
    player = Player(KvGroups((7, 0)), [28], blocks=8)
    player.start(0, 12)
    assert player.pool.free == 2

    assert not player.chunk(0, 16)

    assert player.pool.held() == [2, 3]
    assert player.pool.free == 3


def test_a_step_in_flight_still_reads_what_its_tokens_see() -> None:
    """Steps planned ahead: a block goes once the step before is processed, so a token later than in step."""

    @dataclass
    class Flight:
        chunks: list[tuple[Live, int]]
        decoding: bool

    held = {}
    for late in (False, True):
        player = Player(KvGroups((4, 0)), [9])
        player.pool._late = late
        player.start(0)
        player.decode()  # token 9
        player.pool.flight = Flight([], decoding=True) if late else None
        held[late] = []
        for _ in range(4):
            player.decode()
            held[late].append(player.pool.held()[0])

    assert held == {False: [2, 1, 2, 2], True: [2, 2, 2, 2]}


def test_of_a_chunk_of_8_tokens_all_goes_when_the_next_begins() -> None:
    """Llama 4: token 7 is the last that looks back on 0 to 7; token 8 looks back on itself only."""
    player = Player(KvGroups((8, 0), chunked=True), [6])
    player.start(0)
    held = []
    for _ in range(5):
        player.decode()
        held.append(player.pool.held())

    assert held == [[2, 2], [2, 2], [1, 3], [1, 3], [1, 3]]


def test_chunks_must_be_whole_blocks_beside_layers_that_see_further() -> None:
    for groups in (KvGroups((6, 0), chunked=True), KvGroups((8,), chunked=True)):
        with pytest.raises(ValueError, match="must be whole blocks, beside layers that look back further"):
            Player(groups, [1])


# what is found


def test_a_prefix_is_found_where_the_window_before_its_end_is_kept() -> None:
    """Two prompts share 16 tokens. A, of 24, has slid: its window keeps blocks 4 and 5, which B does not share."""
    player = Player(KvGroups((9, 0)), [24, 24], [16, 16])
    player.start(0, 16)
    player.chunk(0, 8)  # drops blocks 0 and 1, which can still be found: nobody needed their room
    assert player.start(1) == 16
    assert player.pool.held() == [4 + 4, 6 + 6]


def test_only_the_window_at_the_end_of_a_prompt_is_kept() -> None:
    """Retention 0: of A's 24 tokens, blocks 3 and 4 are what its own next token (number 23) looks back on."""
    player = Player(KvGroups((9, 0)), [24, 24, 24], [24, 24, 16], retention=0)
    player.start(0)
    player.leave(0)

    assert player.start(1) == 20  # the same prompt: its last token is computed in any case
    player.leave(1)
    assert player.start(2) == 0  # one that parts at token 16


def test_where_prompts_part_is_remembered_for_the_third() -> None:
    """B finds nothing, but all layers without a window know 16 tokens of it: B keeps blocks 2 and 3 for C."""
    player = Player(KvGroups((9, 0)), [40, 40, 40], [16, 16, 16], retention=0)
    found = []
    for number in range(3):
        found.append(player.start(number))
        player.leave(number)

    assert found == [0, 0, 16]


def test_a_retention_keeps_a_window_every_so_many_tokens() -> None:
    """Every 16 tokens the 2 blocks before: of 24 shared tokens, those up to 16 are found."""
    player = Player(KvGroups((9, 0)), [40, 40], [24, 24], retention=16)
    player.start(0)
    player.leave(0)

    assert player.start(1) == 16


def test_a_short_run_at_the_beginning_is_found_too() -> None:
    """A window of 17 needs 4 blocks in a row, or all that there are from the first: A knows 2."""
    player = Player(KvGroups((17, 0)), [9, 30], [8, 8])
    player.start(0)

    assert player.start(1) == 8


def test_all_groups_with_a_window_must_know_a_block() -> None:
    player = Player(KvGroups((5, 5, 0)), [8, 12], [8, 8])
    player.start(0)
    key = player.pool._keys_of(player.requests[1])[1]
    player.pool._forget(player.pool._cached[key * 3 + 1])  # block 1 of the second group

    assert player.start(1) == 4  # blocks from the first on: the window before token 4


def test_chunks_before_the_one_at_hand_need_not_be_known() -> None:
    """Of 12 shared tokens, in chunks of 8: what is looked back on at 12 begins at 8."""
    player = Player(KvGroups((8, 0), chunked=True), [13, 13], [12, 12])
    player.start(0)  # the window of 8 to 11 only: 0 to 7 slid out with the first chunk of it
    player.leave(0)
    for block in [b for b, key in player.pool._keys.items() if key % 2 == 0][:2]:
        player.pool._forget(block)

    assert player.start(1) == 12


def test_a_preempted_request_finds_its_own_window() -> None:
    """Its 20 tokens are its own: after a preemption it computes the last again, and what its window lacks."""
    player = Player(KvGroups((9, 0)), [20])
    player.start(0)
    player.decode()
    player.leave(0, preempt=True)

    assert player.pool.free == 100
    assert player.start(0) == 20


# the order of reuse


def test_what_is_not_kept_is_reused_first_and_what_is_kept_last() -> None:
    """Window 5, retention 0, one request of 9 tokens: 0 to 2 with a window, 3 to 5 without.

    It ends. With a window only block 1 (before token 8) is kept, so 2 and 0 are reused first; without, blocks 3 and 4
    are full and 5 is not. Group by group, each from its tail.
    """
    player = Player(KvGroups((5, 0)), [9], blocks=8, retention=0)
    player.start(0)
    player.leave(0)

    assert list(player.pool._queue) == [5, 2, 0, 6, 7, 1, 4, 3]


def test_a_block_that_slides_out_is_the_last_to_be_reused_if_it_is_kept() -> None:
    player = Player(KvGroups((5, 0)), [8], blocks=8)
    player.start(0)  # blocks 0, 1 with a window, and 2, 3
    player.decode()  # 0 slides out, kept; 4 and 5 are taken

    assert list(player.pool._queue) == [6, 7, 0]


# sizes, as vLLM has them


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.name)
def test_the_cap_on_admission_is_vllms(path: Path) -> None:
    for case in ledger.cases(path):
        groups, cache = layers(case)
        most = cache.most(groups, case["block_size"], case["max_model_len"])
        assert {cap for cap in case["admission_cap_blocks"] if cap is not None} == {most}


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.name)
def test_the_smallest_pool_is_the_one_with_which_vllm_starts(path: Path) -> None:
    null_counts = "0.26" in path.name
    for case in ledger.cases(path):
        groups, cache = layers(case, null_counts)
        size, longest = case["block_size"], case["max_model_len"]
        usable = case["min_num_blocks"] - 1
        assert cache.room(groups, usable, size, longest) == longest
        if cache.most(groups, size, longest) <= longest // size:  # else vLLM asks for more than any request needs
            assert cache.room(groups, usable - 1, size, longest) < longest


def layers(case: dict[str, Any], null_counts: bool = False) -> tuple[KvGroups, HybridCache]:
    """The groups of a ledger's case, and how they are cached."""
    groups = groups_of(case)
    assert groups is not None
    return groups, HybridCache(case["max_in_flight_tokens"], null_counts=null_counts)
