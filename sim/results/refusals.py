"""Why requests were refused, with the sum that did not fit."""

from __future__ import annotations

import numpy as np

from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.study import Setup


def refusals(setup: Setup, requests: RequestRecords) -> str:
    """What became of the refused requests of a run, in words; empty if none was refused.

    Example: ``3 longer than the model's 131,072 tokens (prompt and output; the longest 200,000 + 100 = 200,100)``.
    """
    refused = np.frombuffer(requests.status, dtype=np.uint8) == Status.REJECTED
    if not refused.any():
        return ""
    prompt = requests.trace.prompt_tokens.astype(np.int64)
    total = prompt + requests.trace.output_tokens
    over = refused & (total > setup.max_model_len)
    largest = max(group.room(setup.max_model_len) for group in setup.groups)
    # The last token of an answer is never stored: a pool must hold one token fewer than the request has.
    large = refused & ~over & (total - 1 > largest)
    other = refused & ~over & ~large
    words = []
    if over.any():
        words.append(f"{_count(over)} longer than the model's {setup.max_model_len:,} tokens ({_sum(requests, over)})")
    if large.any():
        words.append(f"{_count(large)} larger than the KV pool of {largest:,} tokens ({_sum(requests, large)})")
    if other.any():
        limit = setup.limits.queue
        why = (
            "the policy would not have them"
            if limit is None
            else f"{limit:,} were waiting there already, or the policy would not have them"
        )
        words.append(f"{_count(other)} that would fit: {why}")
    return "; ".join(words)


def why_refused(prompt: int, output: int, max_model_len: int | None, pool_tokens: int) -> str:
    """Why one request was refused, as far as its own size tells."""
    total = prompt + output
    said = f"prompt {prompt:,} + output {output:,} = {total:,} tokens"
    if max_model_len is not None and total > max_model_len:
        return f"{said}, over the model's {max_model_len:,}"
    if total - 1 > pool_tokens:
        return f"{said}, over the KV pool's {pool_tokens:,}"
    return "its replica's queue is full, or the policy will not have it"


def _count(which: np.ndarray) -> str:
    return f"{int(np.count_nonzero(which)):,}"


def _sum(requests: RequestRecords, which: np.ndarray) -> str:
    """The lengths of the longest of the requests ``which`` and their sum."""
    prompt = requests.trace.prompt_tokens.astype(np.int64)
    output = requests.trace.output_tokens.astype(np.int64)
    rows = np.flatnonzero(which)
    row = rows[np.argmax((prompt + output)[rows])]
    return f"prompt and output; the longest {prompt[row]:,} + {output[row]:,} = {prompt[row] + output[row]:,}"
