"""The GPU engine: executes what the scheduler plans on a real device, and measures it.

One `TorchEngine` is one replica. `launch` turns the members of a batch into a flat batch of tokens and block tables,
and queues it on the device; `wait` takes in the tokens of the oldest step. Between the two the host is free to plan the
next step (asynchronous scheduling). A token stays on the device for the next step, so that only `wait` waits for the
device.

Steps of decodes alone replay CUDA graphs captured for padded batch sizes (`GRAPHS`), and so do steps with chunks of up
to 1,024 rows, in 8-bit floats and with experts more (`backend.gpu.step_graphs`); larger ones run eagerly. On a CPU the
same code runs plain torch, which is meant for tests with tiny models.
"""

from __future__ import annotations

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

from chairlift.backend.base import Batch, DeviceError, Executor, Members, Prompt, StepCost, Verified
from chairlift.backend.gpu.block_tables import Practice, Sequences
from chairlift.backend.gpu.draft_head import DraftHead, unfit
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.paged_attention import NOWHERE, TILE
from chairlift.backend.gpu.ranks import Ranks, Team, indivisible, missing, place
from chairlift.backend.gpu.runner import TURNS, Runner
from chairlift.backend.gpu.stages import stage_of
from chairlift.backend.gpu.step_graphs import Flat, graph_rows
from chairlift.backend.machine import check_memory
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GPU, Model

PAGE = 16  # tokens a block, where the pool only counts blocks


class Flight(NamedTuple):
    """A step that was launched and not yet waited for."""

    requests: list[int]  # who gets a token; -1: nobody
    kept: Sequence[range]  # of each, where the drafts that it keeps are in ``tokens``; empty: nobody has drafts
    tokens: Tensor  # pinned host memory, filled once the step is done; the last ones are those of ``requests``
    start: Any  # CUDA events; None on a CPU; of several stages: when it was launched, ns
    end: Any
    gpu: int  # ps; on a CPU only, where no events measure it


