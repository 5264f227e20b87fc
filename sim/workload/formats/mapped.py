"""Anybody's file with a row a request: CSV, JSON lines, or one JSON document of lists, whose columns a user names.

Times may be numbers or wall-clock times like ``2023-11-16T18:17:03.97Z``. Numbers are Unix times, whose unit shows in
their size, or count from anywhere, and then their unit must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.workload.formats import foreign
from chairlift.sim.workload.formats.columns import (
    UNITS,
    codes,
    in_time_order,
    in_unit,
    tenant_codes,
    trace_of,
    unit_note,
)
from chairlift.sim.workload.formats.text_tables import (
    Table,
    blank,
    decimal,
    first_line,
    head,
    label,
    read_csv,
    read_json_document,
    read_json_lines,
    stamp_ps,
    whole,
    whole_or,
)
from chairlift.sim.workload.trace import Trace

COLUMNS = {  # of a Trace, and the option that names the file's column
    "arrival_ps": "--arrival",
    "prompt_tokens": "--prompt",
    "output_tokens": "--output",
    "max_tokens": "--max-tokens",
    "priority": "--priority",
    "tenant": "--tenant",
    "session": "--session",
}
# Sizes of Unix times from 1973 to 5138, by their unit.
_UNIX = {"s": (10**8, 10**11), "ms": (10**11, 10**14), "us": (10**14, 10**17), "ns": (10**17, 10**19)}


def read(
    path: Path,
    named: Mapping[str, str],
    time_unit: str | None = None,
    limit: int | None = None,
    drop_empty: bool = False,
) -> Trace:
    """The trace in a file, its rows brought in order of time; time 0 is the first request.

    Args:
        path: a file, possibly gzipped.
        named: columns of a `Trace`, keys of `COLUMNS`, and what the file calls each. ``prompt_tokens`` and
            ``output_tokens`` are needed. Without ``arrival_ps`` all requests arrive at time 0. Keys within keys of JSON
            are written with dots: ``usage.prompt_tokens``.
        time_unit: of arrivals that are numbers, a key of `UNITS`; None: told from Unix times.
        limit: rows to read at most.
        drop_empty: leave out rows without prompt or output tokens, instead of refusing them.

    Raises:
        BadInput: the file cannot be read or is no such table, lacks a column, or has wrong rows; twenty are listed.
    """
    table = _table(path, list(dict.fromkeys(named.values())), limit)
    notes: list[str] = []
    columns: dict[str, Sequence[int]] = {}
    rest: dict[str, Any] = {}
    for name in ("prompt_tokens", "output_tokens"):
        columns[name] = table.parsed(named[name], whole_or(0) if drop_empty else whole, 1)
    for name in ("max_tokens", "priority"):
        if name in named:
            columns[name] = table.parsed(named[name], whole, 1)
    if "tenant" in named:
        columns["tenant"], rest["tenants"] = tenant_codes(table.parsed(named["tenant"], label, ""))
    if "session" in named:
        columns["session"] = codes(table.parsed(named["session"], label, ""))[0]
    if "arrival_ps" in named:
        columns["arrival_ps"] = _times(table, named["arrival_ps"], time_unit, notes)
    else:
        columns["arrival_ps"] = [0] * len(table.rows)
        notes.append("no times: all requests arrive at once, unless a scenario gives arrivals or clients")
    columns, _ = in_time_order(table, columns, None, notes)
    return trace_of(table, "imported", dict(named), columns, notes, drop_empty=drop_empty, **rest)


def _table(path: Path, wanted: list[str], limit: int | None) -> Table:
    """The columns ``wanted`` of a file, and the names of the others. Raises `BadInput` if it is no such table."""
    start = head(path)
    if not start.strip():
        raise BadInput(Problem("the file is empty", file=str(path)))
    if (what := foreign.kind(start, tables=False)) is not None:
        raise BadInput(Problem(f"this is {what}", file=str(path)))
    if not first_line(start).startswith(("{", "[")):
        table = read_csv(path, limit, foreign.delimiter(start))
        table.require(*wanted)
        return table
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    for line, row in read_json_lines(path, limit):
        if isinstance(row, str):
            problems.append((line, row))
            if not rows:
                break  # one document over many lines, or no JSON at all
        else:
            rows.append((line, row))
    if not rows or (len(rows) == 1 and any(isinstance(_at(rows[0][1], name), list) for name in wanted)):
        return _of_document(path, wanted, limit)
    table = Table(path)
    for line, rule in problems:
        table.refuse(rule, line)
    table.header = wanted
    seen = dict.fromkeys(key for _, row in rows for key in row)
    table.others = [key for key in seen if not any(name == key or name.startswith(f"{key}.") for name in wanted)]
    flat = list(dict.fromkeys(key for _, row in rows[:100] for key in foreign.flat(row)))
    for name in wanted:
        if all(_at(row, name) is None for _, row in rows):
            table.refuse(f"missing key{did_you_mean(name, flat)}", rows[0][0], name)
    table.done()
    table.rows = [[_at(row, name) for name in wanted] for _, row in rows]
    table.lines = [line for line, _ in rows]
    return table


def _of_document(path: Path, wanted: list[str], limit: int | None) -> Table:
    """The columns of a JSON document: of a list of rows, or of lists, one number a request."""
    document = read_json_document(path)
    table = Table(path)
    lists: dict[str, Any]
    if isinstance(document, list) and document and all(isinstance(row, dict) for row in document):
        rows = document[:limit]
        known = list(dict.fromkeys(key for row in rows[:100] for key in foreign.flat(row)))
        missing = [name for name in wanted if all(_at(row, name) is None for row in rows)]
        table.rows = [[_at(row, name) for name in wanted] for row in rows]
    elif isinstance(document, dict):
        known = [key for key, value in foreign.flat(document).items() if isinstance(value, list)]
        lists = {name: _at(document, name) for name in wanted}
        missing = [name for name, values in lists.items() if not isinstance(values, list)]
        if not missing:
            counts = {name: len(values) for name, values in lists.items()}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{name} {count}" for name, count in counts.items())
                raise BadInput(Problem(f"these lists must be of one length ({told})", file=str(path)))
            table.rows = list[Sequence[Any]](zip(*lists.values(), strict=True))[:limit]
            table.others = [key for key in known if key not in wanted]
    else:
        raise BadInput(Problem("must be a list of requests, or lists of their numbers", file=str(path)))
    if missing:
        raise BadInput([Problem(f"missing key{did_you_mean(name, known)}", str(path), None, name) for name in missing])
    if not table.rows:
        raise BadInput(Problem("the file has no rows", file=str(path)))
    table.header = wanted
    table.lines = list(range(1, len(table.rows) + 1))
    return table


def _at(row: Mapping[str, Any], name: str) -> Any:
    """What ``row`` has under ``name``: a key, or keys within keys with dots between; None if it has nothing there."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    return _at(inner, rest) if dot and isinstance(inner, dict) else None


