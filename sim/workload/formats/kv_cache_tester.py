"""Sessions of coding agents: kv-cache-tester's Claude Code sessions, and the table of requests derived from them.

github.com/callanjfox/kv-cache-tester, traces/trace_NNNN.json, captured at WEKA; one session a line. A request is sent
when the one before it has ended and the tool or the person has taken its time, so a replay is a closed loop: `Trace`
columns ``follows`` and ``think_ps``. A subagent's requests follow one another; the main agent goes on after the
subagent if it did so in the recording. Sessions have no start times: all start at 0, unless the workload says
``arrivals``, which are then theirs.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.text_tables import Table, read_csv, read_json_lines, seconds_ps, whole
from chairlift.sim.workload.trace import HashIds, Trace, faults

DERIVED = ("trace_id", "agent", "seq", "t_s", "input_tokens", "output_tokens", "api_time_s", "think_time_s")


class _Sent(NamedTuple):
    """One request of a session; times in ps from the session's start."""

    line: int
    at: int
    end: int
    think: int
    prompt: int
    output: int
    ids: list[int] | None


class _Agent(NamedTuple):
    """Requests of one agent, in order; a subagent's ``at`` and ``end`` say when it was at work."""

    requests: list[_Sent]
    at: int
    end: int


class _Rows:
    """Columns of a trace in the making."""

    def __init__(self) -> None:
        self.line: list[int] = []
        self.prompt: list[int] = []
        self.output: list[int] = []
        self.session: list[int] = []
        self.follows: list[int] = []
        self.think: list[int] = []
        self.ids: list[list[int]] = []
        self.silent = 0
        self._sessions = 0
        self._first_id = 0

    def add(self, main: list[_Sent], subagents: list[_Agent]) -> None:
        """A session: the ids of its blocks are its own."""
        first = len(self.ids)
        last, ended = -1, 0  # row of the request that the next one waits for, and when that ended
        waiting = sorted(subagents, key=lambda agent: agent.at)
        for request in main:
            think = request.think
            while waiting and waiting[0].at <= request.at:
                agent = waiting.pop(0)
                row = self._chain(agent, last, ended)
                if row is not None and agent.end <= request.at:  # the main agent has waited for it
                    last, ended, think = row, agent.end, max(0, request.at - agent.end)
            last = self._append(request, last, think)
            ended = request.end
        for agent in waiting:
            self._chain(agent, last, ended)
        self._sessions += 1
        self._first_id = 1 + max((max(ids, default=0) for ids in self.ids[first:]), default=self._first_id)

    def _chain(self, agent: _Agent, last: int, ended: int) -> int | None:
        row = None
        for number, request in enumerate(agent.requests):
            think = request.think if number else max(0, agent.at - ended)
            row = self._append(request, last if row is None else row, think)
        return row

    def _append(self, request: _Sent, follows: int, think: int) -> int:
        self.line.append(request.line)
        self.prompt.append(request.prompt)
        self.silent += request.output == 0
        self.output.append(max(1, request.output))
        self.session.append(self._sessions)
        self.follows.append(follows)
        self.think.append(think if follows >= 0 else 0)
        if request.ids is not None:
            self.ids.append([self._first_id + i for i in request.ids])
        return len(self.line) - 1

    def trace(self, table: Table, block: int, format: str) -> Trace:
        """All of it. Raises `BadInput` with the line of all that is wrong."""
        table.done()
        zeros = np.zeros(len(self.line), np.int64)
        columns: dict[str, Any] = {
            "arrival_ps": zeros,
            "prompt_tokens": np.array(self.prompt, np.int64),
            "output_tokens": np.array(self.output, np.int64),
            "session": np.array(self.session, np.int64),
            "follows": np.array(self.follows, np.int64),
            "think_ps": np.array(self.think, np.int64),
        }
        hash_ids = None
        if self.ids:
            offsets = np.zeros(len(self.ids) + 1, np.int64)
            np.cumsum([len(ids) for ids in self.ids], out=offsets[1:])
            hash_ids = HashIds(np.fromiter(chain.from_iterable(self.ids), np.int64, int(offsets[-1])), offsets)
        for fault in faults(columns, hash_ids, block):
            table.refuse(fault.rule, self.line[fault.row], fault.column, fault.value)
        table.done()
        notes = [f"{self._sessions} sessions; the file says no start times: all start at 0 unless arrivals are given"]
        if self.silent:
            notes.append(f"{self.silent} requests without output taken as one token")
        source = f"{table.name} ({format} format)"
        return Trace(**columns, hash_ids=hash_ids, hash_block=block, source=source, notes=tuple(notes))


def load(path: Path, limit: int | None) -> Trace:
    """kv-cache-tester sessions, one a line; ``limit`` counts sessions. Raises `BadInput`."""
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
                    length = int(whole(each.get("duration_ms") or 0)) * (PS_PER_S // 1000)
                    end = max([start + length, *(r.end for r in inner)])
                    subagents.append(_Agent(inner, start, end))
                else:
                    main.append(_sent(line, each, 0))
            rows.add(main, subagents)
        except (ValueError, AttributeError, TypeError) as error:
            table.refuse(f"not a session of kv-cache-tester: {error}", line)
    if not rows.line and not table.problems:
        table.refuse("the file has no sessions")
    return rows.trace(table, block, "kv_cache_tester")


def load_derived(path: Path, limit: int | None) -> Trace:
    """The table of requests that this project's traces have; ``limit`` counts rows. Raises `BadInput`.

    It has no block ids: of what a session's prompts share only what a chat's would is known, the whole prompt before.
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
    return rows.trace(table, 64, "kv_cache_tester, derived")


def _sent(line: int, row: dict[str, Any], start: int) -> _Sent:
    at = start + seconds_ps(_need(row, "t"))
    ids = [whole(i) for i in _need(row, "hash_ids")]
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
    if key not in row:
        raise ValueError(f"{key} is missing")
    return row[key]


def _seconds_or_none(cell: Any) -> int:
    """Seconds as picoseconds; 0 where there is nothing."""
    return max(0, seconds_ps(cell)) if cell not in (None, "") else 0
