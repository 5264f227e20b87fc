"""What this GPU reaches: copies, matrix products, paged attention, whole steps; and several GPUs: collectives.

``python -m chairlift.backend.gpu.bench --json FILE`` prints a line a row, and writes each as a line of JSON into FILE.
Beside each time stands what physics allows: the copy bandwidth and the matrix rate measured in the same run. Times are
medians of CUDA-event timings, launches included, with inputs out of the L2 cache. Steps are timed as the
engine runs them, one prepared while the other runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chairlift.backend import specs
from chairlift.backend.base import Batch, Prompt, Verified
from chairlift.backend.draft_shapes import head_of
from chairlift.backend.gpu import collective_times
from chairlift.backend.gpu.block_tables import Practice
from chairlift.backend.gpu.engine import TorchEngine
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.paged_attention import Heads, PagedAttention, Paging, Spans, new_cache, read, slots_of
from chairlift.backend.parts import experts_read
from chairlift.backend.shapes import Model

ATTENTION = (  # batch, context, query heads, KV heads, head size; the first five of Llama-3.1-8B, then OPT-13B
    *((64, 4096, 32, 8, 128), (8, 8192, 32, 8, 128), (64, 1024, 32, 8, 128), (256, 1024, 32, 8, 128)),
    *((1, 8192, 32, 8, 128), (256, 128, 32, 8, 128), (1, 512, 32, 8, 128), (32, 2048, 64, 8, 128)),
    *((16, 2048, 40, 40, 128), (64, 1024, 40, 40, 128), (64, 1024, 32, 32, 80), (64, 1024, 16, 8, 64)),
)
CHUNKS = (  # chunks, tokens of each, tokens before it; of Llama-3.1-8B
    *((1, 64, 0), (1, 512, 0), (1, 2047, 0), (1, 8192, 0), (16, 512, 0), (1, 512, 7168), (1, 2048, 6144)),
)
DECODES = (  # batch, context
    *((1, 128), (1, 1024), (4, 1024), (8, 1024), (16, 512), (32, 1024), (64, 256), (64, 1024)),
    *((128, 512), (256, 128), (256, 512)),
)
PREFILLS = (  # prompts, tokens each
    *((16, 512), (4, 512)),
    *((1, n) for n in (64, 128, 256, 512, 1024, 1536, 2047, 3072, 4096, 6144, 8190)),
)
DRAFTED = (
    (1, 128),
    (8, 1024),
    (16, 512),
    (64, 128),
    (64, 1024),
    (128, 512),
)  # batch, context, where drafts are verified
DRAFTED_PREFILLS = (64, 512, 2047)
DRAFT_VOCAB = 32_000  # of the EAGLE3 head that was published for Llama-3.1-8B
MIXED = (  # decodes, tokens of KV each; tokens of a chunk, tokens before it
    *((256, 128, 256, 0), (64, 1024, 64, 0), (64, 1024, 448, 0), (128, 512, 384, 4096), (32, 1024, 512, 7168)),
    *((256, 256, 768, 1024), (16, 1024, 1008, 0)),
    *((190, 130, 191, 0), (95, 515, 236, 0), (63, 1028, 218, 0)),  # as in vLLM's recorded grid, see README.md
)
STEPS = 24  # timed in a row
BETWEEN = 11  # decode steps between prompts, as vLLM's were recorded: the GPU's clock is higher behind them

Row = dict[str, Any]


class Timer:
    """Times GPU work with events while the queue is full and the L2 cache holds something else."""

    def __init__(self) -> None:
        self._other = torch.randn(64 * 2**20, device="cuda")  # 256 MiB

    def __call__(self, work: Callable[[], Any], repeats: int = 30) -> float:
        """Median seconds of ``work``."""
        for _ in range(3):
            work()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.sum()
            self._other.sum()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        middle: float = statistics.median(times)
        return middle


def ceilings(timer: Timer) -> Row:
    """The copy bandwidth (bytes read and written) and the matrix rates of this GPU, bf16 and FP8."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timer(lambda: target.copy_(source), 10)
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / timer(lambda: a @ b, 10)
    x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
    narrow = 2 * 8192**3 / timer(lambda: torch._scaled_mm(x, y, one, one, out_dtype=a.dtype, use_fast_accum=True), 10)
    return {
        **{"bench": "ceilings", "copy_gb_per_s": round(copy / 1e9), "matmul_tflops": round(rate / 1e12)},
        "fp8_tflops": round(narrow / 1e12),
    }


