"""From the cells of a table to the columns of a trace: what the readers of all formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import compress
from typing import Any

import numpy as np

from chairlift.sim.units import PS_PER_MS, PS_PER_S, PS_PER_US
from chairlift.sim.workload.formats.text_tables import Table, blank, decimal, whole
from chairlift.sim.workload.trace import LATEST_PS, HashIds, Trace, faults

UNITS = {"s": PS_PER_S, "ms": PS_PER_MS, "us": PS_PER_US, "ns": 1000}  # picoseconds
_UNIT_WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_LONGEST = {"arrival_ps": "must be within 106 days of time 0", "think_ps": "must be at most 106 days"}


def trace_of(
    table: Table,
    format: str,
    theirs: Mapping[str, str],
    columns: Mapping[str, Sequence[int]],
    notes: Sequence[str] = (),
    ids: list[list[int]] | None = None,
    hash_block: int = 512,
    tenants: tuple[str, ...] = (),
    drop_empty: bool = False,
) -> Trace:
    """The trace of a table, with every row checked. A last note names the columns that nobody read.

    Args:
        table: its rows are in the order of the trace; what was refused so far is among its ``problems``.
        format: a name for the trace's ``source``.
        theirs: columns of a `Trace` and what the file calls them. Those that ``columns`` lacks are parsed here, as
            whole numbers.
        columns: columns of a `Trace` that are parsed already; one number a row.
        notes: what was dropped or changed on the way.
        ids: block ids of each row.
        hash_block: tokens that one id covers.
        tenants: names that the column ``tenant`` counts.
        drop_empty: leave out rows whose prompt or output has 0 tokens, which are else refused. Not for columns with
            ``follows``.

    Raises:
        BadInput: all that is wrong, each with its line and with what the file calls its column.
    """
    columns = {
        **columns,
        **{name: table.parsed(column, whole, 1) for name, column in theirs.items() if name not in columns},
    }
    if drop_empty:
        columns, ids, dropped = _without_empty(table, columns, ids)
        notes = [*notes, f"{dropped:,} rows without prompt or output tokens dropped"] if dropped else notes
    for name, values in columns.items():
        if not -LATEST_PS <= min(values) <= max(values) <= LATEST_PS:
            rule, column = _LONGEST.get(name, "must fit in 64 bits"), theirs.get(name, name)
            cells = table.cells(column) if column in table.header else values
            for line, number, cell in zip(table.lines, values, cells, strict=True):
                if not -LATEST_PS <= number <= LATEST_PS:
                    table.refuse(rule, line, column, cell)
    # Rows that were refused are left out here: a cell that cannot be parsed was replaced by some number, and that
    # number must not be refused a second time.
    kept = table.sound()
    table.keep(kept)
    if not table.rows:
        table.done()
    if not all(kept):  # rows have new numbers now, which `follows` does not know
        columns = {name: values for name, values in columns.items() if name not in ("follows", "think_ps")}
    arrays: dict[str, Any] = {n: np.array(list(compress(v, kept)), np.int64) for n, v in columns.items()}
    hash_ids = None if ids is None else HashIds.of(list(compress(ids, kept)))
    for fault in faults(arrays, hash_ids, hash_block, len(tenants)):
        name = theirs.get(fault.column, fault.column)
        in_file = name in table.header and name != "hash_ids"
        value = table.rows[fault.row][table.header.index(name)] if in_file else fault.value
        table.refuse(fault.rule, table.lines[fault.row], name, value)
    table.done()
    source = f"{table.name} ({format} format)"
    if unread := table.unread():
        notes = [*notes, f"columns not used: {', '.join(unread)}"]
    return Trace(**arrays, hash_ids=hash_ids, hash_block=hash_block, tenants=tenants, source=source, notes=tuple(notes))


def _without_empty(
    table: Table, columns: Mapping[str, Sequence[int]], ids: list[list[int]] | None
) -> tuple[dict[str, Sequence[int]], list[list[int]] | None, int]:
    """Columns and ids without the rows of 0 tokens, which leave ``table`` as well; and how many these were."""
    lengths = zip(columns["prompt_tokens"], columns["output_tokens"], strict=True)
    kept = [prompt != 0 and output != 0 for prompt, output in lengths]
    if not any(kept):
        table.refuse("every row has 0 tokens")
        table.done()
    table.keep(kept)
    left: dict[str, Sequence[int]] = {name: list(compress(values, kept)) for name, values in columns.items()}
    return left, None if ids is None else list(compress(ids, kept)), kept.count(False)


def in_time_order(
    table: Table, columns: Mapping[str, Sequence[int]], ids: list[list[int]] | None, notes: list[str]
) -> tuple[dict[str, Sequence[int]], list[list[int]] | None]:
    """Columns, ids and the rows of ``table`` in order of ``arrival_ps``; rows of one time keep their order.

    ``follows``, if it is there, names rows by their place before. A note is added where a row was moved.
    """
    times = columns["arrival_ps"]
    order = sorted(range(len(times)), key=times.__getitem__)
    if order == list(range(len(order))):
        return dict(columns), ids
    notes.append("rows brought in order of time")
    table.rows, table.lines = [table.rows[i] for i in order], [table.lines[i] for i in order]
    moved: dict[str, Sequence[int]] = {name: [values[i] for i in order] for name, values in columns.items()}
    if "follows" in moved:
        place = [0] * len(order)
        for new, old in enumerate(order):
            place[old] = new
        moved["follows"] = [place[row] if row >= 0 else -1 for row in moved["follows"]]
    return moved, None if ids is None else [ids[i] for i in order]


def in_unit(unit: str) -> Callable[[Any], int]:
    """A parser of times in ``unit``, a key of `UNITS`, to picoseconds; finer fractions are rounded, once."""
    rule, factor = f"must be a number of {_UNIT_WORDS[unit]}", Decimal(UNITS[unit])
    return lambda cell: int((decimal(cell, rule) * factor).to_integral_value())


def unit_note(column: str, unit: str, why: str) -> str:
    """The note that says in which unit times were read, and why: a unit is never taken for granted in silence."""
    return f"{column} read as {_UNIT_WORDS[unit]}, {why}"


def block_ids(cell: Any) -> list[int]:
    """The block ids of a prompt, from a list of whole numbers or a text with spaces between them.

    Raises:
        ValueError: ``cell`` is something else, or an id does not fit in 64 bits.
    """
    words = cell.split() if isinstance(cell, str) else cell
    if not isinstance(words, list):
        raise ValueError("must be a list of whole numbers")
    ids = [whole(word) for word in words]
    if ids and not -LATEST_PS <= min(ids) <= max(ids) <= LATEST_PS:
        raise ValueError("hash ids must fit in 64 bits")
    return ids


def codes(names: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Each name as a number, and the names by their numbers, in order of first appearance; -1 for an empty cell.

    Example: ``b, a, , b`` gives ``[0, 1, -1, 0]`` and ``("b", "a")``.
    """
    found: dict[str, int] = {}
    numbers = [-1 if blank(name) else found.setdefault(str(name), len(found)) for name in names]
    return numbers, tuple(found)


def tenant_codes(names: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """As `codes`, but the requests that name no tenant are those of one tenant without a name, ``""``."""
    found: dict[str, int] = {}
    numbers = [found.setdefault("" if blank(name) else str(name), len(found)) for name in names]
    return numbers, tuple(found)
