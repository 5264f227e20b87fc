"""From the cells of a table to the columns of a trace: what the readers of all formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from chairlift.sim.workload.formats.text_tables import Table, whole
from chairlift.sim.workload.trace import LATEST_PS, HashIds, Trace, faults

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
) -> Trace:
    """The trace of a table, with every row checked.

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

    Raises:
        BadInput: all that is wrong, each with its line and with what the file calls its column.
    """
    columns = {
        **columns,
        **{name: table.parsed(column, whole, 1) for name, column in theirs.items() if name not in columns},
    }
    for name, values in columns.items():
        if not -LATEST_PS <= min(values) <= max(values) <= LATEST_PS:
            rule = _LONGEST.get(name, "must fit in 64 bits")
            for line, number in zip(table.lines, values, strict=True):
                if not -LATEST_PS <= number <= LATEST_PS:
                    table.refuse(rule, line, theirs.get(name, name), number)
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
    return Trace(**arrays, hash_ids=hash_ids, hash_block=hash_block, tenants=tenants, source=source, notes=tuple(notes))


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
    """Each name as a number, and the names by their numbers, in order of first appearance.

    Example: ``b, a, b`` gives ``[0, 1, 0]`` and ``("b", "a")``.
    """
    found: dict[str, int] = {}
    numbers = [found.setdefault(str(name or ""), len(found)) for name in names]
    return numbers, tuple(found)
