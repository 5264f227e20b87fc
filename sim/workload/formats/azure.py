"""Azure's LLM inference traces of 2023 and 2024, in CSV.

github.com/Azure/AzurePublicDataset. Columns: ``TIMESTAMP,ContextTokens,GeneratedTokens``. Stamps are wall-clock times:
with seven decimals (100 ns) and CRLF line ends in 2023, with a zone in 2024. Time 0 is the first request.
The column ``NumImages`` of the multimodal trace is not used, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chairlift.sim.workload.formats.columns import trace_of
from chairlift.sim.workload.formats.text_tables import EPOCH_PS, column_names, read_csv, stamp_ps
from chairlift.sim.workload.trace import Trace

_THEIRS = {"arrival_ps": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
_STAMPS = re.compile(r"(?:\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?\n)++", re.ASCII)
_UTC = "+00:00\n"


def told(head: bytes) -> bool:
    """The header names Azure's column of prompts."""
    return "ContextTokens" in column_names(head)


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


options = ("drop_empty",)


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = False) -> Trace:
    """The trace. Raises `BadInput` with the line of all that is wrong."""
    table = read_csv(path, limit)
    table.require(*_THEIRS.values())
    stamps = _alike(table.cells("TIMESTAMP")) or table.parsed("TIMESTAMP", stamp_ps, 0)
    table.done()  # the first stamp must be sound: all times count from it
    arrivals = {"arrival_ps": [stamp - stamps[0] for stamp in stamps]}
    return trace_of(table, "azure", _THEIRS, arrivals, drop_empty=drop_empty)


def _alike(cells: Sequence[str]) -> list[int] | None:
    """As `stamp_ps` of each cell, much faster, if all are plain stamps, or all end in the zone of UTC; else None."""
    text = "\n".join([*cells, ""])
    if text.count(_UTC) == len(cells):
        text = text.replace(_UTC, "\n")
    if text.count("\n") != len(cells) or _STAMPS.fullmatch(text) is None:
        return None
    plain = text.split("\n")[:-1]
    if not "1700" < min(plain) <= max(plain) < "2262":  # what 64 bits of nanoseconds can say
        return None
    try:
        stamps = np.array(plain, dtype="datetime64[ns]")
    except ValueError:
        return None  # some cell is no time: the slow way says which
    since_epoch: list[int] = stamps.astype(np.int64).tolist()
    return [nanoseconds * 1000 + EPOCH_PS for nanoseconds in since_epoch]
