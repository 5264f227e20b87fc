"""The paged KV cache and attention over it: CUDA kernels on a GPU, plain torch anywhere.

The cache of one layer is ``[blocks, kv_heads, block / 16, 2, 16, head_size]``: tiles of 16 tokens, keys then values,
the 16-byte pieces of each row permuted so that a tile lies in memory as the decode kernel wants it in shared memory
(`places`). A *slot* is ``block number · block size + place in the block``.

The decode kernel's method is in `kernels/paged_decode.cu`. Chunks of prompts go through torch's own FlashAttention 2
(variable lengths, causal from the bottom right), keys and values of earlier steps gathered before it; a whole prompt
that is long goes through cuDNN's, which is faster there (`_long`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu import kernels

TILE = 16  # tokens a tile
BLOCKS = (16, 32)  # tokens a block can have
HEADS = (64, 80, 96, 128)  # head sizes with a kernel
GROUP = 16  # query heads a KV head can have
WARPS = 8  # of a thread block of the decode kernel
MIN_TILES = 2  # worth a warp of their own
LONG = 1024  # long prompts are padded to a multiple of this for cuDNN, which plans once a shape,
LONGEST = 16 * LONG  # and up to here
NOWHERE, UNTOUCHED = -1, -2  # slots: a row whose key and value are not stored; one that is not even rotated


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


class Chunks(NamedTuple):
    """Prompt tokens of a step: rows of the flat batch, one chunk after the other."""

    lengths: Sequence[int]  # rows of each chunk
    starts: Sequence[int]  # tokens of it that are in the cache already
    ends: Tensor  # [chunks + 1] int32: running sum of lengths
    ends_known: Tensor  # [chunks + 1] int32: running sum of starts + lengths
    known: Tensor | None  # [Σ starts + lengths] int32: the slot of every token; None if all start at 0


def unfit(heads: Heads, block: int) -> str | None:
    """Why the kernels cannot serve this; None if they can."""
    if heads.size not in HEADS:
        return f"no kernel for heads of {heads.size}; there are kernels for {', '.join(map(str, HEADS))}"
    if heads.query // heads.kv > GROUP:
        return f"no kernel for {heads.query // heads.kv} query heads a KV head; at most {GROUP}"
    if block not in BLOCKS:
        return f"no kernel for blocks of {block} tokens; there are kernels for 16 and 32"
    return None


def _long(tokens: int) -> bool:
    """Whether cuDNN's attention, at twice FlashAttention 2's pace on an H200, wins although it computes padding too."""
    padded = -(-tokens // LONG) * LONG
    return LONG <= tokens <= LONGEST and padded**2 < 2 * tokens**2


def new_cache(layers: int, blocks: int, block: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty cache, all layers: ``[layers, blocks, kv_heads, block / 16, 2, 16, head_size]``."""
    shape = (layers, blocks, heads.kv, block // TILE, 2, TILE, heads.size)
    return torch.zeros(shape, dtype=dtype, device=device)


@cache
def places(size: int, device: torch.device) -> Tensor:
    """``[16, size]``: where element d of token t of a tile stands in its row.

    Pieces of 8 elements change places with token t's number, so that the eight rows ldmatrix reads at once lie in
    different banks of shared memory whatever the stride of a row.
    """
    shift, mask = {80: (2, 1), 96: (1, 3)}.get(size, (0, 7))
    if size % 64 and size not in (80, 96):  # small heads of tests, on the CPU
        shift, mask = 0, 0
    token = torch.arange(TILE, device=device)[:, None]
    element = torch.arange(size, device=device)[None, :]
    return ((element // 8) ^ ((token >> shift) & mask)) * 8 + element % 8


def _at(cache: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
    """Block, tile and token of ``slots`` in one layer's cache."""
    block = cache.shape[2] * TILE
    return slots // block, slots % block // TILE, slots % TILE


def store(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Plain torch: put keys and values ``[n, kv_heads, size]`` at ``slots`` of one layer's cache."""
    block, tile, token = (i[:, None, None] for i in _at(cache, slots.long()))
    head = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
    place = places(cache.shape[-1], cache.device)[slots.long() % TILE][:, None, :]
    cache[block, head, tile, 0, token, place] = keys
    cache[block, head, tile, 1, token, place] = values


def read(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch: keys and values ``[n, kv_heads, size]`` that one layer's cache holds at ``slots``."""
    block, tile, token = (i[:, None, None] for i in _at(cache, slots.long()))
    head = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
    place = places(cache.shape[-1], cache.device)[slots.long() % TILE][:, None, :]
    return cache[block, head, tile, 0, token, place], cache[block, head, tile, 1, token, place]


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
        layer_macros = {"BF16": bf16, "D": heads.size, "BLOCK": block}
        self._rotate_and_store = kernels.kernel("layers", "rotate_and_store", **layer_macros)
        self._gather = kernels.kernel("layers", "gather", **layer_macros)
        self._grid = torch.cuda.get_device_properties(device).multi_processor_count
        self._plan = torch.zeros(1 + 5 * WARPS * self._grid, dtype=torch.int32, device=device)
        self._partial = torch.empty(2 * self._grid * part, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_batch * heads.kv, dtype=torch.int32, device=device)
        self._scale = math.log2(math.e) / math.sqrt(heads.size)

    def warm_up(self, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Let cuDNN make its plans for prompts of up to ``longest`` tokens."""
        for n in range(LONG, min(longest, LONGEST) + 1, LONG) if self._cuda else ():
            row = torch.zeros((n, self.heads.width), dtype=dtype, device=device).view(n, -1, self.heads.size)
            self._whole(*row.split((self.heads.query, self.heads.kv, self.heads.kv), dim=1))

    def plan(self, paging: Paging) -> None:
        """Share the work of ``paging`` out over the GPU; before the first layer of each step."""
        if self._cuda:
            batch = len(paging.lengths)
            self._share((1,), 1024, paging.lengths, paging.rows, self._plan, batch, self.heads.kv, self._grid)

    def append_and_decode(self, qkv: Tensor, cache: Tensor, paging: Paging, out: Tensor) -> None:
        """One new token a sequence: rotate, store its key and value, attend.

        ``qkv`` [batch, width] raw queries, keys and values, ``cache`` one layer's, ``out`` [batch, query · size].
        """
        if self._cuda:
            self._launch(self._append, qkv, cache, paging, out)
            return
        heads = self.heads
        live = (paging.lengths > 0).nonzero()[:, 0]
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
        """Rotate queries and keys of ``qkv``'s rows in place; store keys and values at ``slots``.

        A slot of `NOWHERE`: it is not stored; `UNTOUCHED`: not even rotated.
        """
        heads = self.heads
        if self._cuda:
            self._rotate_and_store(
                (len(qkv),), 256, qkv, cache, positions, slots, self.rotation, heads.query, heads.kv, qkv.stride(0)
            )
            return
        mine = slots != UNTOUCHED
        query, key, value = self._split(qkv, positions.long())
        qkv[mine] = torch.cat((query, key, value), dim=1).flatten(1)[mine]
        kept = slots >= 0
        store(cache, slots[kept], key[kept], value[kept])

    def chunks(self, qkv: Tensor, cache: Tensor, chunks: Chunks) -> Tensor:
        """Attention of prompt rows, rotated and stored already: ``qkv`` [rows, width] → ``[rows, query · size]``."""
        return self.chunked(qkv, chunks)(cache)

    def chunked(self, qkv: Tensor, chunks: Chunks) -> Callable[[Tensor], Tensor]:
        """`chunks` as a function of the cache, for layer after layer whose rows come to the same place."""
        heads = self.heads
        query, key, value = qkv.view(len(qkv), -1, heads.size).split((heads.query, heads.kv, heads.kv), dim=1)
        if not self._cuda:
            return lambda cache: self._chunks_plainly(query, key, value, cache, chunks).flatten(1)
        if chunks.known is None and all(_long(n) for n in chunks.lengths):
            parts = list(zip(*(x.split(list(chunks.lengths)) for x in (query, key, value)), strict=True))

            def long(_cache: Tensor) -> Tensor:
                whole = [self._whole(*part) for part in parts]
                return (torch.cat(whole) if len(whole) > 1 else whole[0]).flatten(1)

            return long
        longest = max(chunks.lengths)
        longest_known = max(s + n for s, n in zip(chunks.starts, chunks.lengths, strict=True))
        ends = (chunks.ends, chunks.ends_known, longest, longest_known)

        def flash(cache: Tensor) -> Tensor:
            known = (key, value) if chunks.known is None else self._gathered(cache, chunks.known)
            done: Tensor = torch.ops.aten._flash_attention_forward(query, *known, *ends, 0.0, True, False)[0]
            return done.flatten(1)

        return flash

    def _whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One whole prompt by cuDNN: ``[n, heads, size]`` each."""
        n, more = len(query), -len(query) % LONG  # tokens after the last change nothing for those before
        parts = (functional.pad(x, (0, 0, 0, 0, 0, more)) if more else x for x in (query, key, value))
        q, k, v = (x[None].transpose(1, 2) for x in parts)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            done = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return done[0].transpose(0, 1)[:n]

    def _gathered(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads
        keys = torch.empty((len(slots), heads.kv, heads.size), dtype=cache.dtype, device=cache.device)
        values = torch.empty_like(keys)
        self._gather((len(slots),), 128, cache, slots, keys, values, heads.kv)
        return keys, values

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

    def _chunks_plainly(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, chunks: Chunks) -> Tensor:
        found = []
        at = known = 0
        for start, n in zip(chunks.starts, chunks.lengths, strict=True):
            keys, values = key[at : at + n], value[at : at + n]
            if chunks.known is not None:
                keys, values = read(cache, chunks.known[known : known + start + n])
            found.append(attend(query[at : at + n], keys, values, start))
            at, known = at + n, known + start + n
        return torch.cat(found)