def filled(batch: int, context: int, heads: Heads, block: int, dtype: torch.dtype) -> tuple[Tensor, Paging]:
    """A cache with random content and a permuted block table of ``batch`` sequences of ``context`` tokens."""
    device = torch.device("cuda")
    each = -(-context // block)
    cache = new_cache(1, batch * each, block, heads, dtype, device)[0].normal_()
    tables = torch.randperm(batch * each, device=device).to(torch.int32).view(batch, each)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    return cache, Paging(tables, rows, lengths, torch.zeros_like(lengths))


def attention(timer: Timer, copy: float, shape: tuple[int, ...]) -> Row:
    """The paged decode kernel beside torch's attention on a dense cache, and paged peers where they are installed."""
    batch, context, query_heads, kv_heads, size = shape
    heads = Heads(query_heads, kv_heads, size)
    kind = PagedAttention(heads, 16, torch.bfloat16, torch.device("cuda"), None, batch)
    cache, paging = filled(batch, context, heads, 16, torch.bfloat16)
    qkv = torch.randn((batch, heads.width), device="cuda", dtype=torch.bfloat16)
    out = torch.empty((batch, query_heads * size), device="cuda", dtype=torch.bfloat16)
    kind.plan(paging)
    slots = torch.cat([slots_of(table, 0, context, 16) for table in paging.tables])
    dense = [x.view(batch, context, kv_heads, size).transpose(1, 2).contiguous() for x in read(cache, slots)]
    query = qkv[:, : query_heads * size].view(batch, query_heads, 1, size)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    work: dict[str, Callable[[], Any]] = {
        "ours": lambda: kind.decode(qkv, cache, paging, out),
        "ours_append": lambda: kind.append_and_decode(qkv, cache, paging, out),
        "sdpa_dense": lambda: sdpa(query, dense[0], dense[1], enable_gqa=query_heads != kv_heads),
        **dict(peers(query, dense, paging, heads, context)),
    }
    moved = 4 * batch * context * kv_heads * size  # bytes of keys and values
    row: Row = {"bench": "attention", "batch": batch, "context": context, "heads": f"{query_heads}/{kv_heads}x{size}"}
    return row | beside(timer, work, moved / copy)


def chunks(timer: Timer, peak: float, shape: tuple[int, int, int]) -> Row:
    """The kernel for chunks of prompts, rotating its queries, beside torch's attention to a dense cache.

    Torch's is given rotated queries, and whole prompts alone. ``peak`` is the matrix rate in FLOP/s.
    """
    count, tokens, start = shape
    heads, known, rows = Heads(32, 8, 128), start + tokens, count * tokens
    cache, paging = filled(count, known, heads, 16, torch.bfloat16)
    kind = PagedAttention(heads, 16, torch.bfloat16, cache.device, torch.randn((known, 64, 2), device="cuda"), count)
    each = [[i * tokens, tokens, known, 0, i] for i in range(count)]
    spans = Spans(torch.tensor(each, dtype=torch.int32, device="cuda"), paging.tables, start + (tokens + 1) / 2)
    qkv = torch.randn((rows, heads.width), device="cuda", dtype=torch.bfloat16)
    out = torch.empty((rows, heads.query * heads.size), device="cuda", dtype=torch.bfloat16)
    shared = kind.plan_chunks(spans, rows)
    work: dict[str, Callable[[], Any]] = {"ours": lambda: kind.chunks(qkv, cache, spans, shared, out)}
    if not start:
        by_head = qkv.view(count, tokens, -1, heads.size).transpose(1, 2)
        at = (0, heads.query, heads.query + heads.kv, heads.query + 2 * heads.kv)  # of queries, keys and values
        query, key, value = (by_head[:, a:b].contiguous() for a, b in pairwise(at))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        work["sdpa_dense"] = lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    flops = 4 * heads.query * heads.size * count * tokens * (2 * start + tokens + 1) // 2
    row: Row = {"bench": "chunks", "chunks": count, "tokens": tokens, "start": start}
    row["heads"] = f"{heads.query}/{heads.kv}x{heads.size}"
    return row | beside(timer, work, flops / peak)


def beside(timer: Timer, work: dict[str, Callable[[], Any]], least: float) -> Row:
    """What each takes, µs, and which share of that it takes at ``least`` (seconds), percent."""
    row: Row = {}
    for name, call in work.items():
        took = timer(call)
        row[f"{name}_us"] = round(took * 1e6, 1)
        row[f"{name}_percent"] = round(100 * least / took, 1)
    return row


def peers(
    query: Tensor, dense: list[Tensor], paging: Paging, heads: Heads, context: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Paged decode attention of other packages, on the same keys and values in their layout."""
    batch, blocks = paging.tables.shape
    if context % 16:
        return
    keys, values = (
        x.transpose(1, 2).reshape(batch * blocks, 16, heads.kv, heads.size)[torch.argsort(paging.tables.view(-1))]
        for x in dense
    )
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=heads.query > heads.kv
        )
        indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * blocks
        last = torch.full((batch,), 16, dtype=torch.int32, device="cuda")
        shape = (heads.query, heads.kv, heads.size, 16)
        types = {"q_data_type": query.dtype, "kv_data_type": keys.dtype}
        wrapper.plan(indptr, paging.tables.view(-1), last, *shape, **types)
        flat = query[:, :, 0].contiguous()
        yield "flashinfer", lambda: wrapper.run(flat, (keys, values))
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        flat = query.transpose(1, 2).contiguous()
        yield (
            "flash_attn",
            lambda: flash_attn_with_kvcache(
                flat, keys, values, cache_seqlens=paging.lengths, block_table=paging.tables, causal=True
            ),
        )


def engine_of(model: Model, tokens: int, options: Options, gpus: int = 1, drafts: int = 0) -> TorchEngine:
    """An engine with room for ``tokens`` tokens of KV, its cache full of random numbers."""
    head = replace(head_of(model, "eagle3"), vocab=min(model.vocab, DRAFT_VOCAB)) if drafts else None
    engine = TorchEngine(model, specs.gpu("h200"), options, gpus, draft=head, drafts=drafts)
    engine.prepare(tokens, 1, model.max_model_len, named=False)
    engine.fill()
    return engine


class Floor:
    """What a step of an engine takes at least: reading weights and KV once, or its arithmetic, whichever is longer."""

    def __init__(self, engine: TorchEngine, top: Row) -> None:
        self._model = engine.model
        narrow = engine.options.quantization == "fp8"
        self.name = engine.model.name + " fp8" * narrow + f" on {engine.gpus} GPUs" * (engine.gpus > 1)
        self._gpus = engine.gpus
        self._copy = top["copy_gb_per_s"] * 1e9
        self._rate = top["matmul_tflops"] * 1e12
        self._layers_rate = top["fp8_tflops" if narrow else "matmul_tflops"] * 1e12
        self._width = 1 if narrow else 2  # bytes of a weight of the layers
        head = engine.head
        self.of_pass = 0.0 if head is None else head.bytes / self._copy * 1e3  # ms to read a draft head's weights

    def __call__(self, rows: int, sampled: int, kv: int, pairs: int = 0) -> float:
        """Milliseconds for so many rows and sampled rows, tokens of KV read, and query-key pairs of chunks.

        Several GPUs share the work evenly and speak with one another in no time.
        """
        m = self._model
        read = multiplied = m.matmul_parameters
        if m.experts:  # of which a token is multiplied with few, and a step reads those that some token has chosen
            chosen = experts_read(m.experts, m.experts_per_token, rows)
            read += round(m.expert_layers * m.expert_parameters * (chosen - m.experts_per_token))
        moved = self._width * read + 2 * m.head_parameters + kv * m.kv_bytes_per_token
        flops = 2 * sampled * m.head_parameters + 4 * m.layers * m.heads * m.head_size * pairs
        took = flops / self._rate + 2 * rows * multiplied / self._layers_rate
        floor: float = max(moved / self._copy, took) * 1e3 / self._gpus
        return floor


def decode_steps(engine: TorchEngine, floors: Floor, shapes: Sequence[tuple[int, int]] = DECODES) -> Iterator[Row]:
    """Steps of decodes alone: the pace of a steady run, and the GPU's part of it."""
    for batch, context in shapes:
        requests = list(range(batch))
        engine.place(dict.fromkeys(requests, context))
        step = Batch((), batch, 0, 0, Practice((), requests))
        gpu = []
        engine.launch(step)
        for i in range(STEPS + 4):
            if i == 4:
                began = time.perf_counter()
            engine.launch(step)
            gpu.append(engine.wait() / 1e9)
        took = (time.perf_counter() - began) / STEPS * 1e3
        engine.wait()
        for request in requests:
            engine.release(request)
        floor = floors(batch, batch, batch * (context + STEPS // 2))
        yield {
            **{"bench": "decode", "model": floors.name, "batch": batch, "context": context, "step_ms": round(took, 3)},
            **{"gpu_ms": round(statistics.median(gpu[4:]), 3), "floor_ms": round(floor, 3)},
            "of_floor": round(took / floor, 3),
        }


def prefill_steps(engine: TorchEngine, floors: Floor, shapes: Sequence[tuple[int, int]] = PREFILLS) -> Iterator[Row]:
    """Steps of whole prompts, one at a time: each shape six times, the first not counted.

    ``step_ms``: each prompt after `BETWEEN` steps in which the one before decodes; ``train_ms``: right after that one.
    """
    for count, length in shapes:
        requests = list(range(count))
        decodes = Batch((), count, 0, 0, Practice((), requests))
        found = []
        for between in (0, BETWEEN):
            times = []
            for _ in range(6):
                began = time.perf_counter()
                prompts = [Prompt(r, 0, length, 0, True) for r in requests]
                engine.launch(Batch((), 0, 0, 0, Practice(prompts, longest=length)))
                launched = time.perf_counter()
                gpu = engine.wait() / 1e9
                times.append(((time.perf_counter() - began) * 1e3, gpu, (launched - began) * 1e3))
                for _ in range(between):
                    engine.launch(decodes)
                    engine.wait()
                for request in requests:
                    engine.release(request)
            found.append([statistics.median(t) for t in zip(*times[1:], strict=True)])
        (train, *_), (took, on_gpu, launch) = found
        floor = floors(count * length, count, 0, count * length * (length + 1) // 2)
        yield {
            **{"bench": "prefill", "model": floors.name, "prompts": count, "tokens": length, "step_ms": round(took, 2)},
            **{"gpu_ms": round(on_gpu, 2), "launch_ms": round(launch, 2), "train_ms": round(train, 2)},
            **{"floor_ms": round(floor, 2), "of_floor": round(took / floor, 3)},
        }


def mixed_steps(engine: TorchEngine, floors: Floor) -> Iterator[Row]:
    """Steps of decodes with a chunk of a prompt beside them, at the pace of steps that follow one another."""
    for batch, context, length, start in MIXED:
        requests = list(range(batch))
        engine.place({**dict.fromkeys(requests, context), batch: start + length})
        chunk = Prompt(batch, start, length, 0, True)
        step = Batch((), batch, 0, 0, Practice([chunk], requests))
        gpu = []
        engine.launch(step)
        for i in range(STEPS + 4):
            if i == 4:
                began = time.perf_counter()
            engine.launch(step)
            gpu.append(engine.wait() / 1e9)
        took = (time.perf_counter() - began) / STEPS * 1e3
        engine.wait()
        for request in (*requests, batch):
            engine.release(request)
        pairs = length * (2 * start + length + 1) // 2
        floor = floors(batch + length, batch + 1, batch * (context + STEPS // 2) + start, pairs)
        yield {
            **{"bench": "mixed", "model": floors.name, "decodes": batch, "context": context, "chunk": length},
            **{"start": start, "step_ms": round(took, 3), "gpu_ms": round(statistics.median(gpu[4:]), 3)},
            **{"floor_ms": round(floor, 3), "of_floor": round(took / floor, 3)},
        }


def drafted_steps(engine: TorchEngine, floors: Floor, drafts: int) -> Iterator[Row]:
    """Steps of decodes that verify ``drafts`` drafts each, of which one is kept, and of prompts; passes included."""
    for batch, context in DRAFTED:
        requests = list(range(batch))
        engine.place(dict.fromkeys(requests, context + 2 * STEPS + 20))

        def step(i: int, requests: Sequence[int] = requests, context: int = context) -> Batch:
            verified = [Verified(r, context + 2 * i, drafts, 1) for r in requests]
            return Batch((), len(requests), 0, 0, Practice((), verified=verified), proposes=drafts)

        gpu = []
        engine.launch(step(0))
        for i in range(STEPS + 4):
            if i == 4:
                began = time.perf_counter()
            engine.launch(step(i + 1))
            gpu.append(engine.wait() / 1e9)
        took = (time.perf_counter() - began) / STEPS * 1e3
        engine.wait()
        for request in requests:
            engine.release(request)
        rows = batch * (1 + drafts)
        floor = floors(rows, rows, batch * (context + STEPS)) + drafts * floors.of_pass
        yield {
            **{"bench": "drafted", "model": floors.name, "drafts": drafts, "batch": batch, "context": context},
            **{"step_ms": round(took, 3), "gpu_ms": round(statistics.median(gpu[4:]), 3)},
            **{"floor_ms": round(floor, 3), "of_floor": round(took / floor, 3)},
        }
    for length in DRAFTED_PREFILLS:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            prompt = Practice([Prompt(0, 0, length, 0, True)], longest=length + 1)
            engine.launch(Batch((), 0, 0, 0, prompt, proposes=drafts))
            gpu_ms = engine.wait() / 1e9
            times.append(((time.perf_counter() - began) * 1e3, gpu_ms))
            for i in range(BETWEEN):
                verified = [Verified(0, length + 2 * i, drafts, 1)]
                engine.launch(Batch((), 1, 0, 0, Practice((), verified=verified), proposes=drafts))
                engine.wait()
            engine.release(0)
        took, on_gpu = (statistics.median(t) for t in zip(*times[1:], strict=True))
        yield {
            **{"bench": "drafted prefill", "model": floors.name, "drafts": drafts, "tokens": length},
            **{"step_ms": round(took, 2), "gpu_ms": round(on_gpu, 2)},
        }


def versions() -> Row:
    """Which GPU and software this is."""
    import cupy

    name = torch.cuda.get_device_name()
    cuda = torch.version.cuda
    return {"bench": "versions", "gpu": name, "torch": torch.__version__, "cuda": cuda, "cupy": cupy.__version__}


def rows(parts: Sequence[str], models: Sequence[str], options: Options, gpus: int, drafts: int) -> Iterator[Row]:
    """All rows that are asked for."""
    yield versions()
    timer = Timer()
    top = ceilings(timer)
    yield top
    copy = top["copy_gb_per_s"] * 1e9
    if "collectives" in parts:
        yield from collective_times.rows(gpus)
    if "attention" in parts:
        for shape in ATTENTION:
            yield attention(timer, copy, shape)
    if "chunks" in parts:
        for spans in CHUNKS:
            yield chunks(timer, top["matmul_tflops"] * 1e12, spans)
    for name in models if {"decode", "prefill", "mixed"} & set(parts) else ():
        model = specs.model(name)
        engine = engine_of(model, 160_000 if model.kv_bytes_per_token < 200_000 * gpus else 80_000, options, gpus)
        floors = Floor(engine, top)
        longest = model.max_model_len
        if "decode" in parts:
            fitting = [(b, c) for b, c in DECODES if b * (c + 64) <= 80_000 or model.kv_bytes_per_token < 200_000]
            yield from decode_steps(engine, floors, [(b, c) for b, c in fitting if c + 64 < longest])
        if "prefill" in parts:
            yield from prefill_steps(engine, floors, [(n, t) for n, t in PREFILLS if t < longest])
        if "mixed" in parts and longest > 8192:
            yield from mixed_steps(engine, floors)
        engine.close()
    for name in models if "drafted" in parts else ():
        engine = engine_of(specs.model(name), 160_000, options, gpus, drafts)
        yield from drafted_steps(engine, Floor(engine, top), drafts)
        engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a row; with ``--json`` write them to a file too."""
    parser = argparse.ArgumentParser(prog="python -m chairlift.backend.gpu.bench", description=__doc__.split("\n")[0])
    usual = ("attention", "chunks", "decode", "prefill", "mixed")
    choices = (*usual, "drafted", "collectives")
    parser.add_argument(
        "parts", nargs="*", help=f"what to measure: {', '.join(choices)} (default: all but the last two)"
    )
    parser.add_argument("--model", action="append", help="default: llama-3.1-8b and opt-13b")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="of the layers' weights")
    parser.add_argument("--gpus", type=int, default=1, help="that share each model (default 1)")
    parser.add_argument("--routing-skew", type=float, help="experts drawn with chances ∝ rank^-SKEW (0: all alike)")
    parser.add_argument("--drafts", type=int, default=3, help="of a draft head, that a decode verifies (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a JSON line a row")
    given = parser.parse_args(arguments)
    if wrong := set(given.parts) - set(choices):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(choices)}")
    if "collectives" in given.parts and given.gpus < 2:
        parser.error(f"collectives need --gpus 2 or more (got {given.gpus})")
    if not torch.cuda.is_available():
        sys.stderr.write("error: torch sees no CUDA device here\n")
        return 2
    options = Options(max_batch=257, quantization=given.quantization, routing_skew=given.routing_skew)
    lines = []
    models = given.model or ("llama-3.1-8b", "opt-13b")
    for row in rows(given.parts or usual, models, options, given.gpus, given.drafts):
        lines.append(json.dumps(row))
        sys.stdout.write(
            "  ".join(f"{k} {v}" for k, v in row.items() if k != "bench").join((f"{row['bench']:10}", "\n"))
        )
        sys.stdout.flush()
        if given.json is not None:
            given.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
