"""What a journal must agree with: the records of the same run, and the picture that is drawn from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.sim.replica.engine import Engine
from chairlift.sim.report.slots import Cell, Slots, seat
from chairlift.sim.results.records import Kind, Status

Columns = dict[str, Any]


def seats(engine: Engine) -> Slots:
    """The slots of a replica that kept a journal."""
    return seat(engine.records.events(), engine.records.runs())


def story(events: Columns) -> list[tuple[int, ...]]:
    """All that is written but for when: (row of runs, kind, request, other, value), as written."""
    return list(zip(*(events[c].tolist() for c in ("run", "kind", "request", "other", "value")), strict=True))


def token_times(runs: Columns, events: Columns) -> dict[int, list[int]]:
    """When each request got its tokens, by its journal and the steps' ends; every run is one step.

    A client that gives up does not get the token that is under way, nor anybody one that is nobody's.
    """
    nobodys = {(request, run) for run, kind, request, _, _ in story(events) if kind == Kind.DROP}
    assert (runs["steps"] == 1).all()
    ends = (runs["start_ps"] + runs["first_ps"]).tolist()
    decoding = (runs["decodes"] > 0).tolist()
    times: dict[int, list[int]] = {}
    left: dict[int, int] = {}  # tokens to compute before it decodes
    since: dict[int, int] = {}  # decodes from this row on
    for run, kind, request, other, value in sorted(story(events), key=lambda row: row[0]):
        got = times.setdefault(request, [])
        if kind in (Kind.PARK, Kind.PREEMPT, Kind.DONE, Kind.END):
            begin = since.pop(request, run)
            got += [ends[i] for i in range(begin, run) if decoding[i] and (request, i) not in nobodys]
        elif kind == Kind.ADMIT:
            left[request] = other
        elif kind == Kind.CHUNK:
            left[request] -= value
            if not left[request]:
                got += [ends[run]] if (request, run) not in nobodys else []
                since[request] = run + 1
        elif kind == Kind.JOIN:
            since[request] = run
    return times


def check_lives(requests: Columns, runs: Columns, events: Columns, batches: bool = False) -> Counter[int]:
    """The journal tells of each request what its row does; the gaps between tokens that follow from it.

    ``batches``: they return as a whole, so an answer comes later than its last token.
    """
    times = token_times(runs, events)
    kinds, of, at, values, row = (events[c] for c in ("kind", "request", "time_ps", "value", "run"))
    chunks = kinds == Kind.CHUNK
    assert at[chunks].tolist() == runs["start_ps"][row[chunks]].tolist()
    gaps: Counter[int] = Counter()
    for i, status in enumerate(requests["status"]):
        facts = {name: column[i] for name, column in requests.items()}
        # chunks are written down when their step is done, dropped tokens when the step before is
        mine = np.flatnonzero((of == i) & ~chunks & (kinds != Kind.DROP))
        first, last = mine[0], mine[-1]
        own = kinds[mine].tolist()
        assert (own[0], own.count(Kind.ARRIVE), at[first]) == (Kind.ARRIVE, 1, facts["arrival_ps"])
        assert (own[-1], own.count(Kind.END), at[last]) == (Kind.END, 1, facts["finished_ps"])
        assert values[last] == status
        assert own.count(Kind.PREEMPT) == facts["preemptions"]
        admitted = mine[kinds[mine] == Kind.ADMIT]
        if len(admitted):
            assert at[admitted[0]] == facts["admitted_ps"]
            assert values[admitted[0]] == facts["cached_tokens"]
        else:
            assert facts["admitted_ps"] < 0
        got = times[i]
        if status == Status.TIMED_OUT:
            got = got[: facts["emitted_tokens"]]
        assert len(got) == facts["emitted_tokens"]
        if got:
            assert got[0] == facts["first_token_ps"]
        if status == Status.FINISHED:
            assert got[-1] <= facts["finished_ps"]
            assert batches or got[-1] == facts["finished_ps"]
        gaps.update(np.diff(got).tolist())
    return gaps


def counted(slots: Slots, count: int) -> np.ndarray[Any, Any]:
    """Cells of each kind in each row, shape (rows, kinds)."""
    cells = np.zeros((count, len(Cell)), dtype=np.int64)
    for stay in range(len(slots.slot)):
        np.add.at(cells, (np.arange(slots.begin[stay], slots.end[stay]), slots.cells(stay)), 1)
    return cells


def check_slots(slots: Slots, runs: Columns, asynchronous: bool) -> None:
    """Counting the cells of each step gives its row, and nobody sits on another's slot."""
    cells = counted(slots, len(runs["steps"]))
    assert cells[:, Cell.PREFILL].tolist() == runs["chunks"].tolist()
    assert cells[:, Cell.DECODE].tolist() == runs["decodes"].tolist()
    alone = runs["chunks"] == 0  # beside a chunk `padded` holds its prompt's padding too
    assert cells[alone, Cell.PADDING].tolist() == runs["padded"][alone].tolist()
    busy = cells[:, Cell.PREFILL] + cells[:, Cell.DECODE] + cells[:, Cell.STALLED]
    if asynchronous:  # who only waits for a last token in flight counts as running there
        leaving = np.bincount(slots.end, minlength=len(busy) + 1)[: len(busy)]
        assert (busy <= runs["running"]).all()
        assert (runs["running"] <= busy + leaving).all()
    else:
        assert busy.tolist() == runs["running"].tolist()
    tokens = np.zeros(len(busy), dtype=np.int64)
    np.add.at(tokens, slots.chunk_row, slots.chunk_tokens)
    assert tokens.tolist() == runs["prefill_tokens"].tolist()
    _check_seats(slots)


def _check_seats(slots: Slots) -> None:
    """No two on one slot at once, and nobody on a higher slot while a lower one is free as they sit down."""
    taken: dict[int, int] = {}
    for stay in range(len(slots.slot)):
        begin, slot = int(slots.begin[stay]), int(slots.slot[stay])
        if slots.end[stay] <= begin:
            continue
        assert taken.get(slot, 0) <= begin
        assert all(taken.get(lower, 0) > begin for lower in range(slot))
        taken[slot] = int(slots.end[stay])


class Steady(Backend):
    """Every step takes 1000 ps."""

    def step(self, batch: Batch) -> StepCost:
        return StepCost(1000)
