"""The paged KV cache and attention over it: CUDA kernels on a GPU, plain torch anywhere.

The cache of one layer is ``[blocks, kv_heads, block / 16, 2, 16, head_size]``: tiles of 16 tokens, whose keys and
values are permuted within the last three dimensions so that a tile lies in memory as the kernels want it in shared
memory (`places`). A *slot* is ``block number · block size + place in the block``.

Decodes go through `kernels/paged_decode.cu`, chunks of prompts through `kernels/paged_chunks.cu`; both read the number
and the lengths of what they serve on the device, so a captured launch serves every step.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from chairlift.backend.gpu import kernels

TILE = 16  # tokens a tile
BLOCKS = (16, 32)  # tokens a block can have
HEADS = (64, 80, 96, 128)  # head sizes with a kernel
GROUP = 16  # query heads a KV head can have
WARPS = 8  # of a thread block of the decode kernel
MIN_TILES = 2  # worth a warp of their own
CHUNK_GROUPS = (1, 2)  # of four warps a thread block of the kernel for chunks, in small steps and in large ones
SMALL = 2048  # rows of a step, up to which one group is as fast or faster: two thread blocks share an SM
NEAR = 1000  # tokens that a row sees on average, up to which it is so in larger steps
NOWHERE = -1  # the slot of a row whose key and value are not stored


class Heads(NamedTuple):
    """The heads of a layer's attention."""

    query: int
    kv: int
    size: int

    @property
    def width(self) -> int:
        """Elements of a row of queries, keys and values."""
        return (self.query + 2 * self.kv) * self.size


class Paging(NamedTuple):
    """Which blocks hold the sequences of a decode batch; all int32 on the model's device."""

    tables: Tensor  # [rows, blocks of the longest]: block numbers
    rows: Tensor  # [batch]: each sequence's row in tables
    lengths: Tensor  # [batch]: tokens in KV, the new one included; 0: no sequence
    first: Tensor  # [batch]: leading tokens that are padding


class Spans(NamedTuple):
    """Chunks of prompts in a step, and the padding of static batches: each some rows of the flat batch.

    ``each`` [most, 5] int32 on the model's device: first row, rows (0: nobody's span), tokens in KV with the span's
    own, leading tokens of those that are padding, row of the block tables. ``seen``: tokens that a row of them sees on
    average, where the host knows.
    """

    each: Tensor
    tables: Tensor
    seen: float = math.inf

    def last_rows(self) -> Spans:
        """The last row of each span, as a span of its own."""
        first, rows, *rest = self.each.unbind(1)
        one = rows.clamp(max=1)
        return self._replace(each=torch.stack((first + rows - one, one, *rest), dim=1))


class Chunks(NamedTuple):
    """Kernels for chunks; a thread block has so many groups of four warps, the GPU so many thread blocks at once."""

    run: kernels.Kernel
    share: kernels.Kernel
    groups: int
    blocks: int
    tokens: int  # of a tile of queries


class Shared(NamedTuple):
    """How a step's chunks are shared out over the GPU, and by which kernels."""

    by: Chunks
    plan: Tensor


def unfit(heads: Heads, block: int) -> str | None:
    """Why the kernels cannot serve this; None if they can."""
    if heads.size not in HEADS:
        return f"no kernel for heads of {heads.size}; there are kernels for {', '.join(map(str, HEADS))}"
    if heads.query // heads.kv > GROUP:
        return f"no kernel for {heads.query // heads.kv} query heads a KV head; at most {GROUP}"
    if block not in BLOCKS:
        return f"no kernel for blocks of {block} tokens; there are kernels for 16 and 32"
    return None


