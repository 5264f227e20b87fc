"""A recorded run on a host as fast as it was recorded, second by second: what is left is not the host's.

The host of a recorded vLLM has two speeds, a second or so each, for all that it does. How fast it was when shows in the
time that it took to schedule steps with chunks, which no GPU and no launch is part of. Launches are taken to have been
as fast. For example: a profile schedules such a step in 0.4 ms and launches it in 20. Around second 3 scheduling took
0.6 ms, so steps that are planned then are launched in 30 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chairlift.backend.base import PS, Backend, Batch, Settings, StepCost
from chairlift.backend.calibrated.profile import HostTime
from chairlift.backend.fitting.recording import Experiment
from chairlift.backend.fitting.residuals import paces
from chairlift.backend.fitting.steps import steps_of
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GPU, Model
from chairlift.policies.base import Scheduler, Step
from chairlift.sim.study import Setup

WITHIN_S = 0.5  # steps that were scheduled so near tell how fast a host is
LEAST = 3  # or so many, the nearest
Pace = Callable[[], float]


class Clock:
    """When the engine planned last, ps. Prices have no time of their own."""

    def __init__(self) -> None:
        self.now = 0

    def read_by(self, policy: type[Scheduler]) -> type[Scheduler]:
        """``policy``, at whose plans the clock is set."""

        def schedule(scheduler: Scheduler, step: Step) -> int:
            self.now = step.now
            return policy.schedule(scheduler, step)

        return type(policy.__name__, (policy,), {"schedule": schedule, "__doc__": policy.__doc__})


class Paced(Backend):
    """Prices of ``own``, where steps with chunks take ``pace`` times as long to launch."""

    def __init__(self, own: Backend, pace: Pace) -> None:
        self.own, self.pace, self.name = own, pace, own.name
        self.arrival, self.arrival_token = own.arrival, own.arrival_token
        self.remembers, self.prices_drafts = own.remembers, own.prices_drafts

    def ran(self, tokens: int, gpu: int, slope: int, count: int) -> None:
        """Tell the cost model within."""
        self.own.ran(tokens, gpu, slope, count)

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``, planned now."""
        cost = self.own.step(batch)
        if not batch.prefills:
            return cost
        return cost._replace(host=cost.host._replace(launch=round(cost.host.launch * self.pace())))


@dataclass(frozen=True)
class AtPace:
    """The settings of `Paced`."""

    settings: Settings
    pace: Pace

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """The cost model. Raises what the one within raises."""
        return Paced(self.settings.build(model, gpu, parallel), self.pace)


def on_recorded_host(setup: Setup, experiment: Experiment, host: HostTime) -> Setup:
    """``setup``, the run of ``experiment``, launched as fast as that was scheduled; ``host`` says what is usual.

    ``setup`` itself if no step with chunks tells.
    """
    when, took = paces(host, steps_of([experiment]))
    if not len(when):
        return setup
    clock = Clock()

    def pace() -> float:
        away = np.abs(when - clock.now / PS)
        near = away <= max(WITHIN_S, float(np.sort(away)[:LEAST][-1]))
        return float(np.median(took[near]))

    [group] = setup.groups
    changed: dict[str, Any] = {"scheduler": clock.read_by(group.scheduler), "backend": AtPace(group.backend, pace)}
    return replace(setup, groups=[replace(group, **changed)])
