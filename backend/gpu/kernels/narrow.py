"""Products of few rows by weights, in Triton; imported on a GPU only.

Such a product reads its weights and little else, so what counts is that all of the GPU keeps reading. A program has
128 rows of the weights, or 64, and a part of their width. The last program to arrive at a tile adds its parts up,
always in the same order. The weights are the operand with many rows, as tensor cores want one. Each program starts
before the kernel ahead has ended (`Kernel`), which the library's do not, and a gate is taken where its product is.

On an H200, µs for the products of a layer of Llama-3.1-8B in bfloat16, the library's beside (up with its gate)::

    rows                  qkv          out           up           down         head
    16               15.8 / 15.9   11.1 / 13.6  61.9 / 60.6  31.4 / 33.4  257 / 258
    64               16.9 / 16.2   12.0 / 12.0  60.3 / 64.0  33.0 / 35.7  263 / 287
    128              23.2 / 16.9   17.4 / 14.2  68.9 / 73.7  40.7 / 38.3  306 / 279
    16, FP8           9.7 / 9.5     7.2 / 7.8                18.1 / 20.5

What starts early saves 1 to 2 µs more at each border of two kernels.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WIDE = 128  # rows of the weights a program
DEEP = 128  # bytes of their width a stage
HIGH = (16, 64, 128)  # rows of the other operand; 32 are slower than 64
MOST = 300  # programs for 64 rows, half as wide and twice as deep: the fastest of 138 kinds that were tried


@triton.jit  # type: ignore[untyped-decorator]
def _narrow(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    x,
    weight,
    out,
    partial,
    arrived,
    rows,
    row_scale,
    column_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDE: tl.constexpr,
    HIGH: tl.constexpr,
    DEEP: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    columns = tile * WIDE + tl.arange(0, WIDE)
    row = tl.arange(0, HIGH)
    live = row < rows
    k = part * (K // PARTS) + tl.arange(0, DEEP)
    a = weight + columns[:, None].to(tl.int64) * K + k[None, :]
    b = x + row[None, :].to(tl.int64) * K + k[:, None]
    sums = tl.zeros((WIDE, HIGH), dtype=tl.float32)
    ups = tl.zeros((WIDE, HIGH), dtype=tl.float32)
    gdc_wait()
    gdc_launch_dependents()
    for _ in range(0, K // PARTS, DEEP):
        few = tl.load(b, mask=live[None, :], other=0.0)
        sums = tl.dot(tl.load(a), few, sums)
        if GATED:
            ups = tl.dot(tl.load(a + N * K), few, ups)
        a += DEEP
        b += DEEP
    last = True
    if PARTS > 1:
        size = WIDE * HIGH
        to = partial + tile * (PARTS * (2 if GATED else 1) * size)
        to += tl.arange(0, WIDE)[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
        tl.store(to + part * size, sums, cache_modifier=".cg")
        if GATED:
            tl.store(to + (PARTS + part) * size, ups, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have written before one of them says so
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        last = before == PARTS - 1
        if last:
            tl.store(arrived + tile, 0)
            sums = tl.zeros((WIDE, HIGH), dtype=tl.float32)
            ups = tl.zeros((WIDE, HIGH), dtype=tl.float32)
            for p in tl.static_range(PARTS):
                sums += tl.load(to + p * size, cache_modifier=".cg")
                if GATED:
                    ups += tl.load(to + (PARTS + p) * size, cache_modifier=".cg")
    if last:
        kind = out.dtype.element_ty
        if SCALED:
            of_row = tl.load(row_scale + row, mask=live, other=0.0)[None, :]
            sums = sums * of_row * tl.load(column_scale + columns)[:, None]
        if GATED:
            gate = sums.to(kind).to(tl.float32)
            sums = gate / (1.0 + tl.exp(-gate)) * ups.to(kind).to(tl.float32)
        tl.store(out + row[None, :].to(tl.int64) * N + columns[:, None], sums.to(kind), mask=live[None, :])


@cache
def _room(device: torch.device) -> tuple[int, Tensor, Tensor]:
    """Multiprocessors; room for sums of parts, gates' and ups' of 128 rows; how many parts of a tile have arrived."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    sums = torch.empty(count * WIDE * 256, dtype=torch.float32, device=device)
    return count, sums, torch.zeros(count, dtype=torch.int32, device=device)


def narrow(
    x: Tensor,
    weight: Tensor,
    out: Tensor | None = None,
    gated: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x`` [rows, in] · ``weight`` [out, in]ᵀ, of at most 128 rows, where `few` says so; in ``out`` if that is given.

    ``gated`` is as in `linear`. ``scales``, of rows and of columns, are applied to products of 8-bit floats. ``dtype``
    is the result's, by default that of ``x``.
    """
    rows, width = x.shape
    n = len(weight) // (2 if gated else 1)
    if out is None:
        out = torch.empty((rows, n), dtype=dtype or x.dtype, device=x.device)
    most, partial, arrived = _room(x.device)
    high = next(h for h in HIGH if rows <= h)
    half = high == 64 and 2 * n // WIDE <= MOST
    wide, deep = (WIDE // 2, 2 * DEEP // x.element_size()) if half else (WIDE, DEEP // x.element_size())
    tiles, parts = n // wide, 1
    while parts < 8 and tiles * parts * 2 <= most and width % (2 * parts * deep) == 0:
        parts *= 2
    row_scale, column_scale = scales or (None, None)
    _narrow[(tiles, parts)](
        *(x, weight, out, partial, arrived, rows, row_scale, column_scale),
        **{"N": n, "K": width, "WIDE": wide, "HIGH": high, "DEEP": deep},
        **{"PARTS": parts, "GATED": gated, "SCALED": scales is not None},
        num_stages=4 if gated or half else 5,
        num_warps=4 if half else 8,
        launch_pdl=True,
    )
    return out
