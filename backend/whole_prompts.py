"""Which prompts our own GPU engine attends to by cuDNN's kernel, and at what length, as recorded in `gpu/measured`.

cuDNN's attention is faster than the engine's own where prompts are long and computed whole, from their first token to
their last. It cannot be captured in a CUDA graph for lengths unknown, and it plans once a shape. So only steps that are
launched kernel by kernel use it, and prompts are filled up to a multiple of `LONG` tokens (`gpu.paged_attention`). What
a recording shows is its engine's rule: one with another rule needs grids of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

LONG = 1024  # tokens: the shortest such prompt, and what lengths are filled up to a multiple of
LONGEST = 16 * LONG
ALONE = 1.15  # by so much a prompt alone in its step may be filled up


def dense(whole: Sequence[int]) -> bool:
    """Whether a step whose chunks are whole prompts of these lengths attends by cuDNN's kernel.

    Of several prompts none is filled up: copies to do so would take the lead away.
    """
    most = ALONE if len(whole) == 1 else 1.0
    return bool(whole) and all(LONG <= n <= LONGEST and filled(n) <= most * n for n in whole)


def filled(tokens: int) -> int:
    """The length that it computes a prompt at."""
    return -(-tokens // LONG) * LONG


def pairs(whole: Sequence[int]) -> int:
    """Pairs of a query and a key that it computes then."""
    return sum(filled(n) * (filled(n) + 1) // 2 for n in whole)
