"""The CUDA kernels and the engine on a GPU, against double precision. Skipped without a GPU or without CuPy."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("cupy")

from chairlift.backend import specs  # noqa: E402
from chairlift.backend.base import Batch, DeviceError, Prompt, Verified  # noqa: E402
from chairlift.backend.draft_shapes import head_of  # noqa: E402
from chairlift.backend.gpu.engine import TorchEngine  # noqa: E402
from chairlift.backend.gpu.kernels.experts import Experts, mixture  # noqa: E402
from chairlift.backend.gpu.kernels.layers import (  # noqa: E402
    Eights,
    Product,
    gated,
    gated_e4m3,
    head_norm,
    largest,
    linear,
    linear_e4m3,
    product,
    quantised,
    residual_norm,
    residual_norm_e4m3,
)
from chairlift.backend.gpu.paged_attention import (  # noqa: E402
    Heads,
    PagedAttention,
    Paging,
    Spans,
    attend,
    new_cache,
    read,
    rotate,
    slots_of,
    store,
)
from chairlift.backend.gpu.settings import Torch  # noqa: E402
from chairlift.backend.gpu.transformer import Arithmetic  # noqa: E402
from chairlift.backend.shapes import Model  # noqa: E402
from kit.plain_head import PlainHead  # noqa: E402

DEVICE = torch.device("cuda")
SHAPES = [  # heads, block, dtype
    (Heads(32, 8, 128), 16, torch.bfloat16),
    (Heads(8, 8, 128), 32, torch.float16),
    (Heads(14, 2, 128), 16, torch.bfloat16),
    (Heads(16, 1, 128), 16, torch.float16),
    (Heads(8, 4, 64), 32, torch.bfloat16),
    (Heads(4, 4, 80), 16, torch.float16),
    (Heads(24, 2, 80), 16, torch.bfloat16),
    (Heads(6, 2, 96), 32, torch.bfloat16),
]
CONTEXTS = [
    [1],
    [15, 16, 17, 1023],
    [8192],
    [0, 5, 0, 0, 31, 0],
    [1 + 37 * i % 300 for i in range(257)],
    [700, 1, 2900, 64, 1024, 33, 16, 16, 4096],
]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def world(heads: Heads, block: int, dtype: torch.dtype, contexts: list[int], pads: list[int]):  # type: ignore[no-untyped-def]
    """A cache of NaN with random keys and values where the contexts are, in permuted blocks and rows."""
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    each = max(1, -(-max(contexts) // block))
    cache = new_cache(1, len(contexts) * each + 3, block, heads, dtype, DEVICE)[0].fill_(math.nan)
    tables = torch.randperm(len(contexts) * each + 3, device=DEVICE)[: len(contexts) * each]
    tables = tables.to(torch.int32).view(len(contexts), each)
    rows = torch.randperm(len(contexts), device=DEVICE).to(torch.int32)
    first = torch.tensor(pads, dtype=torch.int32, device=DEVICE)
    paging = Paging(tables, rows, lengths, first)
    for i, n in enumerate(contexts):
        slots = slots_of(tables[int(rows[i])], 0, n, block)
        store(cache, slots, *torch.randn((2, n, heads.kv, heads.size), dtype=dtype, device=DEVICE))
    return cache, paging


@pytest.mark.parametrize(("heads", "block", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("contexts", CONTEXTS, ids=lambda c: f"{len(c)}x{max(c)}")
def test_decode_equals_double_precision(heads: Heads, block: int, dtype: torch.dtype, contexts: list[int]) -> None:
    pads = [n // 3 if i % 4 == 1 else 0 for i, n in enumerate(contexts)]
    cache, paging = world(heads, block, dtype, contexts, pads)
    query = torch.randn((len(contexts), heads.width), dtype=dtype, device=DEVICE)
    kind = PagedAttention(heads, block, dtype, DEVICE, None, len(contexts))
    found = []
    for _ in range(2):  # the second finds what the first left in its workspace
        out = torch.full((len(contexts), heads.query * heads.size), math.nan, dtype=dtype, device=DEVICE)
        kind.plan(paging)
        kind.decode(query, cache, paging, out)
        found.append(out)

    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0))
    for i, n in enumerate(contexts):
        if n == 0:
            assert found[0][i].isnan().all()
            continue
        keys, values = read(cache, slots_of(paging.tables[int(paging.rows[i])], pads[i], n, block))
        one = query[i : i + 1, : heads.query * heads.size].view(1, heads.query, heads.size).double()
        wanted = attend_exactly(one, keys.double(), values.double())
        assert error(found[0][i], wanted.flatten()) < 1e-2


def attend_exactly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    weights = (torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1])).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize(("heads", "block", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("rope", [True, False])
def test_append_and_decode_stores_and_attends(heads: Heads, block: int, dtype: torch.dtype, rope: bool) -> None:
    contexts = [1, 15, 16, 17, 33, 1023, 0, 257, 48, 2000]
    pads = [0, 3, 0, 16, 0, 100, 0, 0, 17, 0]
    cache, paging = world(heads, block, dtype, contexts, pads)
    rotation = Arithmetic().rotation(4096, heads.size, DEVICE) if rope else None
    kind = PagedAttention(heads, block, dtype, DEVICE, rotation, len(contexts))
    qkv = torch.randn((len(contexts), heads.width), dtype=dtype, device=DEVICE)
    before = cache.clone()
    out = torch.full((len(contexts), heads.query * heads.size), math.nan, dtype=dtype, device=DEVICE)
    kind.plan(paging)
    kind.append_and_decode(qkv, cache, paging, out)

    for i, n in enumerate(contexts):
        if n == 0:
            continue
        query, key, value = qkv[i : i + 1].view(1, -1, heads.size).split((heads.query, heads.kv, heads.kv), dim=1)
        if rotation is not None:
            angle = rotation[n - 1 - pads[i]][None]
            query, key = rotate(query, angle), rotate(key, angle)
        slots = slots_of(paging.tables[int(paging.rows[i])], 0, n, block)
        store(before, slots[-1:], key, value)
        keys, values = read(before, slots[pads[i] :])
        stored = read(cache, slots[-1:])
        assert error(stored[0], key) < 1e-2
        assert torch.equal(stored[1], value)
        assert error(out[i], attend_exactly(query.double(), keys.double(), values.double()).flatten()) < 1e-2
    assert cache.isnan().sum() == before.isnan().sum()


def test_large_steps_whose_rows_see_few_tokens_go_to_the_small_kernel() -> None:
    kind = PagedAttention(Heads(8, 2, 128), 16, torch.bfloat16, DEVICE, None, 4)
    spans = Spans(torch.tensor([[0, 3000, 3000, 0, 0]], dtype=torch.int32, device=DEVICE), torch.zeros((1, 1)))
    for rows, seen, small in ((2048, 5000.0, True), (3000, 999.0, True), (3000, 1001.0, False)):
        shared = kind.plan_chunks(spans._replace(seen=seen), rows)
        assert shared is not None
        assert (shared.by is kind._small) is small


@pytest.mark.parametrize(("heads", "block", "dtype"), SHAPES, ids=str)
def test_chunks_equal_plain_attention(heads: Heads, block: int, dtype: torch.dtype) -> None:
    rotation = Arithmetic().rotation(9000, heads.size, DEVICE)
    kind = PagedAttention(heads, block, dtype, DEVICE, rotation, 4)
    small, large = kind._small, kind._large
    cases: list[tuple[list[int], list[int], list[int]]] = [  # rows, tokens before them, padding before those
        ([40, 17, 300], [0, 0, 0], [0, 0, 0]),
        ([64, 5, 130], [100, 0, 33], [0, 0, 0]),
        ([1, 1, 63, 1], [64, 4000, 1, 0], [0, 0, 0, 0]),
        ([1, 2, 3, 4, 2], [64, 4000, 15, 13, 30], [0, 0, 0, 0, 16]),  # as where drafts are verified
        ([4, 3, 4, 1] * 20, [(61 * i) % 900 for i in range(80)], [0] * 80),
        ([4, 70, 3], [8000, 300, 190], [0, 0, 0]),
        ([64], [8000], [0]),  # few rows, a long context: split
        ([33, 200], [2500, 3000], [32, 64]),
        ([500, 20], [0, 10], [96, 0]),
        ([1024], [0], [0]),
        ([1500], [0], [0]),
        ([2048, 1024], [0, 0], [0, 0]),
    ]
    for lengths, starts, pads in cases:
        known = [p + s + n for p, s, n in zip(pads, starts, lengths, strict=True)]
        cache, paging = world(heads, block, dtype, known, [0] * len(known))
        tables = paging.tables
        slots = [slots_of(tables[i], 0, n, block).to(torch.int32) for i, n in enumerate(known)]
        for i, n in enumerate(known):
            store(cache, slots[i], *torch.randn((2, n, heads.kv, heads.size), dtype=dtype, device=DEVICE))
        qkv = torch.randn((sum(lengths), heads.width), dtype=dtype, device=DEVICE)
        raw = qkv.clone()
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        new = torch.cat([slots[i][p + s :] for i, (p, s) in enumerate(zip(pads, starts, strict=True))])
        kind.rotate_and_store(qkv, cache, positions.to(DEVICE, torch.int32), new)
        assert torch.equal(qkv, raw)
        found = []
        for by, ahead in itertools.product((small, large), (3, 0)):  # kernels of small and large steps; rows of decodes
            kind._small = kind._large = by
            first = [ahead + sum(lengths[:i]) for i in range(len(lengths))]
            each = [[first[i], n, known[i], pads[i], i] for i, n in enumerate(lengths)]
            spans = Spans(torch.tensor([*each, [0] * 5], dtype=torch.int32, device=DEVICE), tables)
            rows = ahead + sum(lengths)
            out = torch.full((rows, heads.query * heads.size), math.nan, dtype=dtype, device=DEVICE)
            table = torch.cat((torch.ones((ahead, heads.width), dtype=dtype, device=DEVICE), qkv))
            kind.chunks(table, cache, spans, kind.plan_chunks(spans, rows), out)
            assert out[:ahead].isnan().all()
            found.append(out[ahead:])
        out = found[-1]
        assert all(error(other, out) < 1e-2 for other in found)
        at = 0
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            query, key, _ = raw[at : at + n].view(n, -1, heads.size).split((heads.query, heads.kv, heads.kv), dim=1)
            angle = rotation[start : start + n]
            keys, values = read(cache, slots[i][pads[i] :])
            assert error(keys[start:], rotate(key, angle)) < 1e-2
            wanted = attend(rotate(query.double(), angle).double(), keys.double(), values.double(), start)
            assert error(out[at : at + n], wanted.flatten(1)) < 1e-2
            at += n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 768, 4096, 5120, 9216])
def test_layers_equal_double_precision(dtype: torch.dtype, width: int) -> None:
    x, residual = torch.randn((2, 33, width), dtype=dtype, device=DEVICE)
    weight, bias = torch.randn((2, width), dtype=dtype, device=DEVICE)
    total = (x.double() + residual.double()).to(dtype).double()
    for given in (None, bias):
        there = residual.clone()
        out = residual_norm(x, there, weight, given, 1e-5)
        centred = total if given is None else total - total.mean(-1, keepdim=True)
        wanted = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        wanted = wanted if given is None else wanted + given.double()
        assert error(there, total) < 1e-3
        assert error(out, wanted) < 1e-2
    wanted = torch.nn.functional.silu(x[:, : width // 2].double()) * x[:, width // 2 :].double()
    assert error(gated(x), wanted) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 4096, 6144), (2, 5120, 15360), (2, 14336, 4096), (1, 256, 10), (5, 512, 64)),
        *(
            (3, 4096, 6144),
            (16, 14336, 4096),
            (9, 2048, 4096),
            (33, 14336, 4096),
            (64, 4096, 4096),
            (40, 4096, 6144),
            (17, 4096, 28672),
            (100, 4096, 28672),
            (200, 4096, 28672),
        ),
    ],
)
def test_products_equal_double_precision(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, width, n = shape
    x = torch.randn((rows, width), dtype=dtype, device=DEVICE)
    weight = torch.randn((n, width), dtype=dtype, device=DEVICE) / width**0.5
    bias = torch.randn(n, dtype=dtype, device=DEVICE)
    plain = x.double() @ weight.double().T
    gate, up = plain.chunk(2, -1)

    assert error(linear(x, weight), plain) < 1e-2
    assert error(linear(x, weight, bias), plain + bias.double()) < 1e-2
    assert error(linear(x, weight, bias, "relu"), (plain + bias.double()).relu()) < 1e-2
    for _ in range(3):  # what parts of a product leave behind, the next one finds
        assert error(linear(x, weight, None, "gated"), torch.nn.functional.silu(gate) * up) < 1e-2
    assert torch.equal(linear(x, weight), linear(x, weight))


def whole(x: Eights | Product) -> torch.Tensor:
    """What these numbers stand for."""
    if isinstance(x, Eights):
        return x.values.double() * x.scale.double()[:, None]
    if x.rows is None or x.columns is None:
        return x.values.double()
    return x.values.double() * x.rows.double()[:, None] * x.columns.double()


EIGHTH = 0.04  # an e4m3 has 3 bits after its first: errors of at most 1/16, evenly spread 0.036 of the norm


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 4096, 6144), (2, 14336, 48), (3, 256, 16), (64, 4096, 4096), (300, 14336, 512), (2050, 512, 64)),
        *((3, 4096, 6144), (16, 14336, 4096), (8, 4096, 28672)),
    ],
)
def test_products_of_8_bit_floats_equal_double_precision(shape: tuple[int, int, int]) -> None:
    """Of numbers that 8 bits hold, products are as exact as those of halves; to fit them into 8 bits costs `EIGHTH`."""
    rows, width, n = shape
    wide = (
        torch.randn((rows, width), dtype=torch.bfloat16, device=DEVICE)
        * torch.rand((rows, 1), device=DEVICE).bfloat16()
    )
    weight = quantised(torch.randn((n, width), dtype=torch.bfloat16, device=DEVICE) / width**0.5)
    bias = torch.randn(n, dtype=torch.bfloat16, device=DEVICE)
    x = quantised(wide)
    assert error(whole(x), wide) < EIGHTH
    assert (x.values.float().abs().amax(-1) == 448).all()
    exact = whole(x) @ whole(weight).T

    assert error(whole(product(x, weight, torch.bfloat16)), exact) < 1e-2
    assert error(linear_e4m3(x, weight, bias, torch.bfloat16), exact + bias.double()) < 1e-2
    assert error(linear_e4m3(x, weight, None, torch.bfloat16), exact) < 1e-2


@pytest.mark.parametrize("width", [256, 4096, 14336])
def test_layers_in_8_bit_floats_equal_double_precision(width: int) -> None:
    x, residual = torch.randn((2, 33, width), dtype=torch.bfloat16, device=DEVICE)
    rows, columns = torch.rand(33, device=DEVICE) + 0.5, torch.rand(width, device=DEVICE) + 0.5
    weight = torch.randn(width, dtype=torch.bfloat16, device=DEVICE)
    scaled = Product(x, rows, columns)
    total = (whole(scaled) + residual.double()).to(torch.bfloat16).double()
    wanted = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    for given, sums in ((scaled, total), (x, (x.double() + residual.double()).to(torch.bfloat16).double())):
        there = residual.clone()
        found = residual_norm_e4m3(given, there, weight, None, 1e-5)
        assert error(there, sums) < 1e-3
        assert error(whole(found), residual_norm(None, there, weight, None, 1e-5).double()) < EIGHTH
    assert error(residual_norm(scaled, residual.clone(), weight, None, 1e-5), wanted) < 1e-2
    gate, up = whole(scaled).chunk(2, -1)
    assert error(whole(gated_e4m3(scaled)), torch.nn.functional.silu(gate) * up) < EIGHTH
    applied = Product(whole(scaled).to(torch.bfloat16), None, None)
    assert error(whole(gated_e4m3(applied)), torch.nn.functional.silu(gate) * up) < EIGHTH
    assert error(residual_norm(applied, residual.clone(), weight, None, 1e-5), wanted) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 128256), (33, 1024), (257, 8)])
def test_the_largest_of_each_row(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, device=DEVICE).to(dtype) - 3
    best, column = largest(scores, 7)

    top = scores.float().amax(-1)
    assert torch.equal(best, top)
    first = (scores.float() == top[:, None]).float().argmax(-1)  # of equal ones the first
    assert torch.equal(column.long(), first + 7)


def test_head_norm_equals_double_precision() -> None:
    qkv = torch.randn((19, 8 * 128), dtype=torch.bfloat16, device=DEVICE)
    query, key = torch.randn((2, 128), dtype=torch.bfloat16, device=DEVICE)
    wanted = qkv.double().view(19, 8, 128).clone()
    for part, weight in ((wanted[:, :4], query), (wanted[:, 4:6], key)):
        part /= (part.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        part *= weight.double()
    head_norm(qkv, query, key, 4, 2, 1e-6)

    assert error(qkv, wanted.flatten(1)) < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 33, 700, 3000])
@pytest.mark.parametrize(
    ("experts", "top", "hidden", "width"), [(128, 8, 2048, 768), (8, 2, 512, 1792), (60, 4, 256, 32)]
)
def test_experts_equal_double_precision(rows: int, experts: int, top: int, hidden: int, width: int) -> None:
    x = torch.randn((rows, hidden), dtype=torch.bfloat16, device=DEVICE)
    router = torch.randn((experts, hidden), dtype=torch.bfloat16, device=DEVICE) / hidden**0.5
    up = torch.randn((experts, 2 * width, hidden), dtype=torch.bfloat16, device=DEVICE) / hidden**0.5
    down = torch.randn((experts, hidden, width), dtype=torch.bfloat16, device=DEVICE) / width**0.5
    live = max(1, rows * 3 // 4)
    for norm in (True, False):
        plain = Experts(router, up, down, top, norm, 0, None)
        for given, within in ((plain, 1e-2), (plain.quantised(), EIGHTH)):
            for count in (None, torch.tensor([live], dtype=torch.int32, device=DEVICE)):
                found = mixture(x, given, count).double()
                n = rows if count is None else live
                logits = torch.nn.functional.linear(x, router).double()[:n]
                shares, chosen = logits.topk(top, -1)
                weights = shares.softmax(-1) if norm else logits.softmax(-1).gather(1, chosen)
                wanted = torch.zeros((n, hidden), dtype=torch.float64, device=DEVICE)
                first, last = (exact_experts(w) for w in (given.up, given.down))
                inner = x if given is plain else whole(quantised(x))
                for e in range(experts):
                    at, which = (chosen == e).nonzero(as_tuple=True)
                    gate, ups = (inner[at].double() @ first[e].T).chunk(2, -1)
                    made = (torch.nn.functional.silu(gate) * ups) @ last[e].T
                    wanted.index_add_(0, at, made * weights[at, which, None])
                ties = (logits.topk(top + 1, -1).values.diff().abs()[:, -1] < 1e-6).nonzero()[:, 0]
                keep = torch.ones(n, dtype=torch.bool, device=DEVICE).index_fill(0, ties, False)
                assert error(found[:n][keep], wanted[keep]) < within
                assert not found[n:].any()


def exact_experts(weight: torch.Tensor | Eights) -> torch.Tensor:
    """The weights of all experts in double precision."""
    if isinstance(weight, Eights):
        return weight.values.double() * weight.scale.double()[..., None]
    return weight.double()


SMALL = Model("small", 2, 256, 4, 2, 64, 512, 1024, 4096)


class Members:
    def __init__(self, prompts: list[Prompt], decodes: list[int], verified: list[Verified] = []) -> None:  # noqa: B006
        self.prompts, self.decodes, self.dead, self.verified = prompts, decodes, [], verified

    def table(self, request: int) -> None:
        """Blocks are the engine's own."""

    def tokens(self, request: int) -> list[int]:
        return [(request * 31 + 7 * i * i) % 1021 for i in range(9000)]


