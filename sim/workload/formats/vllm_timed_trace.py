"""The timed traces of vLLM's serving benchmark, in JSON lines.

``vllm bench serve --dataset-name timed_trace``. Keys of a row: ``timestamp``, ``input_length``, ``output_length`` and
``hash_ids``. Read from the class ``TimedTrace`` of vLLM's Rust port of the benchmark and from the benchmark's help:
``--timed-trace-sec-multiplier`` is 1 by default, so times are seconds, and ``--timed-trace-chunk-hash-size`` is 16, so
an id stands for 16 tokens; the last id of a row may stand for fewer. Here ``time_unit`` and ``hash_block`` say
otherwise.
"""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.workload.formats import timed_rows
from chairlift.sim.workload.trace import Trace

BLOCK = 16  # tokens that a hash id covers

options = timed_rows.OPTIONS


def told(head: bytes) -> bool:
    """The first rows have an id for each 16 tokens of a prompt, or no ids."""
    return timed_rows.fits(head, BLOCK)


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
    rows = timed_rows.TimedRows("vllm_timed_trace", unit="s", block=BLOCK)
    return rows.read(path, limit, times, time_unit, hash_block, drop_empty)
