"""Steps with chunks of prompts as two CUDA graphs: everything up to the last layer's attention, and what follows.

All that differs from step to step are integers that the kernels read on the device: which row is whose, where its keys
and values go, how long each sequence is. So one graph for each padded number of rows serves every mix of decodes and
chunks. Only rows whose next token is wanted go through the rest of the last layer, the head and the sampler. The second
graph does that; there is one for each padded number of such rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.gpu.draft_head import DraftHead, Takers
from chairlift.backend.gpu.paged_attention import NOWHERE, Paging, Spans
from chairlift.backend.gpu.transformer import Tokens, Transformer
from chairlift.backend.shapes import Model

LIMIT = 1024  # rows of the largest captured step with chunks;
NARROW_LIMIT = 2048  # in 8-bit floats, whose kernels take the host longer to launch one by one than the GPU to run
EXPERTS_LIMIT = 2048  # with experts, a GPU that shares them: likewise,
EXPERTS_MOST = 4096  # and of any number of GPUs
ALONE = 512  # rows up to which steps without decodes have graphs of their own, without their kernel
ALIKE = 0.97  # a graph of more rows is taken where it takes less than this share of the time
CELLS = 1024  # of block tables, that such a step may change itself
SPAN = 5  # integers of a span, see `Spans`

Ints = npt.NDArray[np.int32]


class Flat(NamedTuple):
    """The integers of a step with chunks: its rows, decodes first; its spans; and whose next tokens are wanted.

    ``rows`` [7, rows]: the row of `World.last` that holds the token (its last row: the token is in the next column),
    token, position, slot, row of the block tables, tokens in KV (0 unless it decodes), leading padding.
    ``spans`` [spans, 5] as in `Spans`; ``sampled`` are rows and ``takers`` the rows of `last` that get their tokens.

    Where drafts are verified, the entries of `World.last` are counted one by one, and ``sampled`` are more than the
    ``takers``: a row for each draft too. ``behind`` [rows] is the token after each row (-1: that of the next row), and
    ``places`` [3, takers] says the rest of `Takers`: rows, picked, lengths.
    """

    rows: Ints
    spans: Ints
    sampled: Ints
    takers: Ints
    behind: Ints | None = None
    places: Ints | None = None

    def seen(self) -> float:
        """Tokens that a row of the spans sees on average; those before it in its span, and itself, are some of them."""
        _, count, known, padding, _ = self.spans.reshape(-1, SPAN).T.astype(np.int64)
        return float((count * (known - padding - (count - 1) / 2)).sum() / max(1, count.sum()))


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
    last: Tensor  # [sequences + 1, 1 + drafts]: each sequence's latest token, its drafts; the last row is nobody's
    sample: Callable[[Tensor], Tensor]  # logits → tokens
    head: DraftHead | None = None  # where drafts are verified; the last layer of the cache is its own
    longest: int = 0  # tokens of a sequence, for its passes


def tokens_of(world: World, rows: Tensor, spans: Spans, decodes: int) -> Tokens:
    """The step whose `Flat.rows` lie on the device; its first ``decodes`` rows may decode."""
    taken = rows[0]
    tokens = torch.where(taken < world.last[:-1].numel(), world.last.view(-1)[taken], rows[1])
    paging = Paging(world.tables, *(rows[i, :decodes] for i in (4, 5, 6))) if decodes else None
    return Tokens(tokens, rows[2], paging, rows[3], spans)


def give(world: World, computed: Tensor, takers: Takers) -> Tensor:
    """The next token of each taker, where the tokens of all sampled rows are ``computed``; `World.last` has it too."""
    new = computed[takers.picked]
    world.last[takers.last, 0] = new
    return new


def behind(tokens: Tensor, given: Tensor, takers: Takers, new: Tensor) -> Tensor:
    """The token after each row, `Flat.behind` being ``given`` and ``new`` the next tokens of the takers."""
    rows = len(tokens)
    found = torch.zeros(rows + 1, dtype=torch.int32, device=tokens.device)
    found[: rows - 1] = tokens[1:]
    found[:rows] = torch.where(given >= 0, given, found[:rows])
    found[takers.rows] = new
    return found[:rows]


def through(times: Mapping[int, float]) -> dict[int, int]:
    """Size of a captured step → that of the graph that it is best filled up to, where replaying each takes so long.

    The library's products are not faster for every smaller number of rows. On an H200 those of Llama-3.1-8B's gates and
    ups in bfloat16 take 266 µs for 448 rows, where 480 take 162. Differences within `ALIKE` are left alone.
    """
    found: dict[int, int] = {}
    best = max(times)
    for size in sorted(times, reverse=True):
        if times[size] * ALIKE < times[best]:
            best = size
        found[size] = best
    return found


class StepGraphs:
    """The graphs of steps with chunks, of at most ``limit`` rows (`graph_rows`) and ``most`` sequences.

    With a draft head there are two more of each step: its first pass up to attention, and the rest with all further
    passes. Without a GPU the same parts run as they are, over the same buffers.
    """

    def __init__(self, world: World, most: int, limit: int) -> None:
        net, head = world.net, world.head
        self._world = world
        self._nobody = len(world.last) - 1
        self._nobodys = self._nobody * world.last.shape[1]  # likewise, counted entry by entry
        self._limit = limit
        cuda = net.device.type == "cuda"
        wanted = most * world.last.shape[1]  # rows whose tokens are
        self._spans_at = (7 if head is None else 8) * limit
        self._sampled_at = self._spans_at + SPAN * 2 * most  # each prompt may have padding, a span of its own
        self._takers_at = self._sampled_at + wanted
        self._places_at = self._takers_at + most
        self._counts_at = self._places_at + (0 if head is None else 3 * most)  # how many rows, and sampled ones,
        self._cells_at = self._counts_at + 2  # are somebody's
        count = self._cells_at + 2 * CELLS
        self._whole = torch.zeros(count, dtype=torch.int32, device=net.device)
        self._host = [torch.zeros(count, dtype=torch.int32, pin_memory=cuda) for _ in range(4)]  # in turn
        self._turn = 0
        self._most = most
        whole: dict[str, Any] = {"dtype": net.dtype, "device": net.device}
        hidden, width = net.model.hidden, net.heads.query * net.heads.size
        self._residual, self._attended = torch.zeros((limit, hidden), **whole), torch.zeros((limit, width), **whole)
        also = 0 if head is None else limit + 1  # a row for whoever is nobody
        self._drafted, self._looked = torch.zeros((also, hidden), **whole), torch.zeros((also, width), **whole)
        self._states = torch.zeros((also, 0 if head is None else len(head.of) * hidden), **whole)
        integer: dict[str, Any] = {"dtype": torch.int32, "device": net.device}
        self._tokens, self._new = torch.zeros(limit, **integer), torch.zeros(most, **integer)
        none = np.zeros(0, np.int32)
        nothing = Flat(np.zeros((7, 0), np.int32), none, none, none, none, np.zeros((3, 0), np.int32))
        self._fill(self._host[0].numpy(), nothing, (), (), limit, wanted)
        self._host[0][self._places_at : self._counts_at] = 0  # a row that steps of every size have
        self._whole.copy_(self._host[0])
        self._sizes = graph_sizes(limit)
        self._tails = [*[n for n in graph_sizes(wanted) if n < wanted], wanted]
        self._counts = [*[n for n in self._sizes if n < most], most]
        capture = _Capture() if cuda else _as_it_is
        # the largest first: all share one pool of memory
        kinds = [(size, decodes) for size in reversed(self._sizes) for decodes in (True, False)[: 1 + (size <= ALONE)]]
        if head is not None:
            kinds = [(size, False) for size in reversed(self._sizes)]  # all decodes verify
        self._begin = {kind: capture(partial(self._up_to_attention, *kind)) for kind in kinds}
        self._finish = {size: capture(partial(self._rest, size)) for size in reversed(self._tails)}
        self._through = {size: size for size in self._sizes}
        if cuda and net.ranks.count == 1 and not net.model.experts:
            of_all = {size: self._begin[size, head is None] for size in self._sizes}
            self._through = through({size: _milliseconds(graph) for size, graph in of_all.items()})
        if head is not None:
            self._look = {size: capture(partial(self._first_pass, size)) for size in reversed(self._sizes)}
            passes = world.last.shape[1] - 1
            self._propose = {n: capture(partial(self._drafts, n, passes)) for n in reversed(self._counts)}

    @torch.inference_mode()
    def run(
        self, flat: Flat, cells: Sequence[int], blocks: Sequence[int], decodes: int, passes: int = 0
    ) -> tuple[Tensor, ...]:
        """Do the step, whose first ``decodes`` rows decode: the next tokens of its sampled rows, on the device.

        First these cells of the block tables, at most `CELLS`, become these blocks. With a draft head: the tokens that
        the sampled rows compute, and the next tokens of the takers, who get drafts of so many ``passes``.
        """
        rows, wanted = flat.rows.shape[1], len(flat.sampled)
        size = self._through[self._sizes[bisect_left(self._sizes, rows)]]
        tail = self._tails[bisect_left(self._tails, wanted)]
        self._turn = (self._turn + 1) % len(self._host)
        host = self._host[self._turn]
        self._fill(host.numpy(), flat, cells, blocks, size, tail)
        self._whole.copy_(host, non_blocking=True)
        verifies = self._world.head is not None
        self._begin[size, not verifies and (bool(decodes) or size > ALONE)]()
        found: tuple[Tensor, ...] = (self._whole[:0],)
        if wanted:
            found = tuple(part[:wanted] for part in self._finish[tail]())
        if verifies:
            self._look[size]()
            if passes and wanted:
                n = self._counts[bisect_left(self._counts, len(flat.takers))]
                all_of_them = passes == self._world.last.shape[1] - 1
                self._propose[n]() if all_of_them else self._drafts(n, passes)
            found = (*found, self._new[: len(flat.takers)])
        return found

    def _fill(self, to: Ints, flat: Flat, cells: Sequence[int], blocks: Sequence[int], size: int, tail: int) -> None:
        """Lay a step out in ``to``, filled up to ``size`` rows and ``tail`` sampled ones that are nobody's."""
        n, wanted, taking = flat.rows.shape[1], len(flat.sampled), len(flat.takers)
        rows = to[: self._spans_at].reshape(-1, self._limit)
        rows[:7, :n] = flat.rows
        rows[:, n:size] = 0
        rows[0, n:size] = self._nobodys
        rows[4, n:size] = self._nobody
        rows[3, n:size] = NOWHERE
        spans = to[self._spans_at : self._sampled_at]
        spans[: flat.spans.size] = flat.spans.reshape(-1)
        spans[flat.spans.size :] = 0
        sampled, takers = to[self._sampled_at : self._takers_at], to[self._takers_at : self._places_at]
        to[self._counts_at : self._cells_at] = n, wanted
        changed, become = to[self._cells_at :].reshape(2, CELLS)
        changed[: len(cells)], become[: len(cells)] = cells, blocks
        changed[len(cells) :] = self._nobody * self._world.tables.shape[1]
        sampled[:wanted], takers[:taking] = flat.sampled, flat.takers
        sampled[wanted:tail], takers[taking:] = 0, self._nobody
        if self._world.head is not None:
            assert flat.behind is not None
            assert flat.places is not None
            rows[7, :n] = flat.behind
            places = to[self._places_at : self._counts_at].reshape(3, -1)
            places[:, :taking], places[:, taking:] = flat.places, 0
            places[0, taking:] = size

    def _rows(self, size: int) -> tuple[Tensor, Spans]:
        rows = self._whole[: self._spans_at].view(-1, self._limit)[:, :size]
        return rows, Spans(self._whole[self._spans_at : self._sampled_at].view(-1, SPAN), self._world.tables)

    def _takers(self, count: int) -> Takers:
        rows, picked, lengths = self._whole[self._places_at : self._counts_at].view(3, -1)[:, :count]
        return Takers(rows, picked, self._whole[self._takers_at : self._takers_at + count], lengths)

    def _up_to_attention(self, size: int, decodes: bool) -> None:
        cells, blocks = self._whole[self._cells_at :].view(2, CELLS)
        self._world.tables.view(-1)[cells] = blocks
        rows, spans = self._rows(size)
        live = self._whole[self._counts_at : self._counts_at + 1]
        step = tokens_of(self._world, rows, spans, size if decodes else 0)._replace(live=live)
        world, head = self._world, self._world.head
        if head is None:
            attended = world.net.attended(step, world.cache)
        else:
            self._tokens[:size] = step.tokens
            attended = world.net.attended(step, world.cache[:-1], self._states[:size], head.of)
        self._attended[:size], self._residual[:size] = attended

    def _rest(self, size: int) -> tuple[Tensor, ...]:
        sampled = self._whole[self._sampled_at : self._sampled_at + size]
        live = self._whole[self._counts_at + 1 : self._cells_at]
        world = self._world
        tokens = world.sample(world.net.leave(self._attended, self._residual, sampled, live))
        if world.head is None:
            world.last[self._whole[self._takers_at : self._takers_at + size], 0] = tokens
            return (tokens,)
        self._new[:] = give(world, tokens, self._takers(self._most))
        return (self._tokens[sampled],)

    def _first_pass(self, size: int) -> None:
        world = self._world
        assert world.head is not None
        rows, spans = self._rows(size)
        tokens = self._tokens[:size]
        after = behind(tokens, rows[7], self._takers(self._most), self._new)
        step = Tokens(tokens, rows[2], None, rows[3], spans)
        looked = world.head.begin(step, after, self._states[:size], world.cache[-1])
        self._looked[:size], self._drafted[:size] = looked

    def _drafts(self, count: int, passes: int) -> None:
        world, takers = self._world, self._takers(count)
        assert world.head is not None
        parts = (self._looked, self._drafted, takers, world.tables, world.cache[-1], passes, world.longest)
        world.last[takers.last, 1 : 1 + passes] = world.head.finish(*parts)


def _milliseconds(graph: Callable[[], Any]) -> float:
    """How long a graph takes, the shorter of two times."""
    graph()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events:
        event.record()
        graph()
    torch.cuda.synchronize()
    return min(float(events[i].elapsed_time(events[i + 1])) for i in range(2))


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
