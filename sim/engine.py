"""One replica: what its policy plans, run by run, in integer picoseconds. It knows no event loop.

Three verbs drive it. ``begin(now)`` asks the policy and returns when the run it starts ends (None when idle),
``cut(now)`` shortens that run to its first boundary at or after ``now``, ``settle(now)`` commits the run that ends
now. A *run* is many engine steps of the same members: nothing in it is done per step or per member.

A synchronous engine runs what it has just planned. An asynchronous one (`Scheduler.asynchronous`) plans one step
ahead: at each boundary one step is in flight already, and the plan is for those after it. The policy then sees every
step as done that is planned, except that a request whose last token is in flight keeps its place until it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backend.base import NO_HOST, Backend, Batch, Chunk
from policies.base import PolicyError, Request, Scheduler
from sim.kv import CountingPool, admission
from sim.records import RequestRecords, RunRecords, Status
from sim.runs import NOBODY, Plan, duration, steps_to_reach
from sim.step import ReplicaStep


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
        if scheduler.asynchronous and scheduler.batch_synchronous:
            raise PolicyError(f"policy {type(scheduler).__name__}: a synchronous batch cannot be planned ahead")
        self.scheduler = scheduler
        self.backend = backend
        self.pool = pool
        self.index = index
        self.leap = leap
        self.max_model_len = max_model_len
        self.state = ReplicaStep(scheduler, backend, pool, requests, outputs, max_model_len)
        self.records = RunRecords()
        self.steps = 0
        self.end: int | None = None  # of the run under way
        self._ahead = scheduler.asynchronous
        self._requests = requests
        self._outputs = outputs
        self._finish = finish
        self._start = 0  # of the run under way
        self._count = 0  # steps until its end, one in flight included
        self._plan: Plan | None = None  # what runs; asynchronous: what runs after the step in flight
        self._flight: Plan | None = None  # asynchronous: the step that runs, committed already
        self._landing = 0  # when the step in flight is done

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
        """Whether an arrival now calls for a plan: at once if idle, else at the next boundary (ask before `submit`)."""
        return self.end is None or (self._count > 1 and self.scheduler.heeds_arrival(self.state))

    def begin(self, now: int) -> int | None:
        """Ask the policy what runs next; the time at which that run ends, None when it leaves the replica idle."""
        self._start = now
        if not self._ahead:
            plan = self._plan = self._ask_until(now)
            if plan is None:
                return None
            self._count = plan.count
            self.end = now + (plan.first if plan.count == 1 else duration(plan.first, plan.slope, plan.count))
            return self.end
        if self._flight is None:
            plan = self._ask_until(now)
            if plan is None:
                return None
            self.commit(plan, 1)
            self._launch(plan, now)
        flight = self._flight
        assert flight is not None
        plan = self._plan = self.ask(now, self._landing)
        self._count = 1
        self.end = self._landing
        if plan is not None and plan.count > 1 and not flight.ending:
            self._count = plan.count
            self.end += duration(plan.first, plan.slope, plan.count - 1)
        return self.end

    def cut(self, now: int) -> int | None:
        """Shorten the run under way to its first boundary at or after ``now``; its new end."""
        plan = self._plan
        if self._count > 1 and plan is not None:
            if not self._ahead:
                count = steps_to_reach(now - self._start, plan.first, plan.slope)
                begun = self._start
            else:
                begun = self._landing
                count = 1 if now <= begun else 1 + steps_to_reach(now - begun, plan.first, plan.slope)
            if count < self._count:
                self._count = count
                self.end = begun + duration(plan.first, plan.slope, count - 1 if self._ahead else count)
        return self.end

    def settle(self, now: int) -> list[Request]:
        """Commit the run that ends now; the requests that ended with it."""
        plan, count = self._plan, self._count
        self.end = None
        if not self._ahead:
            assert plan is not None
            self.commit(plan, count)
            self._record(plan, self._start, plan.first, count, plan.row)
            self._emit(plan, now)
            return self.complete(plan, now)
        flight, state = self._flight, self.state
        assert flight is not None
        done = self.complete(flight, self._landing) if flight.ending or state.parked else NOBODY
        if plan is None:
            self._flight = None
            return done
        self.commit(plan, count)
        if count > 1:
            self._record(plan, self._landing, plan.first, count - 1, plan.row)
        self._launch(plan, now, count - 1)
        return done

    def ask(self, now: int, start: int) -> Plan | None:
        """What the policy wants of the steps that start at ``start``; None if nothing."""
        state = self.state
        state.open(now)
        vouched = self.scheduler.schedule(state)
        if not isinstance(vouched, int) or vouched < 1:
            raise PolicyError(f"policy {type(self.scheduler).__name__}: vouched for {vouched} steps")
        if state.released:
            self._answer_batch(now)
        if state.rejected or state.preempted:
            vouched = 1  # the queue has changed
            for request in state.rejected:
                self._reject(request, now)
        chunks = state.chunks
        group = state.group
        decoding = state.whole
        if state.ran:
            state.arrange()
            decoding = True
        elif not decoding and not chunks:
            return None
        if decoding:
            decodes, context, dead = group.live, group.context, group.dead
        else:
            decodes = context = dead = 0
        prefills: tuple[Chunk, ...] = ()
        if chunks:
            prefills = tuple([Chunk(r._offset, t) for r, t in chunks])
        cost = self.backend.step(Batch(prefills, decodes, context, dead + state.padding))
        count = 1
        first, slope = (cost.first, cost.slope) if cost.host is NO_HOST else cost.spacing(self._ahead)
        if self.leap and decoding and not chunks and not state.ran and not state.slept:
            count = min(vouched, cost.steps_alike(self._ahead), group.horizon())
            if count > 1 and group.growing:
                count = group.steps_within(count, self.pool.free + state.taken)
        first += state.slept
        late = 0
        if decoding and (state.fresh or state.decoded_at != start):
            late = self._late(start, start + first, decodes)
        row = (
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
        return Plan(first, slope, count, chunks, decoding, row)

    def commit(self, plan: Plan, count: int) -> None:
        """Take the first ``count`` steps of ``plan`` as done, as far as policies are concerned."""
        state = self.state
        group = state.group
        outputs = self._outputs
        ending: list[Request] = []
        if plan.decoding:
            if count > 1:
                self.pool.decode_all(group, range(1, count))
            state.kv_tokens += count * group.live
            state.promised -= count * group.reserved
            group.advance(count)
            if state.fresh:
                state.fresh = {}
            while (request := group.due()) is not None:
                left = outputs[request.id] - request.emitted
                if left:
                    group.outgrow(request, left)
                else:
                    ending.append(request)
                    self._end(request)
        if plan.chunks:
            emitting: list[Request] = []
            for request, tokens in plan.chunks:
                request._offset += tokens
                state.kv_tokens += tokens
                if request._reserved:
                    state.promised -= tokens
                if request._offset < request.prompt_tokens + request._emitted:
                    continue
                del state.prefills[request.id]
                request._emitted += 1
                emitting.append(request)
                if outputs[request.id] > request._emitted:
                    state.join(request)
                else:
                    ending.append(request)
                    self._end(request)
            plan.emitting = emitting
        if ending:
            plan.ending = ending

    def complete(self, plan: Plan, now: int) -> list[Request]:
        """The last committed step of ``plan`` is done: the requests whose last token it brought leave."""
        state = self.state
        if state.parked and self._ahead:
            for request in state.parked.values():
                self.pool.computed(request, request._offset)
        ending = plan.ending
        if not ending:
            return ending
        if len(ending) > 1:
            ending.sort(key=admission)  # the order in which vLLM frees them, and so reuses their blocks
        if self.scheduler.batch_synchronous:
            for request in ending:
                self._hold(request)
            return []
        for request in ending:
            if request.id in state.admitted:
                del state.admitted[request.id]
                if self._ahead:
                    self.pool.computed(request, request._offset)
                state.vacate(request)
            else:  # preempted while its last token was in flight
                state.waiting.remove(request)
            self._answer(request, now)
        return ending

    def _ask_until(self, now: int) -> Plan | None:
        """As `ask`, again for as long as all that the policy does is to refuse or to preempt."""
        while True:
            plan = self.ask(now, now)
            if plan is not None or not (self.state.rejected or self.state.preempted):
                return plan

    def _launch(self, plan: Plan, start: int, before: int = 0) -> None:
        """Put the last committed step of ``plan``, which has ``before`` steps before it, in flight."""
        row = plan.row
        first = plan.first + before * plan.slope
        self._flight = plan
        self._landing = landing = start + first
        if before:
            decodes, padded, context = row[2:5]
            row = (*row[:4], context + before * (decodes + padded), 0, *row[6:9], row[9] + before * decodes, *row[10:])
        self._record(plan, start, first, 1, row)
        self._emit(plan, landing)

    def _record(self, plan: Plan, start: int, first: int, count: int, row: tuple[int, ...]) -> None:
        self.steps += count
        self.records.rows.extend((start, first, plan.slope, count, *row))

    def _emit(self, plan: Plan, now: int) -> None:
        """Write down the tokens that ``plan`` brings at ``now`` (its last committed step's end)."""
        if plan.decoding:
            self.state.decoded_at = now
        first_token = self._requests.first_token
        for request in plan.emitting:
            if first_token[request.id] < 0:
                first_token[request.id] = now
            else:  # it was preempted: the client has waited for this token since its last
                self.records.gap_rows.extend((now - request._last, 1))
            request._last = now

    def _end(self, request: Request) -> None:
        """The last token of ``request`` comes with the step that is being committed."""
        state = self.state
        request._end = 0
        if self._ahead:
            if request._counter is not None:
                state.drain(request)
            request._drains = True
        elif request._counter is None and self.scheduler.batch_synchronous:
            state.group.join(request, 1)  # it pays for a dead slot like the others

    def _hold(self, request: Request) -> None:
        """A finished request keeps its slot until its batch returns."""
        state = self.state
        if not request._reserved:
            request._blocks = self.pool.blocks(request.computed)
        state.group.die(request)
        request._end = request._reserved = 0
        del state.admitted[request.id]
        state.batch.append(request)

    def _answer_batch(self, now: int) -> None:
        for request in self.state.released:
            self._answer(request, now)
        self.state.released = []

    def _answer(self, request: Request, now: int) -> None:
        records = self._requests
        records.status[request.id] = Status.FINISHED
        records.finished[request.id] = now
        if request.preemptions:
            records.preemptions[request.id] = request.preemptions
        self.backend.release(request.id)
        if self._finish is not None:
            self._finish(request)

    def _reject(self, request: Request, now: int) -> None:
        self._requests.replica[request.id] = self.index
        self._requests.status[request.id] = Status.REJECTED
        self._requests.finished[request.id] = now
        if self._finish is not None:
            self._finish(request)

    def _late(self, start: int, first_end: int, decodes: int) -> int:
        """Record the first gaps of decodes that did not emit at ``start``; how many they are."""
        state = self.state
        gaps = self.records.gap_rows
        late = 0
        old = decodes
        for request in state.fresh.values():
            if request._counter is None:
                continue  # preempted or parked since
            old -= 1
            if request._last != start:
                gaps.extend((first_end - request._last, 1))
                late += 1
        if old > 0 and state.decoded_at != start:
            gaps.extend((first_end - state.decoded_at, old))
            late += old
        return late
