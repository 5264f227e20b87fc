"""Azure's LLM inference traces of 2023 and 2024, in CSV.

github.com/Azure/AzurePublicDataset. Columns: ``TIMESTAMP,ContextTokens,GeneratedTokens``. Stamps are wall-clock times:
with seven decimals (100 ns) and CRLF line ends in 2023, with a zone in 2024. Time 0 is the first request.
The column ``NumImages`` of the multimodal trace is not used, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.columns import trace_of
from chairlift.sim.workload.formats.text_tables import column_names, read_csv
from chairlift.sim.workload.trace import Trace

_THEIRS = {"arrival_ps": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
_PLAIN = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\.\d{1,9}", re.ASCII)
_EPOCH_PS = date(1970, 1, 1).toordinal() * 86_400 * PS_PER_S
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII)


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
    stamps = _alike(table.cells("TIMESTAMP")) or table.parsed("TIMESTAMP", _stamp_ps, 0)
    table.done()  # the first stamp must be sound: all times count from it
    arrivals = {"arrival_ps": [stamp - stamps[0] for stamp in stamps]}
    return trace_of(table, "azure", _THEIRS, arrivals, drop_empty=drop_empty)


def _alike(cells: Sequence[str]) -> list[int] | None:
    """As `_stamp_ps` of each cell, much faster, if all are written as the first and end in a fraction; else None."""
    first = cells[0]
    if _PLAIN.fullmatch(first) is None or any(len(cell) != len(first) or not cell.isascii() for cell in cells):
        return None
    if not "1700" < min(cells) <= max(cells) < "2262":  # what 64 bits of nanoseconds can say
        return None
    try:
        stamps = np.array(cells, dtype="datetime64[ns]")
    except ValueError:
        return None  # some cell is no time: the slow way says which
    if np.isnat(stamps).any():
        return None
    since_epoch: list[int] = stamps.astype(np.int64).tolist()
    return [nanoseconds * 1000 + _EPOCH_PS for nanoseconds in since_epoch]


def _stamp_ps(cell: str) -> int:
    """A wall-clock time as picoseconds since the year 1.

    Raises:
        ValueError: ``cell`` is no such time.
    """
    found = _STAMP.fullmatch(cell.strip())
    if found is None:
        raise ValueError("must be a time like 2023-11-16 18:17:03.9799600")
    day, hour, minute, second, fraction, sign, zone_h, zone_m = found.groups()
    if hour > "23" or minute > "59" or second > "59":
        raise ValueError("must be a time of day")
    minutes = int(hour) * 60 + int(minute)
    if sign:
        minutes -= int(sign + "1") * (int(zone_h) * 60 + int(zone_m))
    whole_s = date.fromisoformat(day).toordinal() * 86_400 + minutes * 60 + int(second)
    return whole_s * PS_PER_S + int((fraction or "").ljust(12, "0"))
