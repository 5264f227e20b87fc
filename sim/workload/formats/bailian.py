"""Traces of Alibaba's Bailian service with the blocks that prompts share, in JSON lines.

github.com/alibaba-edu/qwen-bailian-usagetraces-anon, ``qwen_*_blksz_16.jsonl``; the keys were read from its README.
Wang et al., *KVCache Cache in the Wild*, USENIX ATC 2025. Keys of a row: ``chat_id``, ``parent_chat_id`` (-1 for the
first turn of a chat), ``timestamp`` (s), ``input_length``, ``output_length``, ``type``, ``turn`` and ``hash_ids`` (16
tokens each). A row holds its whole prompt, earlier turns included, and is sent at its own time.

The turns of a chat are those that lead by their parents to one row: they are a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chairlift.sim.workload.formats.columns import block_ids, in_time_order, in_unit, trace_of, unit_note
from chairlift.sim.workload.formats.text_tables import Table, first_line, read_json_table, whole
from chairlift.sim.workload.formats.timed_rows import OPTIONS, THEIRS
from chairlift.sim.workload.trace import Trace

BLOCK = 16  # tokens that a hash id covers

options = OPTIONS


def told(head: bytes) -> bool:
    """The first row names its chat and the chat that it goes on."""
    line = first_line(head)
    return line.startswith("{") and '"chat_id"' in line and '"parent_chat_id"' in line


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
    table = read_json_table(path, limit, [*THEIRS.values(), "chat_id", "parent_chat_id"], ["hash_ids"])
    if not table.rows:
        table.done()
    unit = time_unit or "s"
    chats, parents = table.parsed("chat_id", whole, 0), table.parsed("parent_chat_id", whole, -1)
    columns: dict[str, Sequence[int]] = {
        "arrival_ps": table.parsed("timestamp", in_unit(unit), 0),
        "prompt_tokens": table.parsed("input_length", whole, 1),
        "output_tokens": table.parsed("output_length", whole, 1),
        "session": _sessions(table, chats, parents),
    }
    none: list[int] = []
    ids = table.parsed("hash_ids", block_ids, none) if "hash_ids" in table.header else None
    notes = [unit_note("timestamp", unit, "as time_unit says" if time_unit else "as the bailian format has them")]
    columns, ids = in_time_order(table, columns, ids, notes)
    block = hash_block or BLOCK
    return trace_of(table, "bailian", THEIRS, columns, notes, ids, block, drop_empty=drop_empty)


def _sessions(table: Table, chats: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The number of each row's session, in order of first appearance.

    Example: the chats 7, 9 and 8 with the parents -1, -1 and 7 are of the sessions 0, 1 and 0.
    """
    row_of: dict[int, int] = {}
    for row, chat in enumerate(chats):
        if row_of.setdefault(chat, row) != row:
            table.refuse(
                f"two rows have this chat_id, the first on line {table.lines[row_of[chat]]}",
                table.lines[row],
                "chat_id",
                chat,
            )
    roots: dict[int, int] = {}  # row → the row that its parents lead to
    numbers: dict[int, int] = {}
    sessions = []
    for row in range(len(chats)):
        way: list[int] = []
        here, on_way = row, set()
        while here not in roots:
            way.append(here)
            on_way.add(here)
            above = row_of.get(parents[here])
            if above is None or above == here:
                roots[here] = here
            elif above in on_way:
                table.refuse(
                    "the parents of this chat lead back to it", table.lines[row], "parent_chat_id", parents[row]
                )
                roots[here] = here
            else:
                here = above
        for passed in way:
            roots[passed] = roots[here]
        sessions.append(numbers.setdefault(roots[row], len(numbers)))
    return sessions
