"""What planned steps do to a replica's requests: asking the policy, committing its plan, letting requests go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn

from chairlift.backend.base import NO_HOST, Backend, Batch, Chunk, new
from chairlift.policies.base import FOREVER, PolicyError, Scheduler
from chairlift.sim.replica.counting_pool import CountingPool, Ends, admission
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.request import AWAY, DRAINING, HELD, Live, When
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import NO_GAPS, Plan
from chairlift.sim.results.records import RequestRecords, Status


class Planner:
    """The half of an engine that knows no time but what it is told.

    `ask` has the policy arrange the next steps, `commit` takes them as done as far as policies can see, `complete`
    lets those go whose last token they brought. ``finish`` is called with each request that ends here.
    """

    __slots__ = (  # beyond thirty attributes a dict is slow
        *(
            "_again",
            "_ahead",
            "_arrival",
            "_arrival_token",
            "_budget",
            "_cost",
            "_ends",
            "_finish",
            "_holds",
            "_intake",
        ),
        *("_left", "_overshoots", "_promised", "_requests", "_room", "backend", "handover", "index", "leap"),
        *("max_model_len", "pool", "scheduler", "state"),
    )
    step_type: ClassVar[type[ReplicaStep]] = ReplicaStep

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
        finish: Callable[[Live, int], None] | None = None,
        host: HostMemory | None = None,
    ) -> None:
        if scheduler.asynchronous and scheduler.batch_synchronous:
            raise PolicyError(f"policy {type(scheduler).__name__}: a synchronous batch cannot be planned ahead")
        self.scheduler = scheduler
        self.backend = backend
        self.pool = pool
        self.index = index
        self.leap = leap
        self.max_model_len = max_model_len
        self.state = self.step_type(scheduler, backend, pool, max_model_len, host)
        self._ahead = scheduler.asynchronous
        self._holds = scheduler.batch_synchronous  # finished requests keep their slot
        self._again = False  # the policy wants to be asked again though nothing runs
        self._overshoots = scheduler.overshoots if self._ahead else "never"
        self._requests = requests
        self._ends = Ends(self.state.group, outputs)
        self._promised = 0  # reserved tokens that will be filled
        self._finish = finish
        self._room = pool.room
        self._budget = FOREVER if scheduler.token_limit is None else scheduler.token_limit
        self._cost = backend.step
        self._arrival, self._arrival_token = backend.arrival, backend.arrival_token
        self._left: list[tuple[int, Live]] = []  # who left at the latest such time, where the policy limits arrivals
        self._intake = 0  # ps of host time to take in those that have come
        self.handover: Callable[[Live], bool] | None = None  # takes a request over that has all its tokens from here

    def submit(self, request: Live, now: int) -> bool:
        """Take a request in; False if it can never fit, or the policy turns it away (it has then ended, rejected).

        The caller plans if the replica is idle, else cuts the run if `heeds_arrival` said so.
        """
        self._requests.replica[request.id] = self.index
        allowed = self.scheduler.allowed(request, self.max_model_len, self.pool.total, self.pool.block_size)
        if allowed < request.max_tokens:
            request.max_tokens = allowed
            self._ends.shorten(request.id, allowed)
        final = request.prompt_tokens + self._ends.outputs[request.id]
        if allowed < 1 or final > self.max_model_len or final - 1 > self._room or self._turned_away(now):
            self.end_request(request, now, Status.REJECTED)
            return False
        if request.phase is AWAY:
            request.queue()
        self.state.waiting.append(request)
        self._intake += self._arrival + self._arrival_token * request.prompt_tokens
        return True

    def _turned_away(self, now: int) -> bool:
        """Whether the policy refuses who arrives now.

        At the boundary of two steps the policy sees what was before: whether the boundary is settled first depends on
        how the steps are grouped. So does whether a first token that has landed is written down already.
        """
        if not self.scheduler.limits_arrivals:
            return False
        state, first_token = self.state, self._requests.first_token
        here = [*state.admitted.values(), *state.waiting, *(request for at, request in self._left if at == now)]
        prompts = 0
        for request in here:
            first = first_token[request.id]
            if first < 0 and request.emitted:
                first = request.last.ps
            if not 0 <= first < now:
                prompts += request.prompt_tokens
        return self.scheduler.turns_away(len(here), prompts)

    def ask(self, now: int, start: When) -> Plan | None:
        """What the policy wants of the steps that start at ``start``; None if nothing.

        ``start`` is the holder of that time: the end of the step in flight, or of the run before. Decodes whose last
        token came with another step are late, and their gaps are kept one by one.
        """
        state = self.state
        state.open(now)
        intake, self._intake = self._intake, 0
        vouched = self.scheduler.schedule(state)
        self._again = vouched == 0
        if not isinstance(vouched, int) or vouched < 0:
            self._fail(f"vouched for {vouched} steps")
        if state.tokens > self._budget:
            self._fail(f"a step of {state.tokens} tokens: its budget is {self._budget}")
        if state.released:
            self._answer_batch(now)
        if state.started:
            records = self._requests
            for request, hit in state.started:
                if records.admitted[request.id] < 0:
                    records.admitted[request.id] = now
                    records.cached_tokens[request.id] = hit
        if state.moved or state.pledges:
            self._settle()
        if state.rejected or state.preempted:
            vouched = 1  # the queue has changed
            for request in state.rejected:
                self.end_request(request, now, Status.REJECTED)
        chunks = state.chunks
        group = state.group
        decoding = state.whole
        if state.ran:
            state.arrange()
            decoding = True
        if state.rejoined:
            for request in state.rejoined:
                if request.group is group:  # else this very plan has preempted it, or left it out again
                    self._ends.add(request)
            state.rejoined = []
        if not decoding and not chunks:
            return None
        if self._again:
            self._fail("vouched for 0 steps")
        if decoding:
            decodes, context, dead = group.live, group.context, group.dead
        else:
            decodes = context = dead = 0
        prefills: tuple[Chunk, ...] = ()
        if chunks:
            prefills = tuple([new(Chunk, (r.stored, t)) for r, t in chunks])
        padded = dead + state.padding
        batch = new(Batch, (prefills, decodes, context, padded, None))
        cost = self._cost(_as_decodes(chunks, batch) if state.resumed else batch)
        count = 1
        first, slope, alike, host = cost
        if host is not NO_HOST:
            first, slope = cost.spacing(self._ahead)
        if state.host.busy:
            state.slept += state.host.delay(first)
        leaps = self.leap and decoding and not (chunks or state.ran or state.slept or intake)
        if leaps and not (self.pool.publishes and state.waiting):  # whoever waits may find what is being generated
            count = min(vouched, alike if host is NO_HOST else cost.steps_alike(self._ahead), self._ends.horizon())
            if count > 1 and group.growing:
                count = self.pool.lasts(group, count, state.taken, bool(state.waiting))
        late, late_gaps = 0, NO_GAPS
        if decoding and (state.fresh or state.decoded_at is not start):
            late, late_gaps = self._late(start, decodes)
        row = (
            len(chunks),
            state.tokens - decodes if chunks else 0,
            decodes,
            padded,
            context,
            late,
            len(state.admitted),
            len(state.waiting),
            self.pool.total - self.pool.free,
            state.kv_tokens,
            self._promised,
            state.preempted,
        )
        plan = Plan(first, slope, count, chunks, decoding, row, late_gaps, cost)
        if state.slept or intake:
            plan.first += state.slept + intake
            plan.gpu += state.slept
            plan.intake = intake
        return plan

    def commit(self, plan: Plan, count: int) -> None:
        """Take the first ``count`` steps of ``plan`` as done, as far as policies are concerned."""
        state = self.state
        group = state.group
        ends = self._ends
        when = plan.when
        ending: list[Live] = []
        if self._ahead and self.pool.windowed:
            self.pool.flight = plan
        if plan.decoding:
            if count > 1:
                self.pool.decode_all(group, range(1, count))
            state.kv_tokens += count * group.live
            self._promised -= count * group.reserved
            group.steps += count
            group.context += count * (group.live + group.dead)
            plan.decoded_before, state.decoded_at = state.decoded_at, when
            if state.fresh:
                plan.fresh, state.fresh = state.fresh, {}
            heap, steps = ends.heap, group.steps
            while heap and heap[0][0] <= steps:
                due = ends.due()
                if due is not None:
                    ending.append(due)
                    if self._holds:
                        due.end(when)  # its slot is paid for until its batch returns
                    elif self._overshoots == "never" or not self._goes_on(due):
                        group.leave(due, DRAINING, when)
        if plan.chunks:
            emitting: list[Live] = []
            for request, tokens in plan.chunks:
                state.kv_tokens += tokens
                if request.reserved:
                    self._promised -= tokens
                if not request.compute(tokens, when):
                    continue
                del state.prefills[request.id]
                emitting.append(request)
                if ends.outputs[request.id] > request.produced:
                    group.join(request)
                    state.fresh[request.id] = request
                    ends.add(request)
                    continue
                ending.append(request)
                if self._holds:
                    group.join(request)
                elif self._overshoots != "never" and self._goes_on(request):
                    group.join(request)
                    state.fresh[request.id] = request
                    continue
                request.drain()
            plan.emitting = emitting
        if ending:
            plan.ending = ending

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:
        """The last committed step of ``plan`` is done: the requests whose last token it brought leave.

        ``behind``: what runs after it, planned before its output is in.
        """
        state = self.state
        if self.pool.windowed and self.pool.flight is plan:
            self.pool.flight = None
        if state.parked and self._ahead:
            for request in state.parked.values():
                self.pool.computed(request, request.stored)
        ending = plan.ending
        if self.pool.keeps:
            return self._land(plan, now, behind)
        if not ending:
            return ending
        if len(ending) > 1:
            ending.sort(key=admission)  # the order in which vLLM frees them, and so reuses their blocks
            ending = self.scheduler.landing(ending)  # type: ignore[arg-type, assignment]
        if self._holds:
            for request in ending:
                state.hold(request)
            return []
        for request in ending:
            self._finish_one(request, now, behind)
        return ending

    def _land(self, plan: Plan, now: int, behind: Plan | None) -> list[Live]:
        """As `complete`: one by one the requests leave, or the pool keeps the prompt that was computed."""
        ending = plan.ending
        requests = ending
        if plan.emitting:
            last = {r.id for r in plan.emitting}
            requests = [*plan.emitting, *(r for r in ending if r.id not in last)]
        if len(requests) > 1:
            requests = self.scheduler.landing(requests)  # type: ignore[arg-type, assignment]
        last = {r.id for r in ending}
        for request in requests:
            if request.id in last:
                self._finish_one(request, now, behind)
            else:
                self.state.keep(request)
        return [r for r in requests if r.id in last]

    def _finish_one(self, request: Live, now: int, behind: Plan | None) -> None:
        """A request has its answer, and leaves."""
        state = self.state
        if state.admitted.pop(request.id, None) is None:  # preempted while its last token was in flight
            state.withdraw(request)
        elif request.group is not None:  # it decodes once more, for nothing
            again = False
            if behind is not None and behind.decoding:
                again = True
                behind.undelivered += 1
                self.drop(request)
            state.vacate(request, AWAY if again else DRAINING, again)
        else:
            if self._ahead and self.pool.tracks:
                self.pool.computed(request, request.stored)
            state.dismiss(request)
        self.scheduler.ended(request)
        self.end_request(request, now, Status.FINISHED)

    def drop(self, request: Live) -> None:
        """A token of a request that is under way is nobody's."""
        self.backend.drop(request.id)

    def _goes_on(self, request: Live) -> bool:
        """Whether a request whose last token is planned decodes once more, until that token is seen."""
        return self._overshoots == "always" or self._ends.outputs[request.id] < request.max_tokens

    def end_request(self, request: Live, now: int, status: Status) -> None:
        """A request has left the replica for good; what became of it is written down once."""
        records = self._requests
        if records.status[request.id]:  # pending no more
            if self.state.releases:  # it was cancelled while its batch was under way, and kept its slot until now
                self.backend.release(request.id)
            return
        if self.scheduler.limits_arrivals and status is not Status.REJECTED:
            self._left = [(at, other) for at, other in self._left if at == now]
            self._left.append((now, request))
        if self.handover is not None and status is Status.FINISHED and self.handover(request):
            return
        records.end(request, now, status, request.last.ps)
        if self.state.releases and request.phase is not HELD:  # else its slot is paid for until its batch returns
            self.backend.release(request.id)
        if self._finish is not None:
            self._finish(request, now)

    def _settle(self) -> None:
        """Draw what verbs only wrote down: whose KV moves, and how many reserved tokens will be filled."""
        state = self.state
        for request, tokens, out in state.moved:
            self._requests.moved(request, tokens, out)
        for request, reserved, computed, sign in state.pledges:
            final = request.prompt_tokens + self._ends.outputs[request.id] - 1
            self._promised += sign * max(0, min(reserved, final) - computed)
        state.moved, state.pledges = [], []

    @property
    def promised(self) -> int:
        """Reserved tokens that will be filled."""
        self._settle()
        return self._promised

    def _answer_batch(self, now: int) -> None:
        released, self.state.released = self.state.released, []
        for request in released:
            self.end_request(request, now, Status.FINISHED)

    def _late(self, start: When, decodes: int) -> tuple[int, list[int]]:
        """How many decodes did not emit at ``start``; when they last did, and how many of them, as flat rows."""
        state = self.state
        gaps: list[int] = []
        late = 0
        old = decodes
        for request in state.fresh.values():
            if request.group is None:
                continue  # preempted or parked since
            old -= 1
            if request.last is not start:
                gaps += (request.last.ps, 1)
                late += 1
        if old > 0 and state.decoded_at is not start:
            gaps += (state.decoded_at.ps, old)
            late += old
        return late, gaps

    def _fail(self, what: str) -> NoReturn:
        raise PolicyError(f"policy {type(self.scheduler).__name__}: {what}")


def _as_decodes(chunks: list[tuple[Live, int]], batch: Batch) -> Batch:
    """``batch`` with those as decodes who lack one token, the latest that they emitted: what a kernel sees of them."""
    last = [t == 1 and r.produced > 0 and r.stored + 1 == r.prompt_tokens + r.produced for r, t in chunks]
    prefills = tuple(chunk for chunk, decode in zip(batch.prefills, last, strict=True) if not decode)
    starts = [chunk.start + 1 for chunk, decode in zip(batch.prefills, last, strict=True) if decode]
    return batch._replace(prefills=prefills, decodes=batch.decodes + len(starts), context=batch.context + sum(starts))
