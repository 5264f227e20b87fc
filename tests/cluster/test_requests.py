"""Requests made from rows of a trace: equal ids of blocks where, and only where, prompts are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chairlift.sim.cluster.requests import ID_TOKENS, request_maker
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.workload.trace import HashIds, Trace
from kit.clusters import group, setup_of
from kit.worlds import trace_of

rows = st.lists(
    st.tuples(st.integers(1, 90), st.integers(1, 30), st.integers(-1, 2), st.integers(0, 60), st.integers(-1, 2)),
    min_size=2,
    max_size=15,
)


def ids(trace: Trace, known: dict[int, Identity] | None) -> list[list[int]]:
    make = request_maker(setup_of(trace, [group()]), trace.arrival_ps.tolist(), known)
    return [list(make(i).hash_ids) for i in range(len(trace))]


@given(rows, st.booleans(), st.booleans())
def test_ids_are_equal_where_the_prefix_cache_would_find_a_block(
    table: list[tuple[int, int, int, int, int]], grouped: bool, in_sessions: bool
) -> None:
    columns: dict[str, Any] = {}
    if grouped:
        columns["prefix_group"] = [g for _, _, g, _, _ in table]
        columns["prefix_tokens"] = [min(shared, prompt) if g >= 0 else 0 for prompt, _, g, shared, _ in table]
    if in_sessions:
        columns["session"] = [session for *_, session in table]
    trace = trace_of([(k, prompt, output) for k, (prompt, output, *_) in enumerate(table)], **columns)
    identity = Identity(trace, ID_TOKENS)

    found = ids(trace, {})

    blocks = [prompt // ID_TOKENS for prompt, *_ in table]
    assert all(len(each) <= most for each, most in zip(found, blocks, strict=True))
    for i in range(len(table)):
        for j in range(i):
            for block in range(min(blocks[i], blocks[j])):
                equal = block < min(len(found[i]), len(found[j])) and found[i][block] == found[j][block]
                assert equal == (identity.key(i, block) == identity.key(j, block))
    every = [set(each) for each in found]
    assert [len(s) for s in every] == [len(each) for each in found]


def test_a_traces_own_ids_are_handed_on() -> None:
    trace = trace_of(
        [(0, 40, 2), (1, 40, 2)], hash_ids=HashIds(np.array([7, 8, 7]), np.array([0, 2, 3])), hash_block=32
    )

    assert ids(trace, {}) == [[7, 8], [7]]
    assert ids(trace, None) == [[7, 8], [7]]


def test_without_anything_in_common_there_are_no_ids() -> None:
    assert ids(trace_of([(0, 40, 2), (1, 40, 2)]), {}) == [[], []]
