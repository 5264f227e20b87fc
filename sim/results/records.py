"""What happened, as append-only integer columns; every metric is computed from them afterwards."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from chairlift.sim.workload.trace import Trace

Ints = npt.NDArray[np.int64]


class Status(IntEnum):
    """How a request ended; every request ends exactly once."""

    PENDING = 0
    FINISHED = 1
    REJECTED = 2  # it could never fit, a queue was full, or a policy refused it
    TIMED_OUT = 3  # its client gave up
    FAILED = 4  # its replica failed and nobody took it over


class Kind(IntEnum):
    """What happened to a request (an event of a journal), and what its ``other`` and ``value`` then say."""

    ARRIVE = 0  # it is handed to the replica; value: requests waiting there before it
    DENY = 1  # the pool had no room when a policy asked; other: blocks that were free; value: blocks too few
    ADMIT = 2  # value: tokens found in the prefix cache or loaded; other: known tokens left to compute
    CHUNK = 3  # value: tokens computed in this run
    PARK = 4  # it decodes, but not in this run and those after it
    JOIN = 5  # it decodes again
    PREEMPT = 6  # other: the request whose tokens took the room, -1: all decodes; value: tokens of KV that it loses
    DONE = 7  # it has its answer and keeps its slot (static batching)
    END = 8  # it is gone for good; value: its `Status`
    HANDOVER = 9  # its prompt is done, its KV goes to a decode replica
    LOST = 10  # its replica failed
    DROP = 11  # the token that comes to it from this run is nobody's: it had ended, or generates it again


class StepRow(NamedTuple):
    """What one step holds: the part of a row of runs that does not depend on when it runs."""

    chunks: int  # requests with prompt tokens in it
    prefill_tokens: int
    decodes: int  # requests producing one token a step from earlier tokens
    padded: int  # token slots computed for nothing, each step
    context: int  # KV tokens that the first step's decodes and dead slots read
    late_decodes: int  # decodes whose last token came before start_ps: their first gap stands in `gaps`
    running: int  # admitted requests, those of this step included
    waiting: int
    held_blocks: int  # blocks in use once the first step's are taken
    spared_blocks: int  # blocks that its requests would hold beyond those: shared with others, or slid out of windows
    kv_tokens: int  # tokens stored before the first step, those of a shared block for each request that shares it
    promised_tokens: int  # reserved tokens that will be filled later
    promised_decodes: int  # of its decodes, those that fill one of them each step
    preempted: int  # preemptions while planning it


def row_after(row: tuple[int, ...], steps: int, held: int, spared: int) -> tuple[int, ...]:
    """The `StepRow` of the same members, ``steps`` decode steps after that of ``row``; none is late then.

    ``held`` and ``spared`` blocks are those of that step. Plain tuples: to make and pack a `StepRow` at each step takes
    3 % of a run.
    """
    chunks, prefill, decodes, padded, context, _, running, waiting, _, _, stored, promised, filling, preempted = row
    context += steps * (decodes + padded)
    stored += steps * decodes
    promised -= steps * filling
    return (
        *(chunks, prefill, decodes, padded, context, 0, running, waiting),
        *(held, spared, stored, promised, filling, preempted),
    )


class Growth(NamedTuple):
    """What the steps of a run hold beyond its first one, which its `StepRow` tells: sums over the steps k = 0, 1, 2, ….

    In three steps: a run of 3 steps begins with 5 blocks held; the second step takes 2 more, the third one more. Beyond
    the first, its steps hold 0, 2 and 3 blocks: ``held_sum`` is 0 + 2 + 3 = 5, ``held_moment`` is 0·0 + 1·2 + 2·3 = 8.
    Step k takes ``first_ps + k · slope_ps``, so the run has 5 · ``first_ps`` + 8 · ``slope_ps`` block-ps beyond
    5 blocks all the time.
    """

    held_sum: int
    held_moment: int
    spared_sum: int
    spared_moment: int


NO_GROWTH: Final = Growth(0, 0, 0, 0)


RUN_COLUMNS = (
    "start_ps",  # a row is `steps` engine steps of the same members, one after the other
    "first_ps",  # boundary to boundary of the first of them, pauses and host work included
    "slope_ps",  # each further one takes this much longer than the one before
    "steps",
    *Growth._fields,  # all 0 of a single step
    *StepRow._fields,
)

ADDED_COLUMNS = (*Growth._fields, "spared_blocks", "promised_decodes")  # that version 0.1 did not write

_RUN = Struct(f"{len(RUN_COLUMNS)}q")
PACK_RUN: Final = _RUN.pack  # a row as bytes: half the time of array.extend
UNPACK_RUN: Final = _RUN.unpack


class MeasuredRow(NamedTuple):
    """What was measured of an executed step."""

    asked_ps: int  # when the policy was asked for this step
    planning_ps: int  # wall time that the policy took, and the bookkeeping of its plan
    launch_ps: int  # wall time to prepare and launch the step
    gpu_ps: int  # from the step's first to its last operation on the GPU
    prefill_pairs: int  # query-key pairs of its chunks
    drafts: int  # that its decodes verify
    update_ps: int = 0  # wall time to take its tokens in and let requests go; written last


MEASURED_COLUMNS = MeasuredRow._fields

EVENT_COLUMNS = (  # of a journal, see `sim.replica.journal`
    "time_ps",
    "run",  # row of this replica's runs from which on it counts; of a chunk: the row that computed it
    "kind",
    "request",
    "other",
    "value",
)

GAP_COLUMNS = ("gap_ps", "count")  # inter-token gaps that are not the duration of a step

DRAFT_COLUMNS = (  # of requests, where drafts are verified
    "verifications",  # outputs of steps that verified drafts of it
    "draft_tokens",  # drafts that those verified
    "accepted_tokens",  # of those, the ones that are tokens of its answer
)

HANDOVER_COLUMNS = (  # of requests, where prefill and decode replicas are apart; -1 where it did not happen
    "handed_over_ps",  # its prompt was done, and its KV ready to be sent
    "taken_over_ps",  # its KV lay at the decode side
    "prefill_replica",
)


PACKED_ROWS = 1 << 12  # that `Rows` keeps unpacked, of each replica
PART_ROWS = 1 << 14  # that are read at once, or somewhat more


class Token(Protocol):
    """A token's time, which is known by now."""

    @property
    def ps(self) -> int:
        """Picoseconds."""


