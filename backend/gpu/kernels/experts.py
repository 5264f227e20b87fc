"""A layer's MLP as a mixture of experts: CUDA and Triton kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels import kernel
from chairlift.backend.gpu.kernels.layers import gated

SMALL = 1024  # rows of the largest step that goes through our grouped product; torch's is ahead for larger ones


class Experts(NamedTuple):
    """The weights of one layer's experts, and how they are chosen."""

    router: Tensor  # [experts, hidden]
    up: Tensor  # [own experts, 2 · width, hidden], gates first
    down: Tensor  # [own experts, hidden, width]
    top: int  # experts a token
    norm: bool  # whether a token's weights add up to 1
    layer: int
    skew: float | None  # None: the router chooses. Else experts are drawn with chances ∝ rank^-skew, see `mixture`
    first: int = 0  # of this GPU's own experts


def mixture(x: Tensor, experts: Experts, live: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What the experts of each row of ``x`` [rows, hidden] make of it, added up by their weights: ``[rows, hidden]``.

    ``live`` [1] int32 says how many rows are somebody's; the others become zero and read no weights. With ``skew`` the
    experts are drawn as if at random, so that the cost of a balance can be measured with weights that are random: a
    drawn expert's weight is still the router's. Where other GPUs have experts too, the sum is over this one's; on a
    GPU it goes to ``out``, if that is given.
    """
    logits = functional.linear(x, experts.router)
    if not x.is_cuda:
        return _plainly(x, logits, experts, len(x) if live is None else int(live))
    from chairlift.backend.gpu.kernels.grouped import grouped, high

    rows, hidden = x.shape
    count, top, pairs = len(experts.up), experts.top, len(x) * experts.top
    macros = {"BF16": int(x.dtype == torch.bfloat16), "EXPERTS": count, "TOP": top, "NORM": int(experts.norm)}
    integers = torch.zeros(3 * pairs + 2 * count, dtype=torch.int32, device=x.device)
    chosen, place, source, counts, ends = integers.split((pairs, pairs, pairs, count, count))
    weights = torch.empty(pairs, dtype=torch.float32, device=x.device)
    skew = -1.0 if experts.skew is None else float(experts.skew)
    kernel("experts", "choose", **{**macros, "EXPERTS": len(experts.router)})(
        (-(-rows // 8),),
        256,
        *(logits, chosen, weights, live, rows, skew, experts.layer, experts.first, count, counts, place),
    )
    tall = high(rows)
    most = min(pairs, pairs // tall + count)
    tiles = torch.empty((3, most), dtype=torch.int32, device=x.device)
    blocks = min(-(-pairs // 1024), 64)
    kernel("experts", "arrange", **macros)(
        (blocks,), 1024, chosen, counts, place, source, ends, tiles, pairs, tall, most
    )
    if rows <= SMALL:
        wide = gated(grouped(x, experts.up, source, tiles, pairs, tall))
        y = grouped(wide, experts.down, None, tiles, pairs, tall)
    else:
        wide = gated(torch._grouped_mm(x[source], experts.up.transpose(1, 2), offs=ends))
        y = torch._grouped_mm(wide, experts.down.transpose(1, 2), offs=ends)
    out = torch.empty_like(x) if out is None else out
    kernel("experts", "combine", **macros)((rows,), min(256, hidden // 8), y, place, weights, out, hidden // 8)
    return out


def _plainly(x: Tensor, logits: Tensor, experts: Experts, live: int) -> Tensor:
    """`mixture` in plain torch, expert by expert."""
    shares = logits.float().softmax(-1)
    drawn = logits.float()
    if experts.skew is not None:
        ranks = (torch.arange(len(experts.router)) * 37 + experts.layer * 101) % len(experts.router) + 1
        noise = torch.Generator().manual_seed(experts.layer)
        drawn = -torch.empty_like(drawn).exponential_(generator=noise).log() - experts.skew * ranks.log()
    chosen = drawn.topk(experts.top, dim=-1).indices
    weights = shares.gather(1, chosen)
    if experts.norm:
        weights = weights / weights.sum(-1, keepdim=True)
    weights[live:] = 0
    out = torch.zeros_like(x, dtype=torch.float32)
    for own in range(len(experts.up)):
        expert = experts.first + own
        rows, which = (chosen[:live] == expert).nonzero(as_tuple=True)
        y = functional.linear(gated(functional.linear(x[rows], experts.up[own])), experts.down[own])
        out.index_add_(0, rows, y.float() * weights[rows, which, None])
    return out.to(x.dtype)
