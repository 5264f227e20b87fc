"""BurstGPT, in CSV.

github.com/HPMLL/BurstGPT. Columns: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``. They are
found by name, for the second release puts the session and its elapsed time second and third. Requests of the API have
an empty session there, and so none. Failed requests have 0 tokens and are dropped. Time 0 is the first request that is
kept, for the file counts seconds from a midnight that may be months earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.formats.columns import codes, trace_of
from chairlift.sim.workload.formats.text_tables import column_names, label, read_csv, seconds_ps, whole
from chairlift.sim.workload.trace import Trace

_THEIRS = {"arrival_ps": "Timestamp", "prompt_tokens": "Request tokens", "output_tokens": "Response tokens"}


def told(head: bytes) -> bool:
    """The header names BurstGPT's column of prompts."""
    return "Request tokens" in column_names(head)


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


options = ("drop_empty",)  # as always here


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = True) -> Trace:
    """The trace, without failed requests. Raises `BadInput` with the line of all that is wrong."""
    table = read_csv(path, limit)
    table.require(*_THEIRS.values())
    prompts = table.parsed("Request tokens", whole, 1)
    outputs = table.parsed("Response tokens", whole, 1)
    kept = [prompt != 0 and output != 0 for prompt, output in zip(prompts, outputs, strict=True)]
    notes = []
    if not all(kept):
        notes.append(f"{kept.count(False)} failed requests (0 tokens) dropped")
        table.keep(kept)
    if not any(kept):
        raise BadInput(Problem("every request in the file failed (0 tokens)", file=table.file))
    seconds = table.parsed("Timestamp", seconds_ps, 0)
    table.done()  # the first time must be sound: all times count from it
    notes.append(f"times count from the first request, at {table.cells('Timestamp')[0]} s in the file")
    columns: dict[str, Sequence[int]] = {"arrival_ps": [time - seconds[0] for time in seconds]}
    if table.has("Session ID"):
        columns["session"] = codes(table.parsed("Session ID", label, ""))[0]
    return trace_of(table, "burstgpt", _THEIRS, columns, notes)
