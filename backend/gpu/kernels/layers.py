"""What surrounds a layer's matrix products: one CUDA kernel each on a GPU, plain torch elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels import kernel

TOP = 448.0  # the largest number that e4m3 has
FEW = 512  # rows up to which the library's product with a scale a row is slow: up to twice the other's time
MANY = 2048  # rows from which it is the faster one
TILE = 128  # rows of weights of a program of `narrow`
SOME = 1 << 22  # weights from which `narrow` is ahead of the library for at most 16 rows,
MIDDLE = 1 << 24  # for at most 64,
LOTS = 50 << 20  # and with a gate for at most 128
# Threads of a thread block for a row, at most, measured on an H200 with 64 to 8,190 rows. The norm of 4,096 elements is
# slower with fewer; `quantise` of 4,096 with more (for 8,190 rows 25.0 µs, 30.2 with 512 threads); `gated` of 14,336
# with fewer (137 µs, 168 with 448 threads).
NORM_THREADS, QUANTISE_THREADS, GATED_THREADS = 512, 256, 1024


class Eights(NamedTuple):
    """Rows of 8-bit floats (e4m3), each with a scale: row i stands for ``values[i] · scale[i]``.

    Weights of experts have one dimension more, the first.
    """

    values: Tensor  # float8_e4m3fn [rows, width]
    scale: Tensor  # float32 [rows]


class Product(NamedTuple):
    """What a product of `Eights` gave before its scales: ``values[i, j] · rows[i] · columns[j]``.

    The kernel that reads it applies the scales, since it goes over every element anyway: so the product can be the one
    of the library that knows one scale for all of a matrix, which is the fastest for few rows.
    """

    values: Tensor  # [rows, columns]
    rows: Tensor | None  # float32 [rows]; None: scales are applied
    columns: Tensor | None  # float32 [columns]

    def whole(self) -> Tensor:
        """The product, in plain torch."""
        if self.rows is None or self.columns is None:
            return self.values
        return (self.values.float() * self.rows[:, None] * self.columns).to(self.values.dtype)


class Share(NamedTuple):
    """What this GPU has of a product that is the sum of what every GPU has: the norm that reads it adds them up.

    Where the others' lie is said in bytes from their place of ``sources``, see `backend.gpu.exchange`.
    """

    values: Tensor  # [rows, columns], in memory that all GPUs read; before its scales, if it has any
    rows: Tensor | None  # float32 [rows], likewise
    columns: Tensor | None  # float32 [columns], the same on all GPUs
    bases: Tensor  # int64 [GPUs]: where each one's memory starts
    sources: Tensor  # int64 [GPUs]
    rank: int
    values_at: int
    scales_at: int
    flags_at: int  # bytes from the start of each one's memory
    ours: int  # 1: the norm meets the others at the flags; 0: shares are copied, and whoever copies one tells of it


def residual_norm(
    x: Tensor | Product | Share | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
) -> Tensor:
    """``residual += x`` in place (if x is given), and its norm (LayerNorm with a bias); all ``[rows, width]``."""
    if residual.is_cuda:
        out = torch.empty_like(residual)
        _norm(x, residual, weight, bias, epsilon, out, None)
        return out
    assert not isinstance(x, Share)
    if x is not None:
        residual += x.whole() if isinstance(x, Product) else x
    if bias is not None:
        return functional.layer_norm(residual, weight.shape, weight, bias, epsilon)
    wide = residual.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(residual.dtype) * weight


def residual_norm_e4m3(
    x: Tensor | Product | Share | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
) -> Eights:
    """As `residual_norm`, its result in 8-bit floats."""
    if residual.is_cuda:
        out = empty_eights(len(residual), residual.shape[1], residual.device)
        _norm(x, residual, weight, bias, epsilon, out.values, out.scale)
        return out
    return quantised(residual_norm(x, residual, weight, bias, epsilon))


def _norm(
    x: Tensor | Product | Share | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    values, rows, columns = x[:3] if isinstance(x, Product | Share) else (x, None, None)
    bases, sources, *places = x[3:] if isinstance(x, Share) else (None, None, 0, 0, 0, 0, 0)
    if isinstance(x, Share) and not x.ours:
        kernel("layers", "wait_for_copy", BF16=1, PEERS=len(x.bases))((1,), 1, x.bases, x.rank, x.flags_at)
    threads, each = _shares(residual.shape[1], NORM_THREADS)
    run = kernel(
        *("layers", "residual_norm"),
        **{"BF16": int(residual.dtype == torch.bfloat16), "RMS": int(bias is None), "WIDTH": residual.shape[1]},
        **{"EACH": each, "SCALED": int(rows is not None), "QUANT": int(scale is not None)},
        PEERS=1 if sources is None else len(sources),
    )
    given = (values, residual, weight, bias, out, epsilon, rows, columns, scale)
    run((len(residual),), threads, *given, bases, sources, *places)


def _shares(width: int, most: int) -> tuple[int, int]:
    """Threads, at most so many, for a row of so many elements, and pieces of 8 elements that each thread has."""
    each = -(-width // (8 * most))
    return -(-width // (8 * 32 * each)) * 32, each


def empty_eights(rows: int, width: int, device: torch.device, scale: Tensor | None = None) -> Eights:
    """Room for so many rows; that of their scales may be given."""
    values = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=device)
    return Eights(values, torch.empty(rows, dtype=torch.float32, device=device) if scale is None else scale)


def quantised(x: Tensor, scale: Tensor | None = None) -> Eights:
    """``x`` in 8-bit floats, the largest of each row as 448; on a GPU its scales go to ``scale``, if that is given."""
    if x.is_cuda and x.dtype != torch.float32:
        out = empty_eights(len(x), x.shape[1], x.device, scale)
        threads, each = _shares(x.shape[1], QUANTISE_THREADS)
        run = kernel("layers", "quantise", BF16=int(x.dtype == torch.bfloat16), WIDTH=x.shape[1], EACH=each)
        run((len(x),), threads, x, out.values, out.scale)
        return out
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / TOP
    return Eights((x.float() / scale[:, None]).clamp(-TOP, TOP).to(torch.float8_e4m3fn), scale)


def product(x: Eights, weight: Eights, dtype: torch.dtype, out: Tensor | None = None) -> Product:
    """``x`` · ``weight``ᵀ in ``dtype``, before its scales where that is faster; on a GPU in ``out`` if given."""
    if _fits_gemv(x):
        values = _gemv(x, weight, None, dtype, False, out)
    elif few(x.values, weight.values, 16):
        values = _narrow(x.values, weight.values, out, dtype=dtype)
    elif not x.values.is_cuda:
        values = (x.values.float() @ weight.values.float().t()).to(dtype)
    elif len(x.values) >= MANY:
        return Product(_by_rows(x, weight, None, dtype, out), None, None)
    else:
        one = _one(x.values.device)
        values = torch._scaled_mm(
            *(x.values, weight.values.t(), one, one), out_dtype=dtype, use_fast_accum=True, out=out
        )
    return Product(values, x.scale, weight.scale)


def linear_e4m3(
    x: Eights, weight: Eights, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``x`` · ``weight``ᵀ (+ bias) in ``dtype``, scales applied; on a GPU in ``out``, if that is given."""
    if _fits_gemv(x):
        return _gemv(x, weight, bias, dtype, True, out)
    if bias is None and few(x.values, weight.values, 16):
        return _narrow(x.values, weight.values, out, scales=(x.scale, weight.scale), dtype=dtype)
    if not x.values.is_cuda:
        whole = product(x, weight, dtype).whole()
        return whole if bias is None else whole + bias
    if len(x.values) > FEW:
        return _by_rows(x, weight, bias, dtype, out)
    y = product(x, weight, dtype, out).values
    count = y.numel() // 8
    run = kernel("layers", "apply_scales", BF16=int(dtype == torch.bfloat16))
    run((min(-(-count // 256), 4096),), 256, y, x.scale, weight.scale, bias, y.shape[1] // 8, np.uint64(count))
    return y


def _by_rows(x: Eights, weight: Eights, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """By the library's product with a scale a row and a scale a column, on a GPU."""
    scales = (x.scale[:, None], weight.scale[None, :])
    return torch._scaled_mm(
        *(x.values, weight.values.t(), *scales), bias=bias, out_dtype=dtype, use_fast_accum=True, out=out
    )


def few(x: Tensor, weight: Tensor, most: int = 128, gated: bool = False) -> bool:
    """Whether `narrow` is the fastest way of a product of so few rows, at most ``most``, on a GPU."""
    rows, (n, width) = len(x), weight.shape
    if not x.is_cuda or rows > most or (n // 2 if gated else n) % TILE or width % TILE or weight.numel() < SOME:
        return False
    return rows <= 16 or (rows <= 64 and weight.numel() >= MIDDLE) or (gated and weight.numel() >= LOTS)


def _narrow(*arguments: Any, **more: Any) -> Tensor:
    from chairlift.backend.gpu.kernels.narrow import narrow  # it needs Triton

    return narrow(*arguments, **more)


def _fits_gemv(x: Eights) -> bool:
    return x.values.is_cuda and len(x.values) <= 2 and x.values.shape[1] % 512 == 0


def _gemv(
    x: Eights, weight: Eights, bias: Tensor | None, dtype: torch.dtype, scales: bool, out: Tensor | None
) -> Tensor:
    """One or two rows by weights, both in 8-bit floats, on a GPU."""
    rows, width = x.values.shape
    n = len(weight.values)
    out = torch.empty((rows, n), dtype=dtype, device=x.values.device) if out is None else out
    run = kernel(
        *("gemv_e4m3", "gemv_e4m3", 2 * rows * width),
        **{"BF16": int(dtype == torch.bfloat16), "ROWS": rows, "K": width, "PER_SM": 5},
        AHEAD=max(n for n in range(1, 9) if width // 512 % n == 0),
    )
    given = (x.scale, weight.scale) if scales else (None, None)
    run((-(-n // 4),), 128, x.values, weight.values, bias, *given, out, n)
    return out


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def gated_e4m3(x: Product, scale: Tensor | None = None) -> Eights:
    """`gated` of a product before its scales, in 8-bit floats; ``scale`` as above."""
    if x.values.is_cuda:
        width = x.values.shape[1] // 2
        out = empty_eights(len(x.values), width, x.values.device, scale)
        threads, each = _shares(width, GATED_THREADS)
        run = kernel(
            *("layers", "gated_e4m3"),
            **{"BF16": int(x.values.dtype == torch.bfloat16), "WIDTH": width, "EACH": each, "GATED": 1},
            SCALED=int(x.rows is not None),
        )
        run((len(x.values),), threads, *x, out.values, out.scale)
        return out
    return quantised(gated(x.whole()))


def gated(x: Tensor) -> Tensor:
    """SwiGLU's ``silu(gate) · up`` of ``x`` [rows, 2 · width], gates first: ``[rows, width]``."""
    width = x.shape[1] // 2
    if x.is_cuda:
        out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
        count = len(x) * width // 8
        run = kernel("layers", "gated", BF16=int(x.dtype == torch.bfloat16))
        run((min(-(-count // 256), 4096),), 256, x, out, width // 8, np.uint64(count))
        return out
    return functional.silu(x[:, :width]) * x[:, width:]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, kind: str = "plain", out: Tensor | None = None
) -> Tensor:
    """``x`` [rows, in] · ``weight`` [out, in]ᵀ (+ bias), then a ReLU (``kind`` "relu") or SwiGLU's gate ("gated").

    A "plain" product goes to ``out``, if that is given.

    "gated": the weight's first half are gates, its second half ups, and the result has half as many columns. One or two
    rows on a GPU go through a kernel of ours that reads the weights at 93 to 99 % of the copy bandwidth, where cuBLAS
    reaches 62 to 95 (`gemv.cu`, measured on an H200). Some more go through `narrow`, where that is ahead (`few`).
    """
    width = x.shape[1]
    if x.is_cuda and len(x) <= 2 and width % 256 == 0:
        if out is None:
            out = torch.empty((len(x), len(weight) // (2 if kind == "gated" else 1)), dtype=x.dtype, device=x.device)
        run = kernel(
            *("gemv", "gemv"),
            **{"BF16": int(x.dtype == torch.bfloat16), "ROWS": len(x), "K": width, "PER_SM": 5},
            AHEAD=max(n for n in range(1, 11) if width // 256 % n == 0),
            KIND=("plain", "relu", "gated").index(kind),
        )
        run((-(-out.shape[1] // 4),), 128, x, weight, bias, out, out.shape[1])
        return out
    if bias is None and kind != "relu" and few(x, weight, gated=kind == "gated"):
        return _narrow(x, weight, out, kind == "gated")
    if kind == "gated":
        return gated(functional.linear(x, weight, bias))
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if kind == "plain":
        return functional.linear(x, weight, bias)
    if x.is_cuda and bias is not None:
        return torch._addmm_activation(bias, x, weight.t())  # ReLU in the product's epilogue
    return functional.linear(x, weight, bias).relu_()


def head_norm(qkv: Tensor, query: Tensor, key: Tensor, query_heads: int, key_heads: int, epsilon: float) -> None:
    """RMSNorm of every query and key head of ``qkv`` [rows, width] in place, by weights of one head's size (Qwen3)."""
    size = len(query)
    if qkv.is_cuda:
        run = kernel("layers", "head_norm", BF16=int(qkv.dtype == torch.bfloat16), D=size, BLOCK=16)
        grid = (len(qkv), -(-(query_heads + key_heads) // 8))
        run(grid, 256, qkv, query, key, query_heads, key_heads, qkv.stride(0), epsilon)
        return
    heads = qkv.view(len(qkv), -1, size)
    for part, weight in ((heads[:, :query_heads], query), (heads[:, query_heads : query_heads + key_heads], key)):
        wide = part.float()
        part.copy_((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(part.dtype) * weight)


def largest(scores: Tensor, first: int = 0, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Of each row the largest score, float32, and its column, int32, counted from ``first``; in ``out`` if given."""
    rows, width = scores.shape
    if scores.is_cuda and scores.dtype != torch.float32 and width % 8 == 0:
        device = scores.device
        made = (
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.int32, device=device),
        )
        best, column = out or made
        run = kernel("layers", "largest", BF16=int(scores.dtype == torch.bfloat16))
        if rows:
            run((rows,), 1024, scores, best, column, width // 8, first)
        return best, column
    best, column = scores.float().max(-1)
    found = best, (column + first).to(torch.int32)
    if out is None:
        return found
    for to, values in zip(out, found, strict=True):
        to.copy_(values)
    return out
