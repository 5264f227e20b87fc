"""Which request was on which slot of the batch in which step: the picture of continuous batching.

An engine has no slots. In the picture a request takes the lowest free slot when it is admitted and keeps the slot until
it leaves, as vLLM's persistent batch fills its holes. Every cell follows from the replica's journal and its runs of
steps, so counting cells gives back the columns of ``steps.parquet`` (a test does).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.records import Kind

Ints = npt.NDArray[np.int64]
LEAVING = (Kind.END, Kind.PREEMPT, Kind.HANDOVER, Kind.LOST)


class Cell(IntEnum):
    """What a slot is used for in one step."""

    IDLE = 0  # no request is on it
    PREFILL = 1  # prompt tokens, or tokens computed again
    DECODE = 2  # one token from earlier ones
    STALLED = 3  # a request is on it, and nothing is computed for the request in this step
    PADDING = 4  # the answer is complete; the slot is paid for until the batch returns


GLYPHS = ".PD~#"  # of `Cell`, in text


@dataclass
class Slots:
    """The slots of one replica.

    A *stay* is the time of one request on one slot. Rows are those of the replica's runs of steps. ``first_step``
    counts the engine steps before each row, with one entry more for the total.
    """

    first_step: Ints  # Shape: (rows + 1,)
    decoding: npt.NDArray[np.bool_]  # Shape: (rows,): whether the group decodes in it
    request: Ints  # Shape: (stays,), as those below, in order of admission
    slot: Ints
    begin: Ints  # first row
    end: Ints  # row after the last
    done: Ints  # row from which on the answer is complete, `end` unless the slot was held
    ready: Ints  # row from which on it decodes, `end` if its prompt never got done
    why: Ints  # the `Kind` of event that ended the stay, -1 where the journal ends before
    chunk_stay: Ints  # Shape: (chunks,), by stay, then by row
    chunk_row: Ints
    chunk_tokens: Ints
    park_stay: Ints  # Shape: (parks,): rows in which a decoding request was left out
    park_begin: Ints
    park_end: Ints

    @property
    def count(self) -> int:
        """Slots in use at the peak."""
        return int(self.slot.max()) + 1 if len(self.slot) else 0

    def cells(self, stay: int) -> npt.NDArray[np.int8]:
        """The `Cell` of each row of one stay, shape ``(end - begin,)``."""
        begin, end = int(self.begin[stay]), int(self.end[stay])
        decoding = self.decoding[begin:end]
        found = np.full(end - begin, Cell.STALLED, dtype=np.int8)
        ready = int(self.ready[stay]) - begin
        found[ready:][decoding[ready:]] = Cell.DECODE
        low, high = np.searchsorted(self.park_stay, (stay, stay + 1))
        for i in range(low, high):
            found[self.park_begin[i] - begin : self.park_end[i] - begin] = Cell.STALLED
        low, high = np.searchsorted(self.chunk_stay, (stay, stay + 1))
        found[self.chunk_row[low:high] - begin] = Cell.PREFILL
        found[int(self.done[stay]) - begin :] = Cell.PADDING
        return found

    def grid(self) -> list[str]:
        """A line a slot, a character a step: ``.`` idle, ``P`` prefill, ``D`` decode, ``~`` stalled, ``#`` padding."""
        steps = np.diff(self.first_step)
        lines = np.full((self.count, int(self.first_step[-1])), Cell.IDLE, dtype=np.int8)
        for stay, slot in enumerate(self.slot.tolist()):
            begin, end = int(self.begin[stay]), int(self.end[stay])
            cells = np.repeat(self.cells(stay), steps[begin:end])
            lines[slot, self.first_step[begin] : self.first_step[end]] = cells
        return ["".join(GLYPHS[cell] for cell in line) for line in lines.tolist()]


def seat(events: dict[str, npt.NDArray[Any]], runs: dict[str, npt.NDArray[Any]]) -> Slots:
    """The slots of a replica, from its ``events`` and the columns ``steps`` and ``decodes`` of its ``runs``."""
    rows = len(runs["steps"])
    moves = np.flatnonzero(~np.isin(events["kind"], (Kind.ARRIVE, Kind.DENY, Kind.DROP)))
    # a plan is written down before the step in flight has ended
    order = moves[np.argsort(events["run"][moves], kind="stable")]
    columns = (events[name][order].tolist() for name in ("run", "kind", "request", "other", "value"))
    made = _Seating(rows)
    for row, kind, request, other, value in zip(*columns, strict=True):
        run = min(row, rows)  # what happens once the last step has ended may count from a step that never was
        if kind == Kind.CHUNK:
            made.chunk(run, request, value)
        elif kind == Kind.ADMIT:
            made.enter(run, request, other)
        elif kind in LEAVING:
            made.leave(run, request, kind)
        elif kind == Kind.DONE:
            made.done[made.stays[request]] = run
        elif kind == Kind.PARK:
            made.parked[request] = run
        elif kind == Kind.JOIN:
            made.unpark(run, request)
    return made.slots(runs)


