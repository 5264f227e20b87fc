"""Rows in which the turns of a session wait for one another, which the formats of AIPerf and Dynamo share.

Keys of a row: ``input_length``, ``output_length`` and, where they apply, ``timestamp``, ``delay`` (both in ms),
``session_id`` and ``hash_ids``. A row with a ``delay`` is sent so long after the row before it of the same session has
ended. A row with a ``timestamp`` alone is sent at that time. Rows without a session are requests of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.workload.formats.columns import block_ids, codes, in_time_order, in_unit, trace_of, unit_note
from chairlift.sim.workload.formats.text_tables import Table, blank, label, read_json_table, whole
from chairlift.sim.workload.formats.timed_rows import check_blocks
from chairlift.sim.workload.trace import LATEST_PS, Trace

BLOCK = 512  # tokens that a hash id covers, unless the user says otherwise
THEIRS = {
    "arrival_ps": "timestamp",
    "prompt_tokens": "input_length",
    "output_tokens": "output_length",
    "think_ps": "delay",
}

_TEXTS = ("text_input", "input_text", "messages", "payload")  # prompts as texts, whose tokens nobody counted
_WHOLE, _NEW = "message_array_with_responses", "deltas_without_responses"  # values of context_mode


def read(
    name: str,
    path: Path,
    limit: int | None,
    time_unit: str | None,
    hash_block: int | None,
    drop_empty: bool,
    whole_prompts: bool,
    aliases: Mapping[str, str] | None = None,
) -> Trace:
    """The trace of such a file.

    Args:
        name: of the format.
        path: of the file.
        limit: rows to read at most.
        time_unit: of ``timestamp`` and ``delay``; None: milliseconds.
        hash_block: tokens that a hash id covers; None: 512.
        drop_empty: leave out rows of 0 tokens; the next turn then waits for the turn before them.
        whole_prompts: whether the ``input_length`` of a later turn is its whole prompt. Otherwise it is what the turn
            adds to the prompt and the answer before, unless the row has ``hash_ids`` or its ``context_mode`` says that
            it is whole.
        aliases: other names of keys.

    Raises:
        BadInput: all that is wrong, with the line.
    """
    sparse = ("timestamp", "delay", "session_id", "context_mode", *_TEXTS)
    table = read_json_table(path, limit, ("input_length", "output_length"), ["hash_ids"], sparse, aliases)
    for key in _TEXTS:
        if table.has(key):
            table.refuse("prompts as texts have no token counts: give input_length instead", 1, key)
    table.done()
    if not table.rows:
        table.refuse("the file has no requests")
        table.done()
    prompts, outputs = table.parsed("input_length", whole, 1), table.parsed("output_length", whole, 1)
    none: list[int] = []
    ids = table.parsed("hash_ids", block_ids, none) if table.has("hash_ids") else None
    unit = time_unit or "ms"
    stamps, delays = (_sparse_times(table, key, unit) for key in ("timestamp", "delay"))
    sessions = codes(table.parsed("session_id", label, ""))[0] if table.has("session_id") else [-1] * len(prompts)
    if ids is not None:
        check_blocks(table, prompts, ids, hash_block or BLOCK)
    added = [not each for each in _whole(table, whole_prompts or ids is not None)]
    table.done()  # without rows that were refused, a turn would wait for the wrong one
    notes = [
        unit_note("timestamp and delay", unit, "as time_unit says" if time_unit else f"as the {name} format has them")
    ]
    kept = [i for i in range(len(prompts)) if not drop_empty or (prompts[i] and outputs[i])]
    if len(kept) < len(prompts):
        notes.append(f"{len(prompts) - len(kept):,} rows without prompt or output tokens dropped")
    columns, counts = _chained(table, kept, prompts, outputs, stamps, delays, sessions, added)
    table.rows, table.lines = [table.rows[i] for i in kept], [table.lines[i] for i in kept]
    table.done()
    if counts["new"]:
        notes.append(
            f"{counts['new']:,} later turns: input_length added to the prompt and the answer before, as in {name}"
        )
    if counts["stamped"]:
        notes.append(
            f"{counts['stamped']:,} later turns without delay: sent at their timestamp, even before the last turn ends"
        )
    if counts["untimed"]:
        notes.append(f"{counts['untimed']:,} first turns have no timestamp: sent at 0 unless arrivals are given")
    moved, kept_ids = in_time_order(table, columns, None if ids is None else [ids[i] for i in kept], notes)
    if all(follows < 0 for follows in moved["follows"]):
        del moved["follows"], moved["think_ps"]
    if all(session < 0 for session in moved["session"]):
        del moved["session"]
    theirs = {column: key for column, key in THEIRS.items() if column in moved}
    return trace_of(table, name, theirs, moved, notes, kept_ids, hash_block or BLOCK)


def _sparse_times(table: Table, key: str, unit: str) -> list[int | None]:
    """The times of a column in picoseconds; None where a row has none. Times below 0 are refused."""
    if not table.has(key):
        return [None] * len(table.rows)
    parse = in_unit(unit)
    times = table.parsed(key, lambda cell: None if blank(cell) else parse(cell), None)
    for line, time, cell in zip(table.lines, times, table.cells(key), strict=True):
        if time is not None and not 0 <= time <= LATEST_PS:
            table.refuse("must be at least 0, and at most 106 days", line, key, cell)
    return times


def _whole(table: Table, otherwise: bool) -> list[bool]:
    """Whether each row's ``input_length`` is its whole prompt, as its ``context_mode`` says, or else ``otherwise``."""
    if not table.has("context_mode"):
        return [otherwise] * len(table.rows)

    def said(cell: Any) -> bool:
        if blank(cell):
            return otherwise
        if cell not in (_WHOLE, _NEW):
            raise ValueError(f"must be {_WHOLE} or {_NEW}")
        return bool(cell == _WHOLE)

    return table.parsed("context_mode", said, otherwise)


def _chained(
    table: Table,
    kept: Sequence[int],
    prompts: Sequence[int],
    outputs: Sequence[int],
    stamps: Sequence[int | None],
    delays: Sequence[int | None],
    sessions: Sequence[int],
    added: Sequence[bool],
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """The columns of the rows ``kept``, and how many later turns and first turns were read in a way to be noted.

    ``added``: whether a later turn's ``input_length`` comes on top of what came before.
    """
    columns: dict[str, list[int]] = {
        name: [] for name in ("arrival_ps", "prompt_tokens", "output_tokens", "session", "follows", "think_ps")
    }
    counts = dict.fromkeys(("new", "stamped", "untimed"), 0)
    last: dict[int, int] = {}  # session → the place of its last turn so far
    for place, i in enumerate(kept):
        before = last.get(sessions[i]) if sessions[i] >= 0 else None
        prompt, follows, think, start = prompts[i], -1, 0, stamps[i]
        if before is not None:
            if added[i]:
                prompt += columns["prompt_tokens"][before] + columns["output_tokens"][before]
                counts["new"] += 1
            if delays[i] is not None or start is None:
                follows, think, start = before, delays[i] or 0, columns["arrival_ps"][before]
            else:
                counts["stamped"] += 1
        elif delays[i]:
            rule = "must be 0 in the first turn of a session, which waits for nothing"
            table.refuse(rule, table.lines[i], "delay", table.rows[i][table.header.index("delay")])
        elif start is None:
            counts["untimed"] += 1
        if sessions[i] >= 0:
            last[sessions[i]] = place
        row = (start or 0, prompt, outputs[i], sessions[i], follows, think)
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value)
    return columns, counts
