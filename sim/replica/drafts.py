"""Speculative decoding, as a plan sees it: requests with drafts to verify, and the step that gives them their slots.

Source: vLLM 0.33.0, `vllm/v1/core/sched/scheduler.py`, `async_scheduler.py`, `kv_cache_manager.py`; `tests/ledger.py`
holds it to that. What comes of a plan is in `sim.replica.verifying`.
"""

# A policy hands back requests that it was shown, all of which are `Drafted`.
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any, NamedTuple

from chairlift.policies.base import Speculation
from chairlift.sim.replica.prefix_pool import PrefixPool
from chairlift.sim.replica.request import DRAINING, PARKED, PREFILLING, WAITING, Live, When
from chairlift.sim.replica.step import ReplicaStep


class Drafted(Live):
    """A request whose decodes verify drafts.

    ``stored`` counts the tokens that are in KV if all drafts in flight are kept; what is rejected is taken back once a
    step's output is in (`reject`). ``produced`` counts only tokens that are known. ``ahead`` stands for the tokens in
    flight, asynchronous: one and its drafts for each step. In three steps, with 3 drafts, synchronous: a prompt of 10
    is computed, its first token comes: ``stored == 10``, ``produced == 1``, ``drafts == 3``, so ``remaining == 4``. A
    step computes those 4: ``stored == 14``. Its output keeps one draft of the 3 and brings two tokens:
    ``stored == 12``, ``produced == 3``, and 12 tokens of 13 are computed.
    """

    __slots__ = ("ahead", "drafts")

    def __init__(self, *columns: Any, **more: Any) -> None:
        super().__init__(*columns, **more)
        self.drafts = 0  # proposed, to be verified by its next step
        self.ahead = 0  # tokens in flight, drafts included; 0 where planning is synchronous

    @property
    def known(self) -> int:
        """Tokens of its prompt and its answer, those in flight included."""
        return self.prompt + self.produced + self.ahead

    @property
    def remaining(self) -> int:  # noqa: D102 - documented in the contract, as those below
        return 0 if self.phase is DRAINING else self.known + self.drafts - self.stored

    @property
    def decoding(self) -> bool:  # noqa: D102
        return self.produced > 0 and self.stored > 0 and self.known - self.stored == 1

    def launch(self, tokens: int, when: When) -> bool:
        """So many tokens of it, drafts included, are computed by ``when``; whether its next token comes with that."""
        self.stored += tokens
        if self.stored < self.known:
            return False
        self.before, self.last = self.last, when
        self.phase = PARKED
        return True

    def reject(self, tokens: int) -> None:
        """So many of the tokens that it has computed are none of its answer."""
        self.stored -= tokens
        self.ahead = max(0, self.ahead - tokens)

    def unsay(self, last: When) -> None:  # noqa: D102 - of a token in flight nothing is counted yet
        self.last = last
        if self.phase is DRAINING:
            self.phase = WAITING

    def requeue(self) -> int:  # noqa: D102
        self.drafts = self.ahead = 0
        return super().requeue()

    def depart(self) -> None:  # noqa: D102
        self.drafts = self.ahead = 0
        super().depart()


class Chosen(NamedTuple):
    """What a plan computes of a request."""

    request: Drafted
    tokens: int  # drafts included
    drafts: int
    padding: bool  # the drafts are none: all are rejected
    decodes: bool  # its prompt was done before
    preemptions: int  # of the request by then: if there are more when the output comes, nothing of it is stored


class DraftedStep(ReplicaStep):
    """The step of a replica whose decodes verify drafts. All decodes are `PARKED`: none joins the decode group."""

    __slots__ = ("chosen", "rule", "wanted")

    def __init__(self, speculation: Speculation, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._speculation = self.rule = speculation
        self.chosen: dict[int, Chosen] = {}  # of the plan, in the order of its making
        self.wanted = False  # somebody in the plan can use drafts after it

    def open(self, now: int) -> None:  # noqa: D102
        super().open(now)
        self.chosen, self.wanted = {}, False

    def decode_all(self) -> bool:  # noqa: D102
        self._fail("decode_all where drafts are verified: their decodes are run one by one")

    def run(self, request: Drafted, tokens: int) -> bool:  # noqa: D102
        if request.row not in self.admitted:
            self._fail(f"run of {request}, which is not running")
        if request.row in self.chosen:
            self._fail(f"run of {request} twice in one step")
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


class DraftedPool(PrefixPool):
    """The pool that knows each block, where drafts are verified: told what is known, it publishes nothing beyond that.

    A request has the blocks that `open` and `extend` gave it, those for lookahead and rejected drafts included.
    ``drops_last``: of the blocks that are found the last is computed again, as the drafting layers need it.
    """

    __slots__ = ("_drops_last",)

    def __init__(self, *parts: Any, drops_last: bool = False) -> None:
        super().__init__(*parts)
        self._drops_last = drops_last

    def computed(self, request: Live, tokens: int) -> None:  # noqa: D102
        known = request.prompt + request.produced - self._identity.ahead
        super().computed(request, min(tokens, known))

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        super().close(request, 0)

    def _findable(self, request: Live) -> list[int]:
        blocks = super()._findable(request)
        if self._drops_last:
            del blocks[-1:]
        return blocks

    def _hashed(self, request: Live, decoding: bool, planned: bool) -> int:
        return self._done[request.row]
