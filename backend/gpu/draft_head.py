"""A draft head of random weights, as EAGLE3's: one decoder layer that guesses the tokens after the next one.

Its first pass goes over all rows of a step. A row's input is the token *after* it and what entered three layers of the
model there; so its keys and values are in KV wherever the model's are. Where a request's next token is known the pass
goes on to a first draft. Each further pass takes a token of each request, the draft before, and the state that the head
itself gave it. Which drafts are kept is not for the head to say: its weights are random (`sim.workload.acceptance`).

Source: EAGLE-3 (Li et al., 2025, arXiv 2503.01840) and vLLM 0.33, `llama_eagle3.py` and `spec_decode/eagle`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels.layers import largest, linear, residual_norm
from chairlift.backend.gpu.paged_attention import Paging
from chairlift.backend.gpu.transformer import Layer, Tokens, Transformer
from chairlift.backend.shapes import Model


class Takers(NamedTuple):
    """Requests that a step gives tokens to; all int32 on the model's device, one entry a request."""

    rows: Tensor  # the row of the step behind which its next token comes; of nobody's entry one past the last row
    picked: Tensor  # the place of that row among those whose tokens are computed
    last: Tensor  # its row of `World.last` and of the block tables
    lengths: Tensor  # tokens in KV with those of the second pass; 0: nobody's


def unfit(draft: Model, model: Model) -> str | None:
    """Why no head of the shape ``draft`` is built for ``model``; None if one is."""
    if model.learned_positions or not model.gated_mlp:
        return f"draft heads are built for gated models with rotary positions (got {model.name})"
    for name in ("layers", "hidden", "heads", "kv_heads", "head_size"):
        want = 1 if name == "layers" else getattr(model, name)
        if getattr(draft, name) != want:
            return f"a draft head for {model.name} has {name} {want} (got {getattr(draft, name)})"
    if draft.experts or draft.vocab > model.vocab:
        return f"a draft head for {model.name} is dense and has at most {model.vocab} tokens (got {draft.vocab})"
    return None


class DraftHead:
    """One decoder layer, a norm and a head of ``draft``'s shape, which share embedding and block tables with ``net``.

    Where ``draft`` has fewer tokens than the model, each stands for one of those: they lie evenly.
    """

    def __init__(self, net: Transformer, draft: Model, weight: Callable[..., Tensor]) -> None:
        m, hidden = net.model, net.model.hidden
        self.net = net
        self.of = (min(2, m.layers - 1), m.layers // 2, max(0, m.layers - 3))  # layers whose inputs it reads
        self.join = weight("fc.weight", hidden, len(self.of) * hidden)
        self.token_norm = weight("input_layernorm.weight", hidden)
        self.layer = Layer(
            norm=weight("hidden_norm.weight", hidden),
            norm_bias=None,
            qkv=weight("qkv", net.heads.width, 2 * hidden),
            qkv_bias=None,
            query_norm=None,
            key_norm=None,
            out=weight("o_proj.weight", hidden, net.heads.query * net.heads.size),
            out_bias=None,
            mlp_norm=weight("post_attention_layernorm.weight", hidden),
            mlp_norm_bias=None,
            up=weight("gate_up", 2 * draft.ffn, hidden),
            up_bias=None,
            down=weight("down_proj", hidden, draft.ffn),
            down_bias=None,
        )
        self.norm = weight("norm.weight", hidden)
        self.head = weight("lm_head", draft.vocab, hidden)
        self.tokens = torch.arange(draft.vocab, dtype=torch.int32, device=net.device) * (m.vocab // draft.vocab)

    @property
    def bytes(self) -> int:
        """Bytes of weights that a pass reads."""
        layer = self.layer
        return sum(x.nbytes for x in (layer.qkv, layer.out, layer.up, layer.down, self.head) if isinstance(x, Tensor))

    def begin(self, step: Tokens, behind: Tensor, states: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The first pass, up to attention: what that gives and the residual, for `finish`.

        ``behind`` [rows] int32: the token after each row. ``states`` are of `Transformer.attended`, of the layers
        ``of``; ``cache`` is the head's own.
        """
        assert step.spans is not None
        attention, rows = self.net.attention, len(step.tokens)
        shared = attention.plan_chunks(step.spans, rows)
        residual = linear(states, self.join)
        qkv = self._project(behind, residual)
        y = torch.empty((rows, self.net.heads.query * self.net.heads.size), dtype=qkv.dtype, device=qkv.device)
        self.net.attend(qkv, cache, step, step.spans, shared, y)
        return y, residual

    def finish(
        self, y: Tensor, residual: Tensor, takers: Takers, tables: Tensor, cache: Tensor, passes: int, longest: int
    ) -> Tensor:
        """The drafts of ``passes`` passes, int32 ``[requests, passes]``; sequences have at most ``longest`` tokens."""
        y, state = y[takers.rows], residual[takers.rows]
        drafts = [self._token(y, state)]
        known = takers.lengths + torch.arange(passes - 1, dtype=torch.int32, device=y.device)[:, None]
        known = torch.where((takers.lengths > 0) & (known <= longest), known, 0)
        no_padding = torch.zeros_like(takers.lengths)
        for lengths in known:
            paging = Paging(tables, takers.last, lengths, no_padding)
            self.net.attention.plan(paging)
            qkv = self._project(drafts[-1], state)
            self.net.attention.append_and_decode(qkv, cache, paging, y)  # of who does not go on nothing is written
            drafts.append(self._token(y, state))
        return torch.stack(drafts, dim=1)

    def _project(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Queries, keys and values ``[rows, width]``."""
        epsilon = self.net.epsilon
        assert self.net.embedding is not None
        embedded = residual_norm(None, functional.embedding(tokens, self.net.embedding), self.token_norm, None, epsilon)
        both = torch.cat((embedded, residual_norm(None, state, self.layer.norm, None, epsilon)), dim=1)
        assert isinstance(self.layer.qkv, Tensor)
        return linear(both, self.layer.qkv)

    def _token(self, y: Tensor, state: Tensor) -> Tensor:
        """What follows attention: the likeliest token of each row; ``state`` becomes what the next pass reads."""
        x = self.net.rest(self.layer, y, state, None)
        normed = residual_norm(x, state, self.norm, None, self.net.epsilon)
        _, column = largest(linear(normed, self.head))
        found: Tensor = self.tokens[column]
        return found
