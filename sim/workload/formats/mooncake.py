"""Mooncake's traces with the blocks that prompts share, in JSON lines.

github.com/kvcache-ai/Mooncake, FAST25-release/traces. Keys of a row: ``timestamp`` (ms), ``input_length``,
``output_length`` and ``hash_ids``. An id stands for 512 tokens and all tokens before them; the last, partial block has
an id as well. ``hash_ids`` may be absent, but then from all rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.units import PS_PER_MS
from chairlift.sim.workload.formats.columns import block_ids, trace_of
from chairlift.sim.workload.formats.text_tables import decimal, first_line, read_json_table, whole
from chairlift.sim.workload.trace import Trace

BLOCK = 512  # tokens that a hash id covers

_THEIRS = {"arrival_ps": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}


def told(head: bytes) -> bool:
    """The first row has prompt lengths or block ids, and a time that is not in quotes, as RAGPulse's is."""
    line = first_line(head)
    ours = re.match(r'\{.*"(input_length|hash_ids)" *:', line) and not re.search(r'"timestamp" *: *"', line)
    return bool(ours) and '"hash_id_scope"' not in line


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong."""
    table = read_json_table(path, limit, _THEIRS.values(), ["hash_ids"])
    if not table.rows:
        table.done()
    columns: dict[str, Sequence[int]] = {"arrival_ps": table.parsed("timestamp", _milliseconds_ps, 0)}
    if "hash_ids" not in table.header:
        return trace_of(table, "mooncake", _THEIRS, columns)
    ids: list[list[int]] = table.parsed("hash_ids", block_ids, [])
    columns["prompt_tokens"] = table.parsed("input_length", whole, 1)
    rows = zip(table.lines, table.sound(), columns["prompt_tokens"], ids, strict=True)
    for line, sound, length, row_ids in rows:
        if sound and len(row_ids) != -(-length // BLOCK):
            rule = f"must have an id for each {BLOCK} of the {length} tokens, rounded up"
            table.refuse(rule, line, "hash_ids", f"{len(row_ids)} ids")
    return trace_of(table, "mooncake", _THEIRS, columns, ids=ids, hash_block=BLOCK)


def _milliseconds_ps(cell: Any) -> int:
    return int((decimal(cell, "must be a number of milliseconds") * PS_PER_MS).to_integral_value())
