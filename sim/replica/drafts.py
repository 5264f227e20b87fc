"""Speculative decoding, as a plan sees it: the step that gives requests with drafts to verify their slots.

Source: vLLM 0.33.0, `vllm/v1/core/sched/scheduler.py`, `async_scheduler.py`, `kv_cache_manager.py`; `tests/ledger.py`
holds it to that. What comes of a plan is in `sim.replica.verifying`.
"""

# A policy hands back requests that it was shown, all of which are `Drafted`.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any, NamedTuple

from chairlift.policies.base import Preemption, Speculation
from chairlift.sim.replica.decode_group import admission
from chairlift.sim.replica.drafted_group import Drafted, DraftedGroup
from chairlift.sim.replica.prefix_pool import PrefixPool, TablePool
from chairlift.sim.replica.request import DRAINING, PREFILLING, Live, Phase
from chairlift.sim.replica.step import ReplicaStep


class Chosen(NamedTuple):
    """What a plan computes of a request."""

    request: Drafted
    tokens: int  # drafts included
    drafts: int
    padding: bool  # the drafts are none: all are rejected
    decodes: bool  # its prompt was done before
    preemptions: int  # of the request by then: if there are more when the output comes, nothing of it is stored


class Left(NamedTuple):
    """A request that has left the group, and what is to be told of it elsewhere."""

    request: Drafted
    preemptions: int  # of the request by then
    slot: int  # that it had
    last: int  # the slot of who has that one now
    steps: int  # that it did with the group, one in flight included
    flies: bool  # whether one is


