"""Steps in flight, several at a time, as pipeline stages have them: who is in them, and who may run meanwhile.

Source: vLLM 0.33.0. `vllm/v1/engine/core.py` (`step_with_batch_queue`) plans a batch a turn and takes the oldest one in
once the queue is full: as many batches as there are stages, one more where planning is asynchronous. Who may be
planned meanwhile is told by `vllm/v1/core/sched/scheduler.py`, and by `async_scheduler.py`
(`next_decode_eligible_step`).
"""

from __future__ import annotations

from chairlift.sim.replica.request import Live
from chairlift.sim.replica.step_plan import Plan


class InFlight:
    """What is in flight of each request.

    Synchronous: a request decodes again once its token is in. Asynchronous: once ``stages`` turns have passed since
    its latest token was planned, when a step of its own would leave the first stage again. The next chunk of a prompt
    may follow at once. Whoever is preempted waits until all of its steps are in, and others pass by.

    In three turns, two stages, synchronous: turn 1 plans A's prompt in one chunk; turn 2 finds A not `ready`, plans B,
    the queue is full, and turn 1 is taken in; turn 3 plans A's first decode, while B is in flight.
    """

    __slots__ = ("_asynchronous", "_eligible", "_plans", "_stages", "_steps", "_tokens", "_turn")

    def __init__(self, stages: int, asynchronous: bool) -> None:
        self._stages = stages
        self._asynchronous = asynchronous
        self._turn = 0  # that plans now, counted from 1
        self._plans: dict[Plan, tuple[list[Live], list[Live]]] = {}  # in flight: who is in it; whose token it brings
        self._steps: dict[int, int] = {}  # request → steps in flight that it is in
        self._tokens: dict[int, int] = {}  # request → its tokens in flight
        self._eligible: dict[int, int] = {}  # asynchronous: request → the turn from which on it may decode

    def turn(self) -> None:
        """Another plan is asked for."""
        self._turn += 1

    def ready(self, request: Live, running: bool) -> bool:
        """Whether a request may be in the plan at hand."""
        if not running:
            return request.row not in self._steps
        if self._asynchronous:
            return self._turn >= self._eligible.get(request.row, 0)
        return request.row not in self._tokens

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
            if self._asynchronous:
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
