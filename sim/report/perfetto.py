"""A run as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing.

Each replica is a process: a track of engine steps, a track a slot, counters; a request is an asynchronous slice from
its arrival to its end, and a flow through the slots that it had. Times are microseconds.
Source: Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.sim.atomic import writing
from chairlift.sim.report.slots import Cell, Slots, seat
from chairlift.sim.results.metrics import ends_ps
from chairlift.sim.results.reader import Columns, Results, RunResults
from chairlift.sim.results.records import Kind, Status
from chairlift.sim.units import PS_PER_S, PS_PER_US
from chairlift.sim.workload.trace import LATEST_PS

Event = dict[str, Any]

STEPS_TRACK = 0  # slots follow from 1 on
COLUMNS = (
    *("start_ps", "first_ps", "slope_ps", "steps", "chunks", "prefill_tokens", "decodes", "padded", "running"),
    *("waiting", "held_blocks"),
)
NAMES = {Cell.PREFILL: "prefill", Cell.DECODE: "decode", Cell.STALLED: "stalled", Cell.PADDING: "padding"}
HUES = {"prefill": "thread_state_runnable", "decode": "thread_state_running", "padding": "terrible"}


def write(results: Results, runs: list[RunResults], path: Path, span_s: tuple[float, float] | None = None) -> int:
    """Write ``runs`` as one trace, ``.gz`` compressed by name; how many events. Raises OSError.

    ``span_s`` leaves out what ends before or begins after those seconds.
    """
    count = 0
    low, high = (0, LATEST_PS) if span_s is None else (int(min(s * PS_PER_S, LATEST_PS)) for s in span_s)
    with writing(path) as file:
        file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps({"scenario": results.name}) + ',"traceEvents":[')
        process = 0
        for run in runs:
            for event in _run(run, process, low, high):
                file.write(("," if count else "") + "\n" + json.dumps(event, separators=(",", ":")))
                count += 1
            process += len(run.replicas) + 1
        file.write("\n]}\n")
    return count


def _run(run: RunResults, process: int, low: int, high: int) -> Iterator[Event]:
    label = f" ({run.label})" if run.label else ""
    yield _meta("process_name", process, 0, f"requests{label}")
    yield from _requests(run, process, low, high)
    journals = run.events() if run.has_events else iter([None] * len(run.replicas))
    flows = _Flows(process)
    for replica, steps, events in zip(run.replicas, run.steps(*COLUMNS), journals, strict=True):
        pid = process + 1 + replica.index
        role = "" if replica.role == "mixed" else f" {replica.role}"
        yield _meta("process_name", pid, 0, f"replica {replica.index}{role}{label}")
        yield _meta("thread_name", pid, STEPS_TRACK, "steps")
        within = slice(*(int(i) for i in np.searchsorted(ends_ps(steps), (low, high))))
        yield from _steps({name: column[within] for name, column in steps.items()}, pid)
        if events is not None:
            yield from _slots(seat(events, steps), steps, within, pid, flows)
    yield from flows.events()


def _requests(run: RunResults, pid: int, low: int, high: int) -> Iterator[Event]:
    columns = run.requests("arrival_ps", "finished_ps", "status", "prompt_tokens", "output_tokens")
    here = np.flatnonzero((columns["arrival_ps"] <= high) & (columns["finished_ps"] >= low))
    rows = zip(here.tolist(), *(column[here].tolist() for column in columns.values()), strict=True)
    for i, arrival, finished, status, prompt, output in rows:
        same: Event = {"cat": "request", "id": f"{pid}.{i}", "pid": pid, "tid": 0, "name": f"request {i}"}
        args = {"prompt_tokens": prompt, "output_tokens": output, "status": Status(status).name.lower()}
        yield {"ph": "b", "ts": arrival / PS_PER_US, **same, "args": args}
        yield {"ph": "e", "ts": finished / PS_PER_US, **same}


def _steps(steps: Columns, pid: int) -> Iterator[Event]:
    ends = ends_ps(steps).tolist()
    names = [name for name in COLUMNS if name not in ("first_ps", "slope_ps")]
    rows = list(zip(*(steps[name].tolist() for name in names), strict=True))
    for k, row in enumerate(rows):
        of = dict(zip(names, row, strict=True))
        start, end = of.pop("start_ps"), ends[k]
        what = " + ".join(
            [f"{of['prefill_tokens']} prompt tokens"] * (of["chunks"] > 0)
            + [f"{of['decodes']} decodes"] * (of["decodes"] > 0)
        )
        times = f" × {of['steps']} steps" if of["steps"] > 1 else ""
        args = {name: of[name] for name in ("steps", "chunks", "prefill_tokens", "decodes", "padded")}
        yield _slice((what or "padding") + times, "step", pid, STEPS_TRACK, start, end, args)
        idle = k + 1 == len(rows) or rows[k + 1][0] > end
        for name in ("running", "waiting", "held_blocks"):
            yield _counter(name, pid, start, of[name])
            if idle and name != "waiting":
                yield _counter(name, pid, end, 0)


def _slots(slots: Slots, steps: Columns, within: slice, pid: int, flows: _Flows) -> Iterator[Event]:
    for slot in range(slots.count):
        yield _meta("thread_name", pid, slot + 1, f"slot {slot}")
    starts, ends = steps["start_ps"], ends_ps(steps)
    seated = (slots.end > slots.begin) & (slots.end > within.start) & (slots.begin < within.stop)
    for stay in np.flatnonzero(seated).tolist():
        begin, end = int(slots.begin[stay]), int(slots.end[stay])
        request, track = int(slots.request[stay]), int(slots.slot[stay]) + 1
        cells = slots.cells(stay)
        idle = starts[begin + 1 : end] > ends[begin : end - 1]
        edges = np.flatnonzero((np.diff(cells) != 0) | (cells[1:] == Cell.PREFILL) | idle) + 1
        for low, high in zip([0, *edges.tolist()], [*edges.tolist(), end - begin], strict=True):
            name = NAMES[Cell(cells[low])]
            start, finish = int(starts[begin + low]), int(ends[begin + high - 1])
            tokens = int(slots.first_step[begin + high] - slots.first_step[begin + low])
            if begin + high <= within.start or begin + low >= within.stop:
                continue
            yield _slice(f"{request} {name}", name, pid, track, start, finish, {"request": request, "steps": tokens})
            flows.pass_by(request, pid, track, start, finish)
        if slots.why[stay] in (Kind.PREEMPT, Kind.LOST) and within.start < end <= within.stop:
            word = "preempted" if slots.why[stay] == Kind.PREEMPT else "lost"
            at = int(ends[end - 1]) / PS_PER_US
            yield {
                "ph": "i",
                "s": "t",
                "ts": at,
                "pid": pid,
                "tid": track,
                "name": f"{request} {word}",
                "cat": "request",
            }


class _Flows:
    """Arrows from a request's first slice through the beginnings of its stays to its last."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._slices: dict[int, list[tuple[int, int, int, int]]] = {}

    def pass_by(self, request: int, pid: int, track: int, start: int, end: int) -> None:
        """Note a slice; those within one stay follow each other on a track and need no arrow but the last."""
        seen = self._slices.setdefault(request, [])
        if len(seen) > 1 and seen[-1][:2] == (pid, track) == seen[-2][:2]:
            seen.pop()
        seen.append((pid, track, start, end))

    def events(self) -> Iterator[Event]:
        """The arrows of all requests that have two slices or more."""
        for request, slices in self._slices.items():
            slices.sort(key=lambda each: each[2])
            for k, (pid, track, start, end) in enumerate(slices if len(slices) > 1 else []):
                phase: Event = (
                    {"ph": "s"} if k == 0 else {"ph": "f", "bp": "e"} if k == len(slices) - 1 else {"ph": "t"}
                )
                at = (start + end) / 2 / PS_PER_US  # inside the slice that it binds to
                flow = f"{self._process}.{request}"
                yield {**phase, "ts": at, "pid": pid, "tid": track, "cat": "flow", "name": "request", "id": flow}


def _slice(name: str, kind: str, pid: int, tid: int, start: int, end: int, args: dict[str, Any]) -> Event:
    event: Event = {"ph": "X", "name": name, "cat": kind, "ts": start / PS_PER_US, "dur": (end - start) / PS_PER_US}
    event |= {"pid": pid, "tid": tid, "args": args}
    if kind in HUES:
        event["cname"] = HUES[kind]
    return event


def _counter(name: str, pid: int, at: int, value: int) -> Event:
    return {"ph": "C", "name": name, "ts": at / PS_PER_US, "pid": pid, "tid": 0, "args": {name: value}}


def _meta(name: str, pid: int, tid: int, value: str) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {"name": value}}