def new_cache(layers: int, blocks: int, block: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty cache, all layers: ``[layers, blocks, kv_heads, block / 16, 2, 16, head_size]``."""
    shape = (layers, blocks, heads.kv, block // TILE, 2, TILE, heads.size)
    return torch.zeros(shape, dtype=dtype, device=device)


@cache
def places(size: int, device: torch.device) -> Tensor:
    """``[2, 16, size]``: where element d of token t's key, or value, stands in a tile.

    As `kernels/half.cuh` says: pieces of 8 elements change places with the token's number, so that the eight rows that
    are read at once lie in different banks of shared memory. Rows of 64 or 128 elements lie as Hopper's products of
    warp groups read them: keys, then values of eight tokens, and of each 64 elements of all eight, then the next.
    """
    of, token = torch.arange(2, device=device)[:, None, None], torch.arange(TILE, device=device)[:, None]
    element = torch.arange(size, device=device)
    piece = element // 8
    if size % 64 == 0:
        rows = ((token // 8 * 2 + of) * (size // 64) + piece // 8) * 8 + token % 8  # of 64 elements
        return rows * 64 + ((piece ^ token) % 8) * 8 + element % 8
    shift, mask = {80: (2, 1), 96: (1, 3)}.get(size, (0, 0))  # others are small heads of tests, on the CPU
    return (of * TILE + token) * size + (piece ^ ((token >> shift) & mask)) * 8 + element % 8


def _at(cache: Tensor, slots: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """One layer's cache by flat tiles; block, head and tile of ``slots`` in it; the elements of keys and of values."""
    size, slots = cache.shape[2] * TILE, slots.long()
    block, tile = (i[:, None, None] for i in (slots // size, slots % size // TILE))
    head = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
    keys, values = places(cache.shape[-1], cache.device)[:, slots % TILE][:, :, None, :]
    return cache.flatten(-3), (block, head, tile), keys, values


def store(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Plain torch: put keys and values ``[n, kv_heads, size]`` at ``slots`` of one layer's cache."""
    tiles, tile, of_keys, of_values = _at(cache, slots)
    tiles[(*tile, of_keys)] = keys
    tiles[(*tile, of_values)] = values


def read(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch: keys and values ``[n, kv_heads, size]`` that one layer's cache holds at ``slots``."""
    tiles, tile, of_keys, of_values = _at(cache, slots)
    return tiles[(*tile, of_keys)], tiles[(*tile, of_values)]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [n, heads, size] by ``rotation`` [n, size / 2, 2] (cosine, sine), halves paired."""
    low, high = x.float().chunk(2, dim=-1)
    cosine, sine = rotation[:, None, :, 0], rotation[:, None, :, 1]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1).to(x.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, start: int = 0) -> Tensor:
    """Plain torch: query i [n, heads, size] attends to keys [m, kv_heads, size] up to ``start + i``."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1])
    n, m = scores.shape[1:]
    hidden = torch.arange(m, device=query.device)[None, :] > start + torch.arange(n, device=query.device)[:, None]
    weights = scores.masked_fill(hidden, -math.inf).float().softmax(-1).to(values.dtype)
    return torch.einsum("hqk,khd->qhd", weights, values)


def slots_of(table: Tensor, start: int, stop: int, block: int) -> Tensor:
    """Slots of tokens ``start`` … ``stop`` - 1 of the sequence whose blocks ``table`` lists."""
    tokens = torch.arange(start, stop, device=table.device)
    return table[tokens // block].long() * block + tokens % block


class PagedAttention:
    """Attention of one model over its paged cache, for every layer alike.

    ``rotation`` [positions, size / 2, 2] float32 (cosine, sine), or None for models without rotary embedding. On a GPU
    ``max_batch`` bounds a decode batch. Raises ValueError where `unfit` says so.
    """

    def __init__(
        self,
        heads: Heads,
        block: int,
        dtype: torch.dtype,
        device: torch.device,
        rotation: Tensor | None,
        max_batch: int,
    ) -> None:
        self.heads = heads
        self.block = block
        self.rotation = rotation
        self._cuda = device.type == "cuda"
        if not self._cuda:
            return
        if (problem := unfit(heads, block)) is not None:
            raise ValueError(problem)
        group = heads.query // heads.kv
        bf16 = int(dtype == torch.bfloat16)
        part = group * heads.size + 2 * group  # floats of a partial result
        tile = 4 * TILE * heads.size  # bytes
        stages = min(8, (kernels.SHARED_BYTES - 1024 - WARPS * part * 4) // (WARPS * tile))
        shared = WARPS * (stages * tile + part * 4)
        macros = {
            "BF16": bf16,
            "D": heads.size,
            "GROUP": group,
            "BLOCK": block,
            "STAGES": stages,
            "MIN_TILES": MIN_TILES,
        }
        rope = int(rotation is not None)
        self._decode = kernels.kernel("paged_decode", "paged_decode", shared, **macros, APPEND=0, ROPE=0)
        self._append = kernels.kernel("paged_decode", "paged_decode", shared, **macros, APPEND=1, ROPE=rope)
        self._share = kernels.kernel("paged_decode", "plan_decode", **macros, APPEND=0, ROPE=0)
        self._rotate_and_store = kernels.kernel("layers", "rotate_and_store", BF16=bf16, D=heads.size, BLOCK=block)
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count
        self._plan = torch.zeros(1 + 5 * WARPS * self._grid, dtype=torch.int32, device=device)
        self._partial = torch.empty(2 * self._grid * part, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_batch * heads.kv, dtype=torch.int32, device=device)
        self._small, self._large = (self._for_chunks(groups, bf16) for groups in CHUNK_GROUPS)
        self._scale = math.log2(math.e) / math.sqrt(heads.size)
        pieces = 3 * heads.kv * heads.size // 16  # of a row's K and V, with one for every two of K
        self._threads = 32 * min(16, -(-pieces // 32))  # to rotate and store them
        parts = 4 * self._grid  # results of parts that `plan_chunks` makes at most, of 64 query rows each, see there
        self._parts = torch.empty(parts * 128 * (heads.size // 2 + 4), dtype=torch.float32, device=device)
        self._parts_arrived = torch.zeros(parts, dtype=torch.int32, device=device)

    def _for_chunks(self, groups: int, bf16: int) -> Chunks:
        """The kernels for chunks whose thread blocks have so many groups of warps."""
        heads, group = self.heads, self.heads.query // self.heads.kv
        stage = groups * 64 * 4 * heads.size  # bytes of keys and values of 64 tokens a group
        handed = groups * 128 * (heads.size // 2 + 4)  # bytes of what warps hand to others
        room = kernels.SM_BYTES * groups // 2 - 2048 - handed  # 1 KiB is the system's, 1 for barriers and items
        stages = min(4, room // stage)
        macros = {"BF16": bf16, "D": heads.size, "GROUP": group, "BLOCK": self.block, "GROUPS": groups}
        run = kernels.kernel("paged_chunks", "paged_chunks", stages * stage + handed, **macros, STAGES=stages)
        share = kernels.kernel("paged_chunks", "plan_chunks", **macros, STAGES=stages)
        return Chunks(run, share, groups, self._grid * 2 // groups, groups * 64 // group)

    def plan(self, paging: Paging) -> None:
        """Share the decodes of ``paging`` out over the GPU; before the first layer of each step."""
        if self._cuda:
            batch = len(paging.lengths)
            self._share((1,), 1024, paging.lengths, paging.rows, self._plan, batch, self.heads.kv, self._grid)

    def plan_chunks(self, spans: Spans, rows: int) -> Shared | None:
        """Share spans of at most ``rows`` rows out over the GPU, once a step: what `chunks` needs in each layer."""
        if not self._cuda:
            return None
        by = self._small if rows <= SMALL or spans.seen <= NEAR else self._large
        entries = rows // by.tokens + len(spans.each) + 2 * by.blocks
        plan = torch.empty(8 * (1 + entries), dtype=torch.int32, device=spans.each.device)
        by.share((1,), 1024, spans.each, plan, len(spans.each), self.heads.kv, by.blocks)
        return Shared(by, plan)

    def append_and_decode(self, qkv: Tensor, cache: Tensor, paging: Paging, out: Tensor) -> None:
        """One new token a sequence: rotate, store its key and value, attend.

        ``qkv`` [batch, width] raw queries, keys and values, ``cache`` one layer's, ``out`` [batch, query · size].
        """
        if self._cuda:
            self._launch(self._append, qkv, cache, paging, out)
            return
        heads = self.heads
        live = (paging.lengths > 0).nonzero()[:, 0]
        if not len(live):
            return
        at = paging.lengths[live].long() - 1
        query, key, value = self._split(qkv[live], at - paging.first[live])
        tables = paging.tables[paging.rows[live].long()].long()
        slots = tables.gather(1, (at // self.block)[:, None])[:, 0] * self.block + at % self.block
        store(cache, slots, key, value)
        out[live] = self._attend_each(query, cache, paging, live).reshape(-1, heads.query * heads.size)

    def decode(self, query: Tensor, cache: Tensor, paging: Paging, out: Tensor) -> None:
        """As `append_and_decode` where keys and values are stored and ``query`` [batch, ≥ query · size] is rotated."""
        if self._cuda:
            self._launch(self._decode, query, cache, paging, out)
            return
        heads = self.heads
        live = (paging.lengths > 0).nonzero()[:, 0]
        split = query[live, : heads.query * heads.size].view(-1, heads.query, heads.size)
        out[live] = self._attend_each(split, cache, paging, live).reshape(-1, heads.query * heads.size)

    def rotate_and_store(self, qkv: Tensor, cache: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Store keys of ``qkv``'s rows, rotated, and values at ``slots``, where these are not `NOWHERE`."""
        heads = self.heads
        if self._cuda:
            given = (qkv, cache, positions, slots, self.rotation, heads.query, heads.kv, qkv.stride(0))
            self._rotate_and_store((len(qkv),), self._threads, *given)
            return
        kept = slots != NOWHERE
        _, key, value = self._split(qkv[kept], positions[kept].long())
        store(cache, slots[kept], key, value)

    def chunks(self, qkv: Tensor, cache: Tensor, spans: Spans, shared: Shared | None, out: Tensor) -> None:
        """Attention of rows whose keys and values are stored: ``qkv`` [rows, width] → ``out`` [rows, query · size].

        Queries are raw. Rows that no span has are left as they are. ``shared`` is from `plan_chunks`.
        """
        heads = self.heads
        if shared is not None:
            by, plan = shared
            by.run(
                (by.blocks,),
                128 * (by.groups + 1),
                *(qkv, cache, spans.tables, spans.each, plan, self.rotation, out, self._parts, self._parts_arrived),
                *(heads.kv, qkv.stride(0), spans.tables.stride(0), self._scale),
            )
            return
        for first, n, known, padding, row in spans.each.tolist():
            if n:
                keys, values = read(cache, slots_of(spans.tables[row], padding, known, self.block))
                mine, start = slice(first, first + n), known - n - padding
                query, *_ = self._split(qkv[mine], torch.arange(start, start + n, device=qkv.device))
                out[mine] = attend(query, keys, values, start).flatten(1)

    def _launch(self, kernel: kernels.Kernel, query: Tensor, cache: Tensor, paging: Paging, out: Tensor) -> None:
        kernel(
            (self._grid,),
            WARPS * 32,
            *(query, cache, paging.tables, paging.rows, paging.lengths, paging.first, self._plan),
            *(self.rotation, out, self._partial, self._arrived),
            *(self.heads.kv, query.stride(0), paging.tables.stride(0), self._scale),
        )

    def _split(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values, each [n, heads, size]."""
        heads = self.heads
        query, key, value = qkv.view(len(qkv), -1, heads.size).split((heads.query, heads.kv, heads.kv), dim=1)
        if self.rotation is not None:
            angle = self.rotation[positions]
            query, key = rotate(query, angle), rotate(key, angle)
        return query, key, value

    def _attend_each(self, query: Tensor, cache: Tensor, paging: Paging, live: Tensor) -> Tensor:
        found = []
        for i, sequence in enumerate(live.tolist()):
            table = paging.tables[int(paging.rows[sequence])]
            first, length = int(paging.first[sequence]), int(paging.lengths[sequence])
            keys, values = read(cache, slots_of(table, first, length, self.block))
            found.append(attend(query[i : i + 1], keys, values, length - first - 1))
        return torch.cat(found) if found else query
