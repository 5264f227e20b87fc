"""Vidur's and Etalon's traces, in CSV; some have lengths only.

github.com/microsoft/vidur, data/processed_traces; github.com/project-etalon/etalon. Columns:
``num_prefill_tokens,num_decode_tokens`` and, in some files, ``arrived_at`` (s).
"""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.formats.columns import trace_of
from chairlift.sim.workload.formats.text_tables import column_names, read_csv, seconds_ps
from chairlift.sim.workload.trace import Trace

_THEIRS = {"arrival_ps": "arrived_at", "prompt_tokens": "num_prefill_tokens", "output_tokens": "num_decode_tokens"}


def told(head: bytes) -> bool:
    """The header names Vidur's column of prompts."""
    return "num_prefill_tokens" in column_names(head)


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


options = ("drop_empty",)


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = False) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong, or if ``times`` are needed and missing."""
    table = read_csv(path, limit)
    table.require("num_prefill_tokens", "num_decode_tokens")
    if table.has("arrived_at"):
        arrivals = {"arrival_ps": table.parsed("arrived_at", seconds_ps, 0)}
        return trace_of(table, "vidur", _THEIRS, arrivals, drop_empty=drop_empty)
    if times:
        rule = "missing column: the file has lengths only, so the workload must say arrivals of its own"
        raise BadInput(Problem(rule, table.file, 1, "arrived_at"))
    arrivals = {"arrival_ps": [0] * len(table.rows)}
    return trace_of(table, "vidur", _THEIRS, arrivals, ["the file has no arrival times"], drop_empty=drop_empty)
