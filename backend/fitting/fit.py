"""Fitting a profile to recorded steps: term by term, robustly, and refusing what the data cannot tell.

First come the host's terms and the launches that show (`backend.fitting.steps`). Then the form of GPU time is fitted by
least squares on the logarithms of step times, with a soft-L1 loss, so that a stall now and then moves nothing. Weights
let regimes and batch sizes count of which there are few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from chairlift.backend.calibrated.profile import DraftTime, GpuTime, HostTime, Sizes
from chairlift.backend.fitting.slopes import DRAFTING, TABLES, Ends, of_terms
from chairlift.backend.fitting.steps import (
    ALIKE,
    CLEAR,
    EAGER,
    GRAPH,
    KINDS,
    OWN,
    PIECEWISE,
    SHORTEST_S,
    USUAL_LAUNCH,
    WORKERS_S,
    Floats,
    Spans,
    Steps,
    Waits,
    at_floor,
    chunk_times,
    decode_times,
    launch_times,
    own_launches,
    predicted,
    token_time,
    usual_launches,
)

DECODE_KNOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
CHUNK_KNOTS = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
KV_KNOTS = (1, 4, 16, 32, 64, 128, 256)
BINS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 1e9])
NOISE = 0.02  # by how much a step differs from steps like it, relative
STRAY = 10  # by how much the root of a term may differ from where its search starts, in units of that
STIFF = 0.05  # by how much neighbouring knots of a residual may differ
TIED = 0.15  # by how much a residual may differ from 1
TILE = 128  # tokens of a tile of matmul kernels
CLEAR_ERRORS, CLEAR_OFF = 3, 0.05  # by so many standard errors, and so much, matmuls of a size clearly differ
DEVIATION, MEDIAN_ERROR = 1.4826, 1.2533  # of a normal: standard ÷ median absolute deviation; median's error ÷ mean's
TELLS = 0.97  # a form with a further term must have a loss so much smaller
FEWEST = 200  # steps of a recording
FEWEST_SERVED = 30  # steps of loads that tell how long the mean step takes
FEWEST_WHOLE = 3  # steps of whole prompts that tell what a pair of theirs takes
CELL = 100  # steps of one kind and size that take part in the fit; more would tell no more
DRAFT_SHARE = 1 / 16  # of a token's matmuls, those of the layer that drafts: where the search for it starts
VERIFY_S = 0.2e-3  # of a step whose decodes verify, beside passes and drafts: likewise
HEAD_S, TAIL_S = 2e-3, 1e-3  # of a launch kernel by kernel: likewise


class CalibrationError(ValueError):
    """The data cannot identify a term; the message says which term, why, and which data would."""


@dataclass(frozen=True)
class Fit:
    """The coefficients, the numbers of steps that they rest on, and what had to be assumed."""

    gpu: GpuTime
    host: HostTime
    rows: dict[str, int]
    notes: tuple[str, ...]


def fit(steps: Steps, expert_share: float = 0.0, sizes: Sizes = ()) -> Fit:
    """The cost model of ``steps``; ``expert_share`` of the experts see a token. Raises `CalibrationError`.

    ``sizes``: `GpuTime.size_factors` of another engine with the same kernels, for sizes of which few steps show.
    """
    from threadpoolctl import threadpool_limits

    if len(steps) < FEWEST:
        raise CalibrationError(f"{len(steps)} steps are too few: at least {FEWEST} are needed")
    with threadpool_limits(limits=1, user_api="blas"):
        return _fit(steps, expert_share, sizes)


def _fit(steps: Steps, share: float, sizes: Sizes) -> Fit:
    token_s = token_time(steps)
    usual = usual_launches(steps)
    rows, seconds = decode_times(steps, usual)
    _spread(steps, rows, "decode-only", "kv_s", steps.context)
    _spread(steps, rows, "decode-only", "weights_s", steps.computed)
    form = _Form(share, mixed=False, chunks=False, workers=False, token_s=token_s)
    rough, *_ = form.fitted(steps, _singles(steps, rows, seconds))
    decode_s = np.where(steps.kind == GRAPH, predicted(rough, steps), 0.0)
    notes: list[str] = []
    known_s = np.where(steps.kind == GRAPH, decode_s, np.nan)
    shown = launch_times(steps, known_s, usual)
    host = _host(steps, *shown, usual, notes)
    launch = own_launches(steps, *shown, np.array([host.graph_s, host.piecewise_s, host.eager_s]))
    chunk_rows, chunk_s, _ = chunk_times(steps, decode_s, launch)
    _spread(steps, chunk_rows, "chunk", "token_s", steps.prompt)
    _spread(steps, chunk_rows, "chunk", "pair_s", steps.pairs)
    mixed = chunk_rows[steps.decodes[chunk_rows] > 0]
    if len(mixed) < 20:
        notes.append(f"{len(mixed)} mixed steps show their GPU time: decodes beside chunks cost what they do alone")
    workers = host.eager_s < WORKERS_S and not steps.launch_known
    both = _Form(share, mixed=len(mixed) >= 20, chunks=True, workers=workers, token_s=token_s)
    spans = _spans(steps, launch)
    gpu, head, tail, off = both.fitted(steps, spans)
    in_tiles = both.in_tiles(TILE)
    tiled = in_tiles.fitted(steps, spans)
    if tiled[-1] < TELLS * off:
        both, (gpu, head, tail, off) = in_tiles, tiled
    for name in both.floors:
        hidden = both.without_floor(name)
        other = hidden.fitted(steps, spans)
        if off > TELLS * other[-1]:  # no step waits for such a launch
            both, (gpu, head, tail, off) = hidden, other
    singles = _singles(steps, rows, seconds)
    gpu = _mean(gpu, steps, singles, 0.0, 0.0, "decode_residual", "kv_residual")
    # In a train of chunks the GPU's clock sinks; it is such trains, not prompts after a rest, that a load is made of.
    # Where the GPU waited for a launch within a train, that the launch took long is not the GPU's doing.
    busy = Ends.of(spans, predicted(gpu, steps), steps.singly, head, tail).first[spans.at_last] == 0
    busy &= ~at_floor(gpu, steps)[spans.rows[spans.at_last]]
    ends_with_chunk = spans.known & (steps.chunks > 0)[spans.rows.max(axis=1)] & (spans.free > -np.inf)
    gpu = _mean(gpu, steps, spans.take(np.flatnonzero(ends_with_chunk & busy)), head, tail, "chunk_residual")
    # In worker processes a launch holds no loop up: a step that ends late tells of the floor under its GPU time.
    if not workers:
        shown = launch_times(steps, predicted(gpu, steps), launch, head)
    if not steps.launch_known:
        found = _launches(steps, *shown)
        if "graph_s" not in found:
            notes.append(
                f"launch of a whole graph is hidden by the GPU everywhere: {host.graph_s * 1e3:.1f} ms at most, which"
                " is assumed"
            )
        host = replace(host, **found)
    host = replace(host, head_s=_head(gpu, steps, host) if steps.gpu_known else head, tail_s=tail)
    if not workers:  # launches in worker processes would be taken for kernels
        typical = np.array([host.graph_s, host.piecewise_s, host.eager_s])
        gpu = replace(gpu, size_factors=_sizes(gpu, steps, own_launches(steps, *shown, typical), sizes))
    if workers and gpu.eager_floor_s:
        notes.append("worker processes launch the steps: kernel by kernel, that sets a floor to their GPU time")
    elif workers and (steps.kind[chunk_rows] == EAGER).any():
        most = float(np.quantile(chunk_s[steps.kind[chunk_rows] == EAGER], 0.01)) / CLEAR
        gpu = replace(gpu, eager_floor_s=most)
        notes.append(
            f"worker processes launch the steps: kernel by kernel in {most * 1e3:.0f} ms at most, which is assumed,"
            " for the GPU hides it"
        )
    counts = {"steps": len(steps), "decode": len(rows), "chunk": len(chunk_rows), "launch": len(shown[0])}
    return Fit(gpu, host, counts, tuple(notes))


def fit_drafts(steps: Steps, base: GpuTime) -> Fit:
    """The cost model of ``steps`` of an engine that speculates; ``base`` is its GPU time without drafts.

    What drafts add to GPU time is fitted, and all of the host's time. Raises `CalibrationError`.
    """
    from threadpoolctl import threadpool_limits

    if len(steps) < FEWEST:
        raise CalibrationError(f"{len(steps)} steps are too few: at least {FEWEST} are needed")
    usual = usual_launches(steps)
    rows, seconds = decode_times(steps, usual)
    _spread(steps, rows, "decode-only", "pass_s and draft_s", steps.drafts)
    more = seconds - predicted(base, steps)[rows]  # than without drafts
    each_pass, each_draft = _linear([steps.passes[rows], steps.drafts[rows]], more, 1e-4)
    begin = np.array([each_pass, base.token_s * DRAFT_SHARE, each_draft]).clip(1e-9)
    start = dict(zip(DRAFTING, begin.tolist(), strict=False))
    if steps.gpu_known:  # our own engine, whose decodes that verify run by other kernels than plain ones
        start |= {"drafting.verify_s": VERIFY_S, "drafting.kv_s": base.kv_s / 4}

    def made(terms: dict[str, float], _: Sequence[Floats] = ()) -> GpuTime:
        return replace(base, drafting=DraftTime(*(terms.get(name, 0.0) for name in DRAFTING)))

    decode_s = np.where(steps.kind == GRAPH, predicted(made(start), steps), 0.0)
    notes: list[str] = []
    shown = launch_times(steps, np.where(steps.kind == GRAPH, decode_s, np.nan), usual)
    host = _host(steps, *shown, usual, notes)
    launch = own_launches(steps, *shown, np.array([host.graph_s, host.piecewise_s, host.eager_s]))
    seen = _Seen.of(steps, _spans(steps, launch))
    with threadpool_limits(limits=1, user_api="blas"):
        # Finer than fits of the whole form: few terms move a loss that is mostly of the given rest.
        ends = {"tail_s": TAIL_S} if steps.gpu_known else {"head_s": HEAD_S, "tail_s": TAIL_S}
        gpu, head, tail, _ = seen.fitted(made, start | ends, ftol=1e-8)
    host = replace(host, head_s=_head(gpu, steps, host) if steps.gpu_known else head, tail_s=tail)
    counts = {"steps": len(steps), "decode": len(rows), "launch": len(shown[0])}
    return Fit(gpu, host, counts, tuple(notes))


def _spread(steps: Steps, rows: npt.NDArray[np.int64], what: str, term: str, by: Floats) -> None:
    """Raise `CalibrationError` unless ``rows`` are enough, and differ enough in ``by``, to identify ``term``."""
    if len(rows) < 30:
        raise CalibrationError(
            f"{term} cannot be identified: only {len(rows)} of {len(steps)} steps are {what} steps whose time on the"
            " GPU shows (30 are needed); record steps that keep the GPU busy"
        )
    low, high = np.quantile(by[rows], [0.02, 0.98])
    if high < 2 * max(low, 1):
        raise CalibrationError(
            f"{term} cannot be identified: the {what} steps all have {low:,.0f} to {high:,.0f} of it; record a"
            " wider range, at least a factor of two"
        )


def _mean(gpu: GpuTime, steps: Steps, spans: Spans, head: float, tail: float, *tables: str) -> GpuTime:
    """``gpu`` with its ``tables`` lifted from the typical step to the mean one: a run's total time is to be right.

    A robust fit describes the typical step, and stalls make the mean longer. The worst percent is left out. Each run
    has a factor by which its total is right; theirs is the usual one (`_usual`), so that one disturbed run lifts none.
    Loads that were served tell, if there are any, for their steps take 1 to 4 % longer than the same steps of a grid.
    """
    served = np.flatnonzero(steps.served[spans.rows[spans.at_last]])
    if len(served) >= FEWEST_SERVED:
        spans = spans.take(served)
    if not len(spans):
        return gpu
    seconds = spans.done[spans.at_last] - spans.origin
    run = steps.experiment[spans.rows[spans.at_last]]

    def lifted(factor: float) -> GpuTime:
        tables_of = {name: tuple((at, value * factor) for at, value in getattr(gpu, name)) for name in tables}
        return GpuTime(**{**vars(gpu), **tables_of})

    def told(factor: float) -> Floats:
        gpu_s = predicted(lifted(factor), steps)
        found: Floats = Ends.of(spans, gpu_s, steps.singly, head, tail).seconds[spans.at_last]
        return found

    late = seconds / told(1.0)
    kept = late <= np.quantile(late, 0.99)
    recorded: Floats = np.bincount(run, np.where(kept, seconds, 0.0)).astype(np.float64)
    factors = np.geomspace(0.8, 1.25, 19)
    totals = np.stack([np.bincount(run, np.where(kept, told(factor), 0.0)) for factor in factors])
    runs = np.flatnonzero(recorded)
    own = [float(np.interp(recorded[each], totals[:, each], factors)) for each in runs]
    return lifted(_usual(own, np.sqrt(np.bincount(run)[runs])))


def _sizes(gpu: GpuTime, steps: Steps, launch: Floats, known: Sizes) -> Sizes:
    """`GpuTime.size_factors` of the captured sizes whose steps clearly take another time than ``gpu`` says.

    A library may choose other kernels for one size than for its neighbours. ``gpu`` stays: a robust fit follows the
    usual size. The median of at least `ALIKE` steps of a size tells, if it is off by `CLEAR_ERRORS` standard errors and
    by `CLEAR_OFF`. Of sizes with fewer steps, what is ``known`` stays.
    """
    rows, seconds, led = chunk_times(steps, np.where(steps.kind == GRAPH, predicted(gpu, steps), 0.0), launch)
    shown = (steps.kind[rows] == PIECEWISE) & ~led
    rows, seconds = rows[shown], seconds[shown]
    size = steps.computed[rows]
    off = (seconds - predicted(gpu, steps)[rows]) / gpu.chunk_matmuls(size, steps.tokens[rows])
    of = {int(each): off[size == each] for each in np.unique(size) if (size == each).sum() >= ALIKE}
    found = {each: factor for each, factor in known if each not in of}
    if of:
        own = np.concatenate([some - np.median(some) for some in of.values()])
        deviation = DEVIATION * float(np.median(np.abs(own)))
        for each, some in of.items():
            middle, error = float(np.median(some)), MEDIAN_ERROR * deviation / math.sqrt(len(some))
            if abs(middle) > max(CLEAR_ERRORS * error, CLEAR_OFF):
                found[each] = 1 + middle
    return tuple(sorted(found.items()))


def _usual(values: Sequence[float], weights: Floats) -> float:
    """The weighted median; between the two values in the middle it is interpolated."""
    order = np.argsort(values)
    weight = weights[order]
    reached = np.cumsum(weight) - weight / 2
    return float(np.interp(weight.sum() / 2, reached, np.array(values)[order]))


class _Form:
    """The coefficients of GPU time as one vector of numbers near 1, for least squares."""

    # Where a search starts, and how far it may stray: by so many powers of e.
    TERMS: ClassVar[dict[str, float]] = {
        "weights_s": 5e-3,
        "token_s": 20e-6,
        "sharpness": 2.0,  # above 1
        "sequence_s": 5e-6,
        "kv_s": 30e-9,
        "kv_mixed_s": 60e-9,
        "pair_s": 1e-9,
        "whole_pair_s": 1e-9,
        "chunk_s": 0.2e-3,
        "request_s": 20e-6,
        "experts_s": 10e-3,
        "piecewise_floor_s": 5e-3,
        "eager_floor_s": 20e-3,
        "head_s": HEAD_S,
        "tail_s": TAIL_S,
        "odd_tiles": 1.05,
        "empty_pair_s": 2e-3,
        "hot_chunk": 0.05,
        "hot_computed": 0.05,
        "hot_kv": 0.3,
    }

    def __init__(self, share: float, mixed: bool, chunks: bool, workers: bool, token_s: float) -> None:
        self.share = share  # of the experts that a token is sent to; 0: there are none
        self.mixed = mixed  # whether decodes in steps with chunks have a rate of their own
        self.chunks = chunks  # whether there are steps with chunks at all
        self.tile = 1  # tokens of a tile of the matmuls of steps with chunks
        self.workers = workers  # whether launches kernel by kernel set a floor to GPU time
        self.floors: tuple[str, ...] = ("piecewise_floor_s", "eager_floor_s") if workers else ()  # set by launches
        self.token_s = token_s  # for which a token of a step with chunks makes the GPU warm

    def in_tiles(self, tokens: int) -> _Form:
        """This form, where matmuls of steps with chunks compute whole pairs of tiles of ``tokens`` tokens."""
        other = copy(self)
        other.tile = tokens
        return other

    def without_floor(self, name: str) -> _Form:
        """This form without the floor of `GpuTime` of this name."""
        other = copy(self)
        other.floors = tuple(each for each in self.floors if each != name)
        return other

    def fitted(self, steps: Steps, spans: Spans) -> tuple[GpuTime, float, float, float]:
        """The coefficients by which ``spans`` of ``steps`` end when they did, head and tail of `HostTime`, the loss."""
        seen = _Seen.of(steps, spans)
        few = seen.steps
        knots = [_within(DECODE_KNOTS, few.computed[few.chunks == 0])]
        knots.append(_within(CHUNK_KNOTS, few.computed[few.chunks > 0]) if self.chunks else (1,))
        knots.append(_within(KV_KNOTS, few.decodes[few.chunks == 0]))

        def made(terms: dict[str, float], logs: Sequence[Floats]) -> GpuTime:
            terms["sharpness"] += 1
            terms.setdefault("kv_mixed_s", terms["kv_s"])
            tables = [tuple(zip(k, np.exp(v).tolist(), strict=True)) for k, v in zip(knots, logs, strict=True)]
            named: dict[str, Any] = dict(zip(TABLES, tables, strict=True))
            none: dict[str, Any] = dict.fromkeys(set(self.TERMS) - {"head_s", "tail_s", "odd_tiles"}, 0.0)
            fixed: dict[str, Any] = {"tile_tokens": self.tile, "expert_share": self.share, "hot_token_s": self.token_s}
            fixed["live_experts"] = bool(self.share) and steps.gpu_known  # our own engine sends padding to none
            return GpuTime(**{**none, **terms}, **named, **fixed)

        return seen.fitted(made, self._start(*seen.single()), [len(each) for each in knots])

    def _start(self, steps: Steps, seconds: Floats) -> dict[str, float]:
        """Where the search begins: a value of each term that takes part."""
        start = dict(self.TERMS)
        start["weights_s"] = float(seconds.min())
        if steps.gpu_known:
            del start["head_s"]  # by `_head`
        if not steps.gpu_known or not self.chunks or (steps.whole > 0).sum() < FEWEST_WHOLE:
            del start["whole_pair_s"]  # our own engine alone attends to such prompts in another way
        # A sunk clock slows what is computed. Which experts' products wait for the memory the form does not tell, and
        # mixed steps of our own engine are foreseen no better so: there all of a step is slowed.
        del start["hot_computed" if self.share or steps.gpu_known else "hot_chunk"]
        if not self.chunks:
            of_chunks = ("pair_s", "chunk_s", "request_s", "kv_mixed_s", "head_s", "tail_s")
            for name in (*of_chunks, "hot_chunk", "hot_computed"):
                start.pop(name, None)
        if not self.mixed:
            start.pop("kv_mixed_s", None)
        if self.tile == 1:
            del start["odd_tiles"], start["empty_pair_s"]
        else:
            start["empty_pair_s"] = start["weights_s"]
        if self.share:
            start["experts_s"] = max(1e-3, float(np.quantile(seconds, 0.75)) - start["weights_s"])
        else:
            del start["experts_s"]
        if self.workers:
            for name, kind in (("piecewise_floor_s", PIECEWISE), ("eager_floor_s", EAGER)):
                if name not in self.floors:
                    del start[name]
                    continue
                small = seconds[(steps.chunks > 0) & (steps.kind == kind)]
                start[name] = float(np.quantile(small, 0.1)) if len(small) else 1e-3
            idle = seconds[(steps.chunks > 0) & steps.woke]
            start["tail_s"] = float(np.quantile(idle, 0.1)) if len(idle) else 1e-3
        else:
            del start["piecewise_floor_s"], start["eager_floor_s"]
        if self.chunks:
            many = steps.computed >= np.quantile(steps.computed, 0.9)
            start["token_s"] = float(np.median((seconds / steps.computed)[many]))
        return start


@dataclass(frozen=True)
class _Off:
    """How far off ends of steps are that a cost model foresees: each span's last, and the latest of those before."""

    gpu: GpuTime
    ends: Ends
    row: npt.NDArray[np.int64]  # (2 · spans,): of which of ``ends``
    column: npt.NDArray[np.int64]  # likewise
    log: Floats  # (2 · spans,): in `NOISE`; 0 where an end is not known, or one before the last is not late