@pytest.mark.parametrize(("graphs", "quantization"), [(True, "none"), (False, "none"), (True, "fp8")])
def test_the_engine_chooses_the_likeliest_tokens(graphs: bool, quantization: str) -> None:
    """Chunks, mixed steps, decodes one ahead, by graphs or not: each token is among the likeliest of a plain pass."""
    engine = TorchEngine(
        SMALL, specs.gpu("h200"), Torch(max_batch=24, graphs=graphs, seed=3, quantization=quantization)
    )
    engine.prepare(20_000, 1, 4096, named=False)
    lengths = {r: 5 + 61 * r for r in range(20)}
    running: list[int] = []
    for r, n in lengths.items():
        engine.launch(Batch((), 0, 0, 0, Members([Prompt(r, 0, n - 3, 0, False)], list(running))))
        engine.launch(Batch((), 0, 0, 0, Members([Prompt(r, n - 3, 3, 0, True)], list(running))))
        engine.wait()
        engine.wait()
        running.append(r)
    for _ in range(30):
        engine.launch(Batch((), 0, 0, 0, Members([], running)))
        engine.launch(Batch((), 0, 0, 0, Members([], running)))
        engine.wait()
        engine.wait()
    net = engine._runner.net
    for r, n in lengths.items():
        answer = engine.generated[r]
        tokens = torch.tensor([x % 1024 for x in Members([], []).tokens(r)[:n]] + answer[:-1], device=DEVICE)
        logits = plain_logits(net, tokens)[n - 1 :].float()
        chosen = logits.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
        spread = logits.std(-1)
        assert len(answer) == 1 + 2 * (20 - r - 1) + 60
        assert ((logits.max(-1).values - chosen) < (0.12 if quantization == "none" else 0.5) * spread).all()
    engine.close()


