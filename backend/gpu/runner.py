"""The device's half of the engine: integers in, tokens out. One `Runner` is one GPU's share of a replica.

`backend.gpu.engine` turns what the scheduler plans into integers, once. The runner of every GPU gets the same integers,
and does the same step with its own weights and its own KV heads (`backend.gpu.ranks`).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.gpu.draft_head import DraftHead, Takers
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.paged_attention import Heads, Paging, Spans, new_cache, unfit
from chairlift.backend.gpu.ranks import ALONE, ONLY, Ranks, Stage
from chairlift.backend.gpu.step_graphs import (
    CELLS,
    Flat,
    Ints,
    StepGraphs,
    World,
    behind,
    give,
    graph_rows,
    tokens_of,
)
from chairlift.backend.gpu.transformer import Tokens
from chairlift.backend.gpu.weights import check_room, loaded, random_weights
from chairlift.backend.shapes import Model

GRAPHS = graph_sizes(1024)  # padded batch sizes of decode steps
TURNS = 4  # pinned buffers of each kind, used in turn: to allocate one would wait for the GPU


class Runner:
    """Weights, cache and graphs on one device. ``columns`` is the width of a block table.

    With a ``draft`` head every decode verifies up to ``drafts`` drafts, and is a span of its own.

    Raises ValueError, one sentence, where there is no kernel for the model or it does not fit.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        device: torch.device,
        dtype: torch.dtype,
        blocks: int,
        block: int,
        max_model_len: int,
        columns: int,
        ranks: Ranks = ALONE,
        stage: Stage = ONLY,
        draft: Model | None = None,
        drafts: int = 0,
    ) -> None:
        self._options = options
        self._cuda = device.type == "cuda"
        self.device = device
        self.ranks = ranks
        self.stage = stage
        batch = options.max_batch
        heads = ranks.heads(Heads(model.heads, model.kv_heads, model.head_size))
        if self._cuda and (problem := unfit(heads, block)) is not None:
            raise ValueError(f"{model.name}: {problem}")
        self.net = loaded(model, options, device, dtype, block, max_model_len, ranks, stage)
        check_room(device, blocks * block * model.kv_bytes_per_token_on(ranks.count), f"a KV pool of {blocks:,} blocks")
        integer: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.head = None
        if draft is not None:
            self.head = DraftHead(self.net, draft, random_weights(dtype, device, options.seed + 1))
        layers = len(stage.layers(model.layers)) + (draft is not None)
        self._cache = new_cache(layers, blocks, block, heads, dtype, device)
        self._tables = torch.zeros((batch + 1, columns), **integer)
        self._last = torch.zeros((batch + 1, 1 + drafts), **integer)  # each row's latest token and its drafts
        self._staged = torch.zeros((7, batch + 1), **integer)  # of the decodes, see `Sequences.decode`; how many
        # in turn: the copies of one step may still be under way while the next is prepared
        self._pinned = [self._host(self._staged.numel()).view(self._staged.shape) for _ in range(TURNS)]
        self._large = [self._host(1 << 16) for _ in range(TURNS)]  # of steps too large for a graph
        self._changes = [self._host(1 << 12) for _ in range(TURNS)]  # to block tables
        self._turn = 0
        if self._cuda and ranks.count > 1:
            from chairlift.backend.gpu.exchange import Exchange  # it needs CuPy

            self.net.exchange = Exchange(ranks, model.hidden, dtype, device)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        parts = (self._cache, self._tables, self._last, self.sample, self.head, max_model_len)
        self._world = World(self.net, *parts)
        self._limit = graph_rows(model, ranks.count, options.quantization == "fp8")
        self._step_graphs = StepGraphs(self._world, batch, self._limit) if options.graphs and stage == ONLY else None
        if self._cuda and options.graphs and draft is None:
            self._capture()

    def close(self) -> None:
        """Free the cache and the graphs; the weights stay for the next engine of the same model."""
        if self.net.exchange is not None:
            self.net.exchange.close()
            self.net.exchange = None
        del self._cache, self._tables, self.net, self._world, self.head
        self._graphs, self._step_graphs = {}, None
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def give_up(self) -> None:
        """End what waits for other GPUs, one of whose processes has died."""
        if self.net.exchange is not None:
            self.net.exchange.give_up()

    def _capture(self) -> None:
        """Capture a decode step of every padded batch size, the largest first: the graphs share a pool of memory."""
        most = self._options.max_batch
        sizes = [n for n in GRAPHS if n < most] + [next((n for n in GRAPHS if n >= most), most)]
        self._staged.zero_()
        self._staged[0] = most  # nobody's row
        pool = None
        for size in reversed([min(n, most) for n in sizes]):
            self._decode(size)  # warm: captures must not load kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's own threads go on
                sampled = self._decode(size)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, sampled)

    # steps

    @torch.inference_mode()
    def decodes(self, staged: Ints, n: int) -> tuple[Tensor, ...]:
        """A step of ``n`` decodes as `Sequences.decode` has staged them, ``[6, sequences + 1]``: their next tokens."""
        self._turn = (self._turn + 1) % TURNS
        pinned = self._pinned[self._turn]
        to = pinned.numpy()
        to[:6], to[6, 0] = staged, n
        self._staged.copy_(pinned, non_blocking=True)
        size = min(size for size in self._graphs if size >= n) if self._graphs else n
        if size not in self._graphs:
            return (self._decode(size),)
        graph, sampled = self._graphs[size]
        graph.replay()
        return (sampled[:n],)

    @torch.inference_mode()
    def chunks(
        self,
        flat: Flat,
        cells: Sequence[int],
        blocks: Sequence[int],
        n: int,
        passes: int = 0,
    ) -> tuple[Tensor, ...]:
        """A step with chunks whose first ``n`` rows decode: what `StepGraphs.run` gives.

        First ``cells`` of the block tables become ``blocks``.
        """
        self._turn = (self._turn + 1) % TURNS
        small = self._step_graphs is not None and flat.rows.shape[1] <= self._limit
        if not small or len(cells) > CELLS:
            self.change(cells, blocks)
            cells = blocks = ()
        if small:
            assert self._step_graphs is not None
            return self._step_graphs.run(flat, cells, blocks, n, passes)
        parts = [flat.rows.reshape(-1), flat.spans.reshape(-1), flat.sampled, flat.takers]
        if self.head is not None:
            assert flat.behind is not None
            assert flat.places is not None
            parts += [flat.behind, flat.places.reshape(-1)]
        lengths = [len(part) for part in parts]
        self._large[self._turn] = host = self._grown(self._large[self._turn], sum(lengths))
        np.concatenate(parts, out=host.numpy()[: sum(lengths)])
        rows, each, at, last, *more = host[: sum(lengths)].to(self.device, non_blocking=True).split(lengths)
        spans = Spans(each.view(-1, 5), self._tables, flat.seen())
        step = tokens_of(self._world, rows.view(7, -1), spans, n)._replace(sampled=at)
        if self.head is not None:
            after, places = more
            where, picked, known = places.view(3, -1)
            return self._verify(self.head, step, after, Takers(where, picked, last, known), passes)
        return (self._next(step, last),)

    def _verify(
        self, head: DraftHead, step: Tokens, given: Tensor, takers: Takers, passes: int
    ) -> tuple[Tensor, Tensor]:
        """As the graphs of `StepGraphs` do, of a step too large for them."""
        world, sampled = self._world, step.sampled
        assert sampled is not None
        width = len(head.of) * self.net.model.hidden
        states = torch.empty((len(step.tokens), width), dtype=self.net.dtype, device=self.device)
        made = self.net.attended(step, self._cache[:-1], states, head.of)
        new = give(world, self.sample(self.net.leave(*made, sampled)), takers)
        looked = head.begin(step, behind(step.tokens, given, takers, new), states, self._cache[-1])
        if passes and len(new):
            drafts = head.finish(*looked, takers, self._tables, self._cache[-1], passes, world.longest)
            self._last[takers.last, 1 : 1 + passes] = drafts
        return step.tokens[sampled], new

    def change(self, cells: Sequence[int], blocks: Sequence[int]) -> None:
        """Let these cells of the block tables (row · columns + column) name these blocks."""
        if not len(cells):
            return
        self._changes[self._turn] = host = self._grown(self._changes[self._turn], 2 * len(cells))
        host.numpy()[: 2 * len(cells)] = np.concatenate((cells, blocks))
        new = host[: 2 * len(cells)].to(self.device, non_blocking=True).view(2, -1)
        self._tables.view(-1)[new[0]] = new[1]

    def fill(self) -> None:
        """Fill the cache with random numbers: zeros would be read faster than what real requests leave there."""
        for layer in self._cache:
            layer.normal_()

    def _decode(self, size: int) -> Tensor:
        """The tokens, int32, of a decode step of ``size`` rows as they are staged. This is what a graph captures."""
        rows, positions, cells, blocks = (self._staged[i][:size] for i in (0, 3, 4, 5))
        self._tables.view(-1)[cells] = blocks
        tokens = self._last[rows, 0]
        paging = Paging(self._tables, *(self._staged[i][:size] for i in range(3)))
        step = Tokens(tokens, positions, paging, live=self._staged[6, :1])
        return self._next(step, rows)

    def _next(self, step: Tokens, takers: Tensor) -> Tensor:
        """The next tokens of a step's sampled rows, which are now the latest of the rows ``takers`` of `World.last`."""
        sampled = self.sample(self.net.forward(step, self._cache))
        self._last[takers, 0] = sampled
        return sampled

    def sample(self, logits: Tensor) -> Tensor:
        """The next token of each row: the likeliest, or one drawn at the temperature; ``logits`` are this GPU's."""
        if self._options.temperature:  # the largest of these is a draw by the softmax (Gumbel)
            noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log()
            logits = logits.float() / self._options.temperature - noise
        exchange = self.net.exchange
        near = exchange is not None and 0 < len(logits) <= exchange.rows
        return exchange.largest(logits) if near and exchange is not None else self.ranks.largest(logits)

    def _host(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=self._cuda)

    def _grown(self, buffer: Tensor, count: int) -> Tensor:
        """``buffer``, or a larger one if it has no room for ``count`` integers."""
        return buffer if count <= len(buffer) else self._host(2 * count)
