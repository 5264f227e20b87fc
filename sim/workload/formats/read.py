"""Trace files in and out: one reader for each public format, and Chairlift's own CSV and Parquet.

Every reader names the file, line and column of what it refuses. ``.gz`` is read as is. Times are parsed as
decimals and kept as integer picoseconds, so nothing is lost to floats. Lines count from 1, the header first.

Columns of Chairlift's own format: ``arrival_s,prompt_tokens,output_tokens`` and, if wanted, ``max_tokens``,
``priority``, ``tenant`` (a name), ``session``, ``prefix_group``, ``prefix_tokens``, ``follows`` (the row, from 0,
of the request whose end it waits for; else -1) with ``think_s``, ``hash_ids`` (in CSV with spaces between, in
Parquet a list) and ``hash_block`` (tokens an id covers, the same on all rows; else 512).
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from itertools import chain, compress
from pathlib import Path
from typing import IO, Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats import kv_cache_tester as agent_sessions
from chairlift.sim.workload.formats import ragpulse
from chairlift.sim.workload.formats.text_tables import (
    Table,
    decimal,
    head,
    read_csv,
    read_json_lines,
    seconds_ps,
    whole,
)
from chairlift.sim.workload.trace import COLUMNS, LATEST_PS, HashIds, Trace, faults

NAMES = ("azure", "burstgpt", "chairlift", "kv_cache_tester", "mooncake", "ragpulse", "vidur")

MOONCAKE_BLOCK = 512  # tokens a hash id covers, the last, partial block included

_IN_SECONDS = {"arrival_ps": "arrival_s", "think_ps": "think_s"}  # ours, theirs
_LONGEST = {"arrival_ps": "must be within 106 days of time 0", "think_ps": "must be at most 106 days"}
_OWN = (*(_IN_SECONDS.get(name, name) for name in COLUMNS), "hash_ids", "hash_block")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?(?:Z|([+-])(\d\d):?(\d\d))?")

# What a file says in its first bytes that Chairlift knows of, but does not read.
_UNREAD = (
    (rb".{257}ustar", "a tar archive; ServeGen's client tables are no requests: name them with servegen"),
    (rb"PK\x03\x04|\x28\xb5\x2f\xfd", "a zip archive or a Zstandard file"),
    (rb'\{"(sys_prompt|passage|history|user_input|web_search)_id"', "a RAGPulse component map"),
    (rb'\{(?!"id":)[^{]*"input": *"', "a trace of texts without token counts (LMCache's agent traces)"),
    (rb"request_id,request_type,application_id", "a splitwise-sim trace"),
    (rb"[\d.]+,[\d.]+,[\d.]*,(Gamma|Weibull)?,", "a ServeGen client table: name its folder with servegen"),
)


def load(path: str | Path, format: str | None = None, limit: int | None = None, *, times: bool = True) -> Trace:
    """The trace in a file, or the first ``limit`` rows of it.

    Args:
        path: a file, possibly gzipped.
        format: one of `NAMES`; None: told from the file's first bytes.
        limit: rows to read at most; what comes later is not looked at.
        times: False lets a file without arrival times through, as if everything arrived at time 0.

    Raises:
        BadInput: the file cannot be read, is of another format, or has wrong rows (twenty are listed).
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise BadInput(Problem("must be at least 1", path="limit", value=limit))
    if format is not None and format not in NAMES:
        raise BadInput(Problem(f"not a trace format{did_you_mean(format, NAMES)}", path="format", value=format))
    start = head(path)
    for pattern, what in _UNREAD:
        if re.match(pattern, start, re.DOTALL):
            raise BadInput(Problem(f"this is {what}: not a format Chairlift reads yet", file=str(path)))
    if start.startswith(b"PAR1"):
        if format not in (None, "chairlift"):
            raise BadInput(Problem(f"a Parquet file holds Chairlift's own format, not {format}", file=str(path)))
        return _own(_parquet(path, limit))
    if not start.strip():
        raise BadInput(Problem("the file is empty", file=str(path)))
    format = format or _detected(path, start)
    if format in _SESSIONS:
        return _SESSIONS[format](path, limit)
    if format == "mooncake":
        return _mooncake(path, limit)
    table = read_csv(path, limit)
    if format == "vidur":
        return _vidur(table, times)
    return {"azure": _azure, "burstgpt": _burstgpt, "chairlift": _own}[format](table)


