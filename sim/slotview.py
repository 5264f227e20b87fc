"""Slot diagrams as data for the page: every step where there is room, a stretch of them and the whole binned if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.results import Columns, Replica, RunResults
from sim.slots import Slots, seat

PS_PER_NS = 1000
ROWS = 150_000  # rows of runs on a page, all diagrams together: some 3 MB before compression
STEP_COLUMNS = ("start_ps", "first_ps", "slope_ps", "steps", "decodes", "waiting")


@dataclass
class Window:
    """The rows ``begin`` … ``end`` of a replica's runs that a diagram shows step by step."""

    begin: int
    end: int
    rows: int  # that there are


def diagrams(run: RunResults, rows: int, span_s: tuple[float, float] | None = None) -> Iterator[dict[str, Any]]:
    """One diagram a replica that ran steps, each of at most ``rows`` rows, or those within ``span_s`` seconds."""
    for replica, steps, events in zip(run.replicas, run.steps(*STEP_COLUMNS), run.events(), strict=True):
        if len(steps["steps"]):
            slots = seat(events, steps)
            yield diagram(replica, slots, steps, window(steps, rows, span_s))


def window(steps: Columns, rows: int, span_s: tuple[float, float] | None) -> Window:
    """All rows if there is room; else those around the longest queue, or the first within ``span_s``."""
    n = len(steps["steps"])
    begin, end = 0, n
    if span_s is not None:
        begin, end = (int(i) for i in np.searchsorted(steps["start_ps"], np.array(span_s) * 1e12))
        begin = max(0, begin - 1)  # the run under way at that time
        end = max(end, begin + 1)
    if end - begin > rows:
        if span_s is None:
            begin = min(max(0, int(np.argmax(steps["waiting"])) - rows // 2), n - rows)
        end = begin + rows
    return Window(begin, end, n)


def diagram(replica: Replica, slots: Slots, steps: Columns, shown: Window) -> dict[str, Any]:
    """What the page draws a replica's slots from: integers, each the difference to the one before where marked (d)."""
    begin, end = shown.begin, shown.end
    start = steps["start_ps"][begin:end] // PS_PER_NS
    stays = np.flatnonzero((slots.end > begin) & (slots.begin < end) & (slots.end > slots.begin))
    index = np.full(len(slots.slot), -1)
    index[stays] = np.arange(len(stays))

    def rows(values: npt.NDArray[np.int64]) -> list[int]:
        found: list[int] = (np.clip(values, begin, end) - begin).tolist()
        return found

    chunks = (index[slots.chunk_stay] >= 0) & (slots.chunk_row >= begin) & (slots.chunk_row < end)
    parks = (index[slots.park_stay] >= 0) & (slots.park_end > begin) & (slots.park_begin < end)
    begins = np.clip(slots.begin[stays], begin, end) - begin
    return {
        "replica": replica.index,
        "role": replica.role,
        "slots": slots.count,
        "limit": replica.sequence_limit,
        "rows": shown.rows,
        "begin": begin,
        "step": int(slots.first_step[begin]),
        "start": _differences(start),  # ns (d)
        "first": (steps["first_ps"][begin:end] // PS_PER_NS).tolist(),  # ns
        "slope": steps["slope_ps"][begin:end].tolist(),  # ps
        "steps": steps["steps"][begin:end].tolist(),
        "decoding": slots.decoding[begin:end].astype(int).tolist(),
        "stay": {
            "request": slots.request[stays].tolist(),
            "slot": slots.slot[stays].tolist(),
            "begin": _differences(begins),  # (d)
            "length": (np.clip(slots.end[stays], begin, end) - begin - begins).tolist(),
            "ready": rows(slots.ready[stays]),
            "done": rows(slots.done[stays]),
            "why": np.where(slots.end[stays] <= end, slots.why[stays], -1).tolist(),
        },
        "chunk": {
            "stay": _differences(index[slots.chunk_stay[chunks]]),  # (d)
            "row": (slots.chunk_row[chunks] - begin).tolist(),
            "tokens": slots.chunk_tokens[chunks].tolist(),
        },
        "park": {
            "stay": index[slots.park_stay[parks]].tolist(),
            "begin": rows(slots.park_begin[parks]),
            "end": rows(slots.park_end[parks]),
        },
    }


def _differences(values: npt.NDArray[np.int64]) -> list[int]:
    found: list[int] = np.diff(values, prepend=0).tolist()
    return found