def _times(table: Table, column: str, unit: str | None, notes: list[str]) -> list[int]:
    """The cells of ``column`` as picoseconds from the earliest on. Raises `BadInput` if no unit is told."""
    cells = table.cells(column)
    sample = next((cell for cell in cells if not blank(cell)), "")
    if isinstance(sample, str) and "-" in sample.strip()[1:] and ":" in sample:
        if unit is not None:
            rule = "must not be given for wall-clock times, which say their unit"
            raise BadInput(Problem(rule, table.file, None, "--time-unit", unit))
        parse: Callable[[Any], int] = _stamp
    else:
        found = unit or _unix_unit(table, column, cells)
        notes.append(unit_note(column, found, "as asked for" if unit else "for Unix times of this size are"))
        parse = in_unit(found)
    times = table.parsed(column, parse, 0)
    sound = [time for time, good in zip(times, table.sound(), strict=True) if good]
    table_start = min(sound, default=0)
    notes.append(f"time 0 is the earliest, {cells[times.index(table_start)] if sound else 'none'}")
    return [max(0, time - table_start) for time in times]


def _stamp(cell: Any) -> int:
    if not isinstance(cell, str):
        raise ValueError("must be a time like 2023-11-16T18:17:03.97Z")
    return stamp_ps(cell)


def _unix_unit(table: Table, column: str, cells: Sequence[Any]) -> str:
    """The unit of Unix times. Raises `BadInput` if the numbers are none."""
    numbers = []
    for cell in cells:
        try:
            numbers.append(abs(decimal(cell)))
        except ValueError:
            continue  # refused with its line, once the unit is known
    if not numbers:
        rule = "must hold numbers, or times like 2023-11-16T18:17:03.97Z"
        raise BadInput(Problem(rule, table.file, None, column, cells[0]))
    low, high = min(numbers), max(numbers)
    for unit, (least, most) in _UNIX.items():
        if least <= low and high < most:
            return unit
    rule = (
        f"numbers from {_short(low)} to {_short(high)} are no Unix times: say their unit, --time-unit {'|'.join(UNITS)}"
    )
    raise BadInput(Problem(rule, table.file, None, column))


def _short(number: Decimal) -> str:
    return f"{number.normalize():f}" if abs(number) < 10**15 else f"{number:.6g}"
