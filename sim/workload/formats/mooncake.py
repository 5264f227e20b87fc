"""Mooncake's traces with the blocks that prompts share, in JSON lines.

github.com/kvcache-ai/Mooncake, FAST25-release/traces. Keys of a row: ``timestamp`` (ms), ``input_length``,
``output_length`` and ``hash_ids``. An id stands for 512 tokens and all tokens before them; the last, partial block has
an id as well. ``hash_ids`` may be absent, but then from all rows.

A file is told by its blocks: as many ids as the prompt has blocks of 512. vLLM's timed traces have the same keys, but
seconds and blocks of 16. A file that may be either has to be named.
"""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.workload.formats import timed_rows
from chairlift.sim.workload.trace import Trace

BLOCK = 512  # tokens that a hash id covers

options = timed_rows.OPTIONS


def told(head: bytes) -> bool:
    """The first rows have an id for each 512 tokens of a prompt, or no ids, or ids that fit no format of these keys."""
    return timed_rows.fits(head, BLOCK) or (timed_rows.has_shape(head) and not timed_rows.fits(head, 16))


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
    rows = timed_rows.TimedRows("mooncake", unit="ms", block=BLOCK)
    return rows.read(path, limit, times, time_unit, hash_block, drop_empty)
