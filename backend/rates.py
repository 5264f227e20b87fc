"""What a step costs by the roofline, from rates in integer picoseconds; `roofline` tells where they come from."""

from __future__ import annotations

from chairlift.backend.base import FOREVER, Batch, Chunk, Host, StepCost, new


class Rates:
    """The rates of one model on its GPUs, in ps, and the cost of any step by them.

    Args:
        token: to multiply the weights with a token of a step.
        sequence: to multiply the head's weights with a token that is sampled.
        pair: of attention, for a pair of query and key.
        weights: to read the weights once.
        kv: to read a token's K and V.
        reduce_fixed: of the all-reduces of a step.
        reduce_token: of those, for a token of the step.
        floor: that no step is shorter than.
        step, request: nor one of decodes than ``step`` and ``request`` for each of them, up to ``graph_tokens``.
        piecewise: nor one with prompts, up to ``graph_tokens``.
        eager: nor any beyond those.
        graph_tokens: of the largest captured graph.
        apart, apart_of: of the shorter of prompt and decode work, the share ``apart / apart_of`` does not overlap.
        host: work of the host in each step.
    """

    __slots__ = (
        *("_apart", "_apart_of", "_eager", "_floor", "_graph_tokens", "_host", "_kv", "_pair", "_piecewise"),
        *("_reduce_fixed", "_reduce_token", "_request", "_sequence", "_step", "_token", "_weights"),
    )

    def __init__(
        self,
        *,
        token: int,
        sequence: int,
        pair: int,
        weights: int,
        kv: int,
        reduce_fixed: int,
        reduce_token: int,
        floor: int,
        step: int,
        request: int,
        piecewise: int,
        eager: int,
        graph_tokens: int,
        apart: int,
        apart_of: int,
        host: Host,
    ) -> None:
        self._token = token
        self._sequence = sequence
        self._pair = pair
        self._weights = weights
        self._kv = kv
        self._reduce_fixed = reduce_fixed
        self._reduce_token = reduce_token
        self._floor = floor
        self._step = step
        self._request = request
        self._piecewise = piecewise
        self._eager = eager
        self._graph_tokens = graph_tokens
        self._apart = apart
        self._apart_of = apart_of
        self._host = host

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``, as `Roofline.step` says."""
        prefills, decodes, context, padded, _, drafts, _ = batch
        if prefills:
            return self._with_prompts(prefills, decodes, context, padded, drafts)
        if drafts:
            return self._verifying(batch)
        slots = decodes + padded
        reduce = self._reduce_fixed + self._reduce_token * slots
        compute_slope = self._pair * slots
        compute = slots * (self._token + self._sequence) + self._pair * context + reduce
        memory_slope = self._kv * slots
        memory = self._weights + self._kv * context + reduce
        floor = self._step + self._request * slots if slots <= self._graph_tokens else self._eager
        if floor < self._floor:
            floor = self._floor
        if floor > memory and floor > compute:
            steps = min(_until(floor, 0, memory, memory_slope), _until(floor, 0, compute, compute_slope))
            return StepCost(floor, 0, steps, self._host)
        if memory >= compute:
            steps = _until(memory, memory_slope, compute, compute_slope)
            return new(StepCost, (memory, memory_slope, steps, self._host))
        steps = _until(compute, compute_slope, memory, memory_slope)
        return new(StepCost, (compute, compute_slope, steps, self._host))

    def _verifying(self, batch: Batch) -> StepCost:
        """Decodes with drafts: each reads its context once, and multiplies it with all of its tokens."""
        tokens = batch.decodes + batch.drafts
        compute = tokens * (self._token + self._sequence) + self._pair * batch.context * tokens // batch.decodes
        memory = self._weights + self._kv * batch.context
        first = max(compute, memory) + self._reduce_fixed + self._reduce_token * tokens
        whole = tokens <= self._graph_tokens
        floor = max(self._floor, self._step + self._request * batch.decodes if whole else self._eager)
        return StepCost(max(first, floor), 0, 1, self._host)

    def _with_prompts(
        self, prefills: tuple[Chunk, ...], decodes: int, context: int, padded: int, drafts: int
    ) -> StepCost:
        tokens = pairs = history = 0
        for start, length in prefills:
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
            history += start
        padded += tokens
        compute = padded * self._token + pairs * self._pair + len(prefills) * self._sequence
        memory = self._weights + history * self._kv
        prompt = compute if compute >= memory else memory
        if decodes:
            memory = self._weights + self._kv * context
            compute = (decodes + drafts) * (self._token + self._sequence)
            compute += self._pair * context * (decodes + drafts) // decodes if drafts else self._pair * context
            decode = compute if compute >= memory else memory
            longer, shorter = (prompt, decode) if prompt >= decode else (decode, prompt)
            prompt = longer + shorter * self._apart // self._apart_of
        everything = padded + decodes + drafts
        prompt += self._reduce_fixed + self._reduce_token * everything
        floor = self._piecewise if everything <= self._graph_tokens else self._eager
        if floor < self._floor:
            floor = self._floor
        return new(StepCost, (prompt if prompt >= floor else floor, 0, 1, self._host))


def _until(bound: int, slope: int, other: int, other_slope: int) -> int:
    """For how many steps the line ``other`` stays at or below the line ``bound``, where it is now."""
    if other_slope <= slope:
        return FOREVER
    return (bound - other) // (other_slope - slope) + 1