class _Seating:
    """Gives slots to requests, event by event."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.stays: dict[int, int] = {}  # request → its stay under way
        self.parked: dict[int, int] = {}  # request → since which row
        self._request, self._slot, self._begin, self._end = (array("q") for _ in range(4))  # columns of `Slots`
        self.done, self._ready, self._why = (array("q") for _ in range(3))
        self._left = array("q")  # tokens to compute before it decodes
        self._chunks = array("q")
        self._parks = array("q")
        self._free: list[int] = []
        self._slots = 0
        self._entering: list[int] = []  # stays without a slot yet: slots may become free at the same boundary
        self._row = 0

    def enter(self, run: int, request: int, left: int) -> None:
        if run != self._row:
            self._sit(run)
        stay = len(self._left)
        self._request.append(request)
        self._begin.append(run)
        self._left.append(left)
        self._slot.append(-1)
        self._why.append(-1)
        for open_ended in (self._end, self.done, self._ready):
            open_ended.append(self.rows)
        self.stays[request] = stay
        self._entering.append(stay)

    def chunk(self, run: int, request: int, tokens: int) -> None:
        stay = self.stays.get(request)
        if stay is None:
            return  # the chunk was in flight when the request was preempted or its client gave up
        self._chunks.extend((stay, run, tokens))
        self._left[stay] -= tokens
        if self._left[stay] <= 0:
            self._ready[stay] = run + 1

    def leave(self, run: int, request: int, kind: int) -> None:
        if run != self._row:
            self._sit(run)
        self.unpark(run, request)
        stay = self.stays.pop(request, None)
        if stay is None:
            return  # it was waiting
        self._end[stay] = run
        self._why[stay] = kind
        for column in (self.done, self._ready):
            if column[stay] > run:
                column[stay] = run
        if (slot := self._slot[stay]) >= 0:
            heappush(self._free, slot)

    def unpark(self, run: int, request: int) -> None:
        since = self.parked.pop(request, None)
        if since is not None and request in self.stays:
            self._parks.extend((self.stays[request], since, run))

    def _sit(self, run: int) -> None:
        """Give a slot to each stay that began before row ``run``."""
        slots = self._slot
        for stay in self._entering:
            if self._end[stay] <= self._begin[stay]:
                continue  # preempted by the plan that admitted it
            if self._free:
                slots[stay] = heappop(self._free)
            else:
                slots[stay] = self._slots
                self._slots += 1
        self._entering = []
        self._row = run

    def slots(self, runs: dict[str, npt.NDArray[Any]]) -> Slots:
        for request in list(self.parked):
            self.unpark(self.rows, request)
        self._sit(self.rows)
        chunks = np.array(self._chunks, dtype=np.int64).reshape(-1, 3)
        parks = np.array(self._parks, dtype=np.int64).reshape(-1, 3)
        chunks = chunks[np.lexsort((chunks[:, 1], chunks[:, 0]))]
        parks = parks[np.lexsort((parks[:, 1], parks[:, 0]))]
        first_step = np.concatenate(([0], np.cumsum(runs["steps"], dtype=np.int64)))
        return Slots(
            first_step,
            np.asarray(runs["decodes"]) > 0,
            request=np.array(self._request, dtype=np.int64),
            slot=np.array(self._slot, dtype=np.int64),
            begin=np.array(self._begin, dtype=np.int64),
            end=np.array(self._end, dtype=np.int64),
            done=np.array(self.done, dtype=np.int64),
            ready=np.array(self._ready, dtype=np.int64),
            why=np.array(self._why, dtype=np.int64),
            chunk_stay=chunks[:, 0],
            chunk_row=chunks[:, 1],
            chunk_tokens=chunks[:, 2],
            park_stay=parks[:, 0],
            park_begin=parks[:, 1],
            park_end=parks[:, 2],
        )
