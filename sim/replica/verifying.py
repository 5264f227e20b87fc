"""What planned steps do to a replica's requests where their decodes verify drafts.

Source: vLLM 0.33.0, `update_from_output` of `vllm/v1/core/sched/scheduler.py`, `_update_after_schedule` of
`async_scheduler.py`; `tests/ledger.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from chairlift.backend import base
from chairlift.backend.base import WHOLE, Batch, Chunk, new
from chairlift.policies.base import PolicyError, Speculation
from chairlift.sim.replica.drafted_group import FEWEST, LEAST, LONGEST, Drafted, Paths
from chairlift.sim.replica.drafts import Chosen, DraftedStep
from chairlift.sim.replica.hybrid_pool import DraftedHybridPool
from chairlift.sim.replica.planner import Fields, Planner
from chairlift.sim.replica.ranks import RankBackend
from chairlift.sim.replica.request import AWAY, DRAINING, PARKED, Live, When
from chairlift.sim.replica.step_plan import Course, Plan
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.results.records import DRAFT_COLUMNS, NO_GROWTH, PACK_RUN, Status, StepRow

REST = 64  # plans at most until those whose group was broken up join one again
_CONTEXT, _LATE, _HELD, _STORED = map(StepRow._fields.index, ("context", "late_decodes", "held_blocks", "kv_tokens"))
MOST = 64  # steps that are planned at once
STEADY = 16  # steps after which a group that is broken up may join again at once


class Verified:
    """What a plan verifies and proposes."""

    __slots__ = ("chosen", "drafting", "grouped", "kept")

    def __init__(self, chosen: dict[int, Chosen], drafting: int, grouped: bool) -> None:
        self.chosen = chosen  # by request, in the order of the plan; whoever ends before its output is in leaves it
        self.drafting = drafting  # drafts that each of them gets by the step; 0: nobody could use any
        self.grouped = grouped  # the group does a step
        self.kept: dict[int, int] = {}  # by request: of its drafts so many are kept, where that was looked at already


class VerifyingPlanner(Planner):
    """As `Planner`, where a decode computes its latest token and drafts of those after it.

    With ``leap`` those whose next steps are all alike are a group (`sim.replica.drafted_group`), and a plan has as many
    steps as the group does alone.

    ``accepts(request, position, drafts)``: how many of so many drafts are kept of a request that has ``position``
    tokens of its answer. Tokens that come together come at one time, with one gap before them, as clients get them: in
    one message.

    With several ``stages`` the steps in flight of a request that bring it tokens are at most two: the one that lands
    next, and one planned as it did. Source: vLLM 0.33.0, asynchronous; without, it takes up drafts of a step that is
    not in (`post_step` of `vllm/v1/engine/core.py`), which is not modelled.

    Raises `PolicyError` if the policy cannot plan such steps, or the KV pool or the pipeline is none for them.
    """

    __slots__ = (
        *("_accepts", "_along", "_at_once", "_broken", "_groups", "_paths", "_patience", "_reach", "_rest", "_runs"),
        *("_speculation", "_undated", "_verified", "_windowed"),
    )
    state: DraftedStep

    def __init__(
        self, speculation: Speculation, accepts: Callable[[int, int, int], int], *parts: Any, **more: Any
    ) -> None:
        self._speculation = speculation
        self._accepts = accepts
        self._along: Callable[[int, int, int, int], list[int]] | None = getattr(accepts, "along", None)
        self._paths = Paths()
        self._broken, self._patience, self._rest = 0, 1, 0  # the group, at that step of its; plans to let pass
        self._reach = MOST  # steps worth planning at once: twice as many as were taken the last time
        self._undated: When | None = None  # of the step before the last one that is committed
        self._verified: dict[Plan, Verified] = {}  # of each plan whose output is not in
        super().__init__(*parts, **more)
        policy = self.scheduler
        windowed = self.pool if isinstance(self.pool, DraftedHybridPool) else None
        staged = self.state.stages > 1
        unstaged = not policy.asynchronous or policy.overtakes_flight
        unfit = self.pool.keeps or (self.pool.windowed and windowed is None) or (staged and unstaged)
        if not policy.verifies_drafts or unfit:
            raise PolicyError("speculation is not modelled here", name_of(policy))
        self._windowed = windowed
        self._at_once = speculation.at_once or policy.asynchronous
        # where others find answers each block that a decode fills matters, and each token where windows slide
        apart = speculation.by_batch or windowed or self.pool.publishes or staged or not self._at_once
        self._groups = self._leaps and not apart
        self._runs = self._groups and not isinstance(self.backend, RankBackend)  # a step of ranks is of all of them
        self._leaps = False
        if DRAFT_COLUMNS[0] not in self.requests.extra:
            self.requests.count_drafts()

    def _make_step(self, *parts: Any) -> DraftedStep:
        return DraftedStep(self._speculation, *parts)

    def ask(self, now: int, start: When) -> Plan | None:  # noqa: D102 - documented in `Planner`, as all below
        if self._groups:
            self._regroup()
        plan = super().ask(now, start)
        if plan is not None:
            self._verified[plan] = Verified(self.state.chosen, self.drafting, self.state.whole)
            if self._runs and self.state.whole and not (self.state.chosen or self.state.slept or plan.intake):
                self._go_on(plan)
        return plan

    def _go_on(self, plan: Plan) -> None:
        """Let a plan of the group's next step last for as many steps as it is the group alone that does them.

        What each member keeps in those is drawn already (`Paths`), so contexts, blocks and tokens stored are prefix
        sums, and each step is priced by them.
        """
        state, group, pool, flight = self.state, self.state.drafted, self.pool, self.flight
        limit = self.scheduler.sequence_limit
        if group.fresh or (state.queue and (limit is None or len(state.admitted) < limit)):
            return  # somebody may join
        if self.remembers:
            return  # prices ahead depend on what has not run
        if self._ahead and not (group.flying and flight is not None and not flight.ending):
            return
        steps = min(self.vouched, self._reach, self._paths.until(group.steps))
        if steps < 2:
            return
        n, ahead = len(group), int(self._ahead)
        given = self._paths.between(group.steps - ahead, group.steps + steps - 1)[:, :n]
        brought = given.sum(axis=1)
        context = (plan.row[_CONTEXT] + brought[ahead:].cumsum()).tolist()
        stored = (plan.row[_STORED] + brought[: steps - 1].cumsum()).tolist()
        held = group.held_after(
            given[: steps - 1].cumsum(axis=0), self._speculation.lookahead, state.longest, pool.block_size
        )
        more = (held.sum(axis=1) - group.blocks[:n].sum()).tolist()
        host, drafts, proposes, free = plan.host, n * (group.width - 1), self._verified[plan].drafting, pool.free
        least = host.schedule + host.launch + host.update
        least = max(least, host.launch + host.tail) if self._ahead and host.tail != WHOLE else 0
        if plan.gpu < least:
            return
        ends, gpus, rows = [plan.first], [plan.gpu], [plan.row]
        before, between, after = plan.row[:_CONTEXT], plan.row[_LATE + 1 : _HELD], plan.row[_STORED + 1 :]
        for k in range(steps - 1):
            cost = self.price(new(Batch, ((), n, context[k], 0, None, drafts, proposes)))
            if more[k] > free or cost.host != host or cost.first < least:
                break
            ends.append(ends[-1] + cost.spacing(self._ahead)[0])
            gpus.append(cost.first)
            held_blocks = plan.row[_HELD] + more[k]
            rows.append((*before, context[k], 0, *between, held_blocks, plan.row[_HELD + 1], stored[k], *after))
        if len(ends) > 1:
            plan.count, plan.course = len(ends), Course(ends, gpus, rows)

    def _catch_up(self, count: int) -> None:
        """So many steps of the group are done, each landed before the next one was planned."""
        group, pool, n = self.state.drafted, self.pool, len(self.state.drafted)
        given = self._paths.between(group.steps, group.steps + count)[:, :n].sum(axis=0)
        group.produced[:n] += given
        group.stored[:n] += given
        self.state.kv_tokens += int(given.sum())
        flying = group.width - self._paths.of(group.steps + count - 1)[:n] if self._ahead else 0
        blocks = group.held_after(flying, self._speculation.lookahead, self.state.longest, pool.block_size)
        pool.grow(int(blocks.sum() - group.blocks[:n].sum()))
        group.blocks[:n] = blocks
        group.steps += count
        group.last = self._undated = When()

    def _regroup(self) -> None:
        """Who is about to do other steps leaves the group, and who is to do steps like the others' joins it."""
        state = self.state
        group = state.drafted
        if group.members:
            due = self._paths.due(group.steps)
            for request in due:
                alone = request.alone
                state.leave(request)
                request.alone = alone
            if due:
                self._absorb()
        if self._rest:
            self._rest -= 1
        elif state.lone and len(state.parked) >= FEWEST:
            for request in list(state.lone.values()):
                if not request.alone and request.phase is PARKED and request.drafts == self._speculation.drafts:
                    self._join(request)

    def _join(self, request: Drafted) -> None:
        """Let a request join the group, if enough of its steps are like the others'."""
        if not self.pool.settled(request):
            return
        width, flying = 1 + self._speculation.drafts, None
        start, ahead, now = request.produced, 0, width
        if self.flight is not None:
            flying = self._verified[self.flight].chosen.get(request.row)
        if flying is not None:
            if flying.preemptions != request.lost:
                return
            rejected = self._rejected_ahead(request, self._verified[self.flight]) if self.flight is not None else 0
            start += 1 + flying.drafts - rejected
            ahead, now = 1 + flying.drafts, width - rejected
        if request.ahead != ahead or request.known - request.stored != 1:
            return
        path, request.alone = self._path(request, start)
        if len(path) < LEAST:
            request.alone = True
            return
        del self.state.lone[request.row]
        self.state.drafted.join(request, self.pool.holds(request))
        self._paths.add(request, start, path, now)

    def _path(self, request: Drafted, start: int) -> tuple[list[int], bool]:
        """Tokens that each next step brings a request, which has ``start`` by then; whether that is all of its path.

        The path ends before the step that ends the answer, and where drafts reach beyond what the model can hold.
        """
        drafts, row = self._speculation.drafts, request.row
        final = self._ends.outputs[row]
        last = self.state.longest - request.prompt - 2 * (1 + drafts)  # tokens that a step may begin with
        stop = min(final, start + (LONGEST - 1) * (1 + drafts))
        kept = self._along(row, start, stop, drafts) if self._along is not None and start < stop else None
        path: list[int] = []
        at, end = start, min(stop, last + 1)
        while at < end and len(path) < LONGEST - 1:
            given = 1 + (self._accepts(row, at, drafts) if kept is None else kept[at - start])
            path.append(given)
            at += given
        if path and at >= final:
            del path[-1]
            return path, True
        return path, last < at < stop

    def _absorb(self) -> None:
        """Take in what leaving the group means for those who have left it."""
        state, width = self.state, self.state.drafted.width
        left, state.left = state.left, []
        for request, preemptions, slot, last, steps, flies in left:
            start = self._paths.starts[request.row]
            self._paths.remove(request, slot, last)
            done = steps - flies
            if done:
                accepted = request.produced - start - done
                self.requests.verified(request.row, done * (width - 1), accepted, done)
            if flies:
                flight = self.flight
                assert flight is not None
                chosen = Chosen(request, width, width - 1, False, True, preemptions)
                self._verified[flight].chosen[request.row] = chosen
                flight.ending.append(request)
                flight.fresh[request.row] = request

    def _break_up(self, planned: bool) -> None:
        """The group is no more, for now; ``planned``: the plan at hand computes its next step."""
        self.state.scatter(planned)
        self._note_break()

    def _note_break(self) -> None:
        """Whoever has left the group is alone for now: the longer, the less steady the group was."""
        self._absorb()
        steps = self.state.drafted.steps
        self._patience = 1 if steps - self._broken >= STEADY else min(REST, 2 * self._patience)
        self._broken, self._rest = steps, self._patience

    def idle(self) -> Plan:  # noqa: D102
        plan = super().idle()
        self._verified[plan] = Verified({}, 0, False)
        return plan

    @property
    def drafting(self) -> int:
        """Drafts that the plan at hand proposes for each request that it computes."""
        state = self.state
        rule = self._speculation
        return rule.proposed(len(state.chosen)) if state.wanted or not rule.skips else 0

    def _gather(self, now: int) -> tuple[bool, Fields, int] | None:
        state = self.state
        group = state.drafted
        if state.left:
            self._note_break()
        if group.members and not state.whole:
            self._break_up(False)
        if not (state.chosen or state.whole):
            return None
        prefills: list[Chunk] = []
        decodes = context = drafts = prompt_tokens = 0
        if state.whole:
            decodes = len(group)
            drafts = decodes * (group.width - 1)
            context = int(group.stored[:decodes].sum())
            if self._ahead:
                context += int(self._paths.of(group.steps - 1)[:decodes].sum())
            else:
                context += decodes * group.width
        ahead = self._in_flight()
        for request, tokens, verified, _, decoding, _ in state.chosen.values():
            start = request.stored
            if decoding:
                decodes += 1
                context += start + tokens
                for before in ahead:
                    context -= self._rejected_ahead(request, before)
                drafts += verified
            else:
                prefills.append(Chunk(start, tokens))
                prompt_tokens += tokens - verified
        return decodes > 0, (tuple(prefills), decodes, context, 0, None, drafts, self.drafting), prompt_tokens

    def _in_flight(self) -> Collection[Verified]:
        """What the steps in flight verify as a plan is made."""
        if self.state.flights is not None:
            return self._verified.values()
        return () if self.flight is None else (self._verified[self.flight],)

    def _rejected_ahead(self, request: Drafted, verified: Verified) -> int:
        """Drafts in flight of a request that will be rejected: when the step after ``verified`` runs, its GPU knows."""
        flying = verified.chosen.get(request.row)
        if flying is None or not flying.drafts or flying.preemptions != request.lost:
            return 0
        kept = verified.kept[request.row] = self._kept(flying)
        return flying.drafts - kept

    def _kept(self, chosen: Chosen) -> int:
        """Drafts of a step, whose output is the next that its request gets, that are kept."""
        return 0 if chosen.padding else self._accepts(chosen.request.row, chosen.request.produced, chosen.drafts)

    def decodes(self) -> list[base.Verified]:
        """Those that the plan at hand lets decode, for an engine that executes it: what each will keep is drawn here.

        Of a request with a step in flight that is counted as in: its drafts are rejected by the time the plan runs.
        """
        flying = {} if self.flight is None else self._verified[self.flight].chosen
        found = []
        for request, _, drafts, _, decodes, _ in self.state.chosen.values():
            if not decodes:
                continue
            row, known = request.row, request.produced
            before = flying.get(row)
            if before is not None and before.preemptions == request.lost:
                known += 1 + self._kept(before)
            room = self._ends.outputs[row] - known - 1  # below 0: the step in flight ends it, and nobody wants this one
            kept = max(0, min(self._accepts(row, known, drafts), room))
            found.append(base.Verified(row, request.prompt + known - 1, drafts, kept))
        return found

    def _as_decodes(self, batch: Batch) -> Batch:
        """As `Planner._as_decodes`; who was padded has drafts beside the one token that it lacks."""
        prefills = []
        decodes, context, drafts = batch.decodes, batch.context, batch.drafts
        for chunk, (request, tokens) in zip(batch.prefills, self.state.chunks, strict=True):
            padding, known = self.state.chosen[request.row].drafts, request.prompt + request.produced
            if padding or (tokens == 1 and request.produced > 0 and chunk.start + 1 == known):
                decodes += 1
                context += chunk.start + tokens
                drafts += padding
            else:
                prefills.append(chunk)
        return batch._replace(prefills=tuple(prefills), decodes=decodes, context=context, drafts=drafts)

    def _late(self, start: When, decodes: int) -> tuple[int, list[int]]:
        state, group = self.state, self.state.drafted
        gaps: list[int] = []
        late = 0
        if state.whole:
            old = len(group) - group.fresh
            if old and group.last is not start:
                gaps += (group.last.ps, old)
                late = old - 1
            for request in group.members[old:]:
                if request.last is not start:
                    gaps += (request.last.ps, 1)
        for request, _, _, _, decoding, _ in state.chosen.values():
            if decoding and request.last is not start:
                gaps += (request.last.ps, 1)
        return late + len(gaps) // 2, gaps

    def commit(self, plan: Plan, count: int) -> None:  # noqa: D102
        state, when = self.state, plan.when
        if self.remembers:
            self.remember(plan, count)
        next_drafts = self._speculation.proposed(len(self._verified[plan].chosen))
        plan.fresh = {}
        if self._verified[plan].grouped:
            group = state.drafted
            if plan.course is not None:
                self._reach = min(MOST, max(LEAST, 2 * count))
                if count > 1:
                    self._catch_up(count - 1)
            group.plan(when)
            state.kv_tokens += len(group) * group.width
        emitting: list[Live] = []
        ending: list[Live] = []
        for request, tokens, drafts, _, decodes, _ in self._verified[plan].chosen.values():
            state.kv_tokens += tokens
            if not request.launch(tokens, when):
                continue
            ending.append(request)
            if decodes:
                plan.fresh[request.row] = request
            else:
                emitting.append(request)
                del state.prefills[request.row]
                state.parked[request.row] = state.lone[request.row] = request
            if self._ahead:
                request.ahead += 1 + drafts
                request.drafts = next_drafts
                self._see_end(request)
        plan.emitting, plan.ending = emitting, ending
        if self._windowed is not None:
            self._windowed.flight = plan
            self._windowed.under_way = {row: chosen.tokens for row, chosen in self._verified[plan].chosen.items()}
        if state.flights is not None:
            state.flights.launch(plan, [c.request for c in self._verified[plan].chosen.values()], [*ending])

    def record(self, plan: Plan, start: int, first: int, count: int) -> None:  # noqa: D102
        course, undated = plan.course, self._undated
        super().record(plan, start, first, count if course is None else 1)
        if undated is None or course is None:
            return
        self._undated = None
        undated.ps = start + course.ends[count - 1 if self._ahead else count - 2]
        self.steps += count - 1
        write = self.records.rows.frombytes
        for end, after, row in zip(course.ends, course.ends[1:count], course.rows[1:count], strict=False):
            write(PACK_RUN(start + end, after - end, 0, 1, *NO_GROWTH, *row))

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:  # noqa: D102
        verifying = self._verified.pop(plan)
        flights = self.state.flights
        if flights is not None:
            flights.land(plan)
        if self._windowed is not None and self._windowed.flight is plan:  # else another is committed already
            self._windowed.under_way = {}
        chosen, drafting, known = verifying.chosen, verifying.drafting, verifying.kept
        group = self.state.drafted
        if verifying.grouped and group.flying:
            n = len(group) - group.fresh
            self.state.kv_tokens += group.land(self._paths.of(group.steps - 1)) - n * group.width
        outputs = self._ends.outputs
        ended: list[Live] = []
        for request in plan.ending:
            assert isinstance(request, Drafted)
            verified = chosen[request.row]
            drafts = verified.drafts
            stored = request.lost == verified.preemptions  # else its blocks are gone, but its tokens come
            kept = known.get(request.row)
            given = min(1 + (self._kept(verified) if kept is None else kept), outputs[request.row] - request.produced)
            request.produced += given
            if drafts and not verified.padding:
                self.requests.verified(request.row, drafts, given - 1)
            if stored:
                self._take_back(request, drafts + 1 - given)
                request.ahead = max(0, request.ahead - given)
                if self._at_once:
                    self.pool.computed(request, request.prompt + request.produced - 1)
            if request.produced == outputs[request.row]:
                ended.append(request)
                if flights is not None:
                    behind = next((p for p, other in self._verified.items() if request.row in other.chosen), None)
                    request.last = plan.when  # a step behind it is committed already
                self._finish_one(request, now, behind)
            elif stored and self._ahead:
                self._see_end(request)
            elif stored:
                request.drafts = drafting
            if request.within is not None:  # it has joined since
                group.stored[request.slot], group.produced[request.slot] = request.stored, request.produced
        return ended

    def strike(self, request: Live, now: int) -> None:  # noqa: D102
        assert isinstance(request, Drafted)
        if request.within is not None:
            self.state.leave(request)
            self._absorb()
        super().strike(request, now)

    def lose(self, now: int) -> list[Live]:  # noqa: D102
        self._break_up(False)
        return super().lose(now)

    def _take_back(self, request: Drafted, tokens: int) -> None:
        """So many of the tokens that a request has computed are none of its answer."""
        request.reject(tokens)
        self.state.kv_tokens -= tokens

    def _see_end(self, request: Drafted) -> None:
        """A request whose answer ends with what is in flight, though all drafts be rejected, is planned no more."""
        final = request.prompt + self._ends.outputs[request.row]
        ends = request.ahead > 0 and request.stored + 2 - request.ahead >= final
        request.phase = DRAINING if ends else PARKED

    def _finish_one(self, request: Live, now: int, behind: Plan | None) -> None:
        state = self.state
        if behind is not None and self._verified[behind].chosen.pop(request.row, None) is not None:
            if state.flights is None:
                behind.undelivered += 1
            else:
                behind.lose_gap(now)
            self.drop(request)
            if request in behind.ending:
                behind.ending.remove(request)
            request.phase = AWAY
        else:
            request.phase = DRAINING
        if state.admitted.pop(request.row, None) is None:  # preempted while its last token was in flight
            state.withdraw(request)
        else:
            state.vacate(request, request.phase)
        if state.flights is not None:
            state.flights.forget(request)
        self.scheduler.ended(request)
        self.end_request(request, now, Status.FINISHED)
