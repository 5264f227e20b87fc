"""Dynamo's replay traces with sessions, in JSON lines.

github.com/ai-dynamo/dynamo, written by ``benchmarks/coding`` and read by ``python -m dynamo.replay``; read from
``benchmarks/coding/mooncake.py``, its README, and the crate ``dynamo-data-gen`` (``src/mooncake.rs``). A row has
``session_id``, ``input_length``, ``output_length``, ``hash_ids`` and either ``timestamp`` (ms, the first turn of a
session) or ``delay`` (ms after the turn before has ended). Unlike in AIPerf's rows, ``input_length`` is the whole
prompt. The names ``input_tokens``, ``output_tokens``, ``created_time`` and ``delay_ms`` mean the same keys. A hash id
covers 512 tokens unless ``hash_block`` says otherwise (``--trace-block-size`` there).

A file whose sessions have ``hash_ids`` may be AIPerf's as well: it has to be named.
"""

from __future__ import annotations

import re
from pathlib import Path

from chairlift.sim.workload.formats import session_rows
from chairlift.sim.workload.formats.text_tables import first_line
from chairlift.sim.workload.formats.timed_rows import OPTIONS
from chairlift.sim.workload.trace import Trace

options = OPTIONS

_ALIASES = {
    "input_tokens": "input_length",
    "output_tokens": "output_length",
    "created_time": "timestamp",
    "delay_ms": "delay",
}


def told(head: bytes) -> bool:
    """The first row has a session and hash ids, or a delay in the name of which its unit is said."""
    line = first_line(head)
    if re.search(r'"timestamp" *: *"|"chat_id"|"hash_id_scope"', line):
        return False
    if not re.match(r'\{.*"(input_length|input_tokens)" *:', line):
        return False
    return ('"session_id"' in line and '"hash_ids"' in line) or '"delay_ms"' in line


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(
    path: Path,
    limit: int | None,
    times: bool,
    time_unit: str | None = None,
    hash_block: int | None = None,
    drop_empty: bool = False,
) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong."""
    return session_rows.read(
        "dynamo", path, limit, time_unit, hash_block, drop_empty, whole_prompts=True, aliases=_ALIASES
    )
