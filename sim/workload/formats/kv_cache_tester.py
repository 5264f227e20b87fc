"""kv-cache-tester's sessions of coding agents, one a line, or the table of requests derived from them.

github.com/callanjfox/kv-cache-tester, traces/trace_NNNN.json, captured at WEKA. A request is
sent when the request before it has ended and the tool or the person has taken its time, so a replay is a closed loop:
columns ``follows`` and ``think_ps`` of a `Trace`. The requests of a subagent follow one another. The main agent waits
for a subagent if it did so in the recording. Sessions have no start times: all start at 0, unless the workload gives
``arrivals``, which are then those of sessions.

Example: the main agent's first request ends at 4 s, a subagent is at work from 10 s to 19 s, and the main agent's
second request starts at 21 s. The subagent's first request follows the first of the main agent, 6 s after it. The
second request of the main agent follows the last of the subagent, 2 s after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chairlift.sim.units import PS_PER_MS
from chairlift.sim.workload.formats.columns import trace_of
from chairlift.sim.workload.formats.text_tables import (
    Table,
    column_names,
    first_line,
    head,
    read_csv,
    read_json_lines,
    seconds_ps,
    whole,
)
from chairlift.sim.workload.trace import LATEST_PS, Trace

DERIVED = ("trace_id", "agent", "seq", "t_s", "input_tokens", "output_tokens", "api_time_s", "think_time_s")


def told(head: bytes) -> bool:
    """The first line is a session, or the header that of the derived table."""
    line = first_line(head)
    session = line.startswith('{"id":') and ('"hash_id_scope"' in line or '"block_size"' in line)
    return session or _derived(head)


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool) -> Trace:
    """The trace; ``limit`` counts sessions, or rows of the derived table.

    Raises:
        BadInput: all that is wrong, with the line.
    """
    return _read_derived(path, limit) if _derived(head(path)) else _read_sessions(path, limit)


def _derived(head: bytes) -> bool:
    return column_names(head)[:4] == list(DERIVED[:4])


class _Sent(NamedTuple):
    """One request of a session. Times are in picoseconds since the start of the session."""

    line: int
    at: int
    end: int
    think: int
    prompt: int
    output: int
    ids: list[int] | None


class _Agent(NamedTuple):
    """The requests of a subagent, in order, and when it was at work: from ``at`` to ``end``."""

    requests: list[_Sent]
    at: int
    end: int


class _Rows:
    """The columns of a trace, one session after another."""

    def __init__(self) -> None:
        self.line: list[int] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.session: list[int] = []
        self.follows: list[int] = []
        self.think: list[int] = []
        self.ids: list[list[int]] = []
        self.silent = 0  # requests without output
        self._sessions = 0
        self._first_id = 0  # what is added to the ids of the session at hand

    def add(self, main: list[_Sent], subagents: list[_Agent]) -> None:
        """Add a session. It shares no block with another session.

        Raises:
            ValueError: an id, with those of all sessions before, does not fit in 64 bits.
        """
        first = len(self.ids)
        # The row of the request that the next one waits for, and when that request ended.
        last, ended = -1, 0
        waiting = sorted(subagents, key=lambda agent: agent.at)
        for request in main:
            think = request.think
            while waiting and waiting[0].at <= request.at:
                agent = waiting.pop(0)
                row = self._chain(agent, last, ended)
                if row is not None and agent.end <= request.at:  # the main agent waited for this subagent
                    last, ended, think = row, agent.end, max(0, request.at - agent.end)
            last = self._append(request, last, think)
            ended = request.end
        for agent in waiting:
            self._chain(agent, last, ended)
        self._sessions += 1
        self._first_id = 1 + max((max(ids, default=0) for ids in self.ids[first:]), default=self._first_id)
        if self._first_id > LATEST_PS:
            raise ValueError("hash ids, with those of all sessions before, must fit in 64 bits")

    def _chain(self, agent: _Agent, last: int, ended: int) -> int | None:
        """Add the requests of a subagent; the first of them follows row ``last``, which ended at ``ended``.

        Returns the row of its last request; None if it has no requests.
        """
        row = None
        for number, request in enumerate(agent.requests):
            think = request.think if number else max(0, agent.at - ended)
            row = self._append(request, last if row is None else row, think)
        return row

    def _append(self, request: _Sent, follows: int, think: int) -> int:
        """Add a request; returns its row."""
        self.line.append(request.line)
        self.prompt.append(request.prompt)
        self.silent += request.output == 0
        self.output.append(request.output or 1)
        self.session.append(self._sessions)
        self.follows.append(follows)
        self.think.append(think if follows >= 0 else 0)
        if request.ids is not None:
            self.ids.append([self._first_id + i for i in request.ids])
        return len(self.line) - 1

    def trace(self, table: Table, format: str, block: int, prompt: str, output: str) -> Trace:
        """The trace of all rows; the file calls the columns of lengths ``prompt`` and ``output``.

        Raises `BadInput` with the line of all that is wrong.
        """
        table.done()  # without rows that were refused, `follows` would be wrong
        table.lines = self.line
        table.rows = [()] * len(self.line)
        columns: dict[str, Sequence[int]] = {
            "arrival_ps": [0] * len(self.line),
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
            "session": self.session,
            "follows": self.follows,
            "think_ps": self.think,
        }
        notes = [f"{self._sessions} sessions; the file says no start times: all start at 0 unless arrivals are given"]
        if self.silent:
            notes.append(f"{self.silent} requests without output taken as one token")
        theirs = {"prompt_tokens": prompt, "output_tokens": output}
        return trace_of(table, format, theirs, columns, notes, self.ids or None, block)


def _read_sessions(path: Path, limit: int | None) -> Trace:
    """The trace of sessions, one a line; ``limit`` counts sessions."""
    table = Table(path)
    rows = _Rows()
    block = 0
    for line, session in read_json_lines(path, limit):
        try:
            if isinstance(session, str):
                raise ValueError(session)
            size = whole(_need(session, "block_size"))
            if block not in (0, size):
                raise ValueError(f"block_size must be that of the sessions before, {block} (got {size})")
            block = size
            main: list[_Sent] = []
            subagents: list[_Agent] = []
            for each in _need(session, "requests"):
                if each.get("type") == "subagent":
                    start = seconds_ps(_need(each, "t"))
                    inner = [_sent(line, r, start) for r in _need(each, "requests")]
                    length = int(whole(each.get("duration_ms") or 0)) * PS_PER_MS
                    end = max([start + length, *(r.end for r in inner)])
                    subagents.append(_Agent(inner, start, end))
                else:
                    main.append(_sent(line, each, 0))
            rows.add(main, subagents)
        except (ValueError, AttributeError, TypeError) as error:
            table.refuse(f"not a session of kv-cache-tester: {error}", line)
    if not rows.line and not table.problems:
        table.refuse("the file has no sessions")
    return rows.trace(table, "kv_cache_tester", block, "in", "out")


def _read_derived(path: Path, limit: int | None) -> Trace:
    """The trace of a table of requests, as it lies among this project's traces; ``limit`` counts rows.

    The table has no block ids. So the prompts of a session share what those of a chat do: all of the prompt before.
    """
    table = read_csv(path, limit)
    table.require(*DERIVED)
    columns = {name: table.cells(name) for name in DERIVED[:2]}
    numbers = {name: table.parsed(name, whole, 1) for name in ("input_tokens", "output_tokens")}
    times = {name: table.parsed(name, _seconds_or_none, 0) for name in ("t_s", "api_time_s", "think_time_s")}
    table.done()
    rows = _Rows()
    sessions: dict[str, dict[str, list[_Sent]]] = {}
    for i, line in enumerate(table.lines):
        at = times["t_s"][i]
        sent = _Sent(
            line,
            at,
            at + times["api_time_s"][i],
            times["think_time_s"][i],
            numbers["input_tokens"][i],
            numbers["output_tokens"][i],
            None,
        )
        sessions.setdefault(columns["trace_id"][i], {}).setdefault(columns["agent"][i], []).append(sent)
    for agents in sessions.values():
        main = agents.pop("main", [])
        rows.add(main, [_Agent(requests, requests[0].at, requests[-1].end) for requests in agents.values()])
    return rows.trace(table, "kv_cache_tester, derived", 64, "input_tokens", "output_tokens")


def _sent(line: int, row: dict[str, Any], start: int) -> _Sent:
    """The request of ``row``, whose times count from ``start``. Raises ValueError, TypeError or AttributeError."""
    at = start + seconds_ps(_need(row, "t"))
    ids = [whole(i) for i in _need(row, "hash_ids")]
    if ids and min(ids) < 0:
        raise ValueError(f"hash ids must not be below 0 (got {min(ids)})")
    return _Sent(
        line,
        at,
        at + _seconds_or_none(row.get("api_time")),
        _seconds_or_none(row.get("think_time")),
        whole(_need(row, "in")),
        whole(_need(row, "out")),
        ids,
    )


def _need(row: dict[str, Any], key: str) -> Any:
    """The value of ``key``. Raises ValueError if there is none."""
    if key not in row:
        raise ValueError(f"{key} is missing")
    return row[key]


def _seconds_or_none(cell: Any) -> int:
    """Seconds as picoseconds, at least 0; 0 if the cell is empty."""
    return max(0, seconds_ps(cell)) if cell not in (None, "") else 0
