"""Step costs that are off by a factor: what a cost model would say that errs alike on all steps."""

from __future__ import annotations

from dataclasses import dataclass

from chairlift.backend.base import NO_HOST, Backend, Batch, Settings, StepCost
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Slower:
    """The backend of ``settings`` with every time multiplied by ``factor``."""

    settings: Settings
    factor: float

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """The cost model. Raises what the one within raises."""
        return Slowed(self.settings.build(model, gpu, parallel), self.factor)


class Slowed(Backend):
    """Prices steps as ``within`` does, times ``factor``; each number is rounded to a picosecond."""

    def __init__(self, within: Backend, factor: float) -> None:
        self.within, self.factor = within, factor
        self.name = within.name
        self.arrival = round(within.arrival * factor)
        self.arrival_token = round(within.arrival_token * factor)
        self.remembers = within.remembers
        self._told = 0  # ps that have passed, of what `within` was told

    def ran(self, tokens: int, gpu: int, slope: int, count: int) -> None:
        """Tell the cost model within, whose clock is as much slower; of two rests it hears what it hears of one."""
        before = round(self._told / self.factor)
        self._told += gpu * count + slope * (count * (count - 1) // 2)
        self.within.ran(tokens, round(self._told / self.factor) - before, 0, 1)

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``, host time included; a launch's tail is a length of GPU work, and grows as well."""
        cost = self.within.step(batch)
        host = cost.host
        if host is not NO_HOST:
            times = {
                name: round(getattr(host, name) * self.factor) for name in ("schedule", "launch", "update", "head")
            }
            tail = {"tail": round(host.tail * self.factor)} if host.tail != NO_HOST.tail else {}
            host = host._replace(**times, **tail)
        return StepCost(max(1, round(cost.first * self.factor)), round(cost.slope * self.factor), cost.steps, host)

    def assumptions(self) -> dict[str, str]:
        """Those of the cost model within, and the factor."""
        return {**self.within.assumptions(), "errors": f"all times multiplied by {self.factor:.3g}"}
