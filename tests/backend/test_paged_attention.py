"""The paged cache's layout, and attention over it in plain torch, against dense attention in double precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the paged cache is made of torch tensors")

from chairlift.backend.gpu.paged_attention import (  # noqa: E402 - torch may be absent
    TILE,
    Heads,
    PagedAttention,
    Paging,
    Spans,
    new_cache,
    places,
    read,
    slots_of,
    store,
    unfit,
)

CPU = torch.device("cpu")
KERNELS = (64, 80, 96, 128)  # head sizes with a kernel
PIECE = 8  # elements of 2 bytes in the 16 bytes that a lane of ldmatrix reads


def randn(*shape: int, seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# layout


@pytest.mark.parametrize("size", [8, 16, 40, *KERNELS])
def test_a_tile_is_permuted(size: int) -> None:
    assert sorted(places(size, CPU).flatten().tolist()) == list(range(2 * TILE * size))


@pytest.mark.parametrize("size", KERNELS)
def test_pieces_of_sixteen_bytes_stay_whole(size: int) -> None:
    table = places(size, CPU).view(2, TILE, size // PIECE, PIECE)

    assert (table[..., 0] % PIECE == 0).all()
    assert torch.equal(table - table[..., :1], torch.arange(PIECE).expand_as(table))


@pytest.mark.parametrize("size", KERNELS)
@pytest.mark.parametrize("tokens", [range(8), range(8, 16)], ids=["first eight", "last eight"])
def test_the_rows_that_ldmatrix_reads_at_once_lie_in_different_banks(size: int, tokens: range) -> None:
    # shared memory has 32 banks of 4 bytes: 8 groups of 16 bytes; an element has 2 bytes
    for table in places(size, CPU):
        for piece in range(size // PIECE):
            addresses = [2 * int(table[token, piece * PIECE]) for token in tokens]
            assert sorted(address // 16 % 8 for address in addresses) == list(range(8))


@pytest.mark.parametrize("size", [64, 128])
def test_keys_and_values_of_eight_tokens_lie_as_products_of_warp_groups_read_them(size: int) -> None:
    """128 bytes of each of eight tokens make 1,024 bytes, swizzled: bits 4 to 6 of an address are XORed with 7 to 9."""
    table = places(size, CPU)
    for of, token, element in itertools.product(range(2), range(TILE), range(size)):
        eight = (token // 8 * 2 + of) * (size // 64) + element // 64
        plain = eight * 1024 + token % 8 * 128 + element % 64 * 2
        assert 2 * int(table[of, token, element]) == plain ^ (plain >> 7 & 7) << 4


@pytest.mark.parametrize("size", [16, *KERNELS])
@pytest.mark.parametrize("block", [16, 32])
def test_what_is_stored_is_read_and_nothing_else_changes(size: int, block: int) -> None:
    heads, blocks = Heads(6, 3, size), 5
    cache = new_cache(1, blocks, block, heads, torch.float32, CPU)[0]
    assert cache.shape == (blocks, 3, block // 16, 2, 16, size)
    order = torch.randperm(blocks * block, generator=torch.Generator().manual_seed(size))
    slots, others = order[: len(order) // 2], order[len(order) // 2 :]
    keys, values = randn(2, len(slots), 3, size, seed=1)
    store(cache, slots.to(torch.int32), keys, values)

    stored = read(cache, slots)
    assert torch.equal(stored[0], keys)
    assert torch.equal(stored[1], values)
    assert not torch.cat(read(cache, others)).any()
    # the same by hand: block, KV head, tile, key or value, token of the tile, permuted element
    slot = int(slots[0])
    tile = cache[slot // block, 2, slot % block // 16].flatten()
    assert torch.equal(tile[places(size, CPU)[1, slot % 16]], values[0, 2])


def test_slots_follow_the_table() -> None:
    assert slots_of(torch.tensor([4, 0, 7]), 14, 35, 16).tolist() == [78, 79, *range(16), 112, 113, 114]
    assert slots_of(torch.tensor([2, 5]), 30, 34, 32).tolist() == [94, 95, 160, 161]


@pytest.mark.parametrize(
    ("heads", "block", "problem"),
    [
        (Heads(4, 2, 64), 16, None),
        (Heads(16, 1, 128), 32, None),
        (Heads(4, 4, 72), 16, "no kernel for heads of 72; there are kernels for 64, 80, 96, 128"),
        (Heads(32, 1, 64), 16, "no kernel for 32 query heads a KV head; at most 16"),
        (Heads(4, 2, 64), 8, "no kernel for blocks of 8 tokens; there are kernels for 16 and 32"),
    ],
)
def test_what_the_kernels_serve(heads: Heads, block: int, problem: str | None) -> None:
    assert unfit(heads, block) == problem


# attention


def turned(x: Any, position: int) -> Any:
    """Rotary embedding of one token's heads [heads, size] as a product of complex numbers; base 10000."""
    size = x.shape[-1]
    angle = position * 10_000.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((product.real, product.imag), dim=-1)


