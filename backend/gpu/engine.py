"""The GPU engine: executes what the scheduler plans on a real device, and measures it.

One `TorchEngine` is one replica. `launch` turns the members of a batch into a flat batch of tokens and block tables,
and queues it on the device; `wait` takes in the tokens of the oldest step. Between the two the host is free to plan the
next step (asynchronous scheduling). A token stays on the device for the next step, so that only `wait` waits for the
device.

Steps of decodes alone replay CUDA graphs, captured for padded batch sizes (`GRAPHS`). Small steps with chunks replay
graphs of all but their attention (`backend.gpu.graph_pieces`); larger ones are launched kernel by kernel. On a CPU the
same code runs plain torch, for tests with tiny models.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chairlift.backend.base import Batch, Executor, Measured, Members, Prompt, StepCost
from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.gpu.block_tables import Practice, Sequences
from chairlift.backend.gpu.graph_pieces import Pieces
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.paged_attention import NOWHERE, TILE, Chunks, Heads, Paging, new_cache, unfit
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
        self._staged = torch.zeros((6, batch + 1), **integer)  # of the decodes, see `Sequences.decode`
        # in turn: the copies of one step may still be under way while the next is prepared
        self._pinned = [self._host(self._staged.numel()).view(self._staged.shape) for _ in range(TURNS)]
        self._flat = [self._host(1 << 18) for _ in range(TURNS)]
        self._answers = [self._host(2 * batch) for _ in range(TURNS)]
        self._turn = 0
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._pieces = Pieces(self._net, self._cache, self._cuda) if self.options.graphs else None
        if self._cuda:
            self._warm_up(blocks * self._block, max_model_len)
            if self.options.graphs:
                self._capture()

    def close(self) -> None:
        """Free the cache and the graphs; the weights stay for the next engine of the same model."""
        del self._cache, self._tables, self._net
        self._graphs, self._pieces = {}, None
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
            self._sequences.decode([*members.decodes, *members.dead], members, staged.numpy())
            self._staged.copy_(staged, non_blocking=True)
            if members.prompts:
                sampled = self._with_prompts(members, n, requests)
            else:
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
        practice = Practice(())
        for request, tokens in contexts.items():
            row = self._sequences.take(request, 0, lambda: np.zeros(0, dtype=np.int64))
            self._sequences.length[row] = tokens
            cells, blocks = self._sequences.cover(request, tokens, practice)
            self._tables.view(-1)[torch.tensor(cells, device=self.device)] = torch.tensor(
                blocks, dtype=torch.int32, device=self.device
            )

    def release(self, request_id: int) -> None:  # noqa: D102
        self._sequences.release(request_id)

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
        return {
            "engine": f"executed, not modelled: {self.model.name}, {dtype}, {weights}, on {where}",
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
        step = Tokens(tokens, positions, self._paging(size), None, None, None)
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
        """The tokens of a step of ``n`` staged decodes and the chunks; appends the chunks' requests to ``requests``."""
        flat = _Flat()
        rows: list[int] = list(range(n))
        takers: list[int] = self._pinned[self._turn].numpy()[0, :n].tolist()
        lengths: list[int] = []
        starts: list[int] = []
        at = n
        for prompt in members.prompts:
            self._add(prompt, members, flat, lengths, starts)
            at += prompt.pad + prompt.length
            if prompt.emits:
                rows.append(at - 1)
                takers.append(self._sequences.row[prompt.request])
                requests.append(prompt.request)
        if not any(starts):
            flat.parts["known"] = []
        flat.parts["ends"] = [np.cumsum([0, *lengths])]
        flat.parts["ends_known"] = [np.cumsum([0, *np.add(lengths, starts)])]
        flat.parts["rows"], flat.parts["takers"] = [np.array(rows)], [np.array(takers)]
        self._flat[self._turn] = flat.fill(self._flat[self._turn])
        parts = flat.to(self._flat[self._turn], self.device)
        cells, blocks = (torch.cat((self._staged[i][:n], parts[name])) for i, name in ((4, "cells"), (5, "blocks")))
        self._tables.view(-1)[cells] = blocks
        chunks = Chunks(lengths, starts, parts["ends"], parts["ends_known"], parts.get("known"))
        sampled_rows = parts["rows"].long()
        step = Tokens(
            torch.cat((self._last[self._staged[0][:n]], parts["tokens"])),
            torch.cat((self._staged[3][:n], parts["positions"])),
            self._paging(n) if n else None,
            parts["slots"],
            chunks,
            sampled_rows,
        )
        if self._pieces is not None and len(step.tokens) <= self._pieces.limit:
            logits = self._pieces.forward(step)
        else:
            logits = self._net.forward(step, self._cache)
        if not len(rows):
            return logits.new_empty(0, dtype=torch.int32)
        sampled = self._sample(logits)
        self._last[parts["takers"]] = sampled
        return sampled

    def _add(self, prompt: Prompt, members: Members, flat: _Flat, lengths: list[int], starts: list[int]) -> None:
        """Add a chunk's tokens, positions and slots to the flat batch, and the cells of its block table that change."""
        request, start, length, pad, _ = prompt
        sequences = self._sequences
        row = sequences.take(request, pad, lambda: np.asarray(members.tokens(request)) % self.model.vocab)
        before = int(sequences.first[row])
        stop = before + start + length
        for name, values in zip(("cells", "blocks"), sequences.cover(request, stop, members), strict=True):
            flat.add(name, values)
        sequences.length[row] = stop
        tokens = np.concatenate((sequences.prompt[request], self.generated.get(request, [])))[start : start + length]
        if len(tokens) < length:
            raise RuntimeError(f"request {request}: its last token is not in yet, but is to be computed again")
        slots = sequences.slots(row, stop)
        if pad:  # padding is a chunk of its own: nothing attends to it, and it is stored nowhere
            nothing = np.zeros(pad, dtype=np.int64)
            flat.add("tokens", nothing)
            flat.add("positions", nothing)
            flat.add("slots", nothing + NOWHERE)
            flat.add("known", slots[:pad])
            lengths.append(pad)
            starts.append(0)
        flat.add("tokens", tokens)
        flat.add("positions", np.arange(start, start + length))
        flat.add("slots", slots[before + start :])
        flat.add("known", slots[before:])
        lengths.append(length)
        starts.append(start)

    def _events(self) -> tuple[Any, Any]:
        if not self._cuda:
            return None, None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        return start, end


class _Flat:
    """The integers of a step, gathered part by part and sent to the device in one copy."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = {}
        self._arrays: dict[str, Any] = {}

    def add(self, name: str, values: Any) -> None:
        self.parts.setdefault(name, []).append(values)

    def fill(self, buffer: Tensor) -> Tensor:
        """``buffer``, a pinned int32 tensor, with all parts written into it; a larger one if it is too small."""
        self._arrays = {name: np.concatenate(parts) for name, parts in self.parts.items() if parts}
        count = sum(map(len, self._arrays.values()))
        if count > len(buffer):
            buffer = torch.empty(2 * count, dtype=torch.int32, pin_memory=buffer.is_pinned())
        np.concatenate(list(self._arrays.values()), out=buffer.numpy()[:count], casting="unsafe")
        return buffer

    def to(self, buffer: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Each part that is not empty as an int32 tensor on the device, by one copy."""
        lengths = [len(array) for array in self._arrays.values()]
        split = buffer[: sum(lengths)].to(device, non_blocking=True).split(lengths)
        return dict(zip(self._arrays, split, strict=True))
