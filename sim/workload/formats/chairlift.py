"""Chairlift's own traces, in CSV or Parquet, to read and to write.

Columns: ``arrival_s,prompt_tokens,output_tokens`` and, if wanted,

- ``max_tokens``, ``ignore_eos`` (0 or 1), ``priority``, ``tenant`` (a name), ``session``, ``prefix_group``,
  ``prefix_tokens``: see `Trace`; an empty cell of the last four says that the request has none;
- ``session`` together with ``prefix_group``: sessions of a group begin alike, with their first row's ``prefix_tokens``;
- ``follows``, the row, from 0, of the request whose end is waited for (else -1), together with ``think_s``;
- ``hash_ids``, in CSV with spaces between, in Parquet a list;
- ``hash_block``, the tokens that an id covers, the same on all rows (else 512).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from chairlift.backend.checked import a_file
from chairlift.sim.atomic import replacing, writing
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, reading
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats import foreign
from chairlift.sim.workload.formats.columns import block_ids, tenant_codes, trace_of
from chairlift.sim.workload.formats.text_tables import (
    Table,
    blank,
    column_names,
    head,
    label,
    read_csv,
    seconds_ps,
    whole,
    whole_or,
)
from chairlift.sim.workload.trace import COLUMNS, Trace

_IN_SECONDS = {"arrival_ps": "arrival_s", "think_ps": "think_s"}  # a column of a Trace, and its name in a file
_NONE = {"session": -1, "prefix_group": -1, "prefix_tokens": 0, "follows": -1}  # what an empty cell stands for
_COLUMNS = (*(_IN_SECONDS.get(name, name) for name in COLUMNS), "hash_ids", "hash_block")


def told(head: bytes) -> bool:
    """The file is Parquet, or the header names a column of arrivals or prompts."""
    return head.startswith(b"PAR1") or not {"arrival_s", "prompt_tokens"}.isdisjoint(column_names(head))


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


options = ("drop_empty",)


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = False) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong."""
    table = _read_parquet(path, limit) if head(path, 4) == b"PAR1" else read_csv(path, limit)
    for name in table.header:
        if name not in _COLUMNS:
            table.refuse(f"no such column{did_you_mean(name, _COLUMNS)}", 1, "", name)
    needed = ("arrival_s", "prompt_tokens", "output_tokens")
    if table.problems and not set(needed) <= set(table.header):
        table.refuse(f"without Chairlift's own columns: {foreign.described(path, head(path))}", 1)
    table.require(*needed)
    theirs = {name: column for name in COLUMNS if (column := _IN_SECONDS.get(name, name)) in table.header}
    columns: dict[str, Sequence[int]] = {
        name: table.parsed(theirs[name], _think_ps if name == "think_ps" else seconds_ps, 0)
        for name in _IN_SECONDS
        if name in theirs
    }
    columns |= {name: table.parsed(name, whole_or(none), none) for name, none in _NONE.items() if name in theirs}
    rest: dict[str, Any] = {}
    if "tenant" in table.header:
        columns["tenant"], rest["tenants"] = tenant_codes(table.parsed("tenant", label, ""))
    if "hash_ids" in table.header:
        rest["ids"] = table.parsed("hash_ids", block_ids, [])
    if "hash_block" in table.header:
        blocks = table.parsed("hash_block", whole, 1)
        rest["hash_block"] = blocks[0]
        for line, block in zip(table.lines, blocks, strict=True):
            if block != blocks[0]:
                table.refuse("must be the same on all rows", line, "hash_block", block)
    if drop_empty and "follows" in columns:
        table.refuse("drop_empty must not be given where requests follow one another", 1, "follows")
        table.done()
    return trace_of(table, "chairlift", theirs, columns, **rest, drop_empty=drop_empty)


def _think_ps(cell: Any) -> int:
    return 0 if blank(cell) else seconds_ps(cell)


def _read_parquet(path: Path, limit: int | None) -> Table:
    """The columns of a Parquet file, with rows in place of lines; ``arrival_s`` may be of any type of number."""
    import pyarrow as pa  # imported here, for the import takes longer than reading most CSV files
    import pyarrow.parquet as pq

    table = Table(path)
    with reading(path, pa.ArrowException):
        data = pq.read_table(a_file(path))
        data = data if limit is None else data.slice(0, limit)
        table.header = list(data.column_names)
        table.rows = list(zip(*(column.to_pylist() for column in data.columns), strict=True))
    table.lines = list(range(1, len(table.rows) + 1))
    if not table.rows:
        raise BadInput(Problem("the file has no rows", file=str(path)))
    return table


def save(trace: Trace, path: str | Path) -> None:
    """Write ``trace``: as Parquet if the name ends in ``.parquet``, else as CSV, gzipped if it ends in ``.gz``.

    `read` gives the same columns back, times exact to the picosecond. Source and notes are not written.

    Raises:
        BadInput: the file cannot be written.
    """
    path = Path(path)
    columns: dict[str, list[Any]] = {
        _IN_SECONDS.get(name, name): getattr(trace, name).tolist()
        for name in COLUMNS
        if getattr(trace, name) is not None
    }
    if "tenant" in columns:
        columns["tenant"] = [trace.tenants[i] for i in columns["tenant"]]
    if trace.hash_ids is not None:
        columns["hash_ids"] = [trace.hash_ids.row(i).tolist() for i in range(len(trace))]
        columns["hash_block"] = [trace.hash_block] * len(trace)
    try:
        if path.suffix == ".parquet":
            _write_parquet(path, columns)
        else:
            with writing(path) as file:
                _write_csv(file, columns)
    except OSError as error:
        raise BadInput(Problem(f"cannot be written: {error.strerror or error}", file=str(path))) from None


def _write_csv(file: IO[str], columns: dict[str, list[Any]]) -> None:
    """Write ``columns``, by their names in the file; times are given in picoseconds and written in seconds."""
    if "hash_ids" in columns:
        columns["hash_ids"] = [" ".join(map(str, ids)) for ids in columns["hash_ids"]]
    for name in columns.keys() & _IN_SECONDS.values():
        columns[name] = [f"{ps // PS_PER_S}.{ps % PS_PER_S:012d}".rstrip("0").rstrip(".") for ps in columns[name]]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write ``columns``, by their names in the file; times are given in picoseconds and written in seconds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values) for name, values in columns.items() if name not in _IN_SECONDS.values()}
    for name in columns.keys() & _IN_SECONDS.values():
        arrays[name] = pa.array([Decimal(ps).scaleb(-12) for ps in columns[name]], pa.decimal128(19, 12))
    with replacing(path) as partial:
        pq.write_table(pa.table({name: arrays[name] for name in columns}), partial)
