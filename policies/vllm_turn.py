"""One turn of vLLM's V1 scheduler: who runs in the next step, and who joins.

`policies.vllm.Vllm` has the settings, the versions and the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

from chairlift.policies.base import FOREVER, Request, Speculation, Step


class VllmTurn:
    """Running requests first, in order, under one token budget; then the head of the queue.

    Args:
        budget: tokens a step.
        limit: requests a step.
        by_priority: the least urgent, not the latest, is preempted.
        chunked: a prompt that exceeds the budget left is cut.
        whole: a request is admitted only where all its known tokens would fit.
        watermark: share of all blocks that stay free when a request joins others.
        threshold: tokens of one prompt a step; 0: no limit.
        shared_by: with a threshold, it is at least an equal share of so many tokens; 0: it is fixed.
        one_by_one: the running take their turns one by one where their blocks do not suffice.
        uncapped_alone, any_victim_shifts, on_after_itself, pads_joining: rules of `policies.vllm_versions`.
        cadence: when prompts may be computed; None: in any step.
    """

    __slots__ = (
        *("_any_victim_shifts", "_budget", "_by_priority", "_cadence", "_capped", "_chunked", "_deferred", "_drafts"),
        *("_limit", "_on_after_itself", "_one_by_one", "_one_each", "_pads_joining", "_shared_by", "_staged"),
        *("_threshold", "_uncapped_alone", "_watermark", "_whole"),
    )

    def __init__(
        self,
        *,
        budget: int,
        limit: int,
        by_priority: bool,
        chunked: bool,
        whole: bool,
        watermark: float,
        threshold: int,
        shared_by: int,
        one_by_one: bool,
        uncapped_alone: bool,
        any_victim_shifts: bool,
        on_after_itself: bool,
        pads_joining: bool,
        cadence: Cadence | None,
    ) -> None:
        self._budget = budget
        self._limit = limit
        self._by_priority = by_priority
        self._chunked = chunked
        self._whole = whole
        self._watermark = watermark
        self._capped = threshold
        self._threshold = threshold  # as it counts in the step at hand
        self._shared_by = shared_by
        self._one_by_one = one_by_one
        self._uncapped_alone = uncapped_alone
        self._any_victim_shifts = any_victim_shifts
        self._on_after_itself = on_after_itself
        self._pads_joining = pads_joining
        self._cadence = cadence
        self._one_each: bool | None = None  # if the running always take turns; None: not known yet
        self._drafts = 0  # of a decode
        self._staged = False
        self._deferred: set[int] = set()  # who waits and was passed over, as tokens of theirs were in flight

    def schedule(self, step: Step) -> int:
        """Running first, in order; then the head of the queue, unless somebody was preempted.

        Returns what `policies.base.Scheduler.schedule` does.
        """
        unfinished = step.prefilling
        if self._capped:
            self._threshold = self._cap(len(step.running) + len(step.waiting))
        cadence = self._cadence
        held = cadence is not None and cadence.holds(step, len(step.running) > len(unfinished))
        budget = self._budget
        decodes = step.decodes
        preempted = prefills = False
        alone = held or not unfinished  # decodes are all that there is to run
        one_each = self._one_each
        if one_each is None:  # a replica's stages and drafts stay what they are
            drafted = step.speculation is not None
            one_each = self._one_each = self._by_priority or step.stages > 1 or (drafted and step.windowed)
            self._drafts = 0 if step.speculation is None else step.speculation.drafts
            self._staged = step.stages > 1
        in_one_go = decodes <= budget and not one_each and (alone or _in_one_go(step, unfinished))
        drafts = self._drafts
        if drafts and 0 < self._threshold <= drafts:  # it cuts decodes
            in_one_go = False
        granted = in_one_go and step.decode_all()
        if granted and alone:
            budget -= decodes  # by far the most common step
        elif granted or (in_one_go and not (held or drafts or self._one_by_one or step.windowed)):
            budget, preempted, prefills = self._run_all(step, budget, granted)
        else:
            budget, preempted, prefills = self._run_each(step, budget, {r.id for r in unfinished}, held)
        if not preempted and (waiting := step.waiting):
            budget, admitted = self._admit(step, waiting, budget, held, prefills)
            prefills |= admitted
        if cadence is not None and not (preempted or held):
            cadence.saturated = any(r.id not in self._deferred for r in step.waiting)
        if cadence is not None:
            cadence.planned(budget < self._budget, prefills)
            if held:
                return 1 if preempted else cadence.left()
        return 1 if preempted else FOREVER

    def _cap(self, requests: int) -> int:
        """The threshold that counts in a step with so many requests; 0: none."""
        if requests <= 1 and self._uncapped_alone:
            return 0
        return max(self._capped, self._shared_by // max(1, requests))

    def _admit(self, step: Step, waiting: Sequence[Request], budget: int, held: bool, beside: bool) -> tuple[int, bool]:
        """Admit the head of ``waiting`` for as long as it fits: budget left, whether anybody had a prompt to compute.

        ``held``: nobody who has may join. ``beside``: prompts of the running are computed in the step.
        """
        running, whole = step.running, self._whole
        prefills = False
        staged = self._staged
        padding = self._padding(step.speculation) if self._drafts and not beside else 0
        joins = budget < self._budget  # some of the running are in the step
        place = 0  # behind those that were preempted while in flight, and still are
        while len(waiting) > place and budget > 0 and len(running) < self._limit:
            request = waiting[place]
            if staged and not step.ready(request):
                self._deferred.add(request.id)
                place += 1
                continue
            known = request.remaining
            left = tokens = known - step.cached_tokens(request)
            if held and left > 1:
                break
            if padding and left == 1 and (joins or known > 1) and known + padding < step.max_model_len:
                tokens += padding
                if tokens > budget:
                    break
            if 0 < self._threshold < tokens:
                tokens = self._threshold
            if tokens > budget:
                if not self._chunked:
                    break
                tokens = budget
            spare = 0
            if self._watermark and running:
                spare = int(self._watermark * (step.total_blocks + 1))  # vLLM counts its null block
            if tokens < left and whole and not step.fits(request, known, spare):  # else `admit` asks for just this room
                break
            if not step.admit(request, tokens, spare=spare):
                break
            if staged:
                self._deferred.discard(request.id)
            budget -= tokens
            prefills |= left > 1
        return budget, prefills

    def _padding(self, speculation: Speculation | None) -> int:
        """Drafts that are made up for a request that joins with one token to compute, as wide as the decodes then."""
        if speculation is None or speculation.by_batch or not self._pads_joining:
            return 0
        return speculation.drafts

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        if self._cadence is not None or self._shared_by:
            return True  # that somebody waits changes how others are served
        if len(step.running) >= self._limit:
            return False
        return not step.waiting or self._by_priority

    def _chunk(self, tokens: int, budget: int) -> int:
        threshold = self._threshold
        if 0 < threshold < tokens:
            tokens = threshold
        return tokens if tokens < budget else budget

    def _run_all(self, step: Step, budget: int, granted: bool) -> tuple[int, bool, bool]:
        """All decodes, then the prompts: budget left, whether anybody was preempted, whether any prompt is computed.

        ``granted``: the decodes are planned already.
        """
        preempted = prefills = False
        while not granted:
            step.preempt(_last(step))
            preempted = True
            granted = step.decode_all()
        budget -= step.decodes
        gone: set[int] = set()
        for request in step.prefilling:
            tokens = self._chunk(request.remaining, budget)
            if tokens == 0 or request.id in gone:
                break
            while not step.run(request, tokens):
                victim = _last(step)
                step.preempt(victim)
                gone.add(victim.id)
                if victim is request:
                    return budget, True, prefills
            prefills = True
            budget -= tokens
        return budget, preempted or bool(gone), prefills

    def _run_each(self, step: Step, budget: int, unfinished: set[int], held: bool) -> tuple[int, bool, bool]:
        """vLLM's loop as it stands, its index too; returns what `_run_all` does.

        ``held``: those of ``unfinished`` are passed over. Until 0.27, a victim that the loop has passed over (its last
        token is under way) does not move the index back, so that whoever comes after the request at hand is passed
        over as well.
        """
        running = list(step.running)
        turns: Sequence[Request] = step.ready_running() if self._staged else running
        planned: dict[int, int] = {}
        preempted = prefills = passed_over = False
        speculation = step.speculation
        index = 0
        while index < len(turns) and budget > 0:
            request = turns[index]
            index += 1
            if held and request.id in unfinished:
                continue
            if passed_over and not step.ready(request):
                continue
            tokens = self._chunk(request.remaining, budget)
            if speculation is not None:  # drafts may reach beyond what the model can hold
                tokens = min(tokens, step.max_model_len - 1 - request.computed)
            if tokens == 0:
                continue
            while not step.run(request, tokens):
                if turns is not running:  # from here on the index counts those who are passed over, too
                    turns, index, passed_over = running, running.index(request) + 1, True
                victim = self._victim(step)
                at = running.index(victim)
                del running[at]
                if victim.id in planned or (self._any_victim_shifts and at < index - 1):
                    budget += planned.pop(victim.id, 0)
                    index -= 1
                step.preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                planned[request.id] = tokens
                budget -= tokens
                prefills |= request.id in unfinished
                continue
            if not (self._on_after_itself and self._by_priority):
                break
            index -= 1  # the next one has moved to its place
        return budget, preempted, prefills

    def _victim(self, step: Step) -> Request:
        if self._by_priority:
            return max(step.running, key=lambda r: (r.priority, r.arrival, r.id))
        return _last(step)


class Cadence:
    """When prompts may be computed again under `Vllm.prefill_schedule_interval`, in executed steps.

    In three steps, with an interval of 3: step 1 computes a prompt; steps 2 and 3 are held to decodes; step 4 may
    compute prompts again. Nothing is held while nobody decodes, nor after a step that was not held left somebody
    waiting.
    """

    def __init__(self, interval: int) -> None:
        self.saturated = False  # the latest step that was not held left somebody waiting whom it had not passed over
        self._interval = interval
        self._steps = 0  # executed before the plan at hand
        self._prefilled = -interval  # the latest of them that computed part of a prompt
        self._decoded = 0  # the replica's decode steps by then
        self._ran = False  # the latest plan ran something

    def holds(self, step: Step, decodes: bool) -> bool:
        """Whether the plan at hand is held to decodes; ``decodes``: somebody decodes."""
        done = step.decode_steps
        self._steps += done - self._decoded or self._ran  # a plan with decodes may have run many times
        self._decoded = done
        return decodes and not self.saturated and self.left() > 0

    def left(self) -> int:
        """Steps that are to be held, from the one at hand on."""
        return self._prefilled + self._interval - self._steps - 1

    def planned(self, runs: bool, prefills: bool) -> None:
        """Whether the plan at hand runs something, and whether it computes part of a prompt."""
        self._ran = runs
        if prefills:
            self._prefilled = self._steps + runs


def _in_one_go(step: Step, unfinished: Sequence[Request]) -> bool:
    """Whether the order of the running cannot matter but for who is preempted, the last admitted.

    So it is where all decodes fit the budget and whoever lacks prompt tokens was admitted after all of them.
    """
    return all(map(is_, reversed(unfinished), reversed(step.running)))


def _last(step: Step) -> Request:
    """The request admitted last."""
    return next(reversed(step.running))