class DraftedStep(ReplicaStep):
    """The step of a replica whose decodes verify drafts. All decodes are `PARKED`: none joins the decode group.

    Those whose steps are alike are a group of their own, ``drafted``; the others are ``lone``.
    """

    __slots__ = ("_wants", "chosen", "drafted", "left", "lone", "rule", "wanted")

    def __init__(self, speculation: Speculation, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._speculation = self.rule = speculation
        self.chosen: dict[int, Chosen] = {}  # of the plan, in the order of its making
        self.wanted = False  # somebody in the plan can use drafts after it
        self.drafted = DraftedGroup(1 + speculation.drafts)
        self.lone: dict[int, Drafted] = {}
        self.left: list[Left] = []
        self._wants: list[tuple[Drafted, int]] | None = None  # what `decode_all` computes of those that are lone

    def open(self, now: int) -> None:  # noqa: D102
        super().open(now)
        self.chosen, self.wanted, self._wants = {}, False, None

    @property
    def decodes(self) -> int:
        """Tokens that `decode_all` computes, drafts included."""
        group = self.drafted
        return len(group) * group.width + sum(tokens for _, tokens in self._lone_wants())

    def _lone_wants(self) -> list[tuple[Drafted, int]]:
        if self._wants is None:
            room = self.longest - 1  # drafts may reach beyond what the model can hold
            wants = [(r, min(r.remaining, room - r.stored)) for r in sorted(self.lone.values(), key=admission)]
            self._wants = [(r, tokens) for r, tokens in wants if tokens > 0]
        return self._wants

    def decode_all(self) -> bool:  # noqa: D102
        if self.chosen or self.whole:
            self._fail("decode_all after decodes were chosen already")
        group, pool, wants = self.drafted, self.pool, self._lone_wants()
        need, lacking = 0, sum(pool.lacks(r, self._slots(r.stored + tokens)) for r, tokens in wants)
        if group.members:
            blocks, need = group.growth(self.rule.lookahead, self.longest, pool.block_size)
        if need + lacking > pool.free:
            self._needy = -1
            return False
        if group.members:
            if need:
                pool.grow(need)
                group.blocks[: len(group)] = blocks
            self.tokens += len(group) * group.width
            self.whole = self.wanted = True
        for request, tokens in wants:
            granted = self.run(request, tokens)
            assert granted
        return True

    def scatter(self, planned: bool) -> None:
        """All members leave the group; ``planned``: the plan at hand computes their next step."""
        for request in sorted(self.drafted.members, key=admission):
            self.leave(request, planned)
        if planned:
            self.whole = False

    def leave(self, request: Drafted, planned: bool = False) -> None:
        """A member leaves the group; what follows elsewhere is noted in ``left``."""
        group, pool, slot = self.drafted, self.pool, request.slot
        steps = group.steps - request.since
        flies = steps > 0 and group.flying
        pool.cover(request, int(group.blocks[slot]))
        last = group.leave(request)
        self.left.append(Left(request, request.lost, slot, last, steps, flies))
        self.lone[request.row] = request
        request.alone = False
        if steps:
            request.drafts = self.rule.drafts
            request.ahead = group.width if flies and self.scheduler.asynchronous else 0
            pool.computed(request, request.prompt + request.produced - 1)
        if planned:
            upto = request.stored + group.width
            pool.computed(request, upto)
            self.chosen[request.row] = Chosen(request, group.width, request.drafts, False, True, request.lost)
            request.drafts = 0

    def vacate(self, request: Live, phase: Phase, planned: bool = False) -> None:  # noqa: D102
        self.lone.pop(request.row, None)
        super().vacate(request, phase, planned)

    def preempt(self, request: Drafted, how: Preemption = "recompute") -> None:  # noqa: D102
        if request.within is not None:
            self.scatter(self.whole)
        super().preempt(request, how)

    def run(self, request: Drafted, tokens: int) -> bool:  # noqa: D102
        if request.within is not None:
            self.scatter(self.whole)
        if request.row not in self.admitted:
            self._fail(f"run of {request}, which is not running")
        if request.row in self.chosen:
            self._fail(f"run of {request} twice in one step")
        if self.flights is not None and not self.flights.ready(request, True):
            self._fail(f"run of {request}, whose token is in flight")
        if type(tokens) is not int:
            tokens = self._whole(f"run of {request}", tokens)
        stored, known = request.stored, request.prompt + request.produced + request.ahead
        if not 1 <= tokens <= known + request.drafts - stored or request.phase is DRAINING:
            self._fail(f"run of {tokens} tokens of {request}: {request.remaining} remain")
        upto = stored + tokens
        if not self.pool.extend(request, self._slots(upto)):
            self._needy = request.row
            return False
        self.tokens += tokens
        if self.pool.tracks:
            self.pool.computed(request, upto)
        decodes = request.phase is not PREFILLING
        if not decodes:
            self.resumed |= tokens == 1 and request.produced > 0 and request.remaining == 1
            self.chunks.append((request, tokens))
        drafts = min(request.drafts, upto - known) if upto > known else 0
        request.drafts = 0
        self.chosen[request.row] = Chosen(request, tokens, drafts, False, decodes, request.lost)
        if not self.wanted:
            self.wanted = self._can_use(request, upto)
        return True

    def admit(  # noqa: D102
        self, request: Drafted, tokens: int, reserve: int | None = None, pad: int = 0, spare: int = 0
    ) -> bool:
        if reserve is not None or pad:
            self._fail("a reservation or a padding where drafts are verified")
        hit = self.pool.hit(request)
        padding = max(0, hit + tokens - request.known)
        if padding > self.rule.drafts:
            self._fail(f"admit with {tokens} tokens of {request}: {request.remaining - hit} remain")
        slots = self._slots(hit + tokens)
        if self.pool.need(request, slots) + spare > self.pool.free:
            self._note_denial(request, slots, spare)
            return False
        granted = super().admit(request, tokens - padding, spare=spare)
        assert granted
        self.pool.extend(request, slots)
        if padding:
            self.resumed = True  # a decode to a kernel, as all with one token to compute and drafts
            self.tokens += padding
            self.chunks[-1] = (request, tokens)
        chosen = Chosen(request, tokens, padding, padding > 0, request.phase is not PREFILLING, request.lost)
        self.chosen[request.row] = chosen
        self.wanted = self.wanted or self._can_use(request, request.stored + tokens)
        return True

    def _slots(self, tokens: int) -> int:
        """Tokens of KV that a request needs to compute its first ``tokens`` tokens."""
        return min(tokens + self.rule.lookahead, self.longest)

    def _can_use(self, request: Drafted, upto: int) -> bool:
        """Whether drafts can follow a step that computes so many tokens of a request: no chunk, nor its last one."""
        chunk = upto < request.prompt + request.produced
        return not (chunk or request.produced + 1 + (request.ahead > 0) >= request.limit)

    def _unplan(self, request: Drafted) -> bool:
        chosen = self.chosen.pop(request.row, None)
        if chosen is not None:
            self.tokens -= chosen.tokens
            self.chunks = [chunk for chunk in self.chunks if chunk[0] is not request]
        return False


class _Told(PrefixPool):
    """A pool that is told what is known, where drafts are verified, and publishes nothing beyond that.

    A request has the blocks that `open` and `extend` gave it, those for lookahead and rejected drafts included.
    ``drops_last``: of the blocks that are found the last is computed again, as the drafting layers need it.
    """

    __slots__ = ()
    _drops_last: bool

    def __init__(self, *parts: Any, drops_last: bool = False) -> None:
        super().__init__(*parts)
        self._drops_last = drops_last

    def computed(self, request: Live, tokens: int) -> None:
        known = request.prompt + request.produced - self._identity.ahead
        super().computed(request, min(tokens, known))

    def close(self, request: Live, tokens: int) -> None:
        super().close(request, 0)

    def _findable(self, request: Live) -> list[int]:
        blocks = super()._findable(request)
        if self._drops_last:
            del blocks[-1:]
        return blocks

    def _hashed(self, request: Live, decoding: bool, planned: bool) -> int:
        return self._done[request.row]


class DraftedPool(_Told):
    """The pool that knows each block, where drafts are verified."""

    __slots__ = ("_drops_last",)


class DraftedTablePool(_Told, TablePool):
    """Likewise where steps really run: the pool knows which block is whose."""

    __slots__ = ("_drops_last",)
