"""Fairness among tenants: the virtual token counter.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, Algorithm 2 and theorem 4.4.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from chairlift.policies.backlog import Backlog
from chairlift.policies.base import FOREVER, NotNegative, Request, Step
from chairlift.policies.sarathi import Sarathi


@dataclass
class Fair(Sarathi):
    """Admit the tenant that has been served least, counted in weighted tokens (VTC).

    Work-conserving. Two tenants that always have requests waiting are served alike but for 2·max(input_weight ·
    longest prompt, output_weight · tokens of the pool). It gives up the order of arrival, and so the mean latency of
    tenants that ask for much.
    """

    input_weight: NotNegative = 1  # of a prompt token, the paper's w_p
    output_weight: NotNegative = 2  # of an output token, the paper's w_q

    _served: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # tenant → counter
    _queued: set[int] = field(default_factory=set, init=False, repr=False)  # tenants that waited at the last plan
    _last_left: int = field(default=-1, init=False, repr=False)  # the tenant that stopped waiting last
    _counted: dict[int, tuple[Request, int]] = field(default_factory=dict, init=False, repr=False)  # its tokens so far
    _backlog: Backlog = field(default_factory=Backlog, init=False, repr=False)
    _waiting: dict[int, deque[Request]] = field(default_factory=dict, init=False, repr=False)  # by tenant; never empty

    def schedule(self, step: Step) -> int:
        """As `Sarathi`, with the counters brought up to date before and after."""
        self._count(step)
        self._look(step)
        self._lift()
        vouched = super().schedule(step)
        for request in step.running:
            if request.id not in self._counted:
                self._counted[request.id] = (request, request.emitted)
                if not request.preemptions:
                    self._served[request.tenant] += self.input_weight * request.prompt_tokens
        self._look(step)
        self._leave(set(self._waiting))
        return vouched if vouched == 1 else self._steps_alike(step)

    def heeds_arrival(self, step: Step) -> bool:
        """A tenant's counter is lifted as it comes back."""
        return True

    def _next(self, step: Step) -> Request:
        """The first request of the tenant with the smallest counter, those admitted in this very plan counted."""
        self._look(step)
        served = dict(self._served)
        for request in step.running:
            if request.id not in self._counted and not request.preemptions:
                served[request.tenant] += self.input_weight * request.prompt_tokens
        return min((queue[0] for queue in self._waiting.values()), key=lambda r: (served[r.tenant], r.arrival, r.id))

    def _admit(self, step: Step, request: Request, tokens: int) -> bool:
        if not super()._admit(step, request, tokens):
            return False
        self._backlog.take(request)
        self._drop(request)
        return True

    def _look(self, step: Step) -> None:
        """Bring the tenants' queues up to date, each in the order of `Step.waiting`."""
        head, tail, left = self._backlog.look(step.waiting)
        for request in left:
            self._drop(request)
        for request in reversed(head):
            self._waiting.setdefault(request.tenant, deque()).appendleft(request)
        for request in tail:
            self._waiting.setdefault(request.tenant, deque()).append(request)

    def _drop(self, request: Request) -> None:
        queue = self._waiting[request.tenant]
        queue.remove(request)
        if not queue:
            del self._waiting[request.tenant]

    def _count(self, step: Step) -> None:
        """Charge each tenant for the tokens that its requests got since the last plan."""
        gone = []
        here = {r.id for r in step.running}
        for number, (request, before) in self._counted.items():
            emitted = request.emitted
            self._served[request.tenant] += self.output_weight * (emitted - before)
            if number in here:
                self._counted[number] = (request, emitted)
            else:
                gone.append(number)
        for number in gone:
            del self._counted[number]

    def _lift(self) -> None:
        """A tenant that comes back does not bring credit from its absence: the paper's lines 6 to 13."""
        for tenant in sorted(self._waiting.keys() - self._queued):
            self._served.setdefault(tenant, 0)
            floor = min((self._served[t] for t in self._queued), default=self._served.get(self._last_left, 0))
            self._served[tenant] = max(self._served[tenant], floor)
            self._queued.add(tenant)

    def _leave(self, waiting: set[int]) -> None:
        gone = self._queued - waiting
        if gone:
            self._last_left = max(gone, key=lambda t: (self._served[t], t))
        self._queued = waiting

    def _steps_alike(self, step: Step) -> int:
        """Steps until another tenant's counter is the smallest: a full pool may have room for its request."""
        if not step.waiting or not self._has_slot(step):
            return FOREVER
        heads = {tenant: queue[0] for tenant, queue in self._waiting.items()}
        rate = dict.fromkeys(heads, 0)
        for request in step.running:
            if request.tenant in rate and request.decoding:
                rate[request.tenant] += self.output_weight
        first = min(heads.values(), key=lambda r: (self._served[r.tenant], r.arrival, r.id))
        steps = FOREVER
        for tenant in heads:
            faster = rate[first.tenant] - rate[tenant]
            if faster > 0:  # it is overtaken when its lead is used up, at a tie perhaps
                steps = min(steps, max(1, -(-(self._served[tenant] - self._served[first.tenant]) // faster)))
        return steps
