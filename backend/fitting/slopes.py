"""The derivatives of what a fit predicts by each coefficient, so that least squares needs none by differences.

`of_terms` differentiates the GPU time of single steps (`backend.fitting.steps.predicted`), `Ends` the end
of a stretch of steps, which is a sum of some of their GPU times. For example: three steps take 3, 4 and 5 ms on the
GPU, and the second is launched at 6 ms, when the first is long done. So the third ends at 6 + 4 + 5 ms, whose
derivative is that of the second and third step's GPU time, whatever the first one's is.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

from chairlift.backend.calibrated.profile import DraftTime, GpuTime, Knots, between
from chairlift.backend.fitting.steps import EAGER, PIECEWISE, Floats, Spans, Steps

TABLES = ("decode_residual", "chunk_residual", "kv_residual")
DRAFTING = tuple(f"drafting.{each.name}" for each in fields(DraftTime))


def of_terms(gpu: GpuTime, steps: Steps) -> dict[str, Floats]:
    """Derivatives of each step's GPU seconds by the fields of ``gpu``. Shape of each: ``(steps,)``.

    Of a table of residuals: by the logarithm of its value at each knot. Shape: ``(steps, knots)``. Of what drafts add:
    by the fields of `DraftTime`, as `DRAFTING` names them, if ``gpu`` has any.
    """
    chunked = steps.chunks > 0
    tiles, odd = gpu.tiles(steps.computed)
    odd = np.where(chunked, odd, 0.0)
    tokens = np.where(chunked, tiles * gpu.tile_tokens, steps.computed)
    share = gpu.experts_read(tokens, steps.tokens)
    slower = np.where(chunked, 1 + gpu.hot_computed * steps.warmth, 1.0)
    read, computed = gpu.weights_s + gpu.experts_s * share, gpu.token_s * tokens * slower
    p = gpu.sharpness
    total = read**p + computed**p
    bound = total ** (1 / p)
    residual = np.where(chunked, between(gpu.chunk_residual, tokens), between(gpu.decode_residual, tokens))
    of_size = np.where(chunked, gpu.of_size(steps.computed), 1.0)
    longer = (1 + (gpu.odd_tiles - 1) * odd) * of_size
    factor = residual * longer
    by_read, by_computed = factor * (read / bound) ** (p - 1), factor * (computed / bound) ** (p - 1)
    logs = (read**p * np.log(read) + computed**p * np.log(computed)) / (p * total) - np.log(total) / p**2
    hot_kv = 1 + gpu.hot_kv * steps.warmth
    dense = gpu.whole_pair_s * steps.whole > 0
    kv_factor = between(gpu.kv_residual, steps.decodes) * hot_kv
    whole = bound * longer
    found: dict[str, Floats] = {
        "weights_s": by_read,
        "experts_s": by_read * share,
        "token_s": by_computed * tokens * slower,
        "sharpness": factor * bound * logs,
        "sequence_s": steps.sequences,
        "kv_s": np.where(chunked, 0.0, kv_factor * steps.context),
        "kv_mixed_s": np.where(chunked, steps.context * slower, 0.0),
        "pair_s": np.where(dense, 0.0, steps.pairs) * slower,
        "whole_pair_s": np.where(dense, steps.whole, 0.0) * slower,
        "chunk_s": chunked.astype(np.float64),
        "request_s": steps.chunks,
        "odd_tiles": odd * bound * residual * of_size,
        "empty_pair_s": odd * of_size if gpu.empty_pair_s else np.zeros(len(odd)),
        "decode_residual": _by_knots(gpu.decode_residual, tokens, np.where(chunked, 0.0, whole)),
        "chunk_residual": _by_knots(gpu.chunk_residual, tokens, np.where(chunked, whole, 0.0)),
        "kv_residual": _by_knots(
            gpu.kv_residual, steps.decodes, np.where(chunked, 0.0, gpu.kv_s * hot_kv * steps.context)
        ),
        "hot_kv": np.where(chunked, 0.0, gpu.kv_s * kv_factor / hot_kv * steps.context * steps.warmth),
    }
    kv = np.where(chunked, gpu.kv_mixed_s * slower, gpu.kv_s * kv_factor) * steps.context
    pairs = np.where(dense, gpu.whole_pair_s * steps.whole, gpu.pair_s * steps.pairs)
    slowed = by_computed * gpu.token_s * tokens + pairs + gpu.kv_mixed_s * steps.context
    found["hot_computed"] = np.where(chunked, slowed * steps.warmth, 0.0)
    rest = gpu.sequence_s * steps.sequences + pairs * slower + chunked * gpu.chunk_s
    work = bound * factor + gpu.empty_pair_s * odd * of_size + kv + rest + gpu.request_s * steps.chunks
    if gpu.drafting is not None:
        verifies = (steps.drafts > 0) & ~chunked
        context = np.where(verifies, steps.context * hot_kv, 0.0)
        of_drafts = (steps.passes, steps.passed, steps.drafts, verifies.astype(np.float64), context)
        found |= dict(zip(DRAFTING, of_drafts, strict=True))
        found["hot_kv"] = found["hot_kv"] + gpu.drafting.kv_s * context / hot_kv * steps.warmth
        work += sum(each * n for each, n in zip(astuple(gpu.drafting), of_drafts, strict=True))
    hot = 1 + np.where(chunked, gpu.hot_chunk * steps.warmth, 0.0)
    for term in found:
        found[term] = found[term] * (hot[:, None] if term in TABLES else hot)
    found["hot_chunk"] = np.where(chunked, work * steps.warmth, 0.0)
    work = work * hot
    for name, kind in (("piecewise_floor_s", PIECEWISE), ("eager_floor_s", EAGER)):
        at_floor = chunked & (steps.kind == kind) & (getattr(gpu, name) > work)
        if at_floor.any():
            for term in found:
                found[term] = np.where(at_floor[:, None] if term in TABLES else at_floor, 0.0, found[term])
        found[name] = at_floor.astype(np.float64)
    return found


def _by_knots(residual: Knots, at: Floats, seconds: Floats) -> Floats:
    """Derivatives of ``seconds · between(residual, at)`` by the logarithm at each knot. Shape: ``(steps, knots)``."""
    knots, factors = np.array(residual, dtype=np.float64).T
    logs = np.log(np.maximum(at, 1))
    upper = np.clip(np.searchsorted(np.log(knots), logs), 1, max(1, len(knots) - 1))
    found = np.zeros((len(at), len(knots)))
    if len(knots) == 1:
        found[:, 0] = seconds * factors[0]
        return found
    low, high = np.log(knots)[upper - 1], np.log(knots)[upper]
    part = np.clip((logs - low) / (high - low), 0.0, 1.0)
    rows = np.arange(len(at))
    found[rows, upper - 1] = seconds * (1 - part) * factors[upper - 1]
    found[rows, upper] = seconds * part * factors[upper]
    return found


@dataclass(frozen=True)
class Ends:
    """When each step of `Spans` ends, and what that end is a sum of."""

    seconds: Floats  # (spans, longest): from the span's origin; 0 behind its last step
    first: npt.NDArray[np.int64]  # (spans, longest): the end is the sum of the GPU times from this column to its own
    head: npt.NDArray[np.bool_]  # (spans, longest): and of ``head``
    tail: npt.NDArray[np.bool_]  # (spans, longest): and of ``tail``

    @classmethod
    def of(cls, spans: Spans, gpu_s: Floats, singly: npt.NDArray[np.bool_], head: float, tail: float) -> Ends:
        """Those of ``spans``, whose steps take ``gpu_s[rows]``.

        ``head`` and ``tail`` are those of `HostTime`, for steps that are launched kernel by kernel: where
        ``singly[rows]``.
        """
        ended, first = spans.free.copy(), np.zeros(len(spans), dtype=np.int64)
        by_head, by_tail = np.zeros(len(spans), dtype=bool), np.zeros(len(spans), dtype=bool)
        shape = spans.rows.shape
        found = cls(np.zeros(shape), np.zeros(shape, dtype=np.int64), np.zeros(shape, bool), np.zeros(shape, bool))
        for j in range(shape[1]):
            live = np.flatnonzero(spans.done[:, j] < np.inf)
            rows = spans.rows[live, j]
            by_kernel, launched = singly[rows], spans.launched[live, j]
            begin = np.where(by_kernel, spans.begun[live, j] + head, launched)
            before = ended[live]
            waits = begin > before
            end = np.maximum(before, begin) + gpu_s[rows]
            cut = by_kernel & (launched + tail > end)
            end = np.where(cut, launched + tail, end)
            first[live] = np.where(cut, j + 1, np.where(waits, j, first[live]))
            by_head[live] = ~cut & np.where(waits, by_kernel, by_head[live])
            by_tail[live] = cut | (~waits & by_tail[live])
            ended[live] = end
            found.seconds[live, j] = end - spans.origin[live]
            found.first[live, j], found.head[live, j], found.tail[live, j] = first[live], by_head[live], by_tail[live]
        return found

    def slopes(
        self, spans: Spans, row: npt.NDArray[np.int64], column: npt.NDArray[np.int64], of_steps: Floats
    ) -> Floats:
        """Derivatives of the ends at ``(row, column)``, where those of GPU times are ``of_steps``.

        Shape of ``of_steps``: ``(steps, terms)``; of the result: ``(ends, terms)``.
        """
        from scipy.sparse import csr_matrix

        first = self.first[row, column]
        count = column + 1 - first
        ends = np.cumsum(count)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
        steps = spans.rows[np.repeat(row, count), np.repeat(first, count) + within]
        table = csr_matrix((np.ones(len(steps)), steps, np.concatenate([[0], ends])), shape=(len(row), len(of_steps)))
        found: Floats = table @ of_steps
        return found
