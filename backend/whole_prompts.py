"""Which prompts our own GPU engine attends to by cuDNN's kernel, and at what length: it and its profiles agree.

cuDNN's attention is faster than the engine's own where prompts are long and computed whole, from their first token to
their last. It cannot be captured in a CUDA graph for lengths unknown, and it plans once a shape. So only steps that are
launched kernel by kernel use it, and prompts are filled up to a multiple of `LONG` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

LONG = 1024  # tokens: the shortest such prompt, and what lengths are filled up to a multiple of
LONGEST = 16 * LONG
ALONE = 1.15  # by so much a prompt alone in its step may be filled up


def filled(tokens: int) -> int:
    """The length that cuDNN's attention computes a prompt at: a multiple of `LONG`."""
    return -(-tokens // LONG) * LONG


def dense(whole: Sequence[int]) -> bool:
    """Whether cuDNN's attention is faster than ours, where a step's chunks are whole prompts of these lengths.

    On an H200 it takes 96 µs a layer of Llama-3.1-8B for 2,048 tokens and 1,174 for 8,192, ours 129 and some 1,640. So
    a prompt alone in its step may be filled up by a seventh; of several, copies to fill them up take the lead away.
    """
    most = ALONE if len(whole) == 1 else 1.0
    return bool(whole) and all(LONG <= n <= LONGEST and filled(n) <= most * n for n in whole)


def pairs(whole: Sequence[int]) -> int:
    """Pairs of a query and a key that it computes then."""
    return sum(filled(n) * (filled(n) + 1) // 2 for n in whole)