class TorchEngine(Executor):
    """Executes the steps of one replica of ``model`` on one device, or on ``gpus`` devices of one host.

    With several ``stages`` each is a process that has its own layers (`backend.gpu.stages`), on the CPU.
    With a ``draft`` head decodes verify up to ``drafts`` drafts of it; how many are kept is said with each step.
    Raises ValueError, one sentence, where there is no kernel for the model, or it does not fit or cannot be shared out.
    """

    name = "torch"

    def __init__(
        self,
        model: Model,
        gpu: GPU,
        options: Options,
        gpus: int = 1,
        stages: int = 1,
        draft: Model | None = None,
        drafts: int = 0,
    ) -> None:
        self.model = model
        self._draft, self._drafts = draft, drafts
        self.options = options
        self.gpus = gpus
        self.stages = stages
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
        if stages > 1 and self._cuda:
            raise ValueError("stages of a pipeline run on a CPU alone (got device cuda): give device: cpu")
        if draft is not None:
            problem = unfit(draft, model)
            if gpus * stages > 1:
                problem = f"drafts are verified on one GPU (got {gpus * stages})"
            if problem is not None:
                raise ValueError(problem)
        if gpus > 1:
            width = model.expert_ffn if model.experts else model.ffn
            problem = indivisible(model.heads, model.kv_heads, width, model.vocab, model.experts, gpus)
            if problem is None and self._cuda:
                problem = missing(gpus)
            if problem is not None:
                raise ValueError(f"{model.name}: {problem}")
        self._team: Team | None = None
        self._price = Efficiency().build(model, gpu, Parallel(gpus, stages, 1, gpus if model.experts else 1))
        self.generated: dict[int, list[int]] = {}  # request → tokens generated for it
        self._flights: deque[Flight] = deque()

    # getting ready

    def prepare(self, blocks: int, block_size: int, max_model_len: int, named: bool) -> None:  # noqa: D102
        batch = self.options.max_batch
        self._block = block_size if named else PAGE
        if self._block % TILE:
            raise ValueError(f"the engine's blocks hold a multiple of {TILE} tokens (got {self._block})")
        if not named:  # every sequence may leave its last block half empty
            blocks = -(-blocks * block_size // PAGE) + batch
        if not self._cuda:
            numbers = self.model.kv_bytes_per_token / self.model.kv_bytes_per_element  # of a token's KV
            need = (self.model.parameters + blocks * self._block * numbers) * self.dtype.itemsize
            check_memory(round(need), f"{self.model.name} with a KV pool of {blocks:,} blocks")
        self._sequences = Sequences(batch, blocks, self._block, max_model_len, named)
        self._staged = np.zeros((6, batch + 1), dtype=np.int32)
        answers = (2 + self._drafts) * batch
        self._answers = [torch.zeros(answers, dtype=torch.int32, pin_memory=self._cuda) for _ in range(TURNS)]
        self._turn = 0
        build = partial(
            _runner if self.stages == 1 else stage_of,
            *(self.model, self.options, self.dtype, blocks, self._block, max_model_len, self._sequences.columns),
        )
        processes = self.gpus * self.stages
        if processes > 1:
            self._team = Team(processes, self.device.type, build)
            self.device = place(self.device.type, 0)
        try:
            more = () if self._draft is None else (self._draft, self._drafts)
            self._runner = build(Ranks(0, processes), self.device, *more)
            if self._team is not None:
                self._team.on_loss = self._runner.give_up
                self._team.ready()
        except ValueError:
            self._disband()
            raise
        if self._cuda:
            self._warm_up(blocks * self._block, max_model_len)

    def close(self) -> None:
        """Free the cache and the graphs; the weights stay for the next engine of the same model on one GPU."""
        self._runner.close()
        self._disband()

    def _disband(self) -> None:
        team, self._team = self._team, None
        if team is not None:
            team.close()

    def _do(self, method: str, *arguments: Any) -> Any:
        """Let the runner of every GPU do this; what comes out is the same on all."""
        if self._team is not None:
            self._team.tell(method, *arguments)
        return self._do_here(method, *arguments)

    def _do_here(self, method: str, *arguments: Any) -> Any:
        """Let this process's runner alone do this."""
        try:
            return getattr(self._runner, method)(*arguments)
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"the memory of {self.device} is full: {str(error).partition('. ')[0]}") from None
        except RuntimeError:  # a collective fails where a process has died: that is what matters
            if self._team is not None:
                self._team.look(now=True)
            raise

    def _warm_up(self, room: int, longest: int) -> None:
        """Run every kind of step once, so that no measured step compiles or plans anything."""
        for length in [n for n in (8192, 2048, 600) if n + 4 * self._block < min(room, longest)]:
            steps = [Practice([Prompt(-1, 0, length, 0, True)])]
            if self.options.max_batch > 1:
                decodes: dict[str, Any] = {"decodes": [-1]}
                if self._draft is not None:
                    decodes = {"verified": [Verified(-1, length, self._drafts, 0)]}
                steps.append(Practice([Prompt(-2, 0, 16, 0, False)], **decodes))
                steps.append(Practice([Prompt(-2, 16, 16, 0, True)], **decodes))
            for step in steps:
                self.launch(Batch((), 0, 0, 0, step, proposes=self._drafts))
                self.wait()
            self.release(-1)
            self.release(-2)
        self.generated = {}

    @property
    def head(self) -> DraftHead | None:
        """The head that drafts, once the engine is ready."""
        return self._runner.head

    # steps

    def step(self, batch: Batch) -> StepCost:  # noqa: D102
        return self._price.step(batch)

    def launch(self, batch: Batch) -> None:  # noqa: D102
        began = time.perf_counter_ns()
        members = batch.members
        assert members is not None
        start, end = self._events()
        requests = [*members.decodes, *[-1] * len(members.dead)]
        n = len(requests)
        kept: list[range] = []
        if self._draft is not None:
            found = self._do("chunks", *self._verify(members, batch.proposes, requests, kept), 0, batch.proposes)
        else:
            self._sequences.decode([*members.decodes, *members.dead], members, self._staged)
            if members.prompts:
                found = self._do("chunks", *self._lay_out(members, n, requests), n)
            else:
                found = self._do("decodes", self._staged, n)
        if self.stages > 1:
            [sampled] = found
            self._flights.append(Flight(requests, kept, sampled[: len(requests)], began, None, 0))
            return
        self._turn = (self._turn + 1) % TURNS
        answers, at = self._answers[self._turn], 0
        with torch.inference_mode():
            for part in found:
                answers[at : at + len(part)].copy_(part, non_blocking=True)
                at += len(part)
        if self._cuda:
            end.record()
        took = (time.perf_counter_ns() - began) * 1000
        self._flights.append(Flight(requests, kept, answers[:at], start, end, took))

    def wait(self) -> int:  # noqa: D102
        flight = self._flights.popleft()
        gpu = flight.gpu
        if self.stages > 1:
            self._do_here("arrive", len(self._flights))
            gpu = (time.perf_counter_ns() - flight.start) * 1000
        if self._cuda:
            if self._team is not None:
                while not flight.end.query():  # of a dead process a collective waits for ever
                    self._team.look()
            flight.end.synchronize()
            gpu = round(flight.start.elapsed_time(flight.end) * 1e9)
        generated = self.generated
        tokens = flight.tokens.tolist()
        last = tokens[len(tokens) - len(flight.requests) :]
        for request, kept in zip(flight.requests, flight.kept, strict=bool(flight.kept)):
            if request != -1 and kept:
                generated.setdefault(request, []).extend(tokens[kept.start : kept.stop])
        for request, token in zip(flight.requests, last, strict=True):
            if request in generated:
                generated[request].append(token)
            elif request != -1:
                generated[request] = [token]
        return gpu

    def fill(self) -> None:
        """Fill the cache with random numbers: zeros would be read faster than what real requests leave there."""
        self._do("fill")

    def place(self, contexts: Mapping[int, int]) -> None:
        """Let each request have so many tokens of KV, whatever the cache holds, to measure steps of a given shape.

        Needs an engine whose blocks are not ``named``.
        """
        practice, prompt = Practice(()), np.zeros(max(contexts.values()), dtype=np.int64)
        for request, tokens in contexts.items():
            row = self._sequences.take(request, 0, lambda: prompt)
            self._sequences.length[row] = tokens
            self._do("change", *self._sequences.cover(request, tokens, practice))

    def release(self, request_id: int) -> None:  # noqa: D102
        self._sequences.release(request_id)

    def drop(self, request_id: int) -> None:  # noqa: D102
        for flight in self._flights:
            flight.requests[:] = [-1 if request == request_id else request for request in flight.requests]

    def retable(self, request_id: int, table: Sequence[int]) -> None:  # noqa: D102
        cells, blocks = self._sequences.renamed(request_id, table)
        if cells:  # steps under way read and write the blocks before, which nobody else gets until they are done
            self._do("change", cells, blocks)

    def answer(self, request_id: int) -> Sequence[int]:  # noqa: D102
        return self.generated.get(request_id, ())

    def facts(self) -> dict[str, str]:  # noqa: D102
        gpu = torch.cuda.get_device_name(self.device) if self._cuda else "CPU"
        try:
            own = version("chairlift")
        except PackageNotFoundError:
            own = "0"
        facts = {"chairlift": own, "gpu": gpu, "torch": torch.__version__, "dtype": str(self.dtype)}
        rows = graph_rows(self.model, self.gpus, self.options.quantization == "fp8")
        return {**facts, "graph_tokens": str(rows)} if self.options.graphs and self.stages == 1 else facts

    def assumptions(self) -> dict[str, str]:  # noqa: D102
        o = self.options
        where = torch.cuda.get_device_name(self.device) if self._cuda else "the CPU"
        where = f"{self.gpus} × {where}" if self.gpus > 1 else where
        where = f"{where}, in {self.stages} stages, a process each" if self.stages > 1 else where
        weights = "random weights" if o.weights is None else f"weights of {Path(o.weights).name}"
        dtype = str(self.dtype).removeprefix("torch.")
        quantised = ", layers' products in FP8" if o.quantization == "fp8" else ""
        head = f", drafts by a head of random weights for {self._draft.vocab:,} tokens" if self._draft else ""
        return {
            "engine": f"executed, not modelled: {self.model.name}, {dtype}{quantised}, {weights}{head}, on {where}",
            "software": f"torch {torch.__version__}, CUDA graphs {'on' if o.graphs and self._cuda else 'off'}",
            "attention": "over the paged cache in every step",  # so `backend.fitting` knows it from engines before
        }

    # what a step is made of

    def _lay_out(self, members: Members, n: int, requests: list[int]) -> tuple[Flat, list[int], list[int]]:
        """A step's integers; cells of block tables that change, and what they become.

        Adds whose tokens come, after the decodes', to ``requests``.
        """
        sequences, nobody = self._sequences, self._sequences.most
        staged = self._staged
        rows = np.zeros((7, n + sum(p.pad + p.length for p in members.prompts)), dtype=np.int32)
        rows[0, :n] = rows[4, :n] = staged[0, :n]
        rows[2, :n], rows[5, :n], rows[6, :n] = staged[3, :n], staged[1, :n], staged[2, :n]
        rows[3, :n] = NOWHERE  # the kernel for decodes stores them
        rows[0, n:] = rows[4, n:] = nobody
        changed = staged[4, :n] < nobody * sequences.columns
        cells, blocks = staged[4, :n][changed].tolist(), staged[5, :n][changed].tolist()
        spans: list[tuple[int, ...]] = []
        sampled, takers = list(range(n)), staged[0, :n].tolist()
        at = n
        for prompt in members.prompts:
            request, start, length, pad, emits, _ = prompt
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
        flat = Flat(rows, *(np.array(values, dtype=np.int32) for values in (spans, sampled, takers)))
        return flat, cells, blocks

    def _verify(
        self, members: Members, passes: int, requests: list[int], kept: list[range]
    ) -> tuple[Flat, list[int], list[int]]:
        """As `_lay_out`, of a step whose decodes verify drafts: all are spans, and chunks come after them.

        Adds who gets tokens to ``requests``, and to ``kept`` where the drafts that each keeps lie among the sampled.
        """
        sequences, nobody, width = self._sequences, self._sequences.most, 1 + self._drafts
        decodes = members.verified
        each, tokens, last, cells, blocks = sequences.verify(decodes, members, passes)
        row, first, count = each
        decode, position, slot = tokens
        n = len(decode)
        total = n + sum(p.length + p.drafts for p in members.prompts)
        rows = np.zeros((7, total), dtype=np.int32)
        rows[0, n:] = nobody * width
        rows[4] = nobody
        rows[0, :n] = row[decode] * width + np.arange(n) - first[decode]
        rows[2, :n], rows[3, :n] = position, slot
        after = np.full(total, -1, dtype=np.int32)
        start = last - np.array([v.kept for v in decodes], dtype=np.int32)
        spans = np.stack((first, count, start + count, np.zeros_like(row), row)).T.tolist()
        picked = (first + last - start).tolist()
        where, takers, lengths, sampled = [*picked], row.tolist(), (last + 2).tolist(), list(range(n))
        requests += [v.request for v in decodes]
        kept += [range(at + 1, at + 1 + v.kept) for at, v in zip(first.tolist(), decodes, strict=True)]
        at = n
        for request, begin, length, _, emits, drafts in members.prompts:
            own = sequences.take(request, 0, partial(self._prompt, members, request))
            known, stop = begin + length, begin + length + drafts
            upto = min(max(stop, known - 1 + passes * emits), sequences.longest)
            for to, values in zip((cells, blocks), sequences.cover(request, upto, members), strict=True):
                to += values
            sequences.length[own] = known
            mine = slice(at, at + length)
            found = self._known(request, begin, length + (not emits))
            rows[1, mine], after[at : at + len(found) - 1] = found[:length], found[1:]
            mine = slice(at, at + length + drafts)
            rows[2, mine] = np.arange(begin, stop)
            rows[3, mine] = sequences.slots(own, begin, stop)
            spans.append([at, length + drafts, stop, 0, own])
            if emits:
                picked.append(len(sampled))
                sampled.append(at + length - 1)
                where.append(at + length - 1)
                lengths.append(known + 1)
                takers.append(own)
                requests.append(request)
                kept.append(range(0))
            at += length + drafts
        lists = [np.array(values, dtype=np.int32) for values in (spans, sampled, takers, (where, picked, lengths))]
        flat = Flat(rows, lists[0], lists[1], lists[2], after, lists[3])
        return flat, cells, blocks

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

    def _events(self) -> tuple[Any, Any]:
        if not self._cuda:
            return None, None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        return start, end


def _runner(
    model: Model,
    options: Options,
    dtype: torch.dtype,
    blocks: int,
    block: int,
    max_model_len: int,
    columns: int,
    ranks: Ranks,
    device: torch.device,
    draft: Model | None = None,
    drafts: int = 0,
) -> Runner:
    parts = (model, options, device, dtype, blocks, block, max_model_len, columns, ranks)
    return Runner(*parts, draft=draft, drafts=drafts)
