"""The batch sizes for which an engine captures CUDA graphs, and how a step is padded to one of them.

The sizes are those of vLLM 0.23 (``cudagraph_capture_sizes``, by default): 1, 2, 4, the multiples of 8 up to 256, and
then the multiples of 16. Our own engine captures the same ones, and goes on up to 1,024, in 8-bit floats and with
experts by multiples of 256 up to 2,048 or 4,096 (`backend.gpu.step_graphs`). A step of 9 tokens, say, replays the graph
of 16.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from functools import cache

GPT_OSS_TOKENS = 1024  # likewise of gpt-oss, whatever ``max_num_seqs``: vLLM's GptOssForCausalLMConfig
GRAPH_TOKENS = 512  # tokens of the largest graph that vLLM 0.23 captures
COARSE = 1024  # tokens from which on sizes lie 256 apart, not 16


def graph_limit(limits: Mapping[str, int]) -> int:
    """Tokens of the largest graph of an engine with these limits, which have vLLM's names.

    ``graph_tokens``, if a recording says it; else what vLLM 0.23 captures under ``max_num_seqs`` and
    ``max_num_batched_tokens``.
    """
    usual = min(GRAPH_TOKENS, 2 * limits["max_num_seqs"], limits["max_num_batched_tokens"])
    return limits.get("graph_tokens", usual)


@cache
def graph_sizes(limit: int) -> tuple[int, ...]:
    """Tokens of each captured graph, ascending; none is larger than ``limit``."""
    fine = (1, 2, 4, *range(8, 256, 8), *range(256, COARSE, 16))
    return tuple(n for n in (*fine, *range(COARSE, limit + 1, 256)) if n <= limit)


def padded(tokens: int, limit: int) -> int:
    """Tokens that a step of ``tokens`` computes: the next captured size, or ``tokens`` where no graph is that large."""
    sizes = graph_sizes(limit)
    i = bisect_left(sizes, tokens)
    return sizes[i] if i < len(sizes) else tokens
