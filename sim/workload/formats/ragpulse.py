"""RAGPulse, a week of a university's question answering with retrieval, with the chunks that prompts are made of.

github.com/flashserve/RAGPulse, data/*.jsonl; Wang et al., *RAGPulse*, arXiv:2511.12979. A row of ``0_trace.jsonl``
names the chunks of its prompt in five lists. Five maps beside that file say how long each chunk is. The reader makes
block ids from them: two prompts share a block if they consist of the same chunks up to the end of the block.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.columns import codes, trace_of
from chairlift.sim.workload.formats.text_tables import (
    Table,
    first_line,
    label,
    read_json_lines,
    read_json_table,
    seconds_ps,
    whole,
)
from chairlift.sim.workload.trace import HashIds, Trace

BLOCK = 16  # tokens that an id made here covers: vLLM's block
PARTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")  # of a prompt, in order
_MAPS = ("1_sys_prompt", "2_passages", "3_history", "5_web_search", "4_user_input")  # their files, in the same order
_THEIRS = {"arrival_ps": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}


def told(head: bytes) -> bool:
    """The first row begins with a time in quotes."""
    return re.match(r'\{"timestamp": *"', first_line(head)) is not None


def companions(path: Path) -> list[Path]:
    """The maps of chunks beside ``path``, found by their names; as many of the five as there are."""
    if "0_trace" not in path.name:
        return []
    beside = [path.with_name(path.name.replace("0_trace", name)) for name in _MAPS]
    return [each for each in beside if each.is_file()]


def read(path: Path, limit: int | None, times: bool) -> Trace:
    """The trace; its times count from the first request. Raises `BadInput` with the line of all that is wrong."""
    table = read_json_table(path, limit, [*_THEIRS.values(), "session_id", "hash_ids"])
    table.done()
    arrivals = table.parsed("timestamp", seconds_ps, 0)
    table.done()  # rows are put in order of their times
    sessions = codes(table.parsed("session_id", label, ""))[0]  # numbered in the order of the file
    order = sorted(range(len(arrivals)), key=arrivals.__getitem__)
    table.rows, table.lines = [table.rows[i] for i in order], [table.lines[i] for i in order]
    first = arrivals[order[0]]
    notes = [f"times count from the first request, at {first // PS_PER_S} s in the file"]
    if order != list(range(len(order))):
        notes.append("rows brought in order of time")
    nothing: list[tuple[int, int]] = []
    chunks = table.parsed("hash_ids", _chunks, nothing)
    columns = {
        "arrival_ps": [arrivals[i] - first for i in order],
        "session": [sessions[i] for i in order],
    }
    trace = trace_of(table, "ragpulse", _THEIRS, columns, notes, hash_block=BLOCK)
    lengths = _lengths(path)
    if lengths is None:
        notes.append("the five maps of chunk lengths are not beside it: no prefixes, no sessions")
        # Without `session`: a prompt here does not begin with the prompt before it, as that of a chat does.
        return dataclasses.replace(trace, session=None, notes=tuple(notes))
    return dataclasses.replace(trace, hash_ids=_blocks(chunks, trace.prompt_tokens.tolist(), lengths))


def _chunks(cell: Any) -> list[tuple[int, int]]:
    """The part and the id of each chunk of a prompt, in order. Raises ValueError if ``cell`` is no such mapping."""
    if not isinstance(cell, dict) or any(not isinstance(cell.get(part), list) for part in PARTS):
        raise ValueError(f"must be a mapping with the lists {', '.join(PARTS)}")
    return [(i, whole(chunk)) for i, part in enumerate(PARTS) for chunk in cell[part]]


def _lengths(path: Path) -> dict[tuple[int, int], int] | None:
    """How many tokens each chunk, given by its part and its id, has; None unless all five maps are there."""
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
    """Ids of the full blocks that chunks cover. The template adds tokens at the end, which are the request's own.

    ``rows`` are the chunks of each prompt, ``prompts`` its tokens.

    Example: chunks of 20 and 30 tokens cover the blocks 0, 1 and 2. Block 0 ends in the first chunk, so every prompt
    that begins with this chunk has the same id there. Blocks 1 and 2 end in the second chunk, so a prompt has the same
    ids there only if it begins with both.
    """
    known: dict[tuple[int, int, int], int] = {}  # (id of the chunks before, a chunk, block) → id

    def ids(chunks: list[tuple[int, int]], most: int) -> Iterator[int]:
        before = end = block = 0
        for part, chunk in chunks:
            end = min(end + lengths.get((part, chunk), 0), most)
            # The chunks up to here get an id of their own, as if it were that of a block -1.
            before = known.setdefault((before, part << 32 | chunk, -1), len(known))
            while (block + 1) * BLOCK <= end:
                yield known.setdefault((before, 0, block), len(known))
                block += 1

    return HashIds.of([list(ids(chunks, most)) for chunks, most in zip(rows, prompts, strict=True)])
