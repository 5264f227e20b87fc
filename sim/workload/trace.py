"""A `Trace`: what arrives, and how long each request is, as numpy columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.units import PS_PER_S

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]

LATEST_PS = 2**63 - 1  # int64 picoseconds: about 106 days
SHOWN = 20  # problems that are listed; further ones are only counted

# Columns, one value a request: the type that is stored, and the smallest value.
COLUMNS: dict[str, tuple[type[np.integer[Any]], int | None]] = {
    "arrival_ps": (np.int64, 0),
    "prompt_tokens": (np.int32, 1),
    "output_tokens": (np.int32, 1),
    "max_tokens": (np.int32, 1),
    "ignore_eos": (np.int8, 0),
    "priority": (np.int32, None),
    "tenant": (np.int32, 0),
    "session": (np.int64, -1),
    "prefix_group": (np.int32, -1),
    "prefix_tokens": (np.int32, 0),
    "follows": (np.int64, -1),
    "think_ps": (np.int64, 0),
}


class HashIds(NamedTuple):
    """Block ids of every prompt, ragged: the ids of row i are ``values[offsets[i]:offsets[i + 1]]``.

    An id stands for a block of tokens *and everything before it*, so equal ids mean an equal prefix.

    Example: the rows ``[5, 6]``, ``[]`` and ``[5]`` are ``values = [5, 6, 5]`` and ``offsets = [0, 2, 2, 3]``. The
    third prompt begins with the same block as the first.
    """

    values: IntArray  # Shape: (ids of all rows,)
    offsets: IntArray  # Shape: (rows + 1,)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> HashIds:
        """The ids of each row, in order of rows. All must fit in 64 bits."""
        offsets = offsets_of([len(row) for row in rows])
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(offsets[-1])), offsets)

    def row(self, i: int) -> IntArray:
        """Ids of row ``i``."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def taken(self, order: IntArray) -> HashIds:
        """The rows whose numbers are in ``order``, in that order."""
        counts = np.diff(self.offsets)[order]
        offsets = offsets_of(counts)
        places = np.repeat(self.offsets[order] - offsets[:-1], counts) + np.arange(offsets[-1])
        return HashIds(self.values[places], offsets)


