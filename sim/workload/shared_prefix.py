"""Prompts of sessions that begin alike: what a group of sessions shares, as block ids.

A trace says what prompts share by groups, by sessions, or by block ids, and block ids go before the other two. A turn
repeats its session's own tokens, so where sessions share a prefix too, block ids say so: the prefix is one block of the
group's, and what follows is the session's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.trace import HashIds, IntArray, TokenArray, Trace, offsets_of

FINE = 16  # tokens of a block where prefixes differ in length; vLLM's block size
MOST_IDS = 20_000_000  # of a trace


def first_of_session(trace: Trace) -> IntArray:
    """For each row the first row of its session; the row itself without a session. Shape: ``(n,)``."""
    rows = np.arange(len(trace))
    if trace.session is None:
        return rows
    _, first, which = np.unique(trace.session, return_index=True, return_inverse=True)
    return np.where(trace.session >= 0, first[which], rows)


def with_prefixes(trace: Trace, group: IntArray | TokenArray, tokens: IntArray | TokenArray) -> Trace:
    """``trace``, which has sessions, with prefixes that sessions share.

    Args:
        trace: it has no block ids.
        group: of each row, the same in all rows of a session; -1: none. Shape: ``(n,)``.
        tokens: how many of the row's first tokens are its group's. Of a session the first row's number counts. Shape:
            ``(n,)``.

    Example: the sessions 0 (prompts of 5000 and 6000 tokens) and 1 (5500) of group 7 share 4096 tokens. Each of the
    three rows has one id, 7, of a block of 4096 tokens. The second turn of session 0 finds 4096 tokens of anybody's,
    and the rest of the first turn and its answer as its session's own.

    Where some prompts are shorter than their group's prefix, all of such a prompt is prefix, but no more of the
    session's later prompts; blocks are then of `FINE` tokens, and what a prefix has beyond whole blocks is not shared.

    Raises:
        BadInput: that would be more than `MOST_IDS` block ids.
    """
    tokens = np.where(group >= 0, tokens[first_of_session(trace)], 0)
    tokens = np.minimum(tokens, trace.prompt_tokens).astype(np.int64)
    block = int(tokens.max())
    if block == 0:
        return trace
    whole = (group < 0) | (tokens == block) | (tokens == trace.prompt_tokens)
    if whole.all():
        counts = (group >= 0).astype(np.int64)
        values = group[group >= 0].astype(np.int64)
    else:
        block, longest = FINE, -(-block // FINE)
        counts = tokens // FINE
        if (many := int(counts.sum())) > MOST_IDS:
            rule = f"these prefixes need {many:,} block ids, at most {MOST_IDS:,} are kept: let first prompts be no "
            raise BadInput(Problem(rule + "shorter than their prefix", path="prefix"))
        starts = offsets_of(counts)[:-1]
        within = np.arange(int(counts.sum())) - np.repeat(starts, counts)
        values = np.repeat(group.astype(np.int64), counts) * longest + within
    return dataclasses.replace(trace, hash_ids=HashIds(values, offsets_of(counts)), hash_block=block)


def reblocked(ids: HashIds, block: int, prompts: TokenArray, to: int) -> HashIds:
    """``ids`` of blocks of ``block`` tokens as ids of blocks of ``to`` tokens, which divides ``block``.

    Example: the ids 3 and 5 of a prompt of 40 tokens in blocks of 32 are, in blocks of 16, 6 and 7, and 10.

    Raises:
        BadInput: that would be more than `MOST_IDS`.
    """
    parts = block // to
    counts = np.minimum(np.diff(ids.offsets) * parts, -(-prompts.astype(np.int64) // to))
    if (many := int(counts.sum())) > MOST_IDS:
        rule = f"parts whose block ids cover different numbers of tokens need {many:,} ids of {to} tokens, "
        raise BadInput(Problem(f"{rule}at most {MOST_IDS:,} are kept", path="mix"))
    offsets = offsets_of(counts)
    within = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], counts)
    whole = ids.values[np.repeat(ids.offsets[:-1], counts) + within // parts]
    return HashIds(whole * parts + within % parts, offsets)