@dataclass(frozen=True)
class _Seen:
    """A sample of the spans of a recording, to which cost models are fitted."""

    steps: Steps  # those of the spans
    spans: Spans  # whose rows are of these steps
    weight: Floats  # (spans,)

    @classmethod
    def of(cls, steps: Steps, spans: Spans) -> _Seen:
        """A sample of ``spans`` of ``steps``."""
        kept, weight = _sample(steps, spans.rows.max(axis=1))
        spans = spans.take(kept)
        used, places = np.unique(spans.rows, return_inverse=True)
        return cls(_take(steps, used), replace(spans, rows=places.reshape(spans.rows.shape)), weight)

    def single(self) -> tuple[Steps, Floats]:
        """The steps that are a span alone, and how long they took."""
        spans = self.spans
        _, last = spans.at_last
        alone = (last == 0) & spans.known
        return _take(self.steps, spans.rows[alone, 0]), (spans.done[:, 0] - spans.origin)[alone]

    def off(self, gpu: GpuTime, head: float, tail: float) -> _Off:
        """How far off the ends are by ``gpu``, and ``head`` and ``tail`` of `HostTime`."""
        spans = self.spans
        span, last = spans.at_last
        observed = spans.done - spans.origin[:, None]
        inner = np.arange(observed.shape[1]) < (last + ~spans.known)[:, None]
        ends = Ends.of(spans, predicted(gpu, self.steps), self.steps.singly, head, tail)
        log = np.where(spans.known, np.log(ends.seconds[span, last] / observed[span, last]), 0.0)
        over = np.where(inner, ends.seconds / observed, 0.0)
        latest = over.argmax(axis=1)
        late = np.log(np.maximum(over[span, latest], 1.0))
        row, column = np.concatenate([span, span]), np.concatenate([last, latest])
        return _Off(gpu, ends, row, column, np.concatenate([log, late]) / NOISE)

    def fitted(
        self,
        made: Callable[[dict[str, float], Sequence[Floats]], GpuTime],
        start: dict[str, float],
        sizes: Sequence[int] = (),
        ftol: float = 1e-4,
    ) -> tuple[GpuTime, float, float, float]:
        """The GPU time by which the spans end when they did, head and tail of `HostTime`, and the loss.

        ``made`` makes GPU time of the terms, which are sought from ``start`` on, and of the logarithms of `TABLES`,
        which are sought from 0 on and have as many knots as ``sizes`` says. If ``start`` has head and tail, they are
        sought too; otherwise they are 0. The search ends when the loss changes by no more than the share ``ftol``.
        """
        from scipy.optimize import least_squares

        names, values = list(start), np.array(list(start.values()))
        cuts = np.cumsum([len(names), *sizes])[:-1]
        begin = np.repeat([1.0, 0.0], [len(names), sum(sizes)])  # terms are searched by their roots: none is below 0
        eye = np.eye(len(begin))
        ties = np.concatenate(
            [eye[: len(names)] / STRAY]
            + [part for table in np.split(eye, cuts)[1:] for part in (np.diff(table, axis=0) / STIFF, table / TIED)]
        )
        weights = np.concatenate([self.weight, self.weight])
        kept: dict[bytes, _Off] = {}  # of the last `x`: SciPy asks for the derivatives where it has asked for values

        def model(x: Floats) -> tuple[GpuTime, float, float]:
            roots, *logs = np.split(x, cuts)
            terms = dict(zip(names, (values * (roots * roots)).tolist(), strict=True))
            head, tail = terms.pop("head_s", 0.0), terms.pop("tail_s", 0.0)
            return made(terms, logs), head, tail

        def at(x: Floats) -> _Off:
            if x.tobytes() not in kept:
                found = self.off(*model(x))
                kept.clear()
                kept[x.tobytes()] = found
            return kept[x.tobytes()]

        def off(x: Floats) -> Floats:
            log = at(x).log
            robust = np.sign(log) * np.sqrt(2 * (np.sqrt(1 + log * log) - 1))  # soft L1, of the data only
            return np.concatenate([robust * weights, ties @ (x - begin)])

        def slopes(x: Floats) -> Floats:
            here = at(x)
            terms = of_terms(here.gpu, self.steps)
            if "kv_mixed_s" not in start:  # then decodes beside chunks read at the rate of the others
                terms["kv_s"] = terms["kv_s"] + terms["kv_mixed_s"]
            none = np.zeros(len(self.steps))
            of_steps = [np.stack([terms.get(name, none) for name in names], axis=1)]
            of_steps += [terms[name] for name in TABLES[: len(sizes)]]
            found = here.ends.slopes(self.spans, here.row, here.column, np.concatenate(of_steps, axis=1))
            for name, by in (("head_s", here.ends.head), ("tail_s", here.ends.tail)):
                if name in start:
                    found[:, names.index(name)] = by[here.row, here.column]
            found[:, : len(names)] *= 2 * values * x[: len(names)]
            root = np.sqrt(1 + here.log * here.log)
            by_log = np.sqrt((1 + root) / 2) / root  # of soft L1
            some = np.concatenate([self.spans.known, here.log[len(self.spans) :] > 0])
            seconds = np.where(some, here.ends.seconds[here.row, here.column], 1.0)
            scale = np.where(some, by_log * weights / NOISE / seconds, 0.0)
            return np.concatenate([found * scale[:, None], ties])

        found = least_squares(off, begin, jac=slopes, method="lm", ftol=ftol)
        return (*model(found.x), float(found.cost))


