"""Which prompts our own GPU engine attended to by cuDNN's kernel until December 2026, and at what length.

cuDNN's attention was faster than the engine's own of then where prompts were long and computed whole, from their first
token to their last. It could not be captured in a CUDA graph for lengths unknown, and it planned once a shape. So only
steps that were launched kernel by kernel used it, and prompts were filled up to a multiple of `LONG` tokens. Profiles
that are fitted to recordings of that engine price such prompts by it; today's engine has one kernel for all chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

LONG = 1024  # tokens: the shortest such prompt, and what lengths are filled up to a multiple of
LONGEST = 16 * LONG
ALONE = 1.15  # by so much a prompt alone in its step may be filled up


def filled(tokens: int) -> int:
    """The length that cuDNN's attention computed a prompt at: a multiple of `LONG`."""
    return -(-tokens // LONG) * LONG


def dense(whole: Sequence[int]) -> bool:
    """Whether cuDNN's attention was used, where a step's chunks are whole prompts of these lengths.

    On an H200 it takes 96 µs a layer of Llama-3.1-8B for 2,048 tokens and 1,174 for 8,192, the engine's of then took
    129 and some 1,640 (today's 79 and 950). So a prompt alone in its step was filled up by a seventh at most; of
    several, copies to fill them up took the lead away.
    """
    most = ALONE if len(whole) == 1 else 1.0
    return bool(whole) and all(LONG <= n <= LONGEST and filled(n) <= most * n for n in whole)


def pairs(whole: Sequence[int]) -> int:
    """Pairs of a query and a key that it computed then."""
    return sum(filled(n) * (filled(n) + 1) // 2 for n in whole)
