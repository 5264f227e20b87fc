"""What surrounds a layer's matrix products: one CUDA kernel each on a GPU, plain torch elsewhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels import kernel


def residual_norm(x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """``residual += x`` in place (if x is given), and its norm (LayerNorm with a bias); all ``[rows, width]``."""
    if residual.is_cuda:
        width = residual.shape[1]
        threads = min(1024, -(-width // 256) * 32)
        run = kernel(
            *("layers", "residual_norm"),
            **{"BF16": int(residual.dtype == torch.bfloat16), "RMS": int(bias is None), "WIDTH": width},
            EACH=-(-width // (8 * threads)),
        )
        out = torch.empty_like(residual)
        run((len(residual),), threads, x, residual, weight, bias, out, epsilon)
        return out
    if x is not None:
        residual += x
    if bias is not None:
        return functional.layer_norm(residual, weight.shape, weight, bias, epsilon)
    wide = residual.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(residual.dtype) * weight


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, kind: str = "plain") -> Tensor:
    """``x`` [rows, in] · ``weight`` [out, in]ᵀ (+ bias), then a ReLU (``kind`` "relu") or SwiGLU's gate ("gated").

    "gated": the weight's first half are gates, its second half ups, and the result has half as many columns. One or two
    rows on a GPU go through a kernel of ours that reads the weights at 93 to 99 % of the copy bandwidth, where cuBLAS
    reaches 62 to 95 (`gemv.cu`, measured on an H200).
    """
    width = x.shape[1]
    if x.is_cuda and len(x) <= 2 and width % 256 == 0:
        out = torch.empty((len(x), len(weight) // (2 if kind == "gated" else 1)), dtype=x.dtype, device=x.device)
        run = kernel(
            *("gemv", "gemv"),
            **{"BF16": int(x.dtype == torch.bfloat16), "ROWS": len(x), "K": width, "PER_SM": 5},
            AHEAD=max(n for n in range(1, 11) if width // 256 % n == 0),
            KIND=("plain", "relu", "gated").index(kind),
        )
        run((-(-out.shape[1] // 4),), 128, x, weight, bias, out, out.shape[1])
        return out
    if kind == "gated":
        return gated(functional.linear(x, weight, bias))
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