def _singles(steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats) -> Spans:
    """Steps whose GPU time is known, as spans of one step."""
    never = np.full((len(rows), 1), -np.inf)
    none = np.zeros(len(rows))
    return Spans(rows[:, None], none, none, never, never, seconds[:, None], np.ones(len(rows), dtype=bool))


def _spans(steps: Steps, launch: Floats) -> Spans:
    """What tells the GPU times of ``steps``."""
    if not steps.gpu_known:
        return Spans.of(steps, launch)
    # On an idle GPU such a time holds a part of the launch, and of one that is a graph or two that is a good part.
    return Spans.timed(steps, launch).take(np.flatnonzero(~_led(steps)))


def _led(steps: Steps) -> npt.NDArray[np.bool_]:
    """Which steps with chunks an idle engine launched as graphs: the GPU's own time holds some of the launch."""
    found: npt.NDArray[np.bool_] = steps.woke & (steps.kind == PIECEWISE)
    return found


def _head(gpu: GpuTime, steps: Steps, host: HostTime) -> float:
    """By how many seconds they take longer than the GPU does with ``gpu``: until it gets the first kernel."""
    led = _led(steps)
    late = (steps.gpu - predicted(gpu, steps))[led]
    return float(np.clip(np.median(late), 0.0, host.piecewise_s)) if led.any() else 0.0


