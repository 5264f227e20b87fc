"""Rows of ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids``, which several formats share.

The formats differ in the unit of times and in the tokens that a hash id covers. Neither can be read off the names of
the keys, so a reader says in a note which unit it took, and the number of ids of a row must fit its prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.formats.columns import block_ids, in_unit, trace_of, unit_note
from chairlift.sim.workload.formats.text_tables import Table, first_line, read_json_table, whole
from chairlift.sim.workload.trace import Trace

OPTIONS = ("time_unit", "hash_block", "drop_empty")
THEIRS = {"arrival_ps": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}

NO_TIMES = "missing key: the file has lengths only, so the workload must say arrivals of its own"

_OF_OTHERS = ("session_id", "delay", "chat_id", "parent_chat_id", "hash_id_scope")  # keys that tell another format
_COMMON_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


def fits(head: bytes, block: int) -> bool:
    """Whether a file that begins with ``head`` has such rows, with ids for blocks of ``block`` tokens or without."""
    if not re.search(r'"(timestamp|hash_ids)" *:', first_line(head)):
        return has_shape(head) and block == 512  # lengths only: nothing in which the formats differ
    rows = _whole_rows(head)
    if not rows:  # the first row is longer than `head`
        return has_shape(head) and block == 512
    return has_shape(head) and all(_covers(row, block) for row in rows)


def has_shape(head: bytes) -> bool:
    """Whether the first row has these keys, and none that tells another format."""
    line = first_line(head)
    if not re.match(r'\{.*"(input_length|hash_ids)" *:', line) or re.search(r'"timestamp" *: *"', line):
        return False  # RAGPulse's times are in quotes
    return not any(f'"{key}"' in line for key in _OF_OTHERS)


def _whole_rows(head: bytes) -> list[dict[str, Any]]:
    """The rows that lie within ``head`` from end to end and are JSON objects."""
    found = []
    for line in head.decode("utf-8-sig", "replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _covers(row: dict[str, Any], block: int) -> bool:
    length, ids = row.get("input_length"), row.get("hash_ids")
    if not isinstance(ids, list) or not isinstance(length, int):
        return True  # whoever reads the file says what is wrong with the row
    return len(ids) == -(-length // block)


@dataclass(frozen=True)
class TimedRows:
    """A reader of such rows for the format ``name``."""

    name: str
    unit: str  # of timestamps: s, ms, us or ns
    block: int  # tokens that a hash id covers

    def read(
        self,
        path: Path,
        limit: int | None,
        times: bool,
        time_unit: str | None,
        hash_block: int | None,
        drop_empty: bool,
    ) -> Trace:
        """The trace; ``time_unit`` and ``hash_block`` replace the format's own.

        A file whose rows have no ``timestamp`` at all has lengths only, which is enough where ``times`` are not needed.
        Raises `BadInput` with the line of all that is wrong.
        """
        table = read_json_table(path, limit, ("input_length", "output_length"), ["timestamp", "hash_ids"])
        if not table.rows:
            table.done()
        for key in sorted({"session_id", "delay"}.intersection(table.others)):
            rule = "says when a turn of a session is sent, which this format does not know: give format: aiperf"
            table.refuse(rule, 1, key)
        unit, block = time_unit or self.unit, hash_block or self.block
        if block != self.block and time_unit is None:
            rule = f"blocks of {block} tokens are not those of {self.name}, so time_unit must say the unit of timestamp"
            table.refuse(rule, None, "hash_block", block)
            table.done()
        columns: dict[str, Sequence[int]]
        if table.has("timestamp"):
            columns = {"arrival_ps": table.parsed("timestamp", in_unit(unit), 0)}
            why = "as time_unit says" if time_unit else f"as the {self.name} format has them"
            notes = [unit_note("timestamp", unit, why)]
        elif times:
            raise BadInput(Problem(NO_TIMES, str(path), 1, "timestamp"))
        else:
            columns, notes = {"arrival_ps": [0] * len(table.rows)}, ["the file has no arrival times"]
        columns["prompt_tokens"] = table.parsed("input_length", whole, 1)
        columns["output_tokens"] = table.parsed("output_length", whole, 1)
        ids = None
        if "hash_ids" in table.header:
            none: list[int] = []
            ids = table.parsed("hash_ids", block_ids, none)
            check_blocks(table, columns["prompt_tokens"], ids, block)
        return trace_of(table, self.name, THEIRS, columns, notes, ids, block, drop_empty=drop_empty)


def check_blocks(table: Table, prompts: Sequence[int], ids: Sequence[Sequence[int]], block: int) -> None:
    """Refuse rows of ``table`` that have not an id for each ``block`` tokens of their prompt, the last part included.

    If another common size of blocks fits all rows, it is named.
    """
    rows = [
        (line, length, len(own))
        for line, sound, length, own in zip(table.lines, table.sound(), prompts, ids, strict=True)
        if sound
    ]
    others = [size for size in _COMMON_BLOCKS if all(count == -(-length // size) for _, length, count in rows)]
    named = " or ".join(map(str, others))
    hint = f" (hash_block: {named} would fit every row)" if others else ""
    for line, length, count in rows:
        if count != -(-length // block):
            rule = f"must have an id for each {block} of the {length} tokens, rounded up{hint}"
            table.refuse(rule, line, "hash_ids", f"{count} ids")