def offsets_of(counts: Sequence[int] | IntArray) -> IntArray:
    """Where each row of a ragged array starts, and the end of the last. Shape: ``(rows + 1,)`` int64."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


class Fault(NamedTuple):
    """A rule that one row of a trace breaks."""

    row: int  # from 0
    column: str
    rule: str
    value: object


@dataclass(frozen=True, eq=False)
class Trace:
    """What arrives: one row a request, in order of arrival. Columns have shape ``(n,)`` and are read-only.

    A column may be given as any integer array or sequence; it is stored with the type named below.

    ``follows`` names the row of another request, above this one. The request is then sent ``think_ps`` after that
    other request has ended. Its ``arrival_ps`` repeats that of the row it follows, as a lower bound. Any number of rows
    may follow one row.

    Example: row 0 arrives at 3 s; row 1 has ``follows`` 0 and ``think_ps`` 2 s, and so ``arrival_ps`` 3 s. If row 0
    ends at 10 s, row 1 is sent at 12 s.

    Raises:
        BadInput: no rows, columns of different lengths, numbers out of range or not finite and whole, arrivals
            out of order, or a row that follows no earlier one. At most twenty rows are listed.
    """

    arrival_ps: IntArray  # int64 picoseconds, >= 0, never falling
    prompt_tokens: TokenArray  # int32, >= 1
    output_tokens: TokenArray  # int32, >= 1: what the request will really generate
    max_tokens: TokenArray | None = None  # int32, >= output_tokens: the cap the client declares
    ignore_eos: npt.NDArray[np.int8] | None = (
        None  # int8; 1: the client asked for max_tokens, whatever they are; else 0
    )
    priority: TokenArray | None = None  # int32; what it means is the policy's business
    tenant: TokenArray | None = None  # int32 index into `tenants`
    tenants: tuple[str, ...] = ()
    session: IntArray | None = None  # int64; -1: none
    prefix_group: TokenArray | None = None  # int32; requests of a group share their first tokens; -1: none
    prefix_tokens: TokenArray | None = None  # int32, <= prompt_tokens: how many of them are the group's
    follows: IntArray | None = None  # int64; row of the request whose end is waited for; -1: none, sent at arrival_ps
    think_ps: IntArray | None = None  # int64 picoseconds from that end to the sending; 0 where follows is -1
    hash_ids: HashIds | None = None
    hash_block: int = 512  # tokens that one hash id covers
    source: str = ""  # where the trace comes from, in one line
    notes: tuple[str, ...] = ()  # what was dropped or changed since that source

    def __post_init__(self) -> None:
        columns = {}
        for name in COLUMNS:
            value = getattr(self, name)
            if value is not None:
                columns[name] = _whole_numbers(name, value)
        n = len(columns["arrival_ps"])
        if n == 0:
            raise BadInput(Problem("the trace has no requests"))
        for name, column in columns.items():
            if len(column) != n:
                raise BadInput(Problem(f"must have {n} values, one a request", path=name, value=len(column)))
        found = faults(columns, self.hash_ids, self.hash_block, len(self.tenants))
        if found:
            problems = [Problem(f.rule, path=f"{f.column}[{f.row}]", value=f.value) for f in found]
            raise BadInput(shortened(problems))
        for name, column in columns.items():
            column = column.astype(COLUMNS[name][0], copy=False).view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)  # the one place a frozen Trace is written

    def __len__(self) -> int:
        return len(self.arrival_ps)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_ps[-1] - self.arrival_ps[0]) / PS_PER_S

    def slice(self, start: int, stop: int) -> Trace:
        """Rows ``start`` up to but not including ``stop``; arrival times stay as they are.

        Raises:
            BadInput: no rows are left.
            ValueError: the trace has ``follows``, and ``start`` is not 0, so rows that others follow might be cut off.
        """
        rows = slice(start, stop)
        if self.follows is not None and rows.indices(len(self))[0] != 0:
            raise ValueError(f"a trace whose requests follow one another must be cut from row 0 on, not from {start}")
        cut = {name: getattr(self, name)[rows] for name in COLUMNS if getattr(self, name) is not None}
        if self.hash_ids is not None:
            first, last, _ = rows.indices(len(self))
            offsets = self.hash_ids.offsets[first : max(first, last) + 1]
            values = self.hash_ids.values[offsets[0] : offsets[-1]]
            cut["hash_ids"] = HashIds(values, offsets - offsets[0])
        return dataclasses.replace(self, **cut)

    def head(self, n: int) -> Trace:
        """The first ``n`` rows, or all of them when there are fewer."""
        return self if n >= len(self) else self.slice(0, n)


def named_tokens(trace: Trace) -> IntArray:
    """Of each prompt, the leading tokens that ids of the trace name; 0 without ids. Shape: ``(n,)``."""
    if trace.hash_ids is None:
        return np.zeros(len(trace), np.int64)
    found: IntArray = np.minimum(np.diff(trace.hash_ids.offsets) * trace.hash_block, trace.prompt_tokens)
    return found


def streams(trace: Trace) -> list[int] | None:
    """For each request the number of the token stream it continues, -1 without a session.

    A turn continues its session's stream if its prompt is at least as long as the last prompt and answer together;
    else the session has dropped some of its context and starts a new one.
    """
    if trace.session is None:
        return None
    latest: dict[int, tuple[int, int]] = {}  # session → its stream and the tokens in it
    streams = []
    count = 0
    for session, prompt, output in zip(
        trace.session.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
    ):
        if session < 0:
            streams.append(-1)
            continue
        stream, length = latest.get(session, (-1, 0))
        if stream < 0 or prompt < length:
            stream = count
            count += 1
        latest[session] = (stream, prompt + output)
        streams.append(stream)
    return streams


def _whole_numbers(name: str, value: Any) -> IntArray:
    """``value`` as int64. Raises `BadInput` unless it is one row of finite whole numbers of at most 64 bits."""
    column = np.asarray(value)
    if column.ndim != 1 or (column.size and column.dtype.kind not in "iuf"):
        raise BadInput(Problem("must be a row of whole numbers", path=name, value=value))
    if column.dtype.kind != "i":
        # The largest int64 is no float; the float nearest to it, 2**63, is already too large.
        wrong = ~((column == np.rint(column)) & (column >= -(2.0**63)) & (column < 2.0**63))
        if wrong.any():
            rows = np.flatnonzero(wrong)
            rule = "must be a whole number of at most 64 bits"
            problems = [Problem(rule, path=f"{name}[{i}]", value=column[i].item()) for i in rows]
            raise BadInput(shortened(problems))
    return column.astype(np.int64, copy=False)


def faults(
    columns: Mapping[str, IntArray], hash_ids: HashIds | None = None, hash_block: int = 512, tenants: int = 0
) -> list[Fault]:
    """The rules that rows of a trace break, in order of rows.

    Args:
        columns: by their names in `COLUMNS`. Shape of each: ``(n,)``.
        hash_ids: of the prompts, if the trace has any.
        hash_block: tokens that one hash id covers.
        tenants: how many names there are, for the column ``tenant``.

    Of arrivals out of order only the first is named, for sorting the rows mends all of them.
    """
    found: list[Fault] = []

    def refuse(column: str, wrong: npt.NDArray[np.bool_], rule: str) -> None:
        found.extend(Fault(int(i), column, rule, int(columns[column][i])) for i in np.flatnonzero(wrong))

    for name, column in columns.items():
        dtype, lowest = COLUMNS[name]
        limits = np.iinfo(dtype)
        lowest = limits.min if lowest is None else lowest
        # Only the first arrival is looked at: a later one below 0 is out of order, which is said below.
        low = column[:1] < lowest if name == "arrival_ps" else column < lowest
        refuse(name, low, f"must be at least {lowest}")
        refuse(name, column > limits.max, f"must be at most {limits.max}")
    if "max_tokens" in columns:
        # A cap below 1 was named above.
        cap = columns["max_tokens"]
        short = (cap >= 1) & (cap < columns["output_tokens"])
        refuse("max_tokens", short, "must be at least the row's output tokens")
    if "ignore_eos" in columns:
        goes_on, exact = columns["ignore_eos"], columns.get("max_tokens", 0) == columns["output_tokens"]
        refuse("ignore_eos", goes_on > 1, "must be 0 or 1")
        refuse("ignore_eos", (goes_on == 1) & ~exact, "must be 0 where max_tokens is not the row's output tokens")
    if "tenant" in columns:
        refuse("tenant", columns["tenant"] >= tenants, f"must be below the {tenants} tenants named")
    if "prefix_tokens" in columns:
        prefix = columns["prefix_tokens"]
        refuse("prefix_tokens", prefix > columns["prompt_tokens"], "must be at most the row's prompt tokens")
    times = columns["arrival_ps"]
    back = np.flatnonzero(times[1:] < times[:-1])
    if back.size:
        rule = f"arrivals must be in order of time: sort the rows ({back.size} are earlier than the row above)"
        found.append(Fault(int(back[0]) + 1, "arrival_ps", rule, int(times[back[0] + 1])))
    if ("prefix_tokens" in columns) != ("prefix_group" in columns):
        found.append(Fault(0, "prefix_tokens", "prefix_tokens and prefix_group go together", None))
    if ("follows" in columns) != ("think_ps" in columns):
        found.append(Fault(0, "follows", "follows and a think time go together", None))
    elif "follows" in columns:
        follows, rows = columns["follows"], np.arange(len(times))
        refuse("follows", follows >= rows, "must be the row, counted from 0, of an earlier request, or -1")
        refuse("think_ps", (follows == -1) & (columns["think_ps"] > 0), "must be 0 where follows is -1")
        after = (follows >= 0) & (follows < rows)
        refuse(
            "arrival_ps", after & (times != times[np.where(after, follows, 0)]), "must be that of the row it follows"
        )
    if hash_ids is not None:
        found.extend(_hash_faults(hash_ids, hash_block, columns["prompt_tokens"]))
    return sorted(found, key=lambda fault: fault.row)


def _hash_faults(hash_ids: HashIds, block: int, prompt: IntArray) -> list[Fault]:
    offsets = hash_ids.offsets
    if block < 1:
        return [Fault(0, "hash_block", "must be at least 1", block)]
    if block > LATEST_PS:
        return [Fault(0, "hash_block", "must fit in 64 bits", block)]
    if len(offsets) != len(prompt) + 1 or offsets[0] != 0 or offsets[-1] != len(hash_ids.values):
        return [Fault(0, "hash_ids", "offsets must run from 0 to the number of ids, rows + 1 of them", None)]
    counts = np.diff(offsets)
    rule = f"at most one id for each {block} tokens of the prompt, the last block's included"
    wrong = (counts < 0) | (counts > -(-prompt // block))
    return [Fault(int(i), "hash_ids", rule, f"{counts[i]} ids") for i in np.flatnonzero(wrong)]


def shortened(problems: list[Problem]) -> list[Problem]:
    """The first twenty problems, and one that counts the others."""
    if len(problems) <= SHOWN:
        return problems
    more = Problem(f"and {len(problems) - SHOWN} more problems like these", file=problems[0].file)
    return [*problems[:SHOWN], more]