def _within(knots: tuple[int, ...], tokens: Floats) -> tuple[int, ...]:
    """The ``knots`` that lie in the range of ``tokens``, give or take a fifth."""
    if not len(tokens):
        return (1,)
    low, high = tokens.min(), tokens.max()
    return tuple(k for k in knots if low * 0.8 <= k <= high * 1.2) or (int(np.median(tokens)),)


def _sample(steps: Steps, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Floats]:
    """At most `CELL` of ``rows`` of each regime, size and experiment, and weights by which a rare kind counts more."""
    regime = steps.regime[rows]
    size = np.digitize(steps.computed[rows], BINS)
    group = (steps.experiment[rows] * len(BINS) + size) * 3 + regime
    keep: list[npt.NDArray[np.int64]] = []
    for label in np.unique(group):
        mine = np.flatnonzero(group == label)
        if len(mine) > CELL:
            mine = mine[np.linspace(0, len(mine) - 1, CELL).round().astype(np.int64)]
        keep.append(mine)
    kept = np.concatenate(keep)
    cell = (size * 3 + regime)[kept]
    _, which, count = np.unique(cell, return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(np.sqrt(count))[which]
    return kept, weight


def _take(steps: Steps, rows: npt.NDArray[np.int64]) -> Steps:
    return Steps(**{name: column[rows] for name, column in vars(steps).items()})


def _linear(columns: list[Floats], values: Floats, noise: float) -> Floats:
    """Coefficients, none below 0, by which ``columns`` make up ``values``; 0 for a column that is 0 throughout.

    A soft-L1 fit in which a value is uncertain by ``noise`` and a tenth of itself.
    """
    from scipy.optimize import least_squares

    seen = [bool(column.any()) for column in columns]
    if not all(seen):
        found_few = iter(_linear([c for c, some in zip(columns, seen, strict=True) if some], values, noise))
        return np.array([next(found_few) if some else 0.0 for some in seen])
    table = np.stack(columns, axis=1)
    unit = np.maximum(np.abs(table).max(axis=0), 1e-12)
    scale = noise + 0.1 * np.abs(values)
    start = np.full(len(columns), np.median(values) / len(columns))
    found = least_squares(
        lambda x: (table / unit @ x - values) / scale, np.maximum(start, 1e-9), bounds=(0, np.inf), loss="soft_l1"
    )
    result: Floats = found.x / unit
    return result


def _host(steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats, usual: Floats, notes: list[str]) -> HostTime:
    one = np.ones(len(steps))
    schedule = _linear([one, steps.sequences, steps.prompt, steps.chunks], steps.schedule_cpu, 2e-5)
    known = np.isfinite(steps.turn)
    turn_columns = [one, steps.turn_tokens, steps.added, steps.added_tokens]
    turn = _linear([c[known] for c in turn_columns], steps.turn[known], 5e-5)
    launch = _launches(steps, rows, seconds)
    if launch.keys() <= {"graph_s"}:
        raise CalibrationError(
            "piecewise_s and eager_s cannot be identified: no launch of a step with a chunk shows; record requests"
            " that come while an engine decodes a small batch"
        )
    for kind, other in ((PIECEWISE, EAGER), (EAGER, PIECEWISE)):
        if f"{KINDS[kind]}_s" not in launch:
            launch[f"{KINDS[kind]}_s"] = launch[f"{KINDS[other]}_s"]
            notes.append(f"no {KINDS[kind]} launch shows: taken to be as long as a {KINDS[other]} one")
    waits = Waits.of(steps, usual)
    room = (steps.done - waits.ready)[np.isfinite(waits.ready) & (waits.kind == GRAPH)]
    bound = float(np.quantile(room, 0.01)) if len(room) else SHORTEST_S
    graph_s = min(bound, float(USUAL_LAUNCH[GRAPH]))
    if steps.launch_known:
        graph_s = float(np.median(steps.launch[steps.kind == GRAPH]))
    elif steps.drafts.any():
        graph_s = float(usual[0, GRAPH])
    host = HostTime(
        schedule_s=schedule[0],
        schedule_request_s=schedule[1],
        schedule_token_s=schedule[2],
        schedule_chunk_s=schedule[3],
        update_s=turn[0],
        update_request_s=turn[1],
        arrival_s=turn[2],
        arrival_token_s=turn[3],
        tail_s=0.0,
        **{"graph_s": graph_s, **launch},
    )
    return HostTime(**{name: float(value) for name, value in vars(host).items()})


def _launches(steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats) -> dict[str, float]:
    """The typical launch of each kind of which some of the steps ``rows`` are, by its name in `HostTime`."""
    found = {}
    for kind, least in ((GRAPH, OWN), (PIECEWISE, 1), (EAGER, 1)):
        mine = steps.kind[rows] == kind
        if mine.sum() >= least:
            if steps.launch_known:  # every launch, not only those that outlast the GPU
                found[f"{KINDS[kind]}_s"] = float(np.median(seconds[mine]))
            else:
                found[f"{KINDS[kind]}_s"] = _typical(seconds[mine], steps.experiment[rows][mine])
    return found


def _typical(seconds: Floats, experiment: npt.NDArray[np.int64]) -> float:
    """The median of the runs' trimmed means: a long run is still one day of a host, and one bad day is no usual one.

    A run weighs by the root of its number of values. Between the two runs in the middle the median is interpolated.
    """
    means, weights = [], []
    for each in np.unique(experiment):
        mine = np.sort(seconds[experiment == each])
        cut = len(mine) // 20
        means.append(mine[cut : len(mine) - cut].mean())
        weights.append(math.sqrt(len(mine)))
    return _usual(means, np.array(weights))
