"""Fitting a profile to recorded steps: term by term, robustly, and refusing what the data cannot tell.

First come the host's terms and the launches that show (`backend.fitting.steps`). Then the form of GPU time is fitted by
least squares on the logarithms of step times, with a soft-L1 loss, so that a stall now and then moves nothing. Weights
let regimes and batch sizes count of which there are few steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chairlift.backend.calibrated.profile import GpuTime, HostTime
from chairlift.backend.fitting.steps import (
    CLEAR,
    EAGER,
    GRAPH,
    KINDS,
    LONGEST_LAUNCH,
    PIECEWISE,
    Bools,
    Floats,
    Steps,
    Waits,
    chunk_ceilings,
    chunk_times,
    decode_times,
    launch_times,
    predicted,
)

DECODE_KNOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CHUNK_KNOTS = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
KV_KNOTS = (1, 4, 16, 32, 64, 128, 256)
BINS = np.array([0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 1e9])
NOISE = 0.02  # by how much a step differs from steps like it, relative
STIFF = 0.05  # by how much neighbouring knots of a residual may differ
TIED = 0.15  # by how much a residual may differ from 1
FEWEST = 200  # steps of a recording
CELL = 100  # steps of one kind and size that take part in the fit; more would tell no more
SMALL_PROMPT = 128  # tokens of a step that the GPU finishes no later than its launch
GRAPH_LAUNCH_S = 0.001  # where every launch of a whole graph is hidden: vLLM 0.23's takes less on an H200's host


class CalibrationError(ValueError):
    """The data cannot identify a term; the message says which term, why, and which data would."""


@dataclass(frozen=True)
class Fit:
    """The coefficients, the numbers of steps that they rest on, and what had to be assumed."""

    gpu: GpuTime
    host: HostTime
    rows: dict[str, int]
    notes: tuple[str, ...]


def fit(steps: Steps) -> Fit:
    """The cost model of ``steps``. Raises `CalibrationError`."""
    from threadpoolctl import threadpool_limits

    if len(steps) < FEWEST:
        raise CalibrationError(f"{len(steps)} steps are too few: at least {FEWEST} are needed")
    with threadpool_limits(limits=1, user_api="blas"):
        return _fit(steps)


def _fit(steps: Steps) -> Fit:
    rows, seconds = decode_times(steps)
    _spread(steps, rows, "decode-only", "kv_s", steps.context)
    _spread(steps, rows, "decode-only", "weights_s", steps.computed)
    rough = _Form(mixed=False, chunks=False).fitted(steps, rows, seconds, np.zeros(len(rows), dtype=bool))
    decode_s = np.where(steps.kind == GRAPH, predicted(rough, steps), 0.0)
    notes: list[str] = []
    host, launched = _host(steps, decode_s, notes)
    launch = np.array([host.graph_s, host.piecewise_s, host.eager_s])
    chunk_rows, chunk_seconds = chunk_times(steps, decode_s, launch)
    _spread(steps, chunk_rows, "chunk", "token_s", steps.prompt)
    _spread(steps, chunk_rows, "chunk", "pair_s", steps.pairs)
    mixed = chunk_rows[steps.decodes[chunk_rows] > 0]
    if len(mixed) < 20:
        notes.append(f"{len(mixed)} mixed steps show their GPU time: decodes beside chunks cost what they do alone")
    both = _Form(mixed=len(mixed) >= 20, chunks=True)
    most_rows, most = chunk_ceilings(steps, launch)
    gpu = both.fitted(
        steps,
        np.concatenate([rows, chunk_rows, most_rows]),
        np.concatenate([seconds, chunk_seconds, most]),
        np.arange(len(rows) + len(chunk_rows) + len(most_rows)) >= len(rows) + len(chunk_rows),
    )
    gpu = _mean(gpu, steps, rows, seconds, "decode_residual", "kv_residual")
    gpu = _mean(gpu, steps, chunk_rows, chunk_seconds, "chunk_residual")
    counts = {"steps": len(steps), "decode": len(rows), "chunk": len(chunk_rows), "launch": launched}
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


def _mean(gpu: GpuTime, steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats, *tables: str) -> GpuTime:
    """``gpu`` with its ``tables`` lifted from the typical step to the mean one: a run's total time is to be right.

    A robust fit describes the typical step, and stalls make the mean longer. The worst percent is left out.
    """
    few = _take(steps, rows)
    off = seconds - predicted(gpu, few)
    kept = off <= np.quantile(off / seconds, 0.99) * seconds
    factor = seconds[kept].sum() / predicted(gpu, _take(few, np.flatnonzero(kept))).sum()
    lifted = {name: tuple((at, float(value * factor)) for at, value in getattr(gpu, name)) for name in tables}
    return GpuTime(**{**vars(gpu), **lifted})


class _Form:
    """The coefficients of GPU time as one vector of numbers near 1, for least squares."""

    NAMES = ("weights_s", "token_s", "sharpness", "sequence_s", "kv_s", "kv_mixed_s", "pair_s", "chunk_s", "request_s")
    UNITS = (1e-3, 1e-6, 1.0, 1e-6, 1e-9, 1e-9, 1e-12, 1e-3, 1e-6)
    START = (5.0, 20.0, 4.0, 5.0, 30.0, 60.0, 1.0, 0.3, 5.0)
    LOW = (1e-3, 1e-3, 1.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    HIGH = (1e4, 1e6, 12.0, 1e4, 1e5, 1e5, 1e5, 50.0, 1e4)

    def __init__(self, mixed: bool, chunks: bool) -> None:
        self.mixed = mixed  # whether decodes in steps with chunks have a rate of their own
        self.chunks = chunks  # whether there are steps with chunks at all

    def fitted(self, steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats, ceiling: Bools) -> GpuTime:
        """The coefficients by which ``rows`` take ``seconds``; where ``ceiling`` holds, at most ``seconds``."""
        from scipy.optimize import least_squares

        kept, weight = _sample(steps, rows)
        rows, seconds, ceiling = rows[kept], seconds[kept], ceiling[kept]
        few = _take(steps, rows)
        knots = [_within(DECODE_KNOTS, few.computed[few.chunks == 0])]
        knots.append(_within(CHUNK_KNOTS, few.computed[few.chunks > 0]) if self.chunks else (1,))
        knots.append(_within(KV_KNOTS, few.decodes[few.chunks == 0]))
        sizes = [len(k) for k in knots]
        cuts = np.cumsum([len(self.NAMES), *sizes])[:-1]

        def gpu_of(x: Floats) -> GpuTime:
            head = dict(zip(self.NAMES, (float(v * u) for v, u in zip(x, self.UNITS, strict=False)), strict=True))
            if not self.mixed:
                head["kv_mixed_s"] = head["kv_s"]
            logs = np.split(x, cuts)[1:]
            tables = [tuple(zip(k, np.exp(v).tolist(), strict=True)) for k, v in zip(knots, logs, strict=True)]
            return GpuTime(**head, decode_residual=tables[0], chunk_residual=tables[1], kv_residual=tables[2])

        def off(x: Floats) -> Floats:
            log = (np.log(predicted(gpu_of(x), few)) - np.log(seconds)) / NOISE
            log = np.where(ceiling, np.maximum(log, 0), log)
            robust = np.sign(log) * np.sqrt(2 * (np.sqrt(1 + log * log) - 1))  # soft L1, of the data only
            parts = [robust * weight]
            for table in np.split(x, cuts)[1:]:
                parts += [np.diff(table) / STIFF, table / TIED]
            return np.concatenate(parts)

        start = np.concatenate([self._start(few, seconds), np.zeros(sum(sizes))])
        low = np.concatenate([self.LOW, np.full(sum(sizes), -1.0)])
        high = np.concatenate([self.HIGH, np.full(sum(sizes), 1.0)])
        found = least_squares(
            off, start, bounds=(low, high), x_scale=np.maximum(np.abs(start), 0.05), method="dogbox", ftol=1e-6
        )
        return gpu_of(found.x)

    def _start(self, steps: Steps, seconds: Floats) -> Floats:
        start = np.array(self.START)
        start[0] = seconds.min() * 1e3
        if self.chunks:
            start[1] = np.median((seconds / steps.computed)[steps.computed >= np.quantile(steps.computed, 0.9)]) * 1e6
        return start


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


def _host(steps: Steps, decode_s: Floats, notes: list[str]) -> tuple[HostTime, int]:
    one = np.ones(len(steps))
    schedule = _linear([one, steps.sequences, steps.prompt], steps.schedule_cpu, 2e-5)
    known = np.isfinite(steps.turn)
    turn_columns = [one, steps.turn_tokens, steps.added, steps.added_tokens]
    turn = _linear([c[known] for c in turn_columns], steps.turn[known], 5e-5)
    rows, seconds = launch_times(steps, decode_s)
    launch = {}
    for kind in (PIECEWISE, EAGER):
        mine = steps.kind[rows] == kind
        if mine.any():
            if steps.launch_known:  # every launch, not only those that outlast the GPU
                launch[kind] = float(np.median(seconds[mine]))
            else:
                launch[kind] = _typical(seconds[mine], steps.experiment[rows][mine])
    if not launch:
        raise CalibrationError(
            "piecewise_s and eager_s cannot be identified: no launch of a step with a chunk shows; record requests"
            " that come while an engine decodes a small batch"
        )
    for kind, other in ((PIECEWISE, EAGER), (EAGER, PIECEWISE)):
        if kind not in launch:
            launch[kind] = launch[other]
            notes.append(f"no {KINDS[kind]} launch shows: taken to be as long as a {KINDS[other]} one")
    waits = Waits.of(steps)
    room = (steps.done - waits.ready)[np.isfinite(waits.ready) & (waits.kind == GRAPH)]
    bound = float(np.quantile(room, 0.01)) if len(room) else LONGEST_LAUNCH[GRAPH]
    graph_s = min(bound, GRAPH_LAUNCH_S)
    if steps.launch_known:
        graph_s = float(np.median(steps.launch[steps.kind == GRAPH]))
    else:
        notes.append(
            f"launch of a whole graph is hidden by the GPU everywhere: below {bound * 1e3:.1f} ms,"
            f" {graph_s * 1e3:.1f} ms assumed"
        )
    small = steps.woke & (steps.kind == PIECEWISE) & (steps.computed <= SMALL_PROMPT)
    small &= steps.last | np.append(steps.woke[1:], True)
    whole = (steps.done - steps.schedule - steps.schedule_cpu)[small]
    fast = seconds[steps.kind[rows] == PIECEWISE]
    tail = max(0.0, float(np.median(whole) - np.quantile(fast, 0.1))) if small.sum() >= 3 and len(fast) else 0.0
    host = HostTime(
        schedule_s=schedule[0],
        schedule_request_s=schedule[1],
        schedule_token_s=schedule[2],
        update_s=turn[0],
        update_request_s=turn[1],
        arrival_s=turn[2],
        arrival_token_s=turn[3],
        graph_s=graph_s,
        piecewise_s=launch[PIECEWISE],
        eager_s=launch[EAGER],
        tail_s=_tail(steps, launch[EAGER]) if steps.gpu_known else tail,
    )
    return HostTime(**{name: float(value) for name, value in vars(host).items()}), len(rows)


def _tail(steps: Steps, launch: float) -> float:
    """By how many seconds small steps with chunks end on the GPU after their launch; both are measured."""
    rows = (steps.chunks > 0) & steps.woke & (steps.gpu <= CLEAR * launch)
    return max(0.0, float(np.median((steps.gpu - steps.launch)[rows]))) if rows.any() else 0.0


def _typical(seconds: Floats, experiment: npt.NDArray[np.int64]) -> float:
    """The mean of the runs' trimmed means, for a host is faster on some days, and a long run is still one day."""
    means, weights = [], []
    for each in np.unique(experiment):
        mine = np.sort(seconds[experiment == each])
        cut = len(mine) // 20
        means.append(mine[cut : len(mine) - cut].mean())
        weights.append(np.sqrt(len(mine)))
    return float(np.average(means, weights=weights))
