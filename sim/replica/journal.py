"""Who did what in which step: a journal of a replica's requests, for pictures and explanations.

The records of a replica say what each step held, not who. A journal has a row for everything that happens to a request
and is not implied by the rows before it: an arrival, an admission, a chunk, a preemption. Decode steps are implied, so
a journal has a handful of rows a request, however long the answer. In three steps: A is admitted and its prompt
computed in row 0 of the runs (ADMIT, CHUNK), decodes in rows 1 and 2 (nothing is written), and has its answer with row
2 (END, row 3: the row from which on it counts).

A journal only hears what happens: a run with one and a run without have the same results. Its times are those of the
clock, which is the wall clock where steps really run; the microsecond that a row takes is then part of what is
measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from chairlift.sim.results.records import EVENT_COLUMNS, Kind, RunRecords

PACK_EVENT = Struct(f"{len(EVENT_COLUMNS)}q").pack


class Journal:
    """Writes events beside the ``records`` of one replica."""

    def __init__(self, records: RunRecords) -> None:
        self._records = records

    @property
    def row(self) -> int:
        """The next row of this replica's runs."""
        return len(self._records.rows)

    def write(self, now: int, row: int, kind: Kind, request: int, other: int, value: int) -> None:
        """Add one row, of which `EVENT_COLUMNS` has the meaning."""
        self._records.event_rows.frombytes(PACK_EVENT(now, row, kind, request, other, value))

    def noted(self, now: int, row: int, notes: Iterable[tuple[Kind, int, int, int]]) -> None:
        """Write down what a policy did in one plan, whose ``row`` is to come: kind, request, other, value."""
        for note in notes:
            self.write(now, row, *note)

    def arranged(self, now: int, row: int, before: list[int], parked: list[int]) -> None:
        """Write down who is left out of the decodes (``parked``), and who is taken in again (of ``before``)."""
        for i in parked:
            if i not in before:
                self.write(now, row, Kind.PARK, i, -1, 0)
        for i in before:
            if i not in parked:
                self.write(now, row, Kind.JOIN, i, -1, 0)
