"""What happened, as append-only integer columns; every metric is computed from them afterwards."""

from __future__ import annotations

from array import array
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from chairlift.policies.base import Request
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
    kv_tokens: int  # tokens stored before the first step
    promised_tokens: int  # reserved tokens that will be filled later
    preempted: int  # preemptions while planning it


def row_after(row: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The `StepRow` of the same members, ``steps`` decode steps after that of ``row``; none is late then.

    Plain tuples: to make and pack a `StepRow` at each step takes 3 % of a run.
    """
    chunks, prefill, decodes, padded, context, _, running, waiting, held, stored, promised, preempted = row
    context += steps * (decodes + padded)
    stored += steps * decodes
    return chunks, prefill, decodes, padded, context, 0, running, waiting, held, stored, promised, preempted


RUN_COLUMNS = (
    "start_ps",  # a row is `steps` engine steps of the same members, one after the other
    "first_ps",  # boundary to boundary of the first of them, pauses and host work included
    "slope_ps",  # each further one takes this much longer than the one before
    "steps",
    *StepRow._fields,
)

PACK_RUN = Struct(f"{len(RUN_COLUMNS)}q").pack  # a row as bytes: half the time of array.extend


class MeasuredRow(NamedTuple):
    """What was measured of an executed step."""

    asked_ps: int  # when the policy was asked for this step
    planning_ps: int  # wall time that the policy took, and the bookkeeping of its plan
    launch_ps: int  # wall time to prepare and launch the step
    gpu_ps: int  # from the step's first to its last operation on the GPU
    prefill_pairs: int  # query-key pairs of its chunks
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

HANDOVER_COLUMNS = (  # of requests, where prefill and decode replicas are apart; -1 where it did not happen
    "handed_over_ps",  # its prompt was done, and its KV ready to be sent
    "taken_over_ps",  # its KV lay at the decode side
    "prefill_replica",
)


class Token(Protocol):
    """A token's time, which is known by now."""

    @property
    def ps(self) -> int:
        """Picoseconds."""


class Ended(Protocol):
    """What is written down of a request that has ended."""

    id: int
    produced: int  # tokens that its client has got
    preemptions: int

    @property
    def last(self) -> Token:
        """The latest of its tokens."""


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

    def moved(self, request: Request, tokens: int, out: bool = False) -> None:
        """Write down that the KV of ``tokens`` tokens goes to host memory (``out``) or back."""
        self.swaps[request.id] += out
        self.swapped_tokens[request.id] += tokens

    def end(self, request: Ended, now: int, status: Status) -> None:
        """Write down what became of ``request``, once. It decodes no more."""
        i = request.id
        first = self.first_token[i]
        if first >= 0:
            self.spoken_ps += request.last.ps - first
        self.status[i] = status
        self.finished[i] = now
        self.emitted[i] = request.produced
        if request.preemptions:
            self.preemptions[i] = request.preemptions

    def columns(self) -> dict[str, npt.NDArray[np.generic]]:
        """The rows as NumPy columns; the lengths come from the trace."""
        trace = self.trace
        return {
            "id": np.arange(len(trace)),
            "arrival_ps": np.array(self.arrival, dtype=np.int64),
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
            "status": np.frombuffer(self.status, dtype=np.uint8).copy(),
            "replica": np.array(self.replica, dtype=np.int32),
            "admitted_ps": np.array(self.admitted, dtype=np.int64),
            "first_token_ps": np.array(self.first_token, dtype=np.int64),
            "finished_ps": np.array(self.finished, dtype=np.int64),
            "emitted_tokens": np.array(self.emitted, dtype=np.int32),
            "preemptions": np.array(self.preemptions, dtype=np.int32),
            "cached_tokens": np.array(self.cached_tokens, dtype=np.int32),
            "swaps": np.array(self.swaps, dtype=np.int32),
            "swapped_tokens": np.array(self.swapped_tokens, dtype=np.int64),
            **{name: np.array(column, dtype=np.int64) for name, column in self.extra.items()},
        }


class RunRecords:
    """The runs of one replica, and the gaps between tokens that no run shows."""

    def __init__(self) -> None:
        self.rows = array("q")
        self.gap_rows = array("q")
        self.measured = array("q")  # a row a step, where steps are executed: MEASURED_COLUMNS
        self.event_rows = array("q")  # rows of EVENT_COLUMNS, if a journal is kept

    def runs(self) -> dict[str, Ints]:
        """Column name → int64 array, in order of time."""
        table = np.array(self.rows, dtype=np.int64).reshape(-1, len(RUN_COLUMNS))
        columns = {name: table[:, i] for i, name in enumerate(RUN_COLUMNS)}
        if len(self.measured):
            table = np.array(self.measured, dtype=np.int64).reshape(-1, len(MEASURED_COLUMNS))
            columns.update({name: table[:, i] for i, name in enumerate(MEASURED_COLUMNS)})
        return columns

    def events(self) -> dict[str, Ints]:
        """Column name of EVENT_COLUMNS → int64 array; empty without a journal."""
        table = np.array(self.event_rows, dtype=np.int64).reshape(-1, len(EVENT_COLUMNS))
        return {name: table[:, i] for i, name in enumerate(EVENT_COLUMNS)}

    def gaps(self) -> dict[str, Ints]:
        """Column name → int64 array."""
        table = np.array(self.gap_rows, dtype=np.int64).reshape(-1, len(GAP_COLUMNS))
        return {name: table[:, i] for i, name in enumerate(GAP_COLUMNS)}
