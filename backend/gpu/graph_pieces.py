"""Steps with chunks of prompts, mostly as CUDA graphs: all that lies between two attentions is captured.

Attention depends on which sequences the rows belong to; everything else depends on the number of rows alone. So a graph
for each padded number of rows and each gap between two attentions spares most of the launches that such a step is made
of, as vLLM's piecewise graphs do. What follows the last attention is not captured, because only sampled rows go through
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chairlift.backend.cuda_graphs import GRAPH_TOKENS, graph_sizes, padded
from chairlift.backend.gpu.paged_attention import NOWHERE, UNTOUCHED
from chairlift.backend.gpu.transformer import Tokens, Transformer

Part = Callable[[], Any]


class Pieces:
    """The captured parts of a model's steps over one ``cache``; without ``graphs`` the same parts run one by one."""

    def __init__(self, net: Transformer, cache: Tensor, graphs: bool, limit: int = GRAPH_TOKENS) -> None:
        heads, width = net.heads, net.model.hidden
        self.limit = limit
        self._net = net
        self._cache = cache
        self._positions, self._slots = torch.zeros((2, limit), dtype=torch.int32, device=net.device)
        self._sizes: dict[int, list[Part]] = {}
        whole: dict[str, Any] = {"dtype": net.dtype, "device": net.device}
        self._residual = torch.zeros((limit, width), **whole)
        self._qkv = torch.zeros((limit, heads.width), **whole)
        self._attended = torch.zeros((limit, heads.query * heads.size), **whole)
        capture = _Capture() if graphs else list
        for size in reversed(graph_sizes(limit)):  # the largest first: they share one pool of memory
            self._sizes[size] = capture(self._parts(size))

    def _parts(self, size: int) -> list[Part]:
        net, positions, slots = self._net, self._positions[:size], self._slots[:size]
        residual, qkv, attended = self._residual[:size], self._qkv[:size], self._attended[:size]

        def before(i: int) -> None:
            if i == 0:
                net.enter(residual, qkv)
            else:
                net.between(i - 1, attended, residual, qkv)
            net.attention.rotate_and_store(qkv, self._cache[i], positions, slots)

        return [partial(before, i) for i in range(len(net.layers))]

    @torch.inference_mode()
    def forward(self, step: Tokens) -> Tensor:
        """As `Transformer.forward`, for a step with chunks, of at most `limit` rows.

        Padding rows hold what earlier steps left there; nothing is done with what comes of them.
        """
        assert step.slots is not None
        net, rows = self._net, len(step.tokens)
        start, size = rows - len(step.slots), padded(rows, self.limit)
        if step.paging is not None:
            net.attention.plan(step.paging)
        self._residual[:rows] = net.embed(step.tokens, step.positions)
        self._positions[:rows] = step.positions
        self._slots[:start] = UNTOUCHED
        self._slots[start:rows] = step.slots
        self._slots[rows:size] = NOWHERE
        attend = net.attending(self._qkv[:rows], step, self._attended[:rows])
        for part, layer in zip(self._sizes[size], self._cache, strict=True):
            part()
            attend(layer)
        return net.leave(self._attended[:rows], self._residual[:rows], step.sampled)


class _Capture:
    """Makes graphs of parts, all in one pool of memory and on one stream, whose cuBLAS workspace they share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @torch.inference_mode()
    def __call__(self, parts: list[Part]) -> list[Part]:
        """Each part as a graph. Two parts run before, to load all kernels: a capture must not, and layers are alike."""
        self._stream.wait_stream(torch.cuda.current_stream())
        captured: list[Part] = []
        with torch.cuda.stream(self._stream):
            for part in parts[:2]:
                part()
            for part in parts:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool)  # `torch.cuda.graph` would tidy memory up before each of thousands
                part()
                graph.capture_end()
                captured.append(graph.replay)
        torch.cuda.current_stream().wait_stream(self._stream)
        return captured
