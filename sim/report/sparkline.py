"""The load of a run in one line of text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chairlift.sim.units import PS_PER_S

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters of a sparkline


def sparkline(values: npt.NDArray[np.float64]) -> str:
    """One block a value, the highest for the largest; a space where there is nothing at all."""
    top = float(values.max()) if len(values) else 0.0
    if top <= 0:
        return " " * len(values)
    level = np.minimum((values / top * len(BLOCKS)).astype(int), len(BLOCKS) - 1)
    return "".join(" " if v <= 0 else BLOCKS[i] for v, i in zip(values.tolist(), level.tolist(), strict=True))


def inside(
    arrival_ps: npt.NDArray[np.int64], finished_ps: npt.NDArray[np.int64], bins: int = WIDTH
) -> npt.NDArray[np.float64]:
    """How many requests were in the system, on average over each of ``bins`` equal parts of the run."""
    begin, end = float(arrival_ps.min()), float(max(finished_ps.max(), arrival_ps.min() + 1))
    edges = np.linspace(begin, end, bins + 1) / PS_PER_S
    area = np.zeros(bins + 1)
    for times, sign in ((arrival_ps, 1.0), (finished_ps, -1.0)):  # the integral of a step is a ramp
        ordered = np.sort(times / PS_PER_S)
        so_far = np.concatenate(([0.0], np.cumsum(ordered)))
        count = np.searchsorted(ordered, edges)
        area += sign * (count * edges - so_far[count])
    level: npt.NDArray[np.float64] = np.maximum(np.diff(area), 0) / (edges[1] - edges[0])
    return np.where(level < 1e-6, 0.0, level)
