"""One replica: what its policy plans, run by run, in integer picoseconds. It knows no event loop.

Three verbs drive it. ``begin(now)`` asks the policy and returns when the run it starts ends (None when idle),
``cut(now)`` shortens that run to its first boundary at or after ``now``, ``settle(now)`` commits the run that ends
now. A *run* is many engine steps of the same members: nothing in it is done per step or per member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

from backend.base import Backend, Batch, Chunk
from policies.base import PolicyError, Request, Scheduler
from sim.kv import CountingPool
from sim.records import RequestRecords, RunRecords, Status
from sim.step import ReplicaStep


def duration(first: int, slope: int, steps: int) -> int:
    """Picoseconds of ``steps`` steps that cost ``first``, ``first + slope``, …"""
    return steps * first + slope * (steps * (steps - 1) // 2)


def steps_to_reach(span: int, first: int, slope: int) -> int:
    """The fewest steps (>= 1) whose duration is at least ``span`` ps; ``first`` > 0, ``slope`` >= 0."""
    if span <= first:
        return 1
    if slope == 0:
        return -(-span // first)
    # the root of slope/2·n² + (first − slope/2)·n = span, then the integer fix-up
    b = 2 * first - slope
    n = max(1, (isqrt(b * b + 8 * slope * span) - b) // (2 * slope))
    while duration(first, slope, n) >= span and n > 1:
        n -= 1
    while duration(first, slope, n) < span:
        n += 1
    return n


class Engine:
    """A replica's policy, pool and cost model at work.

    ``requests`` is where each request's fate is written, ``finish`` is called with each one that ends here.
    With ``leap=False`` every step is planned and priced on its own: slow, and the oracle for leaping.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        pool: CountingPool,
        requests: RequestRecords,
        outputs: Sequence[int],
        max_model_len: int,
        index: int = 0,
        leap: bool = True,
        finish: Callable[[Request], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.backend = backend
        self.pool = pool
        self.index = index
        self.leap = leap
        self.max_model_len = max_model_len
        self.state = ReplicaStep(scheduler, backend, pool, outputs, max_model_len)
        self.records = RunRecords()
        self.steps = 0
        self.end: int | None = None  # of the run under way
        self._requests = requests
        self._outputs = outputs
        self._finish = finish
        self._start = 0
        self._first = 0  # of the first step, its pause included
        self._pause = 0
        self._slope = 0
        self._count = 0
        self._decoding = False
        self._row: tuple[int, ...] = ()

    @property
    def outstanding(self) -> int:
        """Requests waiting or running here."""
        return len(self.state.waiting) + len(self.state.admitted)

    def submit(self, request: Request, now: int) -> bool:
        """Take a request in; False if it can never fit (it has then ended, rejected).

        The caller plans if the replica is idle, else cuts the run if `heeds_arrival` said so.
        """
        final = request.prompt_tokens + self._outputs[request.id]
        if final > self.max_model_len or self.pool.blocks(final - 1) > self.pool.total:
            self._reject(request, now)
            return False
        self._requests.replica[request.id] = self.index
        self.state.waiting.append(request)
        return True

    def heeds_arrival(self) -> bool:
        """Whether an arrival now calls for a plan: at once if idle, else at the next boundary (asked before `submit`)."""
        return self.end is None or (self._count > 1 and self.scheduler.heeds_arrival(self.state))

    def begin(self, now: int) -> int | None:
        """Ask the policy what runs next; the time at which that run ends, None when it leaves the replica idle."""
        state = self.state
        state.open(now)
        vouched = self.scheduler.schedule(state)
        if state.released:
            self._answer_batch(now)
        if state.rejected or state.preempted:
            vouched = 1  # the queue has changed
            for request in state.rejected:
                self._reject(request, now)
            state.rejected = []
            if not (state.chunks or state.ran or state.whole):
                return self.begin(now)
        chunks = state.chunks
        group = state.group
        decoding = state.whole
        if state.ran:
            state.arrange()
            decoding = True
        elif not decoding and not chunks:
            self._count = 0
            return None
        if decoding:
            decodes, context, dead = group.live, group.context, group.dead
        else:
            decodes = context = dead = 0
        prefills: tuple[Chunk, ...] = ()
        if chunks:
            prefills = tuple([Chunk(r._offset, t) for r, t in chunks])
            admitted = self._requests.admitted
            for request, _ in chunks:
                if admitted[request.id] < 0:
                    admitted[request.id] = now
        cost = self.backend.step(Batch(prefills, decodes, context, dead + state.padding))
        count = 1
        if self.leap and decoding and not chunks and not state.ran and not state.slept:
            count = min(vouched, cost.steps, group.horizon())
            if count > 1 and group.growing:
                count = group.steps_within(count, self.pool.free + state.taken)
        if count < 1:
            raise PolicyError(f"policy {type(self.scheduler).__name__}: vouched for {vouched} steps")
        first = cost.spacing() + state.slept
        self._start = now
        self._first = first
        self._slope = cost.slope
        self._count = count
        self.end = now + (first if count == 1 else duration(first, cost.slope, count))
        self._decoding = decoding
        late = self._late(now + first, decodes) if decoding else 0
        self._row = (
            len(chunks),
            state.tokens - decodes if chunks else 0,
            decodes,
            dead + state.padding,
            context,
            late,
            len(state.admitted),
            len(state.waiting),
            self.pool.total - self.pool.free,
            state.kv_tokens,
            state.promised,
            state.preempted,
        )
        return self.end

    def cut(self, now: int) -> int | None:
        """Shorten the run under way to its first boundary at or after ``now``; its new end."""
        if self._count > 1:
            count = steps_to_reach(now - self._start, self._first, self._slope)
            if count < self._count:
                self._count = count
                self.end = self._start + duration(self._first, self._slope, count)
        return self.end

    def settle(self, now: int) -> list[Request]:
        """Commit the run that ends now; the requests that ended with it."""
        state = self.state
        group = state.group
        count = self._count
        self.steps += count
        self.records.rows.extend((self._start, self._first, self._slope, count, *self._row))
        self.end = None
        done: list[Request] = []
        chunks = state.chunks
        if self._decoding:
            if count > 1 and group.growing:
                self.pool.free -= group.blocks_needed(count) - state.taken
            state.kv_tokens += count * group.live
            state.promised -= count * group.reserved
            group.advance(count)
            state.decoded_at = now
            if state.fresh:
                state.fresh = {}
            while (request := group.due()) is not None:
                left = self._outputs[request.id] - request.emitted
                if left:
                    group.outgrow(request, left)
                else:
                    self._end_decode(request, now, done)
        for request, tokens in chunks:
            self._advance_chunk(request, tokens, now, done)
        return done

    def _advance_chunk(self, request: Request, tokens: int, now: int, done: list[Request]) -> None:
        state = self.state
        request._offset += tokens
        state.kv_tokens += tokens
        if request._reserved:
            state.promised -= tokens
        if request._offset < request.prompt_tokens + request._emitted:
            return
        del state.prefills[request.id]
        if request._emitted == 0:
            self._requests.first_token[request.id] = now
        else:  # it was preempted: the client waited for this token since its last
            self.records.gap_rows.extend((now - request._last, 1))
        request._emitted += 1
        request._last = now
        left = self._outputs[request.id] - request._emitted
        if left:
            state.join(request)
        elif self.scheduler.batch_synchronous:
            state.group.join(request, 1)  # it pays for a dead slot like the others
            self._hold(request)
        else:
            del state.admitted[request.id]
            state.vacate(request)
            self._answer(request, now, done)

    def _end_decode(self, request: Request, now: int, done: list[Request]) -> None:
        if self.scheduler.batch_synchronous:
            self._hold(request)
            return
        del self.state.admitted[request.id]
        self.state.vacate(request)
        self._answer(request, now, done)

    def _hold(self, request: Request) -> None:
        state = self.state
        if not request._reserved:
            request._blocks = self.pool.blocks(request.computed)
        state.group.die(request)
        request._end = request._reserved = 0
        del state.admitted[request.id]
        state.batch.append(request)

    def _answer_batch(self, now: int) -> None:
        for request in self.state.released:
            self._answer(request, now, None)
        self.state.released = []

    def _answer(self, request: Request, now: int, done: list[Request] | None) -> None:
        records = self._requests
        records.status[request.id] = Status.FINISHED
        records.finished[request.id] = now
        if request.preemptions:
            records.preemptions[request.id] = request.preemptions
        self.backend.release(request.id)
        if done is not None:
            done.append(request)
        if self._finish is not None:
            self._finish(request)

    def _reject(self, request: Request, now: int) -> None:
        self._requests.replica[request.id] = self.index
        self._requests.status[request.id] = Status.REJECTED
        self._requests.finished[request.id] = now
        if self._finish is not None:
            self._finish(request)

    def _late(self, first_end: int, decodes: int) -> int:
        """Record the first gaps of decodes that did not emit at the run's start; how many they are."""
        start = self._start
        gaps = self.records.gap_rows
        late = 0
        old = decodes
        for request in self.state.fresh.values():
            if request._counter is None:
                continue  # preempted or parked since
            old -= 1
            if request._last != start:
                gaps.extend((first_end - request._last, 1))
                late += 1
        if old > 0 and self.state.decoded_at != start:
            gaps.extend((first_end - self.state.decoded_at, old))
            late += old
        return late