class Ended(Protocol):
    """What is written down of a request that has ended."""

    row: int  # of the trace
    produced: int  # tokens that its client has got
    lost: int  # preemptions

    @property
    def last(self) -> Token:
        """The latest of its tokens."""


@mypyc_attr(allow_interpreted_subclasses=True)
class RequestRecords:
    """One row a request of the trace, times in ps, -1 where it did not happen."""

    def __init__(self, trace: Trace) -> None:
        n = len(trace)
        unset = array("q", [-1]) * n
        self.trace = trace
        self.arrival = array("q", trace.arrival_ps.tobytes())  # when it was sent; later than in the trace if it follows
        self.emitted = array("i", [0]) * n  # tokens that the client has got
        self.status = bytearray(n)
        self.replica = array("i", [-1]) * n
        self.admitted = array("q", unset)  # first taken up by a policy
        self.first_token = array("q", unset)
        self.finished = array("q", unset)  # answered, or refused
        self.preemptions = array("i", [0]) * n
        self.cached_tokens = array("i", [0]) * n
        self.swaps = array("i", [0]) * n  # preemptions whose KV went to host memory
        self.swapped_tokens = array("q", [0]) * n  # tokens whose KV was moved there or back
        self.spoken_ps = 0  # from first to latest token, summed over the requests that have ended
        self.extra: dict[str, array[int]] = {}  # columns that only some clusters have
        self._drafts: tuple[array[int], ...] = ()  # `DRAFT_COLUMNS`, where they are counted

    def count_drafts(self) -> None:
        """Keep `DRAFT_COLUMNS` from here on."""
        self._drafts = tuple(array("i", [0]) * len(self.status) for _ in DRAFT_COLUMNS)
        self.extra.update(zip(DRAFT_COLUMNS, self._drafts, strict=True))

    def verified(self, request: int, drafts: int, accepted: int, steps: int = 1) -> None:
        """Write down that so many steps have verified ``drafts`` drafts of a request, of which it keeps so many."""
        verifications, verified, kept = self._drafts
        verifications[request] += steps
        verified[request] += drafts
        kept[request] += accepted

    def messages(self) -> npt.NDArray[np.int64]:
        """Tokens that each client has got, but those that came together with the one before count as one."""
        emitted = np.array(self.emitted, dtype=np.int64)
        accepted = self.extra.get("accepted_tokens")
        return emitted if accepted is None else emitted - np.array(accepted, dtype=np.int64)

    def moved(self, request: Ended, tokens: int, out: bool = False) -> None:
        """Write down that the KV of ``tokens`` tokens goes to host memory (``out``) or back."""
        self.swaps[request.row] += out
        self.swapped_tokens[request.row] += tokens

    def end(self, request: Ended, now: int, status: Status) -> None:
        """Write down what became of ``request``, once. It decodes no more."""
        self.close(request.row, now, status, request.produced, request.lost, request.last.ps)

    def close(self, row: int, now: int, status: Status, produced: int, lost: int, last_ps: int) -> None:
        """As `end`, for a caller that has the request's fields at hand, the time of its latest token for one."""
        first = self.first_token[row]
        if first >= 0:
            self.spoken_ps += last_ps - first
        self.status[row] = status
        self.finished[row] = now
        self.emitted[row] = produced
        if lost:
            self.preemptions[row] = lost

    def columns(self) -> dict[str, npt.NDArray[np.generic]]:
        """The rows as NumPy columns, which show the records and cannot be written to; lengths come from the trace."""
        trace = self.trace
        return {
            "id": np.arange(len(trace)),
            "arrival_ps": _shown(self.arrival),
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
            "status": _shown(self.status),
            "replica": _shown(self.replica),
            "admitted_ps": _shown(self.admitted),
            "first_token_ps": _shown(self.first_token),
            "finished_ps": _shown(self.finished),
            "emitted_tokens": _shown(self.emitted),
            "preemptions": _shown(self.preemptions),
            "cached_tokens": _shown(self.cached_tokens),
            "swaps": _shown(self.swaps),
            "swapped_tokens": _shown(self.swapped_tokens),
            **{name: _shown(column) for name, column in self.extra.items()},
        }


