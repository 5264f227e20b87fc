"""AIPerf's result files: the requests that a run sent, in JSON lines.

github.com/ai-dynamo/aiperf, ``profile_export.jsonl``; read from its ``docs/tutorials/working-with-profile-exports.md``.
A line has ``metadata`` with ``request_start_ns`` (ns), ``conversation_id`` and ``turn_index``, ``metrics`` with
``input_sequence_length.value`` and ``output_sequence_length.value`` (tokens), and ``error``, null where the request
succeeded.
"""

from __future__ import annotations

import re
from pathlib import Path

from chairlift.sim.workload.formats.result_rows import ABSENT, Measured, first, value
from chairlift.sim.workload.formats.text_tables import first_line, read_json_lines
from chairlift.sim.workload.trace import Trace

options = ("drop_empty",)


def told(head: bytes) -> bool:
    """The first line has the metadata of a request and the time of its start."""
    line = first_line(head)
    return re.match(r'\{"(metadata|metrics)" *:', line) is not None and '"request_start_ns"' in line


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = False) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong."""
    names = ("request_start_ns", "input_sequence_length", "output_sequence_length")
    measured = Measured(path, "aiperf_profile", "ns", names)
    lines = list(read_json_lines(path, None))
    turns = False  # whether any request is not the first of its session
    for line, row in lines:
        turn, session = (first(value(row, "metadata", name)) for name in ("turn_index", "x_correlation_id"))
        if turn is not ABSENT and (type(turn) is not int or turn < 0):
            measured.refuse("must be a whole number", line, "metadata.turn_index", turn)
        if session is not ABSENT and not isinstance(session, str):
            measured.refuse("must be text", line, "metadata.x_correlation_id", session)
        turns = turns or (type(turn) is int and turn > 0)
    for line, row in lines:
        if isinstance(row, str):
            measured.refuse(row, line)
        elif value(row, "error") not in (ABSENT, None):
            measured.lose()
        else:
            session = value(row, "metadata", "x_correlation_id")
            measured.add(
                line,
                first(value(row, "metadata", "request_start_ns")),
                first(value(row, "metrics", "input_sequence_length", "value")),
                first(value(row, "metrics", "output_sequence_length", "value")),
                session if turns and isinstance(session, str) else None,
            )
    return measured.trace(limit, drop_empty)
