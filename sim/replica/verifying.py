"""What planned steps do to a replica's requests where their decodes verify drafts.

Source: vLLM 0.33.0, `update_from_output` of `vllm/v1/core/sched/scheduler.py`, `_update_after_schedule` of
`async_scheduler.py`; `tests/ledger.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from chairlift.backend.base import Batch, Chunk
from chairlift.policies.base import PolicyError, Speculation
from chairlift.sim.replica.drafts import Chosen, Drafted, DraftedStep
from chairlift.sim.replica.planner import Planner
from chairlift.sim.replica.request import AWAY, DRAINING, PARKED, Live, When
from chairlift.sim.replica.step_plan import Plan
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.results.records import DRAFT_COLUMNS, Status


class Verified(NamedTuple):
    """What a plan verifies and proposes."""

    chosen: dict[int, Chosen]  # by request, in the order of the plan; whoever ends before its output is in leaves it
    drafting: int  # drafts that each of them gets by the step; 0: nobody could use any
    kept: dict[int, int]  # by request: of its drafts so many are kept, where that was looked at already


class VerifyingPlanner(Planner):
    """As `Planner`, one step a plan, where a decode computes its latest token and drafts of those after it.

    ``accepts(request, position, drafts)``: how many of so many drafts are kept of a request that has ``position``
    tokens of its answer. Tokens that come together come at one time, with one gap before them, as clients get them: in
    one message.

    Raises `PolicyError` if the policy cannot plan such steps, or the KV pool or the pipeline is none for them.
    """

    __slots__ = ("_accepts", "_speculation", "_verified")
    state: DraftedStep

    def __init__(
        self, speculation: Speculation, accepts: Callable[[int, int, int], int], *parts: Any, **more: Any
    ) -> None:
        self._speculation = speculation
        self._accepts = accepts
        self._verified: dict[Plan, Verified] = {}  # of each plan whose output is not in
        super().__init__(*parts, **more)
        policy = self.scheduler
        if not policy.verifies_drafts or self.pool.windowed or self.pool.keeps or self.state.stages > 1:
            raise PolicyError("speculation is not modelled here", name_of(policy))
        self._leaps = False
        if DRAFT_COLUMNS[0] not in self.requests.extra:
            self.requests.count_drafts()

    def _make_step(self, *parts: Any) -> DraftedStep:
        return DraftedStep(self._speculation, *parts)

    def ask(self, now: int, start: When) -> Plan | None:  # noqa: D102 - documented in `Planner`, as all below
        plan = super().ask(now, start)
        if plan is not None:
            self._verified[plan] = Verified(self.state.chosen, self.drafting, {})
        return plan

    def idle(self) -> Plan:  # noqa: D102
        plan = super().idle()
        self._verified[plan] = Verified({}, 0, {})
        return plan

    @property
    def drafting(self) -> int:
        """Drafts that the plan at hand proposes for each request that it computes."""
        state = self.state
        return self._speculation.proposed(len(state.chosen)) if state.wanted else 0

    def _gather(self, now: int) -> tuple[bool, Batch, int] | None:
        state = self.state
        if not state.chosen:
            return None
        prefills: list[Chunk] = []
        decodes = context = drafts = prompt_tokens = 0
        flying = None if self.flight is None else self._verified[self.flight]
        for request, tokens, verified, _, decoding, _ in state.chosen.values():
            start = request.stored
            if decoding:
                decodes += 1
                context += start + tokens
                if flying is not None:
                    context -= self._rejected_ahead(request, flying)
                drafts += verified
            else:
                prefills.append(Chunk(start, tokens))
                prompt_tokens += tokens - verified
        return decodes > 0, Batch(tuple(prefills), decodes, context, 0, None, drafts, self.drafting), prompt_tokens

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
        gaps: list[int] = []
        for request, _, _, _, decoding, _ in self.state.chosen.values():
            if decoding and request.last is not start:
                gaps += (request.last.ps, 1)
        return len(gaps) // 2, gaps

    def commit(self, plan: Plan, count: int) -> None:  # noqa: D102
        state, when = self.state, plan.when
        next_drafts = self._speculation.proposed(len(self._verified[plan].chosen))
        plan.fresh = {}
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
                state.parked[request.row] = request
            if self._ahead:
                request.ahead += 1 + drafts
                request.drafts = next_drafts
                self._see_end(request)
        plan.emitting, plan.ending = emitting, ending

    def complete(self, plan: Plan, now: int, behind: Plan | None = None) -> list[Live]:  # noqa: D102
        chosen, drafting, known = self._verified.pop(plan)
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
                self.pool.computed(request, request.prompt + request.produced - 1)
            if request.produced == outputs[request.row]:
                ended.append(request)
                self._finish_one(request, now, behind)
            elif stored and self._ahead:
                self._see_end(request)
            elif stored:
                request.drafts = drafting
        return ended

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
            behind.undelivered += 1
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
        self.scheduler.ended(request)
        self.end_request(request, now, Status.FINISHED)
