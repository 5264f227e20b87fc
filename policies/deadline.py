"""Deadlines: the earliest first for first tokens, the least slack for all others.

Sources: earliest deadline first, Liu and Layland, *Journal of the ACM* 20(1), 1973; slack of TTFT and TPOT to order and
size prefills as in QoServe/Niyama (Goel et al., 2025) and SLOs-Serve (Chen et al., 2025).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import MinLen

from chairlift.policies.base import FOREVER, PositiveFloat, Request, Step
from chairlift.policies.slo import PS_PER_MS, Slo


@dataclass
class Deadline(Slo):
    """Admit by the deadline of the first token; prompts take what the decode with the least slack can spare.

    Class ``priority`` k of a request has the k-th target; more classes than targets have the last. Requests that have
    missed their deadline go behind those that can still meet it: it gives those up.
    """

    ttft_ms: Annotated[list[PositiveFloat], MinLen(1)] = field(default_factory=lambda: [1000.0])  # one a priority class

    _began: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # who decodes → ps of its first token

    def order(self, request: Request) -> Any:
        """The earliest deadline first, behind those that were preempted after theirs."""
        return 0 if request.emitted else self._deadline(request)

    def schedule(self, step: Step) -> int:
        """As `Sarathi`, once it is noted whose first token has come."""
        began = self._began
        for request in step.running:
            if request.emitted:
                began.setdefault(request.id, step.now)
        if len(began) > 2 * (len(step.running) + len(step.waiting)) + 1000:  # most have left
            here = {r.id for r in (*step.running, *step.waiting)}
            self._began = {i: ps for i, ps in began.items() if i in here}
        return super().schedule(step)

    def _deadline(self, request: Request) -> int:
        last = len(self.ttft_ms) - 1
        return request.arrival + round(self.ttft_ms[min(max(request.priority, 0), last)] * PS_PER_MS)

    def _next(self, step: Step) -> Request:
        """The earliest deadline that is not past; if all are, the first of them."""
        waiting = step.waiting
        if waiting[0].emitted:
            return waiting[0]
        first = bisect_left(waiting, step.now, key=self.order)
        return waiting[first if first < len(waiting) else 0]

    def _vouch(self, step: Step) -> int:
        """Who is late changes with time, while anybody waits who is not."""
        waiting = step.waiting
        return 1 if waiting and self.order(waiting[-1]) >= step.now else FOREVER

    def _target(self, step: Step) -> int:
        """Picoseconds until the decode with the least slack is due, if every token has ``tpot_ms``."""
        gap = round(self.tpot_ms * PS_PER_MS)
        due = [self._began[r.id] + gap * r.emitted for r in step.running if r.emitted]
        return min(due, default=step.now + gap) - step.now
