"""Chunks as large as a TPOT target allows, by asking what the step would cost.

Sources: the chunk size as the knob between TTFT and TBT, Agrawal et al. (Sarathi-Serve), OSDI 2024, section 4.3; set
anew in each step from a cost model as in QoServe/Niyama (Goel et al., 2025, "dynamic chunking").
"""

from __future__ import annotations

from dataclasses import dataclass

from chairlift.policies.base import Positive, PositiveFloat, Step
from chairlift.policies.sarathi import Sarathi

PS_PER_MS = 10**9


@dataclass
class Slo(Sarathi):
    """Stall-free batching whose every step has prompt tokens up to a target of time per token, no more.

    It gives up TTFT where decodes alone come near the target: `least_chunk` tokens are all that a prompt then gets.
    """

    budget: Positive = 8192  # tokens a step, whatever they cost
    tpot_ms: PositiveFloat = 50.0  # no step with decodes takes longer, if it can be helped
    least_chunk: Positive = 16  # prompt tokens a step that go on even so

    def _room(self, step: Step) -> int:
        """The most prompt tokens that keep the step within the target: asked by bisection."""
        most = self.budget - step.decodes
        if step.decodes == 0 or not (step.prefilling or step.waiting):
            return most
        target = self._target(step)
        start = self._start(step)
        low, high = min(self.least_chunk, most), most
        while low < high:
            tokens = (low + high + 1) // 2
            if step.price([(start, tokens)]) <= target:
                low = tokens
            else:
                high = tokens - 1
        return low

    def _target(self, step: Step) -> int:
        """Picoseconds that this step may take."""
        return round(self.tpot_ms * PS_PER_MS)

    @staticmethod
    def _start(step: Step) -> int:
        """Tokens before the first chunk, whose KV it reads."""
        begun = step.prefilling
        return begun[0].computed if begun else step.cached_tokens(step.waiting[0])
