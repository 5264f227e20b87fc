"""Steps with chunks of prompts as two CUDA graphs: everything up to the last layer's attention, and what follows.

All that differs from step to step are integers that the kernels read on the device: which row is whose, where its keys
and values go, how long each sequence is. So one graph for each padded number of rows serves every mix of decodes and
chunks. Only rows whose next token is wanted go through the rest of the last layer, the head and the sampler. The second
graph does that; there is one for each padded number of such rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.gpu.paged_attention import NOWHERE, Paging, Spans
from chairlift.backend.gpu.transformer import Tokens, Transformer
from chairlift.backend.shapes import Model

LIMIT = 1024  # rows of the largest captured step with chunks;
NARROW_LIMIT = 2048  # in 8-bit floats, whose kernels take the host longer to launch one by one than the GPU to run
EXPERTS_LIMIT = 2048  # with experts, a GPU that shares them: likewise,
EXPERTS_MOST = 4096  # and of any number of GPUs
ALONE = 512  # rows up to which steps without decodes have graphs of their own, without their kernel
CELLS = 1024  # of block tables, that such a step may change itself
SPAN = 5  # integers of a span, see `Spans`

Ints = npt.NDArray[np.int32]


class Flat(NamedTuple):
    """The integers of a step with chunks: its rows, decodes first; its spans; and whose next tokens are wanted.

    ``rows`` [7, rows]: the row of `World.last` that holds the token (its last row: the token is in the next column),
    token, position, slot, row of the block tables, tokens in KV (0 unless it decodes), leading padding.
    ``spans`` [spans, 5] as in `Spans`; ``sampled`` are rows and ``takers`` the rows of `last` that get their tokens.
    """

    rows: Ints
    spans: Ints
    sampled: Ints
    takers: Ints


def graph_rows(model: Model, gpus: int, eights: bool) -> int:
    """Rows of the largest captured step with chunks, where ``gpus`` share the model; ``eights`` is as in `Transformer`.

    Rows that fill a step up to a captured size cost dense layers their whole time, and experts none.
    """
    if model.experts:
        return min(EXPERTS_LIMIT * gpus, EXPERTS_MOST)
    return NARROW_LIMIT if eights else LIMIT


class World(NamedTuple):
    """What every step of an engine reads and writes."""

    net: Transformer
    cache: Tensor  # of all layers
    tables: Tensor  # [sequences + 1, columns]: block numbers
    last: Tensor  # [sequences + 1]: each sequence's latest token; the last one is nobody's
    sample: Callable[[Tensor], Tensor]  # logits → tokens


def tokens_of(world: World, rows: Tensor, spans: Spans, decodes: int) -> Tokens:
    """The step whose `Flat.rows` lie on the device; its first ``decodes`` rows may decode."""
    taken = rows[0]
    tokens = torch.where(taken < len(world.last) - 1, world.last[taken], rows[1])
    paging = Paging(world.tables, *(rows[i, :decodes] for i in (4, 5, 6))) if decodes else None
    return Tokens(tokens, rows[2], paging, rows[3], spans)


class StepGraphs:
    """The graphs of steps with chunks, of at most ``limit`` rows (`graph_rows`) and ``most`` sequences.

    Without a GPU the same parts run as they are, over the same buffers.
    """

    def __init__(self, world: World, most: int, limit: int) -> None:
        net = world.net
        self._world = world
        self._nobody = len(world.last) - 1
        self._limit = limit
        cuda = net.device.type == "cuda"
        self._spans_at = 7 * limit
        self._sampled_at = self._spans_at + SPAN * 2 * most  # each prompt may have padding, a span of its own
        self._counts_at = self._sampled_at + 2 * most  # how many rows, and sampled ones, are somebody's
        self._cells_at = self._counts_at + 2
        count = self._cells_at + 2 * CELLS
        self._whole = torch.zeros(count, dtype=torch.int32, device=net.device)
        self._host = [torch.zeros(count, dtype=torch.int32, pin_memory=cuda) for _ in range(4)]  # in turn
        self._turn = 0
        self._most = most
        whole: dict[str, Any] = {"dtype": net.dtype, "device": net.device}
        self._residual = torch.zeros((limit, net.model.hidden), **whole)
        self._attended = torch.zeros((limit, net.heads.query * net.heads.size), **whole)
        nothing = Flat(np.zeros((7, 0), np.int32), *(np.zeros(0, np.int32),) * 3)
        self._fill(self._host[0].numpy(), nothing, (), (), limit, most)
        self._whole.copy_(self._host[0])
        self._sizes = graph_sizes(limit)
        self._tails = [*[n for n in self._sizes if n < most], most]
        capture = _Capture() if cuda else _as_it_is
        # the largest first: all share one pool of memory
        kinds = [(size, decodes) for size in reversed(self._sizes) for decodes in (True, False)[: 1 + (size <= ALONE)]]
        self._begin = {kind: capture(partial(self._up_to_attention, *kind)) for kind in kinds}
        self._finish = {size: capture(partial(self._rest, size)) for size in reversed(self._tails)}

    @torch.inference_mode()
    def run(self, flat: Flat, cells: Sequence[int], blocks: Sequence[int], decodes: int) -> Tensor:
        """Do the step, whose first ``decodes`` rows decode; the next tokens of its sampled rows, on the device.

        First these cells of the block tables, at most `CELLS`, become these blocks.
        """
        rows, wanted = flat.rows.shape[1], len(flat.sampled)
        size = self._sizes[bisect_left(self._sizes, rows)]
        tail = self._tails[bisect_left(self._tails, wanted)]
        self._turn = (self._turn + 1) % len(self._host)
        host = self._host[self._turn]
        self._fill(host.numpy(), flat, cells, blocks, size, tail)
        self._whole.copy_(host, non_blocking=True)
        self._begin[size, bool(decodes) or size > ALONE]()
        if not wanted:
            return self._whole[:0]
        tokens: Tensor = self._finish[tail]()
        return tokens[:wanted]

    def _fill(self, to: Ints, flat: Flat, cells: Sequence[int], blocks: Sequence[int], size: int, tail: int) -> None:
        """Lay a step out in ``to``, filled up to ``size`` rows and ``tail`` sampled ones that are nobody's."""
        n, wanted = flat.rows.shape[1], len(flat.sampled)
        rows = to[: self._spans_at].reshape(7, self._limit)
        rows[:, :n] = flat.rows
        rows[:, n:size] = 0
        rows[0, n:size] = rows[4, n:size] = self._nobody
        rows[3, n:size] = NOWHERE
        spans = to[self._spans_at : self._sampled_at]
        spans[: flat.spans.size] = flat.spans.reshape(-1)
        spans[flat.spans.size :] = 0
        sampled, takers = to[self._sampled_at : self._counts_at].reshape(2, -1)
        to[self._counts_at : self._cells_at] = n, wanted
        changed, become = to[self._cells_at :].reshape(2, CELLS)
        changed[: len(cells)], become[: len(cells)] = cells, blocks
        changed[len(cells) :] = self._nobody * self._world.tables.shape[1]
        sampled[:wanted], takers[:wanted] = flat.sampled, flat.takers
        sampled[wanted:tail], takers[wanted:tail] = 0, self._nobody

    def _up_to_attention(self, size: int, decodes: bool) -> None:
        cells, blocks = self._whole[self._cells_at :].view(2, CELLS)
        self._world.tables.view(-1)[cells] = blocks
        rows = self._whole[: self._spans_at].view(7, self._limit)[:, :size]
        spans = Spans(self._whole[self._spans_at : self._sampled_at].view(-1, SPAN), self._world.tables)
        live = self._whole[self._counts_at : self._counts_at + 1]
        step = tokens_of(self._world, rows, spans, size if decodes else 0)._replace(live=live)
        self._attended[:size], self._residual[:size] = self._world.net.attended(step, self._world.cache)

    def _rest(self, size: int) -> Tensor:
        sampled, takers = self._whole[self._sampled_at : self._counts_at].view(2, -1)[:, :size]
        live = self._whole[self._counts_at + 1 : self._cells_at]
        tokens = self._world.sample(self._world.net.leave(self._attended, self._residual, sampled, live))
        self._world.last[takers] = tokens
        return tokens


def _as_it_is(part: Callable[[], Any]) -> Callable[[], Any]:
    return part


class _Capture:
    """Makes a graph of a part, all in one pool of memory and on one stream, whose cuBLAS workspace they share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @torch.inference_mode()
    def __call__(self, part: Callable[[], Any]) -> Callable[[], Any]:
        """The part as a graph, which gives what the part gave. It runs once before: captures must not load kernels."""
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            part()
            # not by `torch.cuda.graph`, which would tidy memory up before each of hundreds; NCCL's own threads go on
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            made = part()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return made

        return replay
