"""Which row and which blocks each running sequence has: against a plain account of who holds what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.backend.base import Prompt
from chairlift.backend.gpu.block_tables import Sequences

MOST, BLOCKS, BLOCK, LONGEST = 4, 12, 16, 64
COLUMNS = 2 * LONGEST // BLOCK + 1  # as much padding, and one more
ROWS, LENGTHS, FIRST, POSITIONS, CELLS, NEWS = range(6)  # of what is staged for the device


class Pool:
    """Members whose blocks a scheduler's pool names."""

    prompts: Sequence[Prompt] = ()
    decodes: Sequence[int] = ()
    dead: Sequence[int] = ()

    def __init__(self, tables: dict[int, list[int]] | None = None) -> None:
        self.tables = tables or {}

    def table(self, request: int) -> list[int] | None:
        return self.tables.get(request)

    def tokens(self, request: int) -> list[int]:
        raise AssertionError("nobody asks")


COUNTED = Pool()


def sequences(named: bool = False) -> Sequences:
    return Sequences(MOST, BLOCKS, BLOCK, LONGEST, named)


def take(found: Sequences, request: int, pad: int = 0) -> int:
    return found.take(request, pad, lambda: np.arange(5))


def stage(found: Sequences, requests: list[int], members: Pool = COUNTED) -> np.ndarray:
    staged = np.full((6, MOST + 1), -7, dtype=np.int32)
    found.decode(requests, members, staged)
    return staged


def test_a_row_is_kept_until_it_is_given_back() -> None:
    found = sequences()
    rows = [take(found, request) for request in (10, 11, 12, 13)]

    assert sorted(rows) == [0, 1, 2, 3]
    assert take(found, 12) == rows[2]
    found.release(11)
    assert take(found, 14) == rows[1]


def test_more_sequences_than_rows() -> None:
    found = sequences()
    for request in range(MOST):
        take(found, request)

    with pytest.raises(RuntimeError, match="more than 4 sequences at once: raise the backend's max_batch"):
        take(found, 99)
    found.release(99)  # it never had one
    found.release(2)
    assert take(found, 99) in range(MOST)


def test_blocks_come_as_tokens_do_and_cells_say_where_they_go() -> None:
    found = sequences(named=True)
    pool = Pool({5: [7, 3], 6: [9]})
    one, other = take(found, 5), take(found, 6)

    assert found.cover(5, 17, pool) == ([one * COLUMNS, one * COLUMNS + 1], [7, 3])
    assert found.cover(5, 32, pool) == ([], [])  # the second block has room for 15 more
    assert found.cover(6, 16, pool) == ([other * COLUMNS], [9])
    pool.tables[5] += [0, 11]
    assert found.cover(5, 33, pool) == ([one * COLUMNS + 2], [0])  # the fourth is not asked for yet
    assert found.slots(one, 0, 35).tolist() == [*range(112, 128), *range(48, 64), 0, 1, 2]


def test_a_table_starts_anew_for_the_next_owner_of_a_row() -> None:
    found = sequences(named=True)
    row = take(found, 5)
    found.cover(5, 40, Pool({5: [1, 2, 3]}))
    found.release(5)

    assert take(found, 6) == row
    assert found.cover(6, 10, Pool({6: [8]})) == ([row * COLUMNS], [8])
    assert found.slots(row, 0, 10).tolist() == list(range(128, 138))


def test_what_is_staged_for_decodes() -> None:
    found = sequences(named=True)
    pool = Pool({1: [4, 6], 2: [5]})
    one, other = take(found, 1), take(found, 2, pad=3)
    for request, tokens in ((1, 16), (2, 16 + 9)):  # padding ends with a block
        found.cover(request, tokens, pool)
        found.length[found.row[request]] = tokens

    staged = stage(found, [2, 1], pool)
    nobody = MOST * COLUMNS
    assert staged[ROWS].tolist() == [other, one, MOST, MOST, MOST]
    assert staged[LENGTHS].tolist() == [26, 17, 0, 0, 0]
    assert staged[FIRST].tolist() == [16, 0, 0, 0, 0]
    assert staged[POSITIONS].tolist() == [9, 16, 0, 0, 0]  # the padding has no positions
    assert staged[CELLS].tolist() == [nobody, one * COLUMNS + 1, nobody, nobody, nobody]
    assert staged[NEWS][1] == 6
    staged = stage(found, [1], pool)
    assert staged[[ROWS, LENGTHS, POSITIONS, CELLS], 0].tolist() == [one, 18, 17, nobody]
    assert stage(found, [])[:5].tolist() == [[MOST] * 5, [0] * 5, [0] * 5, [0] * 5, [nobody] * 5]