@pytest.mark.parametrize(("graphs", "quantization"), [(True, "none"), (False, "none"), (True, "fp8")])
def test_drafts_are_among_those_a_plain_head_likes(graphs: bool, quantization: str) -> None:
    """Decodes that verify 3 drafts, beside chunks, by graphs or not, and beside prompts too long for a graph."""
    options = Torch(max_batch=24, graphs=graphs, seed=3, quantization=quantization)
    head = replace(head_of(SMALL, "eagle3"), vocab=512)
    engine = TorchEngine(SMALL, specs.gpu("h200"), options, draft=head, drafts=3)
    engine.prepare(30_000, 1, 4096, named=False)
    lengths = {r: 5 + 61 * r for r in range(16)} | {16: 2048, 17: 2500}
    stored: dict[int, int] = {}
    made: dict[int, list[tuple[int, int]]] = {r: [] for r in lengths}  # place in the answer, drafts kept from there

    def decodes(step: int) -> list[Verified]:
        found = []
        for i, (r, start) in enumerate(stored.items()):
            kept = (i + step) % 4
            found.append(Verified(r, start, 3, kept))
            made[r].append((start + 1 - lengths[r], kept))
            stored[r] = start + 1 + kept
        return found

    def launch(prompts: list[Prompt], step: int) -> None:
        engine.launch(Batch((), 0, 0, 0, Members(prompts, [], decodes(step)), proposes=3))

    for r, n in lengths.items():
        if r == 17:  # its prompt is whole, and nobody is beside it
            engine.launch(Batch((), 0, 0, 0, Members([Prompt(r, 0, n, 0, True)], []), proposes=3))
            engine.wait()
        else:
            launch([Prompt(r, 0, n - 3, 0, False)], r)
            launch([Prompt(r, n - 3, 3, 0, True)], r + 1)
            engine.wait()
            engine.wait()
        stored[r] = n
    for step in range(12):
        launch([], step)
        launch([], step + 1)
        engine.wait()
        engine.wait()
    net, own = engine._runner.net, engine.head
    total = 0
    within = 0.12 if quantization == "none" else 0.5
    for r, n in lengths.items():
        answer = engine.generated[r]
        assert len(answer) == 1 + sum(1 + kept for _, kept in made[r])
        tokens = [x % 1024 for x in Members([], []).tokens(r)[:n]] + answer
        inputs: list[torch.Tensor] = []
        logits = plain_logits(net, torch.tensor(tokens[:-1], device=DEVICE), inputs)[n - 1 :]
        shape, theta = (SMALL.heads, SMALL.kv_heads, SMALL.head_size), 10_000.0
        plain = PlainHead(own, [inputs[i] for i in (1, 1, 0)], tokens, net.embedding, shape, net.epsilon, theta)
        by_head = set()
        for place, kept in made[r]:
            drafts = answer[place : place + kept]
            for draft, likes in zip(drafts, plain.drafts(n + place - 1, drafts), strict=False):
                assert draft % 2 == 0
                assert likes.max() - likes[draft // 2] < within * likes.std()
            by_head |= set(range(place, place + kept))
        others = [i for i in range(len(answer)) if i not in by_head]
        chosen = logits.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
        assert ((logits.max(-1).values - chosen) < within * logits.std(-1))[others].all()
        total += len(by_head)
    assert total > 500
    engine.close()


def test_a_request_goes_on_in_other_blocks() -> None:
    """`retable`: what was cached lies in other blocks from now on, and the next steps read and write those."""
    answers = []
    for moved in (False, True):
        engine = TorchEngine(SMALL, specs.gpu("h200"), Torch(max_batch=4, seed=3))
        engine.prepare(64, 16, 4096, named=True)
        members = Named([Prompt(0, 0, 100, 0, True)], [])
        engine.launch(Batch((), 0, 0, 0, members))
        engine.wait()
        for i in range(12):
            if moved and i == 4:
                other = [30 + block for block in members.blocks]
                cache = engine._runner._cache
                cache[:, 30:60] = cache[:, :30]
                cache[:, :30] = math.nan
                members.blocks = other
                engine.retable(0, other)
            step = Named([], [0])
            step.blocks = members.blocks
            engine.launch(Batch((), 1, 0, 0, step))
            engine.wait()
        answers.append(engine.generated[0])
        engine.close()

    assert len(answers[0]) == 13
    assert answers[0] == answers[1]


class Named(Members):
    def __init__(self, prompts: list[Prompt], decodes: list[int]) -> None:
        super().__init__(prompts, decodes)
        self.blocks = list(range(3, 27))

    def table(self, request: int) -> list[int]:
        return self.blocks


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one GPU, both processes share it: its kernels meet in memory as those of two do."""
    monkeypatch.setattr("chairlift.backend.gpu.engine.missing", lambda count: None)


EXPERTS = replace(SMALL, name="experts", experts=16, experts_per_token=4, expert_ffn=128, qk_norm=True)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("model", "quantization", "graphs"),
    [(SMALL, "none", True), (SMALL, "none", False), (SMALL, "fp8", True), (EXPERTS, "none", True)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_two_gpus_choose_likely_tokens_of_one(model: Model, quantization: str, graphs: bool) -> None:
    """Sums by kernels that read the other GPU's memory; 5,000 rows sent by halves; those of 9,000 by NCCL."""
    lengths = {0: 20, 1: 333, 2: 1100, 3: 2500, 4: 5000, 5: 9000}
    options = Torch(max_batch=8, graphs=graphs, seed=3, quantization=quantization)
    found, nets = {}, {}
    for gpus in (1, 2):
        engine = TorchEngine(model, specs.gpu("h200"), options, gpus)
        engine.prepare(30_000, 1, 9100, named=False)
        running: list[int] = []
        for r, n in lengths.items():
            engine.launch(Batch((), 0, 0, 0, Members([Prompt(r, 0, n, 0, True)], list(running))))
            engine.wait()
            running.append(r)
        for _ in range(20):
            engine.launch(Batch((), 0, 0, 0, Members([], running)))
            engine.wait()
        found[gpus], nets[gpus] = engine.generated, engine._runner.net
        engine.close()
    for r, n in lengths.items():
        answer = found[2][r]
        assert len(answer) == 21 + 5 - r
        if model.experts:  # a token's experts change where the router's scores are near: only most tokens are the same
            assert found[1][r][0] == answer[0]
            continue
        tokens = torch.tensor([x % 1024 for x in Members([], []).tokens(r)[:n]] + answer[:-1], device=DEVICE)
        logits = plain_logits(nets[1], tokens)[n - 1 :].float()
        chosen = logits.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
        within = 0.12 if quantization == "none" else 0.5
        assert ((logits.max(-1).values - chosen) < within * logits.std(-1)).all()


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_waits_for_a_dead_process_is_let_go() -> None:
    """Kernels wait for the sums of a process that is killed in the midst of steps: one error, and the GPU is free."""
    engine = TorchEngine(SMALL, specs.gpu("h200"), Torch(max_batch=8, seed=3), 2)
    engine.prepare(30_000, 1, 9100, named=False)
    engine.launch(Batch((), 0, 0, 0, Members([Prompt(0, 0, 1100, 0, True)], [])))
    engine.wait()
    team = engine._team
    assert team is not None
    [process] = team._processes
    os.kill(process.pid, signal.SIGSTOP)  # so that this GPU surely waits
    engine.launch(Batch((), 0, 0, 0, Members([], [0])))
    time.sleep(0.2)
    assert not engine._flights[-1].end.query()
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(DeviceError, match=r"^the process of GPU 1 has died \(exit code -9\)"):
        engine.wait()
    torch.cuda.synchronize()
    assert time.monotonic() - began < 10
    assert not process.is_alive()
    engine._disband()
    assert torch.ones(8, device=DEVICE).sum() == 8


def plain_logits(net, tokens, inputs=None):  # type: ignore[no-untyped-def]
    """The same weights in double precision, whole, no cache; ``inputs`` gets what enters each layer."""
    size, heads = net.heads.size, net.heads
    x = net.embedding.double()[tokens]
    angle = net.attention.rotation[: len(tokens)].double()

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + net.epsilon).sqrt() * weight.double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        cosine, sine = angle[:, None, :, 0], angle[:, None, :, 1]
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)

    def exact(weight: torch.Tensor | Eights) -> torch.Tensor:
        return whole(weight) if isinstance(weight, Eights) else weight.double()

    for layer in net.layers:
        if inputs is not None:
            inputs.append(x)
        qkv = (norm(x, layer.norm) @ exact(layer.qkv).T).view(len(tokens), -1, size)
        query, key, value = qkv.split((heads.query, heads.kv, heads.kv), dim=1)
        x = x + attend(turned(query), turned(key), value).double().flatten(1) @ exact(layer.out).T
        gate, up = (norm(x, layer.mlp_norm) @ exact(layer.up).T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ exact(layer.down).T
    return norm(x, net.norm) @ net.head.double().T