_SESSIONS = {
    "kv_cache_tester": agent_sessions.load,
    "kv_cache_tester, derived": agent_sessions.load_derived,
    "ragpulse": ragpulse.load,
}
_COLUMNS = {"ContextTokens": "azure", "Request tokens": "burstgpt", "num_prefill_tokens": "vidur"}
_COLUMNS |= {"prompt_tokens": "chairlift", "arrival_s": "chairlift"}
_TOLD = (  # a file's first line, and its format
    (r'\{"timestamp": *"', "ragpulse"),
    (r'\{"id":.*"(hash_id_scope|block_size)"', "kv_cache_tester"),
    (r"trace_id,agent,seq,t_s", "kv_cache_tester, derived"),
    (r"\{", "mooncake"),
)


def _detected(path: Path, head: bytes) -> str:
    line = head.decode("utf-8-sig", "replace").splitlines()[0]
    for pattern, name in _TOLD:
        if re.match(pattern, line.lstrip()):
            return name
    header = [name.strip() for name in line.split(",")]
    for column, name in _COLUMNS.items():
        if column in header:
            return name
    rule = f"not a trace format Chairlift knows ({', '.join(NAMES)}); name it with format, or mend the header"
    raise BadInput(Problem(rule, file=str(path), line=1, value=line))


# ---- the formats ----