@pytest.mark.parametrize("named", [False, True])
def test_padding_takes_no_block_and_moves_no_token_within_one(named: bool) -> None:
    found = sequences(named)
    pool = Pool({1: [4, 6], 2: [5]})
    one = take(found, 1, pad=20)
    take(found, 2, pad=LONGEST)
    with pytest.raises(RuntimeError, match="a padding of 65 tokens: sequences have at most 64"):
        take(found, 3, pad=65)

    cells, blocks = found.cover(1, 32 + 17, pool)
    assert cells == [one * COLUMNS + i for i in range(4)]
    assert found.slots(one, 0, 49)[32:].tolist() == [b * 16 + i for b in blocks[2:] for i in range(16)][:17]
    more = found.cover(2, 64 + 9, pool)[1]
    assert len(set(blocks[:2] + more[:4])) == 6  # padding names other blocks each time
    assert named is False or (blocks[2:], more[4:]) == ([4, 6], [5])
    assert len(set(blocks[2:] + more[4:])) == 3
    assert found.cover(2, 64 + 16, pool) == ([], [])
    found.release(1)
    found.release(2)
    for request in range(3):  # every block is free
        take(found, request)
        found.cover(request, 4 * BLOCK, Pool({request: [*range(4 * request, 4 * request + 4)]}))
    assert len({int(found.slots(found.row[r], 0, t)[-1]) for r in range(3) for t in range(1, 65)}) == BLOCKS * BLOCK


def test_a_dead_sequence_stops_at_the_longest_and_may_overwrite_itself() -> None:
    found = sequences(named=True)
    pool = Pool({1: [4, 6], 2: [5]})
    pool.dead = [1]
    row = take(found, 1, pad=3)
    found.cover(1, 16 + 30, pool)
    found.length[row] = 46
    for position in range(30, 70):
        staged = stage(found, [1], pool)
        assert staged[POSITIONS][0] == min(position, LONGEST - 1)
        assert staged[LENGTHS][0] == staged[POSITIONS][0] + 1 + 16
    assert set(found.slots(row, 0, 16 + LONGEST)[16 + 32 :].tolist()) == set(range(6 * 16, 7 * 16))  # its last block

    take(found, 2)
    with pytest.raises(RuntimeError, match="request 2 has no block for its token 17"):
        found.cover(2, 17, pool)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["start", "decode", "end"]), st.integers(0, 5)), max_size=80))
def test_no_block_is_ever_shared_and_all_are_given_back(actions: list[tuple[str, int]]) -> None:
    found = sequences()
    tokens: dict[int, int] = {}  # who runs, and its tokens in KV
    for action, request in actions:
        if action == "start" and request not in tokens and len(tokens) < MOST:
            length = 7 * request + 1
            if sum(-(-n // BLOCK) for n in [*tokens.values(), length]) > BLOCKS:
                continue
            take(found, request)
            found.cover(request, length, COUNTED)
            found.length[found.row[request]] = tokens[request] = length
        elif action == "decode" and request in tokens:
            grown = {r: n + 1 for r, n in tokens.items()}
            if sum(-(-n // BLOCK) for n in grown.values()) > BLOCKS or max(grown.values()) > LONGEST:
                continue
            tokens = grown
            staged = stage(found, list(tokens))
            assert staged[LENGTHS][: len(tokens)].tolist() == list(tokens.values())
        elif action == "end":
            tokens.pop(request, None)
            found.release(request)
        slots = [slot for r, n in tokens.items() for slot in found.slots(found.row[r], 0, n).tolist()]
        assert len(set(slots)) == len(slots) == sum(tokens.values())
        assert all(0 <= slot < BLOCKS * BLOCK for slot in slots)
        assert len({found.row[r] for r in tokens}) == len(tokens)
    for request in list(tokens):
        found.release(request)

    for request in range(3):  # every block is free again: these take them all
        take(found, request)
        found.cover(request, 4 * BLOCK, COUNTED)
    assert len({slot for r in range(3) for slot in found.slots(found.row[r], 0, 4 * BLOCK).tolist()}) == BLOCKS * BLOCK
