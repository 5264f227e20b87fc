"""Slot diagrams as data for the page.

A page holds every step of a short run. Of a long one it holds a stretch step by step, and the whole in bins of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.report.slots import Cell, Slots, seat
from chairlift.sim.results.metrics import ends_ps
from chairlift.sim.results.reader import Columns, Replica, RunResults
from chairlift.sim.units import PS_PER_NS, PS_PER_S

ROWS = 100_000  # rows of runs that all diagrams of a page hold together: some 3 MB
BINS = 600  # of the whole, where it is more than a diagram holds
STEP_COLUMNS = ("start_ps", "first_ps", "slope_ps", "steps", "decodes", "waiting")


@dataclass
class Window:
    """The rows ``begin`` … ``end`` of a replica's runs that a diagram shows step by step."""

    begin: int
    end: int
    rows: int  # how many the replica has


def diagrams(run: RunResults, rows: int, span_s: tuple[float, float] | None = None) -> Iterator[dict[str, Any]]:
    """One diagram a replica that ran steps, each of at most ``rows`` rows, or those within ``span_s`` seconds."""
    for replica, steps, events in zip(run.replicas, run.steps(*STEP_COLUMNS), run.events(), strict=True):
        if len(steps["steps"]):
            slots = seat(events, steps)
            shown = window(steps, rows, span_s)
            made = diagram(replica, slots, steps, shown)
            if shown.end - shown.begin < shown.rows:
                made["overview"] = overview(slots, steps)
            yield made


def window(steps: Columns, rows: int, span_s: tuple[float, float] | None) -> Window:
    """All rows if there is room; else the rows around the longest queue, or the first ones within ``span_s``."""
    n = len(steps["steps"])
    begin, end = 0, n
    if span_s is not None:
        begin, end = (int(i) for i in np.searchsorted(steps["start_ps"], np.array(span_s) * 1e12))
        begin = max(0, begin - 1)  # the run of steps that is under way at that time
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


def overview(slots: Slots, steps: Columns) -> dict[str, Any]:
    """The whole run in `BINS` bins of time: a string of `Cell` numbers a slot, of what lasted longest in each bin.

    A stay counts as prefill until its prompt is done, then as decoding: steps in which it stalls are not told apart.
    """
    start, ends = steps["start_ps"].astype(np.float64), ends_ps(steps).astype(np.float64)
    origin, width = start[0], (ends[-1] - start[0]) / BINS
    seated = np.flatnonzero(slots.end > slots.begin)
    slot, begin = slots.slot[seated], slots.begin[seated]
    edges = [(start[begin] - origin) / width]
    for rows in (slots.ready[seated], slots.done[seated], slots.end[seated]):
        # what ends before a row ends with the row before: the replica may have been away in between
        edges.append((np.where(rows > begin, ends[np.maximum(rows, 1) - 1], start[begin]) - origin) / width)
    weight = np.zeros((len(Cell), slots.count, BINS))
    for cell, low, high in ((Cell.PREFILL, 0, 1), (Cell.DECODE, 1, 2), (Cell.PADDING, 2, 3)):
        _cover(weight[cell], slot, edges[low], edges[high])
    weight[Cell.IDLE] = 1 - weight.sum(axis=0)
    most = weight.argmax(axis=0).astype(np.uint8) + ord("0")
    return {
        "from": origin / PS_PER_S,
        "to": float(ends[-1]) / PS_PER_S,
        "cells": [line.tobytes().decode() for line in most],
    }


def _cover(weight: npt.NDArray[np.float64], line: npt.NDArray[np.int64], low: Any, high: Any) -> None:
    """Add to each bin of ``weight``, shape (lines, bins), the share of it that the spans ``low`` … ``high`` cover."""
    bins = weight.shape[1]
    for at, sign in ((low, 1.0), (high, -1.0)):  # ramps: a span is what begins at `low` less what begins at `high`
        whole = np.minimum(at.astype(np.int64), bins - 1)
        steps = np.zeros((weight.shape[0], bins + 1))
        np.add.at(steps, (line, whole), sign * (whole + 1 - at))
        np.add.at(steps, (line, whole + 1), sign * (at - whole))
        weight += np.cumsum(steps, axis=1)[:, :bins]


def _differences(values: npt.NDArray[np.int64]) -> list[int]:
    found: list[int] = np.diff(values, prepend=0).tolist()
    return found