def _azure(table: Table) -> Trace:
    """Azure LLM inference traces of 2023 and 2024: ``TIMESTAMP,ContextTokens,GeneratedTokens``.

    github.com/Azure/AzurePublicDataset. Stamps are wall-clock: seven decimals (100 ns) and CRLF line ends in
    2023, a zone in 2024. Time 0 is the first request.
    """
    own = {"arrival_ps": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
    table.require(*own.values())
    stamps = table.parsed("TIMESTAMP", _stamp_ps, 0)
    table.done()  # the first stamp is needed
    return _trace(table, "azure", own, {"arrival_ps": [stamp - stamps[0] for stamp in stamps]})


def _burstgpt(table: Table) -> Trace:
    """BurstGPT, by column name: its second release puts the session and its elapsed time second and third.

    github.com/HPMLL/BurstGPT. Failed requests have 0 tokens and are dropped. Time 0 is the first request
    kept, for the file counts seconds from a midnight that may be months before.
    """
    own = {"arrival_ps": "Timestamp", "prompt_tokens": "Request tokens", "output_tokens": "Response tokens"}
    table.require(*own.values())
    prompts = table.parsed("Request tokens", whole, 1)
    outputs = table.parsed("Response tokens", whole, 1)
    kept = [prompt != 0 and output != 0 for prompt, output in zip(prompts, outputs, strict=True)]
    notes = []
    if not all(kept):
        notes.append(f"{kept.count(False)} failed requests (0 tokens) dropped")
        table.keep(kept)
    if not any(kept):
        raise BadInput(Problem("every request in the file failed (0 tokens)", file=table.file))
    times = table.parsed("Timestamp", seconds_ps, 0)
    table.done()  # the first time is needed
    notes.append(f"times count from the first request, at {table.cells('Timestamp')[0]} s in the file")
    columns: dict[str, Sequence[int]] = {"arrival_ps": [time - times[0] for time in times]}
    if "Session ID" in table.header:
        columns["session"] = _codes(table.cells("Session ID"))[0]
    return _trace(table, "burstgpt", own, columns, notes)


def _vidur(table: Table, times: bool) -> Trace:
    """Vidur's and Etalon's CSV: ``num_prefill_tokens,num_decode_tokens`` and, in some, ``arrived_at`` (s).

    github.com/microsoft/vidur, data/processed_traces.
    """
    own = {
        "arrival_ps": "arrived_at",
        "prompt_tokens": "num_prefill_tokens",
        "output_tokens": "num_decode_tokens",
    }
    table.require("num_prefill_tokens", "num_decode_tokens")
    if "arrived_at" in table.header:
        return _trace(table, "vidur", own, {"arrival_ps": table.parsed("arrived_at", seconds_ps, 0)})
    if times:
        rule = "missing column: the file has lengths only, so the workload must say arrivals of its own"
        raise BadInput(Problem(rule, table.file, 1, "arrived_at"))
    return _trace(table, "vidur", own, {"arrival_ps": [0] * len(table.rows)}, ["the file has no arrival times"])


def _mooncake(path: Path, limit: int | None) -> Trace:
    """Mooncake's JSON lines: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.

    github.com/kvcache-ai/Mooncake, FAST25-release/traces. An id stands for 512 tokens and all before them.
    ``hash_ids`` may be absent, but from all rows alike.
    """
    own = {"arrival_ps": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}
    table = Table(path)
    table.header = list(own.values())
    for line, row in read_json_lines(path, limit):
        if isinstance(row, str):
            table.refuse(row, line)
            continue
        if not table.rows and "hash_ids" in row and "hash_ids" not in table.header:
            table.header.append("hash_ids")
        missing = [name for name in table.header if name not in row]
        for name in missing:
            table.refuse(f"missing key{did_you_mean(name, list(row))}", line, name)
        if not missing:
            table.rows.append([row[name] for name in table.header])
            table.lines.append(line)
    if not table.rows:
        table.done()
    columns: dict[str, Sequence[int]] = {"arrival_ps": table.parsed("timestamp", _milliseconds_ps, 0)}
    if "hash_ids" not in table.header:
        return _trace(table, "mooncake", own, columns)
    ids: list[list[int]] = table.parsed("hash_ids", _ids, [])
    columns["prompt_tokens"] = table.parsed("input_length", whole, 1)
    rows = zip(table.lines, table.sound(), columns["prompt_tokens"], ids, strict=True)
    for line, sound, length, row_ids in rows:
        if sound and len(row_ids) != -(-length // MOONCAKE_BLOCK):
            rule = f"must have an id for each {MOONCAKE_BLOCK} of the {length} tokens, rounded up"
            table.refuse(rule, line, "hash_ids", f"{len(row_ids)} ids")
    return _trace(table, "mooncake", own, columns, ids=ids, hash_block=MOONCAKE_BLOCK)


def _own(table: Table) -> Trace:
    """Chairlift's own columns."""
    for name in table.header:
        if name not in _OWN:
            table.refuse(f"no such column{did_you_mean(name, _OWN)}", 1, "", name)
    table.require("arrival_s", "prompt_tokens", "output_tokens")
    own = {name: theirs for name in COLUMNS if (theirs := _IN_SECONDS.get(name, name)) in table.header}
    columns: dict[str, Sequence[int]] = {
        name: table.parsed(own[name], seconds_ps, 0) for name in _IN_SECONDS if name in own
    }
    rest: dict[str, Any] = {}
    if "tenant" in table.header:
        columns["tenant"], rest["tenants"] = _codes(table.cells("tenant"))
    if "hash_ids" in table.header:
        rest["ids"] = table.parsed("hash_ids", _ids, [])
    if "hash_block" in table.header:
        blocks = table.parsed("hash_block", whole, 1)
        rest["hash_block"] = blocks[0]
        for line, block in zip(table.lines, blocks, strict=True):
            if block != blocks[0]:
                table.refuse("must be the same on all rows", line, "hash_block", block)
    return _trace(table, "chairlift", own, columns, **rest)


def _parquet(path: Path, limit: int | None) -> Table:
    """Chairlift's own columns in Parquet, rows numbered from 1; ``arrival_s`` may be of any number type."""
    import pyarrow as pa  # here: it takes longer to import than most CSV files to read
    import pyarrow.parquet as pq

    table = Table(path)
    try:
        data = pq.read_table(path)
        data = data if limit is None else data.slice(0, limit)
        table.header = list(data.column_names)
        table.rows = list(zip(*(column.to_pylist() for column in data.columns), strict=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(Problem(f"not a readable Parquet file: {reason}", file=str(path))) from None
    table.lines = list(range(1, len(table.rows) + 1))
    if not table.rows:
        raise BadInput(Problem("the file has no rows", file=str(path)))
    return table


# ---- from cells to columns ----


def _trace(
    table: Table,
    format: str,
    own: dict[str, str],
    columns: dict[str, Sequence[int]],
    notes: Sequence[str] = (),
    ids: list[list[int]] | None = None,
    hash_block: int = 512,
    tenants: tuple[str, ...] = (),
) -> Trace:
    """A Trace of the columns parsed and of those that ``own``, our name to theirs, has too; all checked."""
    parsed = {name: table.parsed(theirs, whole, 1) for name, theirs in own.items() if name not in columns}
    columns = columns | parsed
    for name, values in columns.items():
        if not -LATEST_PS <= min(values) <= max(values) <= LATEST_PS:
            rule = _LONGEST.get(name, "must fit in 64 bits")
            for line, number in zip(table.lines, values, strict=True):
                if not -LATEST_PS <= number <= LATEST_PS:
                    table.refuse(rule, line, own.get(name, name), number)
    # Rows refused so far are left out, lest what stands in for their cells be refused as well.
    kept = table.sound()
    table.keep(kept)
    if not table.rows:
        table.done()
    if not all(kept):  # rows are numbered anew, so what they follow is told no more
        columns = {name: values for name, values in columns.items() if name not in ("follows", "think_ps")}
    arrays: dict[str, Any] = {n: np.array(list(compress(v, kept)), np.int64) for n, v in columns.items()}
    hash_ids = None if ids is None else _ragged(list(compress(ids, kept)))
    for fault in faults(arrays, hash_ids, hash_block, len(tenants)):
        theirs = own.get(fault.column, fault.column)
        cell = table.rows[fault.row][table.header.index(theirs)] if theirs in table.header else fault.value
        table.refuse(fault.rule, table.lines[fault.row], theirs, fault.value if theirs == "hash_ids" else cell)
    table.done()
    source = f"{table.name} ({format} format)"
    return Trace(**arrays, hash_ids=hash_ids, hash_block=hash_block, tenants=tenants, source=source, notes=tuple(notes))


def _stamp_ps(cell: str) -> int:
    """A wall-clock time as picoseconds since year 1.

    Raises:
        ValueError: not such a time.
    """
    found = _STAMP.fullmatch(cell.strip())
    if found is None:
        raise ValueError("must be a time like 2023-11-16 18:17:03.9799600")
    day, hour, minute, second, fraction, sign, zone_h, zone_m = found.groups()
    if hour > "23" or minute > "59" or second > "59":
        raise ValueError("must be a time of day")
    minutes = int(hour) * 60 + int(minute)
    if sign:
        minutes -= int(sign + "1") * (int(zone_h) * 60 + int(zone_m))
    whole_s = date.fromisoformat(day).toordinal() * 86_400 + minutes * 60 + int(second)
    return whole_s * PS_PER_S + int((fraction or "").ljust(12, "0"))


def _milliseconds_ps(cell: Any) -> int:
    return int((decimal(cell, "must be a number of milliseconds") * (PS_PER_S // 1000)).to_integral_value())


def _ids(cell: Any) -> list[int]:
    """Hash ids: a list, or a text of numbers separated by spaces.

    Raises:
        ValueError: something else.
    """
    words = cell.split() if isinstance(cell, str) else cell
    if not isinstance(words, list):
        raise ValueError("must be a list of whole numbers")
    ids = [whole(word) for word in words]
    if ids and not -LATEST_PS <= min(ids) <= max(ids) <= LATEST_PS:
        raise ValueError("hash ids must fit in 64 bits")
    return ids


def _ragged(rows: list[list[int]]) -> HashIds:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return HashIds(np.fromiter(chain.from_iterable(rows), np.int64, int(offsets[-1])), offsets)


def _codes(names: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Each name as a number, in order of first appearance; and the names."""
    codes: dict[str, int] = {}
    numbers = [codes.setdefault(str(name or ""), len(codes)) for name in names]
    return numbers, tuple(codes)


# ---- out ----


def save(trace: Trace, path: str | Path) -> None:
    """Write Chairlift's own format: Parquet if the name ends in ``.parquet``, else CSV, gzipped for ``.gz``.

    `load` gives the same columns back, times exact to the picosecond; source and notes are not written.

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
            packed = path.suffix == ".gz"
            with (gzip.open if packed else open)(path, "wt", encoding="utf-8", newline="") as file:
                _write_csv(file, columns)
    except OSError as error:
        raise BadInput(Problem(f"cannot be written: {error.strerror or error}", file=str(path))) from None


def _write_csv(file: IO[str], columns: dict[str, list[Any]]) -> None:
    """``columns`` by their names in the file; those in seconds are given in picoseconds."""
    if "hash_ids" in columns:
        columns["hash_ids"] = [" ".join(map(str, ids)) for ids in columns["hash_ids"]]
    for name in columns.keys() & _IN_SECONDS.values():
        columns[name] = [f"{ps // PS_PER_S}.{ps % PS_PER_S:012d}".rstrip("0").rstrip(".") for ps in columns[name]]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values) for name, values in columns.items() if name not in _IN_SECONDS.values()}
    for name in columns.keys() & _IN_SECONDS.values():
        arrays[name] = pa.array([Decimal(ps).scaleb(-12) for ps in columns[name]], pa.decimal128(19, 12))
    pq.write_table(pa.table({name: arrays[name] for name in columns}), path)
