"""Who did what in which step: an engine that keeps a journal of its requests, for pictures and explanations.

The records of a plain engine say what each step held, not who. `JournalEngine` writes a row for everything that
happens to a request and is not implied by the rows before it: an arrival, an admission, a chunk, a preemption. Decode
steps are implied, so a journal has a handful of rows a request, however long the answer. It overrides and changes
nothing: a run with a journal and one without have the same results, and a run without one pays nothing.

Whether steps are priced or run makes no difference to it: `JournalExecuting` is both engines in one, and its times are
those of the clock, which there is the wall clock.
"""

# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any

from chairlift.sim.replica.engine import Engine
from chairlift.sim.replica.executing import Executing
from chairlift.sim.replica.request import AWAY, HELD, Live
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.results.records import EVENT_COLUMNS, Kind, Status

PACK_EVENT = Struct(f"{len(EVENT_COLUMNS)}q").pack
DENIALS = 8  # written of one plan; a policy may try its whole queue


class JournalStep(ReplicaStep):
    """A step whose verbs are written down; ``write`` and ``row`` are the engine's."""

    write: Callable[..., None]
    row: Callable[[], int]

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._denied = 0
        self._needy = -1  # for whom room is sought, -1: all decodes

    def open(self, now: int) -> None:
        """Start a new plan."""
        super().open(now)
        self._denied = 0
        self._needy = -1

    def fits(self, request: Live, tokens: int, spare: int = 0) -> bool:  # noqa: D102 - documented in the contract, as all below
        fits = super().fits(request, tokens, spare)
        if not fits:
            self._deny(request, tokens, spare)
        return fits

    def admit(self, request: Live, tokens: int, reserve: int | None = None, *more: Any, **named: Any) -> bool:  # noqa: D102
        hit = self.pool.hit(request)
        left = request.remaining - hit
        admitted = super().admit(request, tokens, reserve, *more, **named)
        if admitted:
            self.write(self.now, self.row(), Kind.ADMIT, request.id, left, hit)
        elif not any(r is request for r in self.rejected):
            self._deny(request, hit + tokens if reserve is None else reserve)
        return admitted

    def run(self, request: Live, tokens: int) -> bool:  # noqa: D102
        ran = super().run(request, tokens)
        if not ran:
            self._needy = request.id
        return ran

    def decode_all(self) -> bool:  # noqa: D102
        back = list(self.parked)
        granted = super().decode_all()
        if not granted:
            self._needy = -1
            return False
        for i in back:
            self.write(self.now, self.row(), Kind.JOIN, i, -1, 0)
        return True

    def arrange(self) -> None:
        """Write down who is left out of the decodes, and who is taken in again."""
        before = set(self.parked)
        super().arrange()
        row = self.row()
        for i in self.parked:
            if i not in before:
                self.write(self.now, row, Kind.PARK, i, -1, 0)
        for i in before:
            if i not in self.parked:
                self.write(self.now, row, Kind.JOIN, i, -1, 0)

    def preempt(self, request: Live, *more: Any, **named: Any) -> None:  # noqa: D102
        lost = request.computed
        super().preempt(request, *more, **named)
        self.write(self.now, self.row(), Kind.PREEMPT, request.id, self._needy, lost)

    def _deny(self, request: Live, tokens: int, spare: int = 0) -> None:
        self._denied += 1
        if self._denied <= DENIALS:
            free = self.pool.free
            lack = self.pool.need(request, tokens) + spare - free
            self.write(self.now, self.row(), Kind.DENY, request.id, free, lack)


class JournalEngine(Engine):
    """An engine that writes a journal beside its records."""

    step_type = JournalStep

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        state = self.state
        assert isinstance(state, JournalStep)
        state.write, state.row = self.write, self._row_to_come

    def write(self, now: int, row: int, kind: Kind, request: int, other: int, value: int) -> None:
        """Add one row to the journal, of which `EVENT_COLUMNS` has the meaning."""
        self.records.event_rows.frombytes(PACK_EVENT(now, row, kind, request, other, value))

    def _row(self) -> int:
        """The next row of this replica's runs."""
        return len(self.records.rows)

    def _row_to_come(self) -> int:
        """The row of what is planned now: a step in flight has the one before it."""
        return self._row() + (self._flight is not None)

    def submit(self, request: Live, now: int) -> bool:
        """As `Engine.submit`."""
        planned = self.end is not None and self._plan is not None  # without it
        self.write(now, self._row_to_come() + planned, Kind.ARRIVE, request.id, -1, len(self.state.waiting))
        return super().submit(request, now)

    def settle(self, now: int) -> list[Live]:
        """As `Engine.settle`; the first row that it records is that of the chunks planned last."""
        plan = self._flight if self._ahead else self._plan
        if plan is not None and plan.chunks:
            row = self._row()
            start = plan.air[0] if self._ahead else self._start
            for request, tokens in plan.chunks:
                self.write(start, row, Kind.CHUNK, request.id, -1, tokens)
        return super().settle(now)

    def abort(self, now: int) -> list[Live]:
        """As `Engine.abort`."""
        lost = super().abort(now)
        row = self._row()
        for request in lost:
            self.write(now, row, Kind.LOST, request.id, -1, 0)
        return lost

    def end_request(self, request: Live, now: int, status: Status) -> None:
        """As `Planner.end_request`."""
        records = self._requests
        before = records.status[request.id]
        super().end_request(request, now, status)
        if request.phase is HELD:
            return  # its client has given up, but its slot is paid for until its batch returns: then comes this again
        became = records.status[request.id]
        at = now if before == Status.PENDING else records.finished[request.id]
        # who has a step in flight when they end leaves with the step after it: a client that gives up, or who decodes
        # once more for nothing
        late = status is Status.TIMED_OUT or (status is Status.FINISHED and request.phase is AWAY)
        row = self._row_to_come() if late else self._row()
        kind = Kind.HANDOVER if became == Status.PENDING else Kind.END
        self.write(at, row, kind, request.id, -1, became)

    def drop(self, request: Live) -> None:
        """As `Planner.drop`."""
        super().drop(request)
        self.write(self.state.now, self._row(), Kind.DROP, request.id, -1, 0)

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:
        """As `Planner.complete`."""
        if self.scheduler.batch_synchronous:
            row = self._row()
            for request in plan.ending:
                self.write(now, row, Kind.DONE, request.id, -1, 0)
        return super().complete(plan, now, behind)


class JournalExecuting(JournalEngine, Executing):
    """The same of an engine whose steps really run; the microsecond that a row takes is part of what is measured."""
