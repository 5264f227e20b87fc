"""How far a profile is off the recorded steps, one step at a time, by regime.

Each step is predicted from the recorded past: from when it and the next step were scheduled, and when the output before
it came. What is left to predict is what the profile says: GPU time, launches, and how they overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chairlift.backend.calibrated.profile import HOST, QUANTILES, REGIMES, GpuTime, HostTime, Spread
from chairlift.backend.fitting.steps import (
    GRAPH,
    SURE,
    WORKERS_S,
    Bools,
    Floats,
    Steps,
    at_floor,
    chunk_times,
    decode_times,
    launch_times,
    own_launches,
    predicted,
    without_floors,
)

LENGTHS_S = (0.008, 0.016, 0.032, 0.064)  # classes of length: steps of each are off by factors of their own
FEWEST = 10  # steps that a run must have of a length to count there


@dataclass(frozen=True)
class Foreseen:
    """A value a step: seconds from the output before it (after idling: from its scheduling) to its own output."""

    predicted: Floats
    recorded: Floats
    regime: npt.NDArray[np.int64]
    experiment: npt.NDArray[np.int64]

    @property
    def error(self) -> Floats:
        """Predicted over recorded, less one."""
        found: Floats = self.predicted / self.recorded - 1
        return found


def foresee(gpu: GpuTime, host: HostTime, steps: Steps) -> Foreseen:
    """Predict every step's duration from what was recorded before it."""
    gpu_s = predicted(gpu, steps)
    launch = np.array([host.graph_s, host.piecewise_s, host.eager_s])[steps.kind]
    begun = steps.schedule + steps.schedule_cpu
    ends = begun + launch
    n = len(steps)
    follows = ~steps.last & ~np.append(steps.woke[1:], True)
    durations = np.empty(n)
    gpu_end = -np.inf
    done_before = 0.0
    columns = (begun, ends, gpu_s, steps.singly, steps.woke | steps.first, steps.done, steps.schedule, follows)
    table = zip(*(c.tolist() for c in columns), strict=True)
    later = np.append(ends[1:], np.inf).tolist()
    for i, (start, end, work, singly, fresh, done, scheduled, more) in enumerate(table):
        if fresh:
            gpu_end = -np.inf
        else:
            end = min(end, done_before)  # the launch ends before the output of the step before is processed
        if singly:
            gpu_end = max(max(gpu_end, min(start, end) + host.head_s) + work, end + host.tail_s)
        else:
            gpu_end = max(gpu_end, end) + work
        foreseen = max(gpu_end, later[i]) if more else gpu_end
        durations[i] = foreseen - scheduled if fresh else max(foreseen - done_before, host.update_s)
        # What is known once the output has come: the GPU had ended by then, and only then unless a launch ended later.
        gpu_end = done if not more or gpu_end >= later[i] else min(gpu_end, done)
        done_before = done
    past = np.where(steps.woke | steps.first, steps.schedule, np.concatenate([[0.0], steps.done[:-1]]))
    told = ~steps.stalled
    return Foreseen(durations[told], (steps.done - past)[told], steps.regime[told], steps.experiment[told])


def on_gpu(gpu: GpuTime, host: HostTime, steps: Steps) -> Foreseen:
    """GPU times alone, of the steps that show theirs.

    On an idle engine the time begins with the launch, and nothing shows when that ended: in a slow spell of the host it
    takes 1.6 times as long as usual. So a step tells of the GPU there only if no launch takes as long.
    """
    gpu_s = predicted(gpu, steps)
    decode_s = np.where(steps.kind == GRAPH, gpu_s, 0.0)
    typical = np.array([host.graph_s, host.piecewise_s, host.eager_s])
    shown = launch_times(steps, gpu_s, np.tile(typical, (int(steps.experiment.max()) + 1, 1)), host.head_s)
    launch = own_launches(steps, *shown, typical)
    rows, seconds = decode_times(steps, launch)
    chunk_rows, chunk_seconds, led = chunk_times(steps, decode_s, launch)
    longer = ~led | steps.gpu_known | (chunk_seconds > SURE * launch[steps.experiment, steps.kind][chunk_rows])
    chunk_rows, chunk_seconds = chunk_rows[longer], (chunk_seconds - host.head_s * led)[longer]
    chunk_seconds = np.maximum(chunk_seconds, 1e-6)
    both, times = np.concatenate([rows, chunk_rows]), np.concatenate([seconds, chunk_seconds])
    shown = ~by_workers(gpu, host, steps)[both]
    both, times = both[shown], times[shown]
    return Foreseen(gpu_s[both], times, steps.regime[both], steps.experiment[both])


def by_workers(gpu: GpuTime, host: HostTime, steps: Steps) -> Bools:
    """Which steps take as long as worker processes need to launch them, so that they tell nothing of the GPU.

    Workers launch one step after the other. They are done after the GPU where its work is shorter than the floor of its
    kind, and where nothing hides a launch: on an idle engine, and behind a step that was launched in the same way.
    Behind a whole graph a launch goes on while that runs.
    """
    work = without_floors(gpu, steps)
    launch = np.array([host.graph_s, host.piecewise_s, host.eager_s])[steps.kind] + host.tail_s
    behind = np.concatenate([[False], (steps.kind != GRAPH)[:-1]]) & ~steps.woke
    ruled = (behind & (work < launch)) | (steps.woke & (host.head_s + work < launch)) | at_floor(gpu, steps)
    found: Bools = (steps.chunks > 0) & (host.eager_s < WORKERS_S) & ruled
    return found


