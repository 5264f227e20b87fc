"""AIPerf's custom traces with sessions, in JSON lines.

github.com/ai-dynamo/aiperf, ``--custom-dataset-type mooncake_trace``; read from ``src/aiperf/dataset/loader`` (the
class ``MooncakeTrace`` and its loader) and ``docs/benchmark-modes/trace-replay.md``. A row has ``input_length``,
``output_length`` and, where they apply, ``timestamp`` and ``delay`` (ms), ``session_id``, ``hash_ids`` and
``context_mode``. What AIPerf sends in a later turn of a session is the conversation so far and ``input_length`` tokens
more, unless ``context_mode`` is ``message_array_with_responses``. A row with ``hash_ids`` is taken as a whole prompt,
which these ids name. Rows with texts in place of lengths are refused.

Example: two rows of session ``a``, 300 tokens in and 40 out, then 150 in with a ``delay`` of 2000. The second is sent
2 s after the first has ended, with a prompt of 300 + 40 + 150 tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

from chairlift.sim.workload.formats import session_rows
from chairlift.sim.workload.formats.text_tables import first_line
from chairlift.sim.workload.formats.timed_rows import OPTIONS
from chairlift.sim.workload.trace import Trace

options = OPTIONS


def told(head: bytes) -> bool:
    """The first row has a session or a delay, and is neither of RAGPulse (times in quotes) nor of Bailian."""
    line = first_line(head)
    return (
        re.match(r'\{.*"(input_length|text_input|messages)" *:', line) is not None
        and re.search(r'"(session_id|delay)" *:', line) is not None
        and re.search(r'"timestamp" *: *"|"chat_id"|"delay_ms"', line) is None
    )


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
    return session_rows.read("aiperf", path, limit, time_unit, hash_block, drop_empty, whole_prompts=False)
