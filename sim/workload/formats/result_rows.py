"""From the requests that a benchmark measured to the trace that it sent: what the readers of result files share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import NOTHING
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.columns import codes, in_time_order, in_unit, trace_of
from chairlift.sim.workload.formats.text_tables import Table, label, whole
from chairlift.sim.workload.trace import Trace

ABSENT = object()  # in place of a value that a file does not have

_COLUMNS = ("start", "prompt", "output", "session")


def value(here: Any, *path: str) -> Any:
    """What stands at ``path`` in nested mappings; `ABSENT` where nothing does."""
    for key in path:
        if not isinstance(here, dict) or key not in here:
            return ABSENT
        here = here[key]
    return here


def first(*values: Any) -> Any:
    """The first of ``values`` that is there and not null; else `ABSENT`."""
    return next((each for each in values if each is not ABSENT and each is not None), ABSENT)


class Measured:
    """The requests of a result file, one after the other; `trace` makes the trace of them.

    A request counts as a line where the file is one document: the first is line 1.
    """

    def __init__(self, path: Path, format: str, unit: str, names: Sequence[str]) -> None:
        """``unit`` is that of start times; ``names`` say what the file calls start, prompt and output tokens."""
        self._table = Table(path)
        self._format = format
        self._unit = unit
        self._names = dict(zip(_COLUMNS, names, strict=False))
        self._table.header = [*names, "session"]
        self._lost = 0

    def add(self, line: int, start: Any, prompt: Any, output: Any, session: Any = None) -> None:
        """Add a request; a value that is `ABSENT` is refused."""
        given = dict(zip(_COLUMNS, (start, prompt, output), strict=False))
        absent = [self._names[name] for name, each in given.items() if each is ABSENT]
        for name in absent:
            self._table.refuse("is missing", line, name)
        if not absent:
            self._table.rows.append((start, prompt, output, session))
            self._table.lines.append(line)

    def lose(self, count: int = 1) -> None:
        """Leave out ``count`` requests that failed: what they would have generated is not known."""
        self._lost += count

    def refuse(self, rule: str, line: int | None = None, column: str = "", value: object = NOTHING) -> None:
        """Add a problem."""
        self._table.refuse(rule, line, column, value)

    def trace(self, limit: int | None, drop_empty: bool, notes: Sequence[str] = ()) -> Trace:
        """The trace of the first ``limit`` requests by their start; times count from the first. Raises `BadInput`."""
        table = self._table
        if not table.rows:
            if not table.problems:
                table.refuse("the file has no requests that succeeded")
            table.done()
        start, prompt, output = (self._names[name] for name in _COLUMNS[:3])
        columns: dict[str, Sequence[int]] = {
            "arrival_ps": table.parsed(start, in_unit(self._unit), 0),
            "prompt_tokens": table.parsed(prompt, whole, 1),
            "output_tokens": table.parsed(output, whole, 1),
        }
        table.done()  # the first time must be sound: all others count from it
        sessions = codes(table.parsed("session", label, ""))[0]
        if max(sessions) >= 0:
            columns["session"] = sessions
        said: list[str] = []
        columns, _ = in_time_order(table, columns, None, said)
        times = columns["arrival_ps"]
        columns["arrival_ps"] = [time - times[0] for time in times]
        if limit is not None:
            columns = {name: values[:limit] for name, values in columns.items()}
            table.rows, table.lines = table.rows[:limit], table.lines[:limit]
        told = [*notes, f"times count from the first request, at {times[0] / PS_PER_S:.3f} s in the file"]
        if self._lost:
            told.append(f"{self._lost:,} requests that failed or were cut short left out")
        theirs = {"arrival_ps": start, "prompt_tokens": prompt, "output_tokens": output}
        return trace_of(table, self._format, theirs, columns, told, drop_empty=drop_empty)
