"""A draft head in double precision and without a cache, from the weights of a `backend.gpu.draft_head` alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")


class PlainHead:
    """The head over ``tokens``: its first pass over all of them but the last. `drafts` goes on from any place.

    ``inputs``: what enters the model's layers that the head reads, float64 [tokens - 1, hidden] each. ``shape``: query
    heads, KV heads, size of one.
    """

    def __init__(
        self,
        head: Any,
        inputs: list[Any],
        tokens: list[int],
        embedding: Any,
        shape: tuple[int, int, int],
        epsilon: float,
        theta: float,
    ) -> None:
        self._head, self._embedding, self._shape, self._epsilon = head, embedding, shape, epsilon
        half = shape[2] // 2
        self._turns = torch.tensor([theta ** (-i / half) for i in range(half)]).double().to(embedding.device)
        states = torch.cat(inputs, dim=1) @ head.join.double().T
        positions = self._places(0, len(states))
        query, self._keys, self._values = self._project(tokens[1:], states, positions)
        hidden = positions[None, :] > positions[:, None]
        self._states, self._logits = self._rest(states, query, self._keys, self._values, hidden)

    def drafts(self, at: int, given: list[int]) -> Iterator[Any]:
        """Logits of each draft behind token ``at``, ``given`` being those that were made."""
        keys, values, state = self._keys[:at], self._values[:at], self._states[at - 1 : at]
        yield self._logits[at - 1]
        for i, draft in enumerate(given):
            query, key, value = self._project([draft], state, self._places(at + i, at + i + 1))
            keys, values = torch.cat((keys, key)), torch.cat((values, value))
            none_hidden = torch.zeros((1, len(keys)), dtype=torch.bool, device=keys.device)
            state, logits = self._rest(state, query, keys, values, none_hidden)
            yield logits[0]

    def _places(self, start: int, stop: int) -> Any:
        return torch.arange(start, stop, device=self._embedding.device)

    def _norm(self, x: Any, weight: Any) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + self._epsilon).sqrt() * weight.double()

    def _rotated(self, x: Any, positions: Any) -> Any:
        angle = (positions[:, None] * self._turns)[:, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)

    def _project(self, tokens: list[int], states: Any, positions: Any) -> Any:
        (heads, kv_heads, size), head = self._shape, self._head
        embedded = self._embedding[tokens].double()
        both = torch.cat((self._norm(embedded, head.token_norm), self._norm(states, head.layer.norm)), dim=1)
        parts = (both @ head.layer.qkv.double().T).split([heads * size, kv_heads * size, kv_heads * size], dim=1)
        query, key, value = (x.view(len(tokens), -1, size) for x in parts)
        return self._rotated(query, positions), self._rotated(key, positions), value

    def _rest(self, states: Any, query: Any, keys: Any, values: Any, hidden: Any) -> Any:
        (heads, kv_heads, size), head = self._shape, self._head
        mixed = []
        for i in range(heads):
            shared = i * kv_heads // heads
            scores = (query[:, i] @ keys[:, shared].T / math.sqrt(size)).masked_fill(hidden, -math.inf)
            mixed.append(scores.softmax(-1) @ values[:, shared])
        states = states + torch.cat(mixed, dim=1) @ head.layer.out.double().T
        gate, up = (self._norm(states, head.layer.mlp_norm) @ head.layer.up.double().T).chunk(2, dim=1)
        states = states + (gate * gate.sigmoid() * up) @ head.layer.down.double().T
        return states, self._norm(states, head.norm) @ head.head.double().T
