"""A layer's MLP as a mixture of experts: CUDA and Triton kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels import kernel
from chairlift.backend.gpu.kernels.layers import Eights, Product, gated, gated_e4m3, linear_e4m3, quantised

SMALL = 1024  # rows of the largest step that goes through our grouped product; torch's is ahead for larger ones


class Experts(NamedTuple):
    """The weights of one layer's experts, and how they are chosen."""

    router: Tensor  # [experts, hidden]
    up: Tensor | Eights  # [own experts, 2 · width, hidden], gates first
    down: Tensor | Eights  # [own experts, hidden, width]; in 8-bit floats as `up`, and so are both products' inputs
    top: int  # experts a token
    norm: bool  # whether a token's weights add up to 1
    layer: int
    skew: float | None  # None: the router chooses. Else experts are drawn with chances ∝ rank^-skew, see `mixture`
    first: int = 0  # of this GPU's own experts

    @property
    def own(self) -> int:
        """How many experts this GPU has."""
        return len(self.up.values if isinstance(self.up, Eights) else self.up)

    def quantised(self) -> Experts:
        """These experts in 8-bit floats."""

        def fit(weight: Tensor | Eights) -> Eights:
            assert isinstance(weight, Tensor)
            values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
            scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
            for i, one in enumerate(weight):  # one by one: on the CPU each takes room as float32
                values[i], scale[i] = quantised(one)
            return Eights(values, scale)

        return self._replace(up=fit(self.up), down=fit(self.down))


def mixture(x: Tensor, experts: Experts, live: Tensor | None, out: Tensor | None = None) -> Tensor:
    """What the experts of each row of ``x`` [rows, hidden] make of it, added up by their weights: ``[rows, hidden]``.

    ``live`` [1] int32 says how many rows are somebody's; the others become zero and read no weights. With ``skew`` the
    experts are drawn as if at random, so that the cost of a balance can be measured with weights that are random: a
    drawn expert's weight is still the router's. Where other GPUs have experts too, the sum is over this one's; on a
    GPU it goes to ``out``, if that is given.

    On a GPU experts of 8-bit floats have widths that are multiples of 32.
    """
    logits = functional.linear(x, experts.router)
    if not x.is_cuda:
        return _plainly(x, logits, experts, len(x) if live is None else int(live))
    from chairlift.backend.gpu.kernels.grouped import grouped, high

    rows, hidden = x.shape
    count, top, pairs = experts.own, experts.top, len(x) * experts.top
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
    if isinstance(experts.up, Eights):
        narrow = quantised(x)
        if rows <= SMALL:
            made = grouped(narrow, experts.up, source, tiles, pairs, tall, x.dtype)
        else:
            values = narrow.values.view(torch.uint8)[source].view(narrow.values.dtype)
            made = _many(Eights(values, narrow.scale[source]), experts.up, ends, x.dtype)
        fit = gated_e4m3(Product(made, None, None))
        if rows <= SMALL:
            y = grouped(fit, experts.down, None, tiles, pairs, tall, x.dtype)
        else:
            assert isinstance(experts.down, Eights)
            y = _many(fit, experts.down, ends, x.dtype)
    elif rows <= SMALL:
        wide = gated(grouped(x, experts.up, source, tiles, pairs, tall, x.dtype))
        y = grouped(wide, experts.down, None, tiles, pairs, tall, x.dtype)
    else:
        assert isinstance(experts.down, Tensor)
        wide = gated(torch._grouped_mm(x[source], experts.up.transpose(1, 2), offs=ends))
        y = torch._grouped_mm(wide, experts.down.transpose(1, 2), offs=ends)
    out = torch.empty_like(x) if out is None else out
    kernel("experts", "combine", **macros)((rows,), min(256, hidden // 8), y, place, weights, out, hidden // 8)
    return out


def _many(x: Eights, weight: Eights, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The library's product of rows that lie together by expert, up to ``ends``, on a GPU."""
    given = (x.values, weight.values.transpose(1, 2), x.scale, weight.scale)
    made: Tensor = torch._scaled_grouped_mm(*given, offs=ends, out_dtype=dtype, use_fast_accum=True)
    return made


def _product(x: Tensor, weight: Tensor | Eights, expert: int) -> Tensor:
    """In plain torch, by the weights of one expert."""
    if isinstance(weight, Eights):
        return linear_e4m3(quantised(x), Eights(weight.values[expert], weight.scale[expert]), None, x.dtype)
    return functional.linear(x, weight[expert])


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
    for own in range(experts.own):
        expert = experts.first + own
        rows, which = (chosen[:live] == expert).nonzero(as_tuple=True)
        y = _product(gated(_product(x[rows], experts.up, own)), experts.down, own)
        out.index_add_(0, rows, y.float() * weights[rows, which, None])
    return out.to(x.dtype)
