"""Shortest job first by predicted answer length, with and without preemption.

Sources: Fu et al., "Efficient LLM Scheduling by Learning to Rank", NeurIPS 2024, for the order and its starvation
control; Shahout et al., "Don't Stop Me Now: Embedding Based Scheduling for LLMs" (TRAIL), ICLR 2025, for preemption
that stops once a request is far enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from chairlift.policies.base import FOREVER, NotNegative, Positive, Predictor, Request, Step
from chairlift.policies.preemptive import Preemptive
from chairlift.policies.sarathi import Share


@dataclass
class Sjf(Preemptive):
    """Admit the shortest answer first, as predicted; nobody who runs is displaced.

    The shortest mean time of all orders of admission where slots are what is short, as far as the prediction is right.
    It gives up the long answers' tail: under overload they wait for ever, unless `starvation_steps` is set.
    """

    preemption: Literal["none", "recompute", "swap"] = "none"
    predictions: Literal["oracle", "noisy", "buckets"] = "oracle"
    tau: Annotated[float, Interval(ge=-1, le=1)] = 1.0  # noisy: Kendall τ of predicted with true order
    buckets: Annotated[int, Interval(ge=2, le=1000)] = 10  # buckets: how many, equally frequent
    accuracy: Share = 1.0  # buckets: share of predictions that name the right one
    starvation_steps: NotNegative = 0  # whoever waited so many decode steps goes first; 0: never
    quantum: Positive = 64  # tokens for which nobody displaces such a one

    _since: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # who waits → decode step it began
    _now: int = field(default=0, init=False, repr=False)  # decode steps at this plan
    _safe_until: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # who starved → emitted tokens

    def __post_init__(self) -> None:
        self.oracle = self.predictions == "oracle" or (self.predictions == "noisy" and self.tau == 1)

    @property
    def predictor(self) -> Predictor | None:
        """None for an oracle, which needs no guess."""
        if self.oracle:
            return None
        return Predictor("buckets" if self.predictions == "buckets" else "noisy", self.tau, self.buckets, self.accuracy)

    def urgency(self, request: Request) -> Any:
        """The answer's length, true or predicted."""
        length = request.output_tokens if self.oracle else request.predicted_tokens
        return request.max_tokens if length is None else length

    def schedule(self, step: Step) -> int:
        """As `Preemptive`, with a note of who waits since when."""
        if self.starvation_steps:
            self._now = now = step.decode_steps
            self._since = {r.id: self._since.get(r.id, now) for r in step.waiting}
            if self._safe_until:
                here = {r.id for r in (*step.running, *step.waiting)}
                self._safe_until = {i: tokens for i, tokens in self._safe_until.items() if i in here}
        return super().schedule(step)

    def heeds_arrival(self, step: Step) -> bool:
        """A full batch hears nothing, if nobody is displaced and no waiting is counted."""
        return self.preemption != "none" or self.starvation_steps > 0 or self._has_slot(step)

    def protected(self, request: Request) -> bool:
        """Whoever starved keeps its place for a quantum."""
        return request.emitted < self._safe_until.get(request.id, 0)

    def outranks(self, request: Request, other: Request) -> bool:
        """Whoever starved outranks all others."""
        return self._starves(request) or super().outranks(request, other)

    def _starves(self, request: Request) -> bool:
        return self._since.get(request.id, FOREVER) <= self._now - self.starvation_steps

    def _next(self, step: Step) -> Request:
        if self.starvation_steps:
            starving = [r for r in step.waiting if self._starves(r)]
            if starving:
                request = min(starving, key=lambda r: (self._since[r.id], r.arrival, r.id))
                self._safe_until[request.id] = request.emitted + self.quantum
                return request
        return step.waiting[0]

    def _vouch(self, step: Step) -> int:
        """Until somebody waiting starves, or somebody running has used its quantum up."""
        if not self.starvation_steps or not step.waiting:
            return FOREVER
        left = [self._since.get(r.id, self._now) + self.starvation_steps - self._now for r in step.waiting]
        left += [self._safe_until.get(r.id, 0) - r.emitted for r in step.running]
        return min((steps for steps in left if steps > 0), default=FOREVER)


@dataclass
class Srpt(Sjf):
    """Serve the fewest predicted tokens left first; a shorter answer displaces a longer one that runs.

    The shortest mean time of all where preemption costs little. It gives up the work that preemption does cost: a
    displaced request computes its tokens again, or moves its KV, and may lose more than the order gains.
    """

    preemption: Literal["none", "recompute", "swap"] = "recompute"
    keep_from: Share = 0.8  # of its predicted answer: from there on a request is not displaced (TRAIL's C)

    def urgency(self, request: Request) -> Any:
        """Predicted tokens left; 1 for an answer longer than predicted."""
        return max(1, super().urgency(request) - request.emitted)

    def protected(self, request: Request) -> bool:
        """Whoever is nearly done, or starved, keeps its place."""
        return request.emitted >= self.keep_from * super().urgency(request) or super().protected(request)
