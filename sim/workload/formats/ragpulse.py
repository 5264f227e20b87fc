"""RAGPulse: a week of a university's question answering with retrieval, and which chunks each prompt is made of.

github.com/flashserve/RAGPulse, data/*.jsonl; Wang et al., *RAGPulse*, arXiv:2511.12979. A row of ``0_trace.jsonl``
names the chunks of its prompt in five lists; five maps beside it tell how long each chunk is. From these come block
ids: two prompts share a block where they consist of the same chunks up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.sim.workload.formats.text_tables import Table, read_json_lines, seconds_ps, whole
from chairlift.sim.workload.trace import COLUMNS, LATEST_PS, HashIds, Trace, faults

BLOCK = 16  # tokens an id made here covers: vLLM's block
PARTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")  # of a prompt, in order
_MAPS = ("1_sys_prompt", "2_passages", "3_history", "5_web_search", "4_user_input")  # their files, in the same order
_KEYS = ("timestamp", "input_length", "output_length", "session_id", "hash_ids")


def companions(path: Path) -> list[Path]:
    """The maps that belong to ``path``: files of its folder, told by name; as many as there are."""
    if "0_trace" not in path.name:
        return []
    beside = [path.with_name(path.name.replace("0_trace", name)) for name in _MAPS]
    return [each for each in beside if each.is_file()]


def load(path: Path, limit: int | None) -> Trace:
    """The trace; times count from the first request. Raises `BadInput` with the line of all that is wrong."""
    table = Table(path)
    table.header = list(_KEYS)
    for line, row in read_json_lines(path, limit):
        if isinstance(row, str):
            table.refuse(row, line)
            continue
        missing = [key for key in _KEYS if key not in row]
        for key in missing:
            table.refuse("missing key", line, key)
        if not missing:
            table.rows.append([row[key] for key in _KEYS])
            table.lines.append(line)
    table.done()
    times = table.parsed("timestamp", seconds_ps, 0)
    prompts = table.parsed("input_length", whole, 1)
    outputs = table.parsed("output_length", whole, 1)
    nothing: list[tuple[int, int]] = []
    chunks = table.parsed("hash_ids", _chunks, nothing)
    table.done()
    order = sorted(range(len(times)), key=times.__getitem__)
    notes = [f"times count from the first request, at {times[order[0]] // 10**12} s in the file"]
    if order != list(range(len(times))):
        notes.append("rows brought in order of time")
    codes: dict[str, int] = {}
    sessions = [codes.setdefault(str(row[3]), len(codes)) for row in table.rows]
    columns = {
        "arrival_ps": [times[i] - times[order[0]] for i in order],
        "prompt_tokens": [prompts[i] for i in order],
        "output_tokens": [outputs[i] for i in order],
        "session": [sessions[i] for i in order],
    }
    arrays = {name: np.array([min(v, LATEST_PS) for v in values], np.int64) for name, values in columns.items()}
    for fault in faults(arrays):
        table.refuse(fault.rule, table.lines[order[fault.row]], fault.column, fault.value)
    table.done()
    lengths = _lengths(path)
    ids = None
    if lengths is None:
        notes.append("the five maps of chunk lengths are not beside it: no prefixes, no sessions")
        del arrays["session"]  # a prompt does not begin with the last one, as a chat's would
    else:
        ids = _blocks([chunks[i] for i in order], [prompts[i] for i in order], lengths)
    kept: Any = {name: column.astype(COLUMNS[name][0]) for name, column in arrays.items()}
    source = f"{table.name} (ragpulse format)"
    return Trace(**kept, hash_ids=ids, hash_block=BLOCK, source=source, notes=tuple(notes))


def _chunks(cell: Any) -> list[tuple[int, int]]:
    """(part, id) of each chunk of a prompt, in order. Raises ValueError if it is no such mapping."""
    if not isinstance(cell, dict) or any(not isinstance(cell.get(part), list) for part in PARTS):
        raise ValueError(f"must be a mapping with the lists {', '.join(PARTS)}")
    return [(i, whole(chunk)) for i, part in enumerate(PARTS) for chunk in cell[part]]


def _lengths(path: Path) -> dict[tuple[int, int], int] | None:
    """(part, id) → tokens; None unless all five maps are there."""
    maps = companions(path)
    if len(maps) < len(_MAPS):
        return None
    found: dict[tuple[int, int], int] = {}
    for i, file in enumerate(maps):
        table = Table(file)
        for line, row in read_json_lines(file, None):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                [key] = [key for key in row if key.endswith("_id")]
                found[i, whole(row[key])] = whole(row["token_length"])
            except (ValueError, KeyError) as error:
                table.refuse(f"must be an id and its token_length ({error})", line)
        table.done()
    return found


def _blocks(rows: Sequence[list[tuple[int, int]]], prompts: list[int], lengths: dict[tuple[int, int], int]) -> HashIds:
    """Ids of the full blocks that whole chunks cover; what the template adds at the end is the request's own."""
    known: dict[tuple[int, int, int], int] = {}  # what came before, a chunk, block → id

    def ids(chunks: list[tuple[int, int]], most: int) -> Iterator[int]:
        before = end = block = 0
        for part, chunk in chunks:
            end = min(end + lengths.get((part, chunk), 0), most)
            # the chain of chunks up to here is told by a number of its own, block -1
            before = known.setdefault((before, part << 32 | chunk, -1), len(known))
            while (block + 1) * BLOCK <= end:
                yield known.setdefault((before, 0, block), len(known))
                block += 1

    found = [list(ids(chunks, most)) for chunks, most in zip(rows, prompts, strict=True)]
    offsets = np.zeros(len(found) + 1, np.int64)
    np.cumsum([len(each) for each in found], out=offsets[1:])
    return HashIds(np.fromiter(chain.from_iterable(found), np.int64, int(offsets[-1])), offsets)
