"""Steps in flight, several at a time, as pipeline stages have them: who is in them, and who may run meanwhile.

Source: vLLM 0.23.0 to 0.33.0. `vllm/v1/engine/core.py` (`step_with_batch_queue`) plans a batch a turn and takes the
oldest one in once the queue is full: as many batches as there are stages, one more where planning is asynchronous. Who
may be planned meanwhile is told by `vllm/v1/core/sched/scheduler.py`, and by `async_scheduler.py`
(`next_decode_eligible_step`). Which chunk of a prompt brings a token is told by the workers
(`_get_num_sampled_and_rejected_kernel` of `vllm/v1/worker/gpu/input_batch.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from chairlift.sim.replica.request import Live, When
from chairlift.sim.replica.step_plan import Plan


class Stray:
    """What vLLM until 0.26 counts of a request that was preempted while tokens of it were in flight.

    Nobody waits for those: the request may join again, and computes what was known when it did. The last of that brings
    the very token that is in flight, once more, so two count where one was generated. From there on the request has one
    token more in flight than another one, and ends one real token short.

    In five turns, four stages, synchronous: turn 1 plans A's seventh token, with 6 known, and turn 2 preempts A; turn 3
    admits A, which computes its 6 tokens again, so the seventh comes a second time; turn 4 finds nothing of A to
    compute, and turn 1 is taken in; turn 5 computes the seventh token, though turn 3 is in flight.
    """

    __slots__ = ("brought", "expected", "known")

    def __init__(self, brought: int, expected: int) -> None:
        self.brought = brought  # tokens of its answer that are in
        self.expected = expected  # tokens in flight that its scheduler counts; asynchronous, else none
        self.known = 0  # tokens, its prompt's too, when it joined again: a chunk that reaches them brings a token


NO_STRAYS: Final[dict[int, Stray]] = {}


class InFlight:
    """What is in flight of each request.

    Synchronous: a request decodes again once its token is in. Asynchronous: once ``stages`` turns have passed since
    its latest token was planned, when a step of its own would leave the first stage again. The next chunk of a prompt
    may follow at once. Whoever is preempted waits until all of its steps are in, and others pass by; with ``overtakes``
    they do not wait (`Stray`).

    In three turns, two stages, synchronous: turn 1 plans A's prompt in one chunk; turn 2 finds A not `ready`, plans B,
    the queue is full, and turn 1 is taken in; turn 3 plans A's first decode, while B is in flight.
    """

    __slots__ = (
        *("_asynchronous", "_eligible", "_overtakes", "_plans", "_stages", "_steps", "_tokens", "_turn"),
        "strays",
    )

    def __init__(self, stages: int, asynchronous: bool, overtakes: bool) -> None:
        self._stages = stages
        self._asynchronous = asynchronous
        self._overtakes = overtakes
        self._turn = 0  # that plans now, counted from 1
        self._plans: dict[Plan, tuple[list[Live], list[Live]]] = {}  # in flight: who is in it; whose token it brings
        self._steps: dict[int, int] = {}  # request → steps in flight that it is in
        self._tokens: dict[int, int] = {}  # request → its tokens in flight
        self._eligible: dict[int, int] = {}  # asynchronous: request → the turn from which on it may decode
        self.strays: dict[int, Stray] = {}  # by request

    def turn(self) -> None:
        """Another plan is asked for."""
        self._turn += 1

    def ready(self, request: Live, running: bool) -> bool:
        """Whether a request may be in the plan at hand."""
        if not running:
            return self._overtakes or request.row not in self._steps
        row = request.row
        if not self._asynchronous:
            return row not in self._tokens or row in self.strays
        if self._turn < self._eligible.get(row, 0):
            return False
        stray = self.strays.get(row)
        if stray is None or not stray.expected:
            return True
        return request.stored + 2 - stray.expected < request.prompt + request.limit  # else its last token is planned

    def ready_of(self, running: Iterable[Live]) -> list[Live]:
        """Those of the ``running`` that are `ready`, in their order."""
        if self.strays:
            return [r for r in running if self.ready(r, True)]
        if not self._asynchronous:
            return [r for r in running if r.row not in self._tokens]
        turn, eligible = self._turn, self._eligible
        return [r for r in running if eligible.get(r.row, 0) <= turn]

    def tokens(self, request: Live) -> int:
        """Tokens of a request that are planned and not in."""
        return self._tokens.get(request.row, 0)

    def emitting(self, plan: Plan) -> list[Live]:
        """Whose token a plan in flight brings."""
        return self._plans[plan][1]

    def launch(self, plan: Plan, members: list[Live], emitting: list[Live]) -> None:
        """A plan is committed: ``members`` are in it, and it brings tokens to ``emitting``."""
        for request in members:
            self._steps[request.row] = self._steps.get(request.row, 0) + 1
        for request in emitting:
            self._tokens[request.row] = self._tokens.get(request.row, 0) + 1
            if self._asynchronous and request.row not in self.strays:
                self._eligible[request.row] = self._turn + self._stages
        self._plans[plan] = members, emitting

    def land(self, plan: Plan) -> list[Live]:
        """A plan's output is in: whose tokens it brought."""
        members, emitting = self._plans.pop(plan)
        for counts, requests in ((self._steps, members), (self._tokens, emitting)):
            for request in requests:
                counts[request.row] -= 1
                if not counts[request.row]:
                    del counts[request.row]
        return emitting

    def forget(self, request: Live) -> None:
        """A request has left for good."""
        self._eligible.pop(request.row, None)
        self.strays.pop(request.row, None)

    # those that vLLM until 0.26 does not let wait

    def preempted(self, request: Live) -> None:
        """A request has been preempted: only those of its tokens that are in are known now."""
        if not self._overtakes:
            return
        flying, stray = self.tokens(request), self.strays.get(request.row)
        if stray is None and flying:
            stray = Stray(request.produced - flying, flying if self._asynchronous else 0)
            self.strays[request.row] = stray
        if stray is not None:
            request.know(stray.brought)
            if not flying:
                del self.strays[request.row]

    def joined(self, request: Live) -> None:
        """A request has joined the running ones."""
        stray = self.strays.get(request.row)
        if stray is not None:
            stray.known = request.prompt + stray.brought
            request.know(stray.brought + stray.expected)

    def known(self, request: Live, tokens: int) -> int:
        """How many of a request's first ``tokens`` tokens are known."""
        stray = self.strays.get(request.row)
        return tokens if stray is None else min(tokens, request.prompt + stray.brought)

    def compute(self, request: Live, tokens: int, when: When) -> bool:
        """A chunk of a stray is computed by ``when``; whether a token of it comes with that."""
        stray = self.strays[request.row]
        if request.compute(tokens, when):
            if self._asynchronous:
                stray.expected += 1
                self._eligible[request.row] = self._turn + self._stages
            else:
                request.know(stray.brought)
            return True
        if request.stored < stray.known:
            return False
        request.expect(when)
        return True

    def strays_on(self, request: Live, tokens: int, answer: int) -> bool:
        """Whether a request that computes ``tokens`` tokens is a stray, and stays one.

        Once it computes all that it lacks, and just those tokens are in flight that are counted, it is as all others;
        but not if its ``answer``, so many tokens, ends with those.
        """
        stray = self.strays.get(request.row)
        if stray is None:
            return False
        if self.tokens(request) != stray.expected or tokens < request.remaining or answer <= request.produced:
            return True
        del self.strays[request.row]
        return False

    def bring(self, request: Live, running: bool) -> int:
        """A token of a stray is in; how many are by now.

        Asynchronous, vLLM stops with an assertion where it expects none (its #47900). Here it goes on, as if it had.
        """
        stray = self.strays[request.row]
        stray.brought += 1
        if stray.expected:
            stray.expected -= 1
        request.know(stray.brought + stray.expected if running else stray.brought)
        if not (running or self.tokens(request)):
            del self.strays[request.row]
        return stray.brought

    def settle(self, request: Live, last: When) -> None:
        """A request leaves, and keeps the tokens that its client has, the latest of which came at ``last``."""
        stray = self.strays.pop(request.row, None)
        if stray is not None:
            request.know(stray.brought)
            request.last = last