def dense(query: Any, keys: Any, values: Any) -> Any:
    """One query [heads, size] over keys and values [tokens, KV heads, size], head by head, float64."""
    found = []
    for head, q in enumerate(query.double()):
        shared = head * keys.shape[1] // len(query)
        weight = (keys[:, shared].double() @ q / math.sqrt(len(q))).exp()
        found.append((weight[:, None] * values[:, shared].double()).sum(0) / weight.sum())
    return torch.cat(found)


def rotation(positions: int, size: int) -> Any:
    angle = torch.arange(positions)[:, None] * 10_000.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


class World:
    """Sequences in permuted blocks and rows of a cache full of NaN, with their keys and values beside it."""

    def __init__(self, heads: Heads, block: int, lengths: list[int]) -> None:
        each = max(-(-n // block) for n in lengths)
        order = torch.randperm(len(lengths) * each + 2, generator=torch.Generator().manual_seed(block))
        self.heads, self.block, self.lengths = heads, block, lengths
        self.tables = order[: len(lengths) * each].to(torch.int32).view(len(lengths), each)
        self.rows = list(range(len(lengths)))[::-1]
        self.cache = new_cache(1, len(order), block, heads, torch.float32, CPU)[0].fill_(math.nan)
        self.keys = [randn(n, heads.kv, heads.size, seed=i) for i, n in enumerate(lengths)]
        self.values = [randn(n, heads.kv, heads.size, seed=100 + i) for i, n in enumerate(lengths)]

    def slots(self, i: int) -> Any:
        return slots_of(self.tables[self.rows[i]], 0, self.lengths[i], self.block).to(torch.int32)

    def paging(self, first: list[int]) -> Paging:
        rows, lengths, pads = (torch.tensor(x, dtype=torch.int32) for x in (self.rows, self.lengths, first))
        return Paging(self.tables, rows, lengths, pads)


LENGTHS = [1, 15, 0, 16, 17, 33, 0, 70]  # 0: a row of the padded batch that is nobody's
FIRST = [0, 3, 0, 0, 16, 1, 0, 40]  # padding, which nobody attends to


@pytest.mark.parametrize("heads", [Heads(4, 2, 64), Heads(3, 3, 80), Heads(5, 1, 16)], ids=str)
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("rotary", [True, False])
def test_a_decode_equals_dense_attention(heads: Heads, block: int, rotary: bool) -> None:
    world = World(heads, block, LENGTHS)
    for i in range(len(LENGTHS)):  # all but the padding in front and the new token
        kept = slice(FIRST[i], max(0, LENGTHS[i] - 1))
        store(world.cache, world.slots(i)[kept], world.keys[i][kept], world.values[i][kept])
    untouched = world.cache.clone()
    attention = PagedAttention(
        heads, block, torch.float32, CPU, rotation(100, heads.size) if rotary else None, len(LENGTHS)
    )
    qkv = randn(len(LENGTHS), heads.width, seed=7)
    out = torch.full((len(LENGTHS), heads.query * heads.size), math.nan)
    attention.append_and_decode(qkv, world.cache, world.paging(FIRST), out)

    stored = 0
    for i, n in enumerate(LENGTHS):
        if n == 0:
            assert out[i].isnan().all()
            continue
        query, key, value = qkv[i].view(-1, heads.size).split((heads.query, heads.kv, heads.kv))
        if rotary:
            query, key = (turned(x, n - 1 - FIRST[i]).float() for x in (query, key))
        keys = torch.cat((world.keys[i][FIRST[i] : n - 1], key[None]))
        values = torch.cat((world.values[i][FIRST[i] : n - 1], value[None]))
        torch.testing.assert_close(out[i].double(), dense(query, keys, values), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read(world.cache, world.slots(i)[-1:])[0][0], key, rtol=1e-4, atol=1e-5)
        stored += 2 * heads.kv * heads.size
    assert untouched.isnan().sum() - world.cache.isnan().sum() == stored

    again = torch.full_like(out, math.nan)  # all stored and rotated: `decode` alone
    rotated = [
        turned(q, n - 1 - p).float() if rotary and n else q
        for q, n, p in zip(
            qkv[:, : heads.query * heads.size].view(-1, heads.query, heads.size), LENGTHS, FIRST, strict=True
        )
    ]
    attention.decode(torch.stack(rotated).flatten(1), world.cache, world.paging(FIRST), again)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("heads", [Heads(4, 2, 64), Heads(5, 1, 16)], ids=str)
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("starts", [[0, 0, 0], [20, 0, 33]], ids=["whole prompts", "later chunks"])
def test_chunks_equal_dense_attention(heads: Heads, block: int, starts: list[int]) -> None:
    lengths = [17, 1, 15]
    world = World(heads, block, [s + n for s, n in zip(starts, lengths, strict=True)])
    for i, start in enumerate(starts):
        store(world.cache, world.slots(i)[:start], world.keys[i][:start], world.values[i][:start])
    qkv = randn(sum(lengths), heads.width, seed=8)
    raw = qkv.clone()
    attention = PagedAttention(heads, block, torch.float32, CPU, rotation(100, heads.size), 1)
    places_of = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).to(torch.int32)
    slots = torch.cat([world.slots(i)[start:] for i, start in enumerate(starts)])
    attention.rotate_and_store(qkv, world.cache, places_of, slots)
    first = [0, 17, 18]
    each = [(first[i], n, starts[i] + n, 0, world.rows[i]) for i, n in enumerate(lengths)]
    spans = Spans(torch.tensor([each[2], (0, 0, 0, 0, 0), *each[:2]], dtype=torch.int32), world.tables)
    out = torch.full((sum(lengths), heads.query * heads.size), math.nan)
    attention.chunks(qkv, world.cache, spans, attention.plan_chunks(spans, sum(lengths)), out)

    at = 0
    for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        keys, values = list(world.keys[i][:start]), list(world.values[i][:start])
        for j in range(n):
            query, key, value = raw[at].view(-1, heads.size).split((heads.query, heads.kv, heads.kv))
            keys.append(turned(key, start + j).float())
            values.append(value)
            wanted = dense(turned(query, start + j), torch.stack(keys), torch.stack(values))
            torch.testing.assert_close(out[at].double(), wanted, rtol=1e-4, atol=1e-5)
            at += 1


def test_a_span_leaves_out_its_padding_and_other_rows() -> None:
    """Rows 1 to 3 are tokens 20 to 22 of a sequence whose first 16 are padding; row 0 is nobody's."""
    heads = Heads(2, 1, 16)
    world = World(heads, 16, [23])
    store(world.cache, world.slots(0)[16:], world.keys[0][16:], world.values[0][16:])
    attention = PagedAttention(heads, 16, torch.float32, CPU, None, 1)
    spans = Spans(torch.tensor([[1, 3, 23, 16, world.rows[0]]], dtype=torch.int32), world.tables)
    qkv = randn(4, heads.width, seed=3)
    out = torch.full((4, 32), math.nan)
    attention.chunks(qkv, world.cache, spans, None, out)

    assert out[0].isnan().all()
    for i, n in ((1, 21), (2, 22), (3, 23)):
        wanted = dense(qkv[i, :32].view(2, 16), world.keys[0][16:n], world.values[0][16:n])
        torch.testing.assert_close(out[i].double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_last_row_of_a_span_attends_alone_as_it_does_among_the_others() -> None:
    heads = Heads(2, 1, 16)
    world = World(heads, 16, [9, 40])
    for i, n in enumerate((9, 40)):
        store(world.cache, world.slots(i), world.keys[i][:n], world.values[i][:n])
    each = [[1, 3, 9, 0, world.rows[0]], [4, 0, 0, 0, 0], [4, 2, 40, 16, world.rows[1]]]
    spans = Spans(torch.tensor(each, dtype=torch.int32), world.tables)
    attention = PagedAttention(heads, 16, torch.float32, CPU, rotation(100, heads.size), 1)
    qkv = randn(6, heads.width, seed=3)
    of_all, of_last = torch.full((2, 6, 32), math.nan)
    attention.chunks(qkv, world.cache, spans, None, of_all)
    attention.chunks(qkv, world.cache, spans.last_rows(), None, of_last)

    assert spans.last_rows().each[:, :2].tolist() == [[3, 1], [4, 0], [5, 1]]
    torch.testing.assert_close(of_last[[3, 5]], of_all[[3, 5]])
    assert of_last[[0, 1, 2, 4]].isnan().all()


def test_a_row_without_a_slot_is_stored_nowhere() -> None:
    heads = Heads(2, 1, 16)
    cache = new_cache(1, 2, 16, heads, torch.float32, CPU)[0]
    qkv = randn(3, heads.width, seed=9)
    value = qkv[1, -16:].clone()
    attention = PagedAttention(heads, 16, torch.float32, CPU, None, 1)
    slots, positions = (torch.tensor(x, dtype=torch.int32) for x in ([-1, 21, -1], [0, 1, 2]))
    attention.rotate_and_store(qkv, cache, positions, slots)

    assert torch.equal(read(cache, torch.tensor([21]))[1][0, 0], value)
    assert not torch.cat(read(cache, torch.tensor([i for i in range(32) if i != 21]))).any()
