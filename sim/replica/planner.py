"""What planned steps do to a replica's requests: asking the policy, committing its plan, letting requests go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, TypeAlias

from mypy_extensions import mypyc_attr

from chairlift.backend.base import NO_HOST, Backend, Batch, Chunk, Members, new
from chairlift.policies.base import FOREVER, NoProgress, PolicyError, Scheduler
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.decode_group import ROW_BITS, Ends, admission
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.journal import Journal
from chairlift.sim.replica.pipeline import NO_STRAYS
from chairlift.sim.replica.request import AWAY, DRAINING, HELD, Live, When
from chairlift.sim.replica.step import ReplicaStep
from chairlift.sim.replica.step_plan import NO_GAPS, Plan
from chairlift.sim.replica.users_code import blame, name_of
from chairlift.sim.results.records import NO_GROWTH, PACK_RUN, Growth, Kind, RequestRecords, RunRecords, Status, StepRow

FRUITLESS: Final = 2_000  # plans that preempt somebody, in a row: if no token comes of them, none ever will
_FINISHED: Final = Status.FINISHED
Fields: TypeAlias = tuple[tuple[Chunk, ...], int, int, int, Members | None, int, int]  # of a `Batch`
_HELD, _SPARED = StepRow._fields.index("held_blocks"), StepRow._fields.index("spared_blocks")


@mypyc_attr(allow_interpreted_subclasses=True)
class Planner:
    """What either loop of an engine does to its requests. It knows no time but what it is told.

    `ask` has the policy arrange the next steps, `commit` takes them as done as far as policies can see, `record`,
    `deliver` and `complete` follow once they are done. ``requests`` is where each request's fate is written,
    ``records`` where steps are; ``outputs`` are the true lengths. With ``leap=False`` every step is planned and priced
    on its own: slow, and the oracle for leaping. ``finish`` is called with each request that ends here. ``handover``
    takes a request over that has all its tokens from here; False if it does not. ``journal`` hears what happens.
    ``stages``: of a pipeline; with several, each plan is one step, is committed as soon as it is made, and `complete`
    takes the oldest in once so many are in flight, one more where planning is asynchronous.

    Raises `PolicyError` if the policy wants a synchronous batch planned ahead, or cannot fill a pipeline.
    """

    count = 1  # of planners whose steps are one
    __slots__ = (  # without them a run takes 2 % longer
        *("_ahead", "_budget", "_caps", "_ended", "_ends", "_finish", "_handover", "_hears", "_holds", "_leaps"),
        *("_left", "_limits", "_longest", "_overshoots", "_preempting", "_progress", "_promised", "again"),
        *("arrival", "arrival_token", "backend", "ends_in_plan", "flight", "index", "intake", "journal", "pool"),
        *("price", "records", "remembers", "requests", "scheduler", "state", "steps", "vouched"),
    )

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
        records: RunRecords | None = None,
        handover: Callable[[Live], bool] | None = None,
        journal: bool = False,
        stages: int = 1,
    ) -> None:
        if stages > 1 and (not scheduler.fills_pipelines or pool.windowed or pool.keeps):
            raise PolicyError("several steps in flight are not modelled here", name_of(scheduler))
        if scheduler.asynchronous and scheduler.batch_synchronous:
            raise PolicyError("a synchronous batch cannot be planned ahead", name_of(scheduler))
        self.scheduler = scheduler
        self.backend = backend
        self.pool = pool
        self.index = index
        self.state = self._make_step(scheduler, backend, pool, max_model_len, host, stages)
        self.requests = requests
        self.records = records or RunRecords()
        self.steps = 0  # done
        self.flight: Plan | None = None  # the step in flight (`fly`), committed already; None in a synchronous loop
        self.vouched = 1  # steps that the policy vouches for, of the latest plan
        self.price = backend.step  # where steps really run, it launches them
        self.remembers = backend.remembers
        self.arrival, self.arrival_token = backend.arrival, backend.arrival_token
        self.intake = 0  # ps of host time to take in those that have come
        self.journal = Journal(self.records) if journal else None
        if journal:
            self.state.notes = []
        self._leaps = leap
        self._ahead = scheduler.asynchronous
        self._holds = scheduler.batch_synchronous  # finished requests keep their slot
        self.again = False  # the policy wants to be asked again though nothing runs
        self._overshoots = scheduler.overshoots if self._ahead else "never"
        self._limits = bool(scheduler.limits_arrivals)
        self._caps = type(scheduler).allowed is not Scheduler.allowed  # it says more than the request's own limit
        self._hears = type(scheduler).ended is not Scheduler.ended  # it wants to know who has left
        self._left: list[tuple[int, Live]] = []  # who left at the latest such time, where the policy limits arrivals
        self._longest = min(max_model_len, pool.room + 1)  # tokens of a request; no KV of its last
        self._budget = FOREVER if scheduler.token_limit is None else scheduler.token_limit
        self._ends = Ends(self.state.group, self.state.admitted, outputs)
        self._promised = 0  # reserved tokens that will be filled
        self._finish = finish
        self.ends_in_plan: Callable[[int], None] | None = None  # called when requests end as a step is planned
        self._handover = handover
        self._preempting = 0  # plans that preempted since the latest look for progress
        self._progress = (0, 0)  # at that look: requests that had ended, and tokens of those that were here
        self._ended = 0  # requests that have left for good

    def heeds_arrival(self) -> bool:
        """Whether an arrival now, while a run is under way, calls for a plan at the next boundary."""
        policy: Any = self.scheduler  # which may answer anything
        return self.arrival > 0 or self.arrival_token > 0 or bool(policy.heeds_arrival(self.state))

    def _make_step(self, *parts: Any) -> ReplicaStep:
        return ReplicaStep(*parts)

    def takes(self, request: Live, now: int) -> bool:
        """Whether a request that arrives now can ever fit, and the policy does not turn it away.

        Its answer may be shortened to what the policy allows; one that has as many tokens already, from a replica that
        failed or handed it over, is not taken.
        """
        allowed = request.limit
        if self._caps:
            pool = self.pool
            allowed = self.scheduler.allowed(request, self.state.longest, pool.total, pool.block_size)
            if allowed < request.limit:
                request.cap(allowed)
                self._ends.shorten(request.row, allowed)
        final = request.prompt + self._ends.outputs[request.row]
        fits = allowed > request.produced and final <= self._longest
        return fits and not (self._limits and self._turned_away(now))

    def _turned_away(self, now: int) -> bool:
        """Whether the policy, which limits arrivals, refuses who arrives now.

        At the boundary of two steps the policy sees what was before: whether the boundary is settled first depends on
        how the steps are grouped. So does whether a first token that has landed is written down already.
        """
        state, first_token = self.state, self.requests.first_token
        here = [*state.admitted.values(), *state.queue, *(request for at, request in self._left if at == now)]
        prompts = 0
        for request in here:
            first = first_token[request.row]
            if first < 0 and request.emitted:
                first = request.last.ps
            if not 0 <= first < now:
                prompts += request.prompt
        return self.scheduler.turns_away(len(here), prompts)

    def ask(self, now: int, start: When) -> Plan | None:
        """What the policy wants of the steps that start at ``start``; None if nothing.

        ``start`` is the holder of that time: the end of the step in flight, or of the run before. Decodes whose last
        token came with another step are late, and their gaps are kept one by one.
        """
        state = self.state
        state.open(now)
        intake, self.intake = self.intake, 0
        policy: Any = self.scheduler  # which may answer anything
        try:
            vouched = policy.schedule(state)
        except BaseException as error:
            blame(error, self.scheduler, self._step)
            raise
        self.again = vouched == 0
        if not isinstance(vouched, int) or vouched < 0:
            self.fail(f"vouched for {vouched!r} steps: a whole number from 0 on is possible")
        if state.tokens > self._budget:
            self.fail(f"a step of {state.tokens} tokens: its budget is {self._budget}")
        if self.journal is not None:
            self.journal.noted(now, self.row_to_come(), state.notes or ())
        if state.released:
            released, state.released = state.released, []
            self._end_in_plan(released, now, Status.FINISHED)
        if state.started:
            records = self.requests
            for request, hit in state.started:
                if records.admitted[request.row] < 0:
                    records.admitted[request.row] = now
                    records.cached_tokens[request.row] = hit
        if state.moved or state.pledges:
            self._settle()
        if state.rejected or state.preempted:
            vouched = 1  # the queue has changed
            if state.preempted:
                self._check_progress()
            self._end_in_plan(state.rejected, now, Status.REJECTED)
        gathered = self._gather(now)
        if gathered is None:
            return None
        decoding, fields, prompt_tokens = gathered
        if self.again:
            self.fail("vouched for 0 steps")
        _, decodes, context, padded, _, _, _ = fields  # sooner than of a `Batch`
        batch = new(Batch, fields)
        chunks = state.chunks
        group = state.group
        price = self.price  # looked up first: Python is slow to call what is not a method
        cost = price(self._as_decodes(batch) if state.resumed else batch)
        count = 1
        gpu, gpu_slope, alike, host = cost
        first, slope = gpu, gpu_slope
        if host is not NO_HOST:
            first, slope = cost.spacing(self._ahead)
        if state.host.busy:
            state.slept += state.host.delay(first)
        self.vouched = vouched
        leaps = self._leaps and decoding and not (chunks or state.slept or intake)
        if leaps and not (self.pool.publishes and state.queue):  # whoever waits may find what is being generated
            count = min(vouched, alike if host is NO_HOST else cost.steps_alike(self._ahead), self._ends.horizon())
            if count > 1 and group.growing:
                count = self.pool.lasts(group, count, state.taken, bool(state.queue))
        late, late_gaps = 0, NO_GAPS
        if decoding and (state.fresh or state.decoded_at is not start):
            late, late_gaps = self._late(start, decodes)
        row = (  # a `StepRow`, which takes longer to make
            len(chunks),
            prompt_tokens,
            decodes,
            padded,
            context,
            late,
            len(state.admitted),
            len(state.queue),
            self.pool.total - self.pool.free,
            self.pool.spared if self.pool.tracks else 0,
            state.kv_tokens,
            self._promised,
            group.reserved if decoding else 0,
            state.preempted,
        )
        plan = Plan(first, slope, count, chunks, decoding, row, late_gaps, gpu, gpu_slope, host)
        if state.slept or intake:
            plan.first += state.slept + intake
            plan.gpu += state.slept
            plan.intake = intake
        return plan

    def _gather(self, now: int) -> tuple[bool, Fields, int] | None:
        """What the policy chose: whether anybody decodes, a `Batch`, its tokens of prompts; None if nothing runs."""
        state = self.state
        chunks = state.chunks
        group = state.group
        decoding = state.whole
        if state.ran:
            before = list(state.parked)
            state.arrange()
            decoding = True
            if self.journal is not None:
                self.journal.arranged(now, self.row_to_come(), before, list(state.parked))
        if state.rejoined:
            for request in state.rejoined:
                if request.group is group:  # else this very plan has preempted it, or left it out again
                    self._ends.add(request)
            state.rejoined = []
        if not decoding and not chunks:
            return None
        if decoding:
            decodes, context, dead = group.live, group.context, group.dead
        else:
            decodes = context = dead = 0
        prefills: tuple[Chunk, ...] = ()
        if chunks:
            prefills = tuple([new(Chunk, (r.stored, t)) for r, t in chunks])
        batch = (prefills, decodes, context, dead + state.padding, None, 0, 0)
        return decoding, batch, state.tokens - decodes if chunks else 0

    def _as_decodes(self, batch: Batch) -> Batch:
        """``batch`` as a kernel sees it: a chunk of one token that a client already has is a decode.

        In three steps: a request with a prompt of 10 has 4 tokens of answer when it is preempted. Computed again, its
        14 tokens come in chunks of 13 and 1. The last chunk reads 14 tokens of KV, its own included, and brings the
        fifth token of the answer, as a decode does.
        """
        chunks = self.state.chunks
        last = [t == 1 and r.produced > 0 and r.stored + 1 == r.prompt + r.produced for r, t in chunks]
        prefills = tuple(chunk for chunk, decode in zip(batch.prefills, last, strict=True) if not decode)
        starts = [chunk.start + 1 for chunk, decode in zip(batch.prefills, last, strict=True) if decode]
        return batch._replace(
            prefills=prefills, decodes=batch.decodes + len(starts), context=batch.context + sum(starts)
        )

    def remember(self, plan: Plan, count: int) -> None:
        """Tell the backend, which `remembers`, of the first ``count`` steps of ``plan``."""
        chunks, prompt_tokens, decodes = plan.row[:3]
        self.backend.ran(prompt_tokens + decodes if chunks else 0, plan.gpu, plan.gpu_slope, count)

    def commit(self, plan: Plan, count: int) -> None:
        """Take the first ``count`` steps of ``plan`` as done, as far as policies are concerned."""
        state = self.state
        group = state.group
        ends = self._ends
        outputs = ends.outputs
        when = plan.when
        ending: list[Live] = []
        if self.remembers:
            self.remember(plan, count)
        if self._ahead and self.pool.windowed:
            self.pool.flight = plan
        if plan.decoding:
            if count > 1:
                self._leap(plan, count)
            state.kv_tokens += count * group.live
            if group.reserved:
                self._promised -= count * group.reserved
            group.steps += count
            group.context += count * (group.live + group.dead)
            plan.decoded_before, state.decoded_at = state.decoded_at, when
            if state.fresh:
                plan.fresh, state.fresh = state.fresh, {}
            heap, later = ends.heap, group.steps + 1 << ROW_BITS
            while heap and heap[0] < later:
                due = ends.due()
                if due is not None:
                    ending.append(due)
                    if self._holds:
                        due.end(when)  # its slot is paid for until its batch returns
                    elif self._overshoots == "never" or not self._goes_on(due):
                        group.leave(due, DRAINING, when)
        elif count > 1:  # other ranks' steps
            self._leap(plan, count)
        if plan.chunks:
            emitting: list[Live] = []
            flights = state.flights
            strays = NO_STRAYS if flights is None else flights.strays
            for request, tokens in plan.chunks:
                state.kv_tokens += tokens
                if request.reserved:
                    self._promised -= tokens
                if strays and flights is not None and flights.strays_on(request, tokens, outputs[request.row]):
                    if flights.compute(request, tokens, when):
                        emitting.append(request)
                    continue
                if not request.compute(tokens, when):
                    continue
                del state.prefills[request.row]
                emitting.append(request)
                if outputs[request.row] > request.produced:
                    group.join(request)
                    state.fresh[request.row] = request
                    ends.add(request)
                    continue
                ending.append(request)
                if self._holds:
                    group.join(request)
                elif self._overshoots != "never" and self._goes_on(request):
                    group.join(request)
                    state.fresh[request.row] = request
                    continue
                request.drain()
            plan.emitting = emitting
        if ending:
            plan.ending = ending
        if state.flights is not None:
            decodes = list(state.ran.values()) if plan.decoding else []
            members = [*decodes, *(request for request, _ in plan.chunks)]
            state.flights.launch(plan, members, [*decodes, *plan.emitting])

    def _leap(self, plan: Plan, count: int) -> None:
        """Take the blocks of the steps that follow the first of ``plan``, ``count`` in all, and keep what they held.

        The first step's are taken already. Where planning is ahead, the last step is in flight from here on and has a
        row of its own, and the step that was in flight has landed since the first was planned: a pool that `keeps`
        prompts may hold fewer blocks.
        """
        pool, steps = self.pool, count - self._ahead
        held, spared = pool.total - pool.free - plan.row[_HELD], pool.spared - plan.row[_SPARED]
        growth = pool.leap(self.state.group, count, steps) if plan.decoding else NO_GROWTH
        if held or spared:
            moment = steps * (steps - 1) // 2
            more = (held * (steps - 1), held * moment, spared * (steps - 1), spared * moment)
            growth = Growth(*map(sum, zip(growth, more, strict=True)))
        plan.growth = growth
        plan.held, plan.spared = pool.total - pool.free, pool.spared

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:
        """The last committed step of ``plan`` is done: the requests whose last token it brought leave.

        ``behind``: what runs after it, planned before its output is in.
        """
        state = self.state
        if self.pool.windowed and self.pool.flight is plan:
            self.pool.flight = None
        if state.flights is not None:
            self._land_flight(plan)
        elif state.parked and self._ahead:
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
                if self.journal is not None:
                    self.journal.write(now, self.journal.row, Kind.DONE, request.row, -1, 0)
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
            last = {r.row for r in plan.emitting}
            requests = [*plan.emitting, *(r for r in ending if r.row not in last)]
        if len(requests) > 1:
            requests = self.scheduler.landing(requests)  # type: ignore[arg-type, assignment]
        last = {r.row for r in ending}
        for request in requests:
            if request.row in last:
                self._finish_one(request, now, behind)
            else:
                self.state.keep(request)
        return [r for r in requests if r.row in last]

    def _land_flight(self, plan: Plan) -> None:
        """Where several steps fly: the tokens of ``plan`` are in, and what they complete can be found."""
        flights, pool = self.state.flights, self.pool
        assert flights is not None
        landed = flights.land(plan)
        if not (flights.strays or (self._ahead and pool.tracks)):
            return
        ended: list[Live] = []
        for request in landed:
            running = request.row in self.state.admitted
            flying = flights.tokens(request)
            if (stray := flights.strays.get(request.row)) is not None:
                if not running:
                    pool.another_known(request)
                self.records.stops += self._ahead and not stray.expected
                if flights.bring(request, running) == self._ends.outputs[request.row]:
                    ended.append(request)
                flying = stray.expected
            if self._ahead and pool.tracks and running:
                pool.computed(request, request.computed - flying)
        if plan.ending or ended:
            plan.ending = [r for r in plan.ending if r.row not in flights.strays and r not in ended] + ended

    def _finish_one(self, request: Live, now: int, behind: Plan | None) -> None:
        """A request has its answer, and leaves."""
        state = self.state
        if state.admitted.pop(request.row, None) is None:  # preempted while its last token was in flight
            state.withdraw(request)
        elif request.group is not None:  # it decodes once more, for nothing
            again = False
            if behind is not None and behind.decoding:
                again = True
                behind.undelivered += 1
                self.drop(request)
            state.vacate(request, AWAY if again else DRAINING, again)
        elif state.flights is not None and request.row in state.flights.strays:
            state.vacate(request, DRAINING)
        else:
            if self._ahead and self.pool.tracks:
                self.pool.computed(request, request.stored)
            state.dismiss(request)
        if self._hears:
            self.scheduler.ended(request)
        self.end_request(request, now, _FINISHED)
        if state.flights is not None:
            state.flights.forget(request)

    def drop(self, request: Live) -> None:
        """The token of a request that is under way is nobody's: the request has ended, or will generate it again."""
        self.backend.drop(request.row)
        if self.journal is not None:
            self.journal.write(self.state.now, self.journal.row, Kind.DROP, request.row, -1, 0)

    def _goes_on(self, request: Live) -> bool:
        """Whether a request whose last token is planned is planned once more, since that token is not seen yet."""
        return self._overshoots == "always" or self._ends.outputs[request.row] < request.limit

    def end_request(self, request: Live, now: int, status: Status) -> None:
        """A request has left the replica for good; what became of it is written down once."""
        records = self.requests
        self._ended += 1
        pending = not records.status[request.row]
        if pending and self._limits and status is not Status.REJECTED:
            self._left = [(at, other) for at, other in self._left if at == now]
            self._left.append((now, request))
        if not pending:  # it was cancelled while its batch was under way, and kept its slot until now
            if self.state.releases:
                self.backend.release(request.row)
        elif self._handover is None or status is not _FINISHED or not self._handover(request):
            records.close(request.row, now, status, request.produced, request.lost, request.last.ps)
            if self.state.releases and request.phase is not HELD:  # else its slot is paid for until its batch returns
                self.backend.release(request.row)
            if (finish := self._finish) is not None:
                finish(request, now)
        if self.journal is not None and request.phase is not HELD:  # of one that is held, once its batch returns
            # who has a step in flight when they end leaves with the step after it: a client that gives up, or a request
            # that decodes once more for nothing
            late = status is Status.TIMED_OUT or (status is Status.FINISHED and request.phase is AWAY)
            row = self.row_to_come() if late else self.journal.row
            became = Status(records.status[request.row])
            kind = Kind.HANDOVER if became is Status.PENDING else Kind.END
            self.journal.write(now if pending else records.finished[request.row], row, kind, request.row, -1, became)

    def record(self, plan: Plan, start: int, first: int, count: int) -> None:
        """Write down the first ``count`` steps of ``plan``, or its last one, that began at ``start``."""
        if self.journal is not None:
            for request, tokens in plan.chunks:
                self.journal.write(start, self.journal.row, Kind.CHUNK, request.row, -1, tokens)
        self.steps += count
        row = plan.row
        if plan.undelivered:  # no gap is theirs
            named = StepRow._make(row)
            row = named._replace(late_decodes=named.late_decodes + plan.undelivered)
        slope, growth = (plan.slope, plan.growth) if count > 1 else (0, NO_GROWTH)
        self.records.rows.frombytes(PACK_RUN(start, first, slope, count, *growth, *row))
        if plan.late_gaps:
            end = start + first
            for i in range(0, len(plan.late_gaps), 2):
                self.records.gap_rows.extend((end - plan.late_gaps[i], plan.late_gaps[i + 1]))
            plan.late_gaps = []

    def record_landed(self, plan: Plan, landing: int) -> None:
        """Write down the one step of ``plan`` that was in flight since ``plan.begun``, and has landed."""
        if plan.undelivered or plan.late_gaps or self.journal is not None:
            self.record(plan, plan.begun, landing - plan.begun, 1)
        else:  # the same, without the detour
            self.steps += 1
            begun, write = plan.begun, self.records.rows.frombytes
            write(PACK_RUN(begun, landing - begun, 0, 1, 0, 0, 0, 0, *plan.row))

    def fly(self, plan: Plan | None) -> None:
        """The last committed step of ``plan`` is in flight from now on; None: no step is."""
        self.flight = plan

    def idle(self) -> Plan:
        """A plan of as many steps as others want, in which nothing of this planner's runs."""
        state, pool = self.state, self.pool
        here = (len(state.admitted), len(state.queue), pool.total - pool.free, pool.spared)
        row = (0, 0, 0, 0, 0, 0, *here, state.kv_tokens, self._promised, 0, 0)
        return Plan(0, 0, FOREVER, [], False, row, [], 0, 0, NO_HOST)

    def deliver(self, plan: Plan) -> None:
        """Write down the tokens that ``plan`` has brought to those whose prompt was done with it."""
        now = plan.when.ps
        first_token = self.requests.first_token
        for request in plan.emitting:
            if first_token[request.row] >= 0:  # it was preempted: its client waits for this token since the one before
                self.records.gap_rows.extend((now - request.before.ps, 1))
            else:
                first_token[request.row] = now

    def strike(self, request: Live, now: int) -> None:
        """A cancelled request leaves, between two steps."""
        state, flight = self.state, self.flight
        if self.requests.status[request.row] != Status.PENDING:
            return  # its last token came with the very step
        flying = self._flies(request)
        if request.row in state.admitted:
            del state.admitted[request.row]
            state.vacate(request, AWAY)
            if self._hears:
                self.scheduler.ended(request)
        elif request.phase is not HELD and request.phase is not AWAY:
            state.withdraw(request)  # one that is held goes on paying for its slot
        if flying:
            assert flight is not None
            _unsay(flight, request)
            _miss(flight, request)
        self.end_request(request, now, Status.TIMED_OUT)

    def drop_tokens(self) -> None:
        """Those whom the plan at hand has preempted lose their tokens in flight (`Scheduler.drops_flight`)."""
        flight = self.flight
        assert flight is not None
        for request in self.state.evicted:
            if self._flies(request):
                _unsay(flight, request)
                _miss(flight, request)
                self.drop(request)

    def lose(self, now: int) -> list[Live]:
        """All requests that are here leave, with the tokens that their clients have. Those that are held have ended."""
        state, flight = self.state, self.flight
        state.release()
        released, state.released = state.released, []
        for request in released:
            self.end_request(request, now, Status.FINISHED)
        lost = [*state.admitted.values(), *state.queue]
        for request in lost:
            flying = self._flies(request)
            if request.group is not None:
                state.part(request, AWAY)
            if flying:
                assert flight is not None
                _unsay(flight, request)
            request.depart()
        self.flight = None
        if self.journal is not None:
            for request in lost:
                self.journal.write(now, self.journal.row, Kind.LOST, request.row, -1, 0)
        return lost

    def row_to_come(self) -> int:
        """The row of runs of what is planned now: a step in flight has the one before it."""
        assert self.journal is not None
        return self.journal.row + (self.flight is not None)

    def _flies(self, request: Live) -> bool:
        """Whether a token of ``request`` is in flight: planned, counted in what policies see, not brought yet."""
        flight = self.flight
        if flight is None:
            return False
        if request in flight.emitting or request in flight.ending:
            return True
        if not flight.decoding:
            return False
        if request.group is not None:  # who joined since the flight was committed is in `emitting`, or was parked
            return request.row not in self.state.fresh
        return request.last is flight.when  # parked or preempted by the plan under way

    def _settle(self) -> None:
        """Take in what the policy's verbs have only noted: moves of KV, and reservations made and given up."""
        state = self.state
        for request, tokens, out in state.moved:
            self.requests.moved(request, tokens, out)
        for request, reserved, computed, sign in state.pledges:
            final = request.prompt + self._ends.outputs[request.row] - 1
            self._promised += sign * max(0, min(reserved, final) - computed)
        state.moved, state.pledges = [], []

    @property
    def promised(self) -> int:
        """Reserved tokens that will be filled."""
        self._settle()
        return self._promised

    def _end_in_plan(self, requests: list[Live], now: int, status: Status) -> None:
        """These end not at a boundary but as a step is planned: a batch returns, or the policy refuses them."""
        if requests and self.ends_in_plan is not None:
            self.ends_in_plan(now)
        for request in requests:
            self.end_request(request, now, status)

    def _late(self, start: When, decodes: int) -> tuple[int, list[int]]:
        """How many of ``decodes`` have their latest token from elsewhere than ``start``: they are late.

        Beside it flat rows of when such tokens came and how many they were. In three steps: 5 requests decode until
        100 ps, the policy runs a prompt alone until 180, and all 5 decode from there. At ``start``, 180 ps, 5 are
        late, and the row is (100, 5).
        """
        state = self.state
        gaps: list[int] = []
        late = 0
        old = decodes
        for request in state.fresh.values():
            if request.group is not state.group:
                continue  # preempted, parked, or handed over to another replica since
            old -= 1
            if request.last is not start:
                gaps += (request.last.ps, 1)
                late += 1
        if old > 0 and state.decoded_at is not start:
            gaps += (state.decoded_at.ps, old)
            late += old
        return late, gaps

    def fail(self, what: str, kind: type[PolicyError] = PolicyError) -> NoReturn:
        """Say what the policy has done wrong."""
        raise kind(what, name_of(self.scheduler), self._step)

    @property
    def _step(self) -> int:
        """The number of the engine step that is planned."""
        return self.steps + (self.flight is not None) + 1

    def _check_progress(self) -> None:
        """Raise `PolicyError` if nothing comes of `FRUITLESS` plans that took blocks away.

        A plan that preempts nobody makes progress, since what a request lacks is finite. In three steps: A, with a
        prompt of 100 tokens, has 50 of them computed; the policy preempts it and computes the same 50 again; and so on:
        nobody gets a token, and nobody leaves.
        """
        self._preempting += 1
        if self._preempting < FRUITLESS:
            return
        here = (*self.state.admitted.values(), *self.state.queue)
        ends, emitted = self._ended, sum(request.emitted for request in here)
        if (ends, emitted) <= self._progress:
            self.fail(
                f"no token came of the latest {FRUITLESS:,} plans that preempted: {len(here)} requests are here",
                NoProgress,
            )
        self._preempting, self._progress = 0, (ends, emitted)


def _unsay(flight: Plan, request: Live) -> None:
    """The token in flight of a request will not come. The request has left the group by now, if it was in it."""
    own = request in flight.emitting or request.row in flight.fresh  # it was not in the group the step before
    request.unsay(request.before if own else flight.decoded_before)


def _miss(flight: Plan, request: Live) -> None:
    """The token in flight of a request goes to nobody."""
    if request in flight.emitting:
        flight.emitting.remove(request)
    else:
        flight.lose_gap(request.last.ps)
    if request in flight.ending:
        flight.ending.remove(request)