def _shown(column: array[int] | bytearray) -> npt.NDArray[np.generic]:
    """``column`` as NumPy sees it, without a copy; read-only."""
    shown = np.frombuffer(column, dtype=column.typecode if isinstance(column, array) else np.uint8)
    shown.flags.writeable = False
    return shown


@mypyc_attr(allow_interpreted_subclasses=True)
class Rows:
    """Rows of 64-bit numbers, added at the end. Those added long ago are kept column by column, as narrow as they are.

    `frombytes` and `extend` are those of an `array`, which holds the latest rows, so that a row costs what it costs
    there. `pack` moves them aside once there are many: a run of a million requests has five million rows of 128 bytes
    each, of which packing leaves some 45.

    Example: the rows (10**12, 3) and (10**12 + 7, 300) of columns "at" and "n" are packed as an int64 and an int16
    column.
    """

    __slots__ = ("_latest", "_packed", "_packed_rows", "columns", "extend", "frombytes")

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._latest = array("q")
        self._packed: list[dict[str, npt.NDArray[np.signedinteger]]] = []
        self._packed_rows = 0
        self.frombytes, self.extend = self._latest.frombytes, self._latest.extend

    def __len__(self) -> int:
        """How many rows there are."""
        return self._packed_rows + len(self._latest) // len(self.columns)

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` has the same rows, packed or not."""
        if not isinstance(other, Rows):
            return NotImplemented
        same = self.columns == other.columns and len(self) == len(other)
        return same and all(np.array_equal(self.column(name), other.column(name)) for name in self.columns)

    __hash__ = None  # type: ignore[assignment]  # rows are added

    def pack(self) -> None:
        """Pack the latest rows, if they are many."""
        if len(self._latest) < PACKED_ROWS * len(self.columns):
            return
        part = zip(self.columns, np.ascontiguousarray(self._table().T), strict=True)
        self._packed.append({name: values.astype(_narrowest(values)) for name, values in part})
        self._packed_rows = len(self)
        self._latest = array("q")
        self.frombytes, self.extend = self._latest.frombytes, self._latest.extend

    def parts(self) -> Iterator[Mapping[str, Ints]]:
        """All rows, some ten thousand at a time: column name → int64 array, put together when asked for.

        While a part is kept no rows can be added.
        """
        many: list[Mapping[str, npt.NDArray[np.signedinteger]]] = []
        rows = 0
        for packed in self._packed:
            many.append(packed)
            rows += len(packed[self.columns[0]])
            if rows >= PART_ROWS:
                yield Part(many)
                many, rows = [], 0
        if self._latest or not self._packed:
            many.append(dict(zip(self.columns, self._table().T, strict=True)))
        if many:
            yield Part(many)

    def column(self, name: str) -> Ints:
        """All values of one column."""
        latest = self._table()[:, self.columns.index(name)]
        return np.concatenate([*(part[name] for part in self._packed), latest], dtype=np.int64)

    def _table(self) -> Ints:
        """The latest rows, without a copy. While this is kept none can be added. Shape: ``(rows, columns)``."""
        latest = self._latest
        shown = np.frombuffer(latest, np.int64) if latest else np.empty(0, np.int64)
        return shown.reshape(-1, len(self.columns))


def _narrowest(values: Ints) -> type[np.signedinteger]:
    """The smallest type that holds ``values``, which are not empty."""
    low, high = int(values.min()), int(values.max())
    types: tuple[type[np.signedinteger], ...] = (np.int8, np.int16, np.int32)
    return next((kind for kind in types if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), np.int64)


class Part(Mapping[str, Ints]):
    """Column name → int64 array of some rows, which lie in ``pieces``; put together when asked for, and not kept."""

    def __init__(self, pieces: Sequence[Mapping[str, npt.NDArray[np.signedinteger]]]) -> None:
        self._pieces = pieces

    def __getitem__(self, name: str) -> Ints:
        return np.concatenate([piece[name] for piece in self._pieces], dtype=np.int64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces[0])

    def __len__(self) -> int:
        return len(self._pieces[0])


class Columns(Mapping[str, Ints]):
    """Column name → int64 array, put together from `Rows` when asked for, and not kept."""

    def __init__(self, *rows: Rows) -> None:
        self._rows = {name: each for each in rows for name in each.columns}

    def __getitem__(self, name: str) -> Ints:
        return self._rows[name].column(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@mypyc_attr(allow_interpreted_subclasses=True)
class RunRecords:
    """The runs of one replica, and the gaps between tokens that no run shows."""

    def __init__(self) -> None:
        self.rows = Rows(RUN_COLUMNS)
        self.gap_rows = Rows(GAP_COLUMNS)
        self.measured = array("q")  # a row a step, where steps are executed: MEASURED_COLUMNS
        self.event_rows = Rows(EVENT_COLUMNS)  # if a journal is kept
        self.stage_ps = 0  # of a pipeline whose steps are modelled: in which a stage computes, on average of them
        self.piped_ps = 0  # in which any stage does
        self.stops = 0  # times that the engine itself would have stopped

    def pack(self) -> None:
        """Take less memory where there are many rows; nothing else changes."""
        for rows in (self.rows, self.gap_rows, self.event_rows):
            rows.pack()

    def runs(self) -> Mapping[str, Ints]:
        """Column name → int64 array, in order of time."""
        columns = Columns(self.rows)
        if not self.measured:
            return columns
        table = np.array(self.measured, dtype=np.int64).reshape(-1, len(MEASURED_COLUMNS))
        return {**columns, **{name: table[:, i] for i, name in enumerate(MEASURED_COLUMNS)}}

    def run_parts(self) -> Iterator[Mapping[str, Ints]]:
        """As `runs`, some ten thousand rows at a time where there are many."""
        return iter([self.runs()]) if self.measured else self.rows.parts()

    def event_parts(self) -> Iterator[Mapping[str, Ints]]:
        """As `events`, some ten thousand rows at a time where there are many."""
        return self.event_rows.parts()

    def events(self) -> Mapping[str, Ints]:
        """Column name of EVENT_COLUMNS → int64 array; empty without a journal."""
        return Columns(self.event_rows)

    def gaps(self) -> Mapping[str, Ints]:
        """Column name → int64 array."""
        return Columns(self.gap_rows)
