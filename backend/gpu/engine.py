"""The GPU engine: executes what the scheduler plans on a real device, and measures it.

One `TorchEngine` is one replica. `launch` turns the members of a batch into a flat batch of tokens and block tables,
and queues it on the device; `wait` takes in the tokens of the oldest step. Between the two the host is free to plan the
next step (asynchronous scheduling). A token stays on the device for the next step, so that only `wait` waits for the
device.

Steps of decodes alone replay CUDA graphs captured for padded batch sizes (`GRAPHS`), and so do steps with chunks of up
to 1,024 rows (`backend.gpu.step_graphs`); larger ones run eagerly. On a CPU the same code runs plain torch, which is
meant for tests with tiny models.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chairlift.backend.base import Batch, Executor, Measured, Members, Prompt, StepCost
from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.gpu.block_tables import Practice, Sequences
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.paged_attention import NOWHERE, TILE, UNTOUCHED, Heads, Paging, Spans, new_cache, unfit
from chairlift.backend.gpu.step_graphs import Flat, StepGraphs, World, tokens_of
from chairlift.backend.gpu.transformer import Tokens
from chairlift.backend.gpu.weights import check_room, loaded
from chairlift.backend.roofline import Roofline
from chairlift.backend.shapes import GPU, Model

GRAPHS = graph_sizes(1024)  # padded batch sizes of decode steps
PAGE = 16  # tokens a block, where the pool only counts blocks
TURNS = 4  # pinned buffers of each kind, used in turn: to allocate one would wait for the GPU


class Flight(NamedTuple):
    """A step that was launched and not yet waited for."""

    requests: list[int]  # the request of each row of tokens; -1: none
    tokens: Tensor  # pinned host memory, filled once the step is done
    start: Any  # CUDA events; None on a CPU
    end: Any
    host: int  # ps of the launch
    gpu: int  # ps; on a CPU only, where no events measure it


class TorchEngine(Executor):
    """Executes the steps of one replica of ``model`` on one device.

    Raises ValueError, one sentence, where there is no kernel for the model or it does not fit.
    """

    name = "torch"

    def __init__(self, model: Model, gpu: GPU, options: Options) -> None:
        self.model = model
        self.options = options
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if options.device == "cuda" and found == "cpu":
            raise ValueError("torch sees no CUDA device here; device: cpu runs tiny models")
        self.device = torch.device(found if options.device == "auto" else options.device)
        self._cuda = self.device.type == "cuda"
        usual = "float32" if not self._cuda else "float16" if model.learned_positions else "bfloat16"
        self.dtype: torch.dtype = getattr(torch, usual if options.dtype == "auto" else options.dtype)
        if self._cuda and self.dtype == torch.float32:
            raise ValueError("the GPU kernels compute in bfloat16 or float16 (got dtype float32)")
        if options.quantization == "fp8" and self._cuda and self.dtype != torch.bfloat16:
            raise ValueError(f"quantization fp8 needs dtype bfloat16 (got {str(self.dtype).removeprefix('torch.')})")
        self._price = Roofline(model, gpu)
        self.generated: dict[int, list[int]] = {}  # request → tokens generated for it
        self._flights: deque[Flight] = deque()

    # getting ready

    def prepare(self, blocks: int, block_size: int, max_model_len: int, named: bool) -> None:  # noqa: D102
        model, batch = self.model, self.options.max_batch
        self._named = named
        self._block = block_size if named else PAGE
        heads = Heads(model.heads, model.kv_heads, model.head_size)
        if self._cuda and (problem := unfit(heads, self._block)) is not None:
            raise ValueError(f"{model.name}: {problem}")
        if self._block % TILE:
            raise ValueError(f"the engine's blocks hold a multiple of {TILE} tokens (got {self._block})")
        if not named:  # every sequence may leave its last block half empty
            blocks = -(-blocks * block_size // PAGE) + batch
        self._net = loaded(model, self.options, self.device, self.dtype, self._block, max_model_len)
        check_room(self.device, blocks * self._block * model.kv_bytes_per_token, f"a KV pool of {blocks:,} blocks")
        integer: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        self._cache = new_cache(model.layers, blocks, self._block, heads, self.dtype, self.device)
        self._sequences = Sequences(batch, blocks, self._block, max_model_len, named)
        self._tables = torch.zeros(self._sequences.table.shape, **integer)
        self._last = torch.zeros(batch + 1, **integer)  # each row's latest token
        self._staged = torch.zeros((7, batch + 1), **integer)  # of the decodes, see `Sequences.decode`; how many
        # in turn: the copies of one step may still be under way while the next is prepared
        self._pinned = [self._host(self._staged.numel()).view(self._staged.shape) for _ in range(TURNS)]
        self._large = [self._host(1 << 16) for _ in range(TURNS)]  # of steps too large for a graph
        self._changes = [self._host(1 << 12) for _ in range(TURNS)]  # to block tables
        self._answers = [self._host(2 * batch) for _ in range(TURNS)]
        self._turn = 0
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._world = World(self._net, self._cache, self._tables, self._last, self._sample)
        self._step_graphs = StepGraphs(self._world, batch) if self.options.graphs else None
        if self._cuda:
            self._warm_up(blocks * self._block, max_model_len)
            if self.options.graphs:
                self._capture()

    def close(self) -> None:
        """Give the cache and the graphs back; the weights stay for the next engine of the same model."""
        del self._cache, self._tables, self._net, self._world
        self._graphs, self._step_graphs = {}, None
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def _warm_up(self, room: int, longest: int) -> None:
        """Run every kind of step once, so that no measured step compiles or plans anything."""
        self._net.attention.warm_up(self.dtype, self.device, longest)
        for length in [n for n in (8192, 2048, 600) if n + 4 * self._block < min(room, longest)]:
            steps = [Practice([Prompt(-1, 0, length, 0, True)])]
            if self.options.max_batch > 1:
                steps.append(Practice([Prompt(-2, 0, 16, 0, False)], [-1]))
                steps.append(Practice([Prompt(-2, 16, 16, 0, True)], [-1]))
            for step in steps:
                self.launch(Batch((), 0, 0, 0, step))
                self.wait()
            self.release(-1)
            self.release(-2)
        self.generated = {}

    def _capture(self) -> None:
        """Capture a decode step of every padded batch size, the largest first: the graphs share a pool of memory."""
        most = self.options.max_batch
        sizes = [n for n in GRAPHS if n < most] + [next((n for n in GRAPHS if n >= most), most)]
        self._staged.zero_()
        self._staged[0] = self.options.max_batch  # nobody's row
        pool = None
        for size in reversed([min(n, most) for n in sizes]):
            self._decode(size)  # warm: captures must not load kernels
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                sampled = self._decode(size)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, sampled)

    # steps

    def step(self, batch: Batch) -> StepCost:  # noqa: D102
        return self._price.step(batch)

    def launch(self, batch: Batch) -> None:  # noqa: D102
        began = time.perf_counter_ns()
        members = batch.members
        assert members is not None
        start, end = self._events()
        with torch.inference_mode():
            requests = [*members.decodes, *[-1] * len(members.dead)]
            n = len(requests)
            self._turn = (self._turn + 1) % TURNS
            staged = self._pinned[self._turn]
            self._sequences.decode([*members.decodes, *members.dead], members, staged.numpy()[:6])
            staged[6, 0] = n
            if members.prompts:
                sampled = self._with_prompts(members, n, requests)
            else:
                self._staged.copy_(staged, non_blocking=True)
                size = min(size for size in self._graphs if size >= n) if self._graphs else n
                if size in self._graphs:
                    graph, sampled = self._graphs[size]
                    graph.replay()
                else:
                    sampled = self._decode(size)
            tokens = self._answers[self._turn][: len(requests)]
            tokens.copy_(sampled[: len(requests)], non_blocking=True)
        if self._cuda:
            end.record()
        took = (time.perf_counter_ns() - began) * 1000
        self._flights.append(Flight(requests, tokens, start, end, took, took))

    def wait(self) -> Measured:  # noqa: D102
        flight = self._flights.popleft()
        gpu = flight.gpu
        if self._cuda:
            flight.end.synchronize()
            gpu = round(flight.start.elapsed_time(flight.end) * 1e9)
        generated = self.generated
        for request, token in zip(flight.requests, flight.tokens.tolist(), strict=True):
            if request in generated:
                generated[request].append(token)
            elif request != -1:
                generated[request] = [token]
        return Measured(gpu, flight.host)

    def fill(self) -> None:
        """Fill the cache with random numbers: zeros would be read faster than what real requests leave there."""
        for layer in self._cache:
            layer.normal_()

    def place(self, contexts: Mapping[int, int]) -> None:
        """Let each request have so many tokens of KV, whatever the cache holds, to measure steps of a given shape.

        Needs an engine whose blocks are not ``named``.
        """
        practice, prompt = Practice(()), np.zeros(max(contexts.values()), dtype=np.int64)
        for request, tokens in contexts.items():
            row = self._sequences.take(request, 0, lambda: prompt)
            self._sequences.length[row] = tokens
            cells, blocks = self._sequences.cover(request, tokens, practice)
            self._tables.view(-1)[torch.tensor(cells, device=self.device)] = torch.tensor(
                blocks, dtype=torch.int32, device=self.device
            )

    def release(self, request_id: int) -> None:  # noqa: D102
        self._sequences.release(request_id)

    def drop(self, request_id: int) -> None:  # noqa: D102
        for flight in self._flights:
            flight.requests[:] = [-1 if request == request_id else request for request in flight.requests]

    def retable(self, request_id: int, table: Sequence[int]) -> None:  # noqa: D102
        cells, blocks = self._sequences.renamed(request_id, table)
        if cells:  # steps under way read and write the blocks before, which nobody else gets until they are done
            at = torch.tensor(cells, device=self.device)
            self._tables.view(-1)[at] = torch.tensor(blocks, dtype=torch.int32, device=self.device)

    def answer(self, request_id: int) -> Sequence[int]:  # noqa: D102
        return self.generated.get(request_id, ())

    def facts(self) -> dict[str, str]:  # noqa: D102
        gpu = torch.cuda.get_device_name(self.device) if self._cuda else "CPU"
        try:
            own = version("chairlift")
        except PackageNotFoundError:
            own = "0"
        return {"chairlift": own, "gpu": gpu, "torch": torch.__version__, "dtype": str(self.dtype)}

    def assumptions(self) -> dict[str, str]:  # noqa: D102
        o = self.options
        where = torch.cuda.get_device_name(self.device) if self._cuda else "the CPU"
        weights = "random weights" if o.weights is None else f"weights of {Path(o.weights).name}"
        dtype = str(self.dtype).removeprefix("torch.")
        quantised = ", layers' products in FP8" if o.quantization == "fp8" else ""
        return {
            "engine": f"executed, not modelled: {self.model.name}, {dtype}{quantised}, {weights}, on {where}",
            "software": f"torch {torch.__version__}, CUDA graphs {'on' if o.graphs and self._cuda else 'off'}",
        }

    # decodes

    def _host(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, pin_memory=self._cuda)

    def _paging(self, size: int) -> Paging:
        rows, lengths, first = (self._staged[i][:size] for i in range(3))
        return Paging(self._tables, rows, lengths, first)

    def _decode(self, size: int) -> Tensor:
        """The tokens, int32, of a decode step of ``size`` rows as they are staged. This is what a graph captures."""
        rows, positions, cells, blocks = (self._staged[i][:size] for i in (0, 3, 4, 5))
        self._tables.view(-1)[cells] = blocks
        tokens = self._last[rows]
        step = Tokens(tokens, positions, self._paging(size), live=self._staged[6, :1])
        sampled = self._sample(self._net.forward(step, self._cache))
        self._last[rows] = sampled
        return sampled

    def _sample(self, logits: Tensor) -> Tensor:
        """The next token of each row: the likeliest, or one drawn at the temperature."""
        if self.options.temperature:
            weights = (logits.float() / self.options.temperature).softmax(-1)
            logits = weights / torch.empty_like(weights).exponential_()  # the largest is a draw by these weights
        return logits.argmax(-1).to(torch.int32)

    # steps with chunks of prompts

    def _with_prompts(self, members: Members, n: int, requests: list[int]) -> Tensor:
        """The next tokens of ``n`` decodes, as staged, and of chunks beside them.

        Adds whose tokens come to ``requests``.
        """
        flat, changes, whole = self._lay_out(members, n, requests)
        cells, blocks = changes
        if len(cells):
            self._changes[self._turn] = host = self._grown(self._changes[self._turn], 2 * len(cells))
            host.numpy()[: 2 * len(cells)] = np.concatenate((cells, blocks))
            new = host[: 2 * len(cells)].to(self.device, non_blocking=True).view(2, -1)
            self._tables.view(-1)[new[0]] = new[1]
        if self._step_graphs is not None and flat.rows.shape[1] <= self._step_graphs.limit:
            return self._step_graphs.run(flat)
        parts = [flat.rows.reshape(-1), flat.spans.reshape(-1), flat.sampled, flat.takers]
        lengths = [len(part) for part in parts]
        self._large[self._turn] = host = self._grown(self._large[self._turn], sum(lengths))
        np.concatenate(parts, out=host.numpy()[: sum(lengths)])
        rows, each, at, takers = host[: sum(lengths)].to(self.device, non_blocking=True).split(lengths)
        spans = Spans(each.view(-1, 5), self._tables, whole)
        step = tokens_of(self._world, rows.view(7, -1), spans, n)._replace(sampled=at)
        logits = self._net.forward(step, self._cache)
        self._last[takers] = sampled = self._sample(logits)
        return sampled

    def _lay_out(
        self, members: Members, n: int, requests: list[int]
    ) -> tuple[Flat, tuple[list[int], list[int]], list[int]]:
        """A step's integers; cells of block tables that change and what they become; `Spans.whole`."""
        sequences, nobody = self._sequences, self._sequences.most
        staged = self._pinned[self._turn].numpy()
        rows = np.zeros((7, n + sum(p.pad + p.length for p in members.prompts)), dtype=np.int32)
        rows[0, :n] = rows[4, :n] = staged[0, :n]
        rows[2, :n], rows[5, :n], rows[6, :n] = staged[3, :n], staged[1, :n], staged[2, :n]
        rows[3, :n] = UNTOUCHED
        rows[0, n:] = rows[4, n:] = nobody
        changed = staged[4, :n] < nobody * sequences.columns
        cells, blocks = staged[4, :n][changed].tolist(), staged[5, :n][changed].tolist()
        spans: list[tuple[int, ...]] = []
        sampled, takers = list(range(n)), staged[0, :n].tolist()
        at = n
        for prompt in members.prompts:
            request, start, length, pad, emits = prompt
            row = sequences.take(request, pad, partial(self._prompt, members, request))
            before = int(sequences.first[row])
            stop = before + start + length
            for to, values in zip((cells, blocks), sequences.cover(request, stop, members), strict=True):
                to += values
            sequences.length[row] = stop
            if pad:  # a span of its own, that nobody attends to and that is stored nowhere
                rows[3, at : at + pad] = NOWHERE
                spans.append((at, pad, pad, 0, row))
                at += pad
            mine = slice(at, at + length)
            rows[1, mine] = self._known(request, start, length)
            rows[2, mine] = np.arange(start, start + length)
            rows[3, mine] = sequences.slots(row, before + start, stop)
            spans.append((at, length, stop, before, row))
            at += length
            if emits:
                sampled.append(at - 1)
                takers.append(row)
                requests.append(request)
        whole = [p.length for p in members.prompts if p.start == 0 and not p.pad]
        flat = Flat(rows, *(np.array(values, dtype=np.int32) for values in (spans, sampled, takers)))
        return flat, (cells, blocks), whole if len(whole) == len(members.prompts) else []

    def _prompt(self, members: Members, request: int) -> Any:
        return np.asarray(members.tokens(request)) % self.model.vocab

    def _known(self, request: int, start: int, length: int) -> Any:
        """Tokens ``start`` … of a request, of its prompt and of what it was given."""
        prompt, stop = self._sequences.prompt[request], start + length
        if stop <= len(prompt):
            return prompt[start:stop]
        tokens = np.concatenate((prompt, self.generated.get(request, [])))[start:stop]
        if len(tokens) < length:
            raise RuntimeError(f"request {request}: its last token is not in yet, but is to be computed again")
        return tokens

    def _grown(self, buffer: Tensor, count: int) -> Tensor:
        """``buffer``, or a larger one if it has no room for ``count`` integers."""
        return buffer if count <= len(buffer) else self._host(2 * count)

    def _events(self) -> tuple[Any, Any]:
        if not self._cuda:
            return None, None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        return start, end