def pace(host: HostTime, steps: Steps) -> float:
    """How many times as long as ``host`` says the engine's host took for its own work, by its time to schedule chunks.

    A host has days and hours: other work on its cores slows all that it does, scheduling and launching alike. The worst
    and the best twentieth of the steps are left out.
    """
    told = np.sort(paces(host, steps)[1])
    cut = len(told) // 20
    return float(told[cut : len(told) - cut].mean()) if len(told) else 1.0


def paces(host: HostTime, steps: Steps) -> tuple[Floats, Floats]:
    """When each step with chunks was scheduled, seconds, and how many times as long as ``host`` says that took."""
    mine = (steps.chunks > 0) & ~steps.stalled
    usual = host.schedule_s + host.schedule_request_s * steps.sequences + host.schedule_token_s * steps.prompt
    usual += host.schedule_chunk_s * steps.chunks
    return steps.schedule[mine], (steps.schedule_cpu / np.maximum(usual, 1e-9))[mine]


def summary(foreseen: list[Foreseen]) -> dict[str, dict[str, float]]:
    """Of each regime: the number of steps, median and 95th percentile of the absolute relative error, and the bias.

    The bias (``total``) is that of the summed time.
    """
    found = {}
    error = np.concatenate([f.error for f in foreseen])
    regime = np.concatenate([f.regime for f in foreseen])
    ours, theirs = (np.concatenate([getattr(f, c) for f in foreseen]) for c in ("predicted", "recorded"))
    for i, name in enumerate(REGIMES):
        mine = regime == i
        if mine.any():
            off = np.abs(error[mine])
            found[name] = {
                "steps": int(mine.sum()),
                "median": round(float(np.median(off)), 5),
                "p95": round(float(np.quantile(off, 0.95)), 5),
                "total": round(float(ours[mine].sum() / theirs[mine].sum() - 1), 5),
            }
    return found


def launches(gpu: GpuTime, host: HostTime, steps: Steps) -> Foreseen:
    """Launches alone, of the steps with chunks that show theirs; none where worker processes launch."""
    typical = np.array([host.graph_s, host.piecewise_s, host.eager_s])
    usual = np.tile(typical, (int(steps.experiment.max()) + 1, 1))
    rows, seconds = launch_times(steps, predicted(gpu, steps), usual, host.head_s)
    mine = (steps.chunks[rows] > 0) & (max(gpu.piecewise_floor_s, gpu.eager_floor_s) == 0)
    rows, seconds = rows[mine], seconds[mine]
    return Foreseen(typical[steps.kind[rows]], seconds, steps.regime[rows], steps.experiment[rows])


def spreads(
    foreseen: Sequence[Foreseen], on_gpu: Sequence[Foreseen], launched: Sequence[Foreseen]
) -> dict[str, list[Spread]]:
    """How far off predictions are, by cause where that shows: GPU times by regime, and launches.

    Each argument has one a run: of `foresee`, `on_gpu` and `launches`. Where no launch shows, it is whole steps.
    """
    known = [_off(each.predicted, each.recorded) for each in launched if len(each.recorded) >= FEWEST]
    if not known:
        return spread(foreseen)
    return {**spread(on_gpu), HOST: [_spread(None, known)]}


def spread(foreseen: Sequence[Foreseen]) -> dict[str, list[Spread]]:
    """How far off predictions are, by regime and by how long a step was predicted to take; ``foreseen`` has one a run.

    A run's factor is the ratio of its summed times. Its spread is taken around 1, where the fit put it, not around the
    mean of a handful of runs. What is left of a step's error after its run's factor is the step's own.
    """
    found: dict[str, list[Spread]] = {}
    for i, regime in enumerate(REGIMES):
        for j, upto in enumerate((*LENGTHS_S, None)):
            runs = []
            for each in foreseen:
                mine = (each.regime == i) & (np.searchsorted(LENGTHS_S, each.predicted) == j)
                if mine.sum() >= FEWEST:
                    runs.append(_off(each.predicted[mine], each.recorded[mine]))
            if runs:
                found.setdefault(regime, []).append(_spread(upto, runs))
    return found


def _off(told: Floats, recorded: Floats) -> tuple[float, Floats]:
    """The logarithm of a run's factor, and those of its steps relative to it."""
    ratio = recorded.sum() / told.sum()
    return float(np.log(ratio)), np.log(recorded / told / ratio)


def _spread(upto: float | None, runs: Sequence[tuple[float, Floats]]) -> Spread:
    rms = math.sqrt(sum(log**2 for log, _ in runs) / len(runs))
    steps = np.quantile(np.concatenate([logs for _, logs in runs]), QUANTILES).round(5).tolist()
    return {"upto_s": upto, "runs": len(runs), "rms": round(rms, 5), "steps": steps}
