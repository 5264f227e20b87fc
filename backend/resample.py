"""A profile with errors like those it was seen to make: what an interval around a prediction is drawn from.

Two kinds of error were recorded on experiments that a fit had not seen. Whole runs were slower or faster (another day,
another temperature): one factor a run and regime, drawn from those of the experiments. Single steps differed from
their like: a factor with mean 1, drawn for each step with a chunk from what it computes and for each size of a decode
batch, so that the cost stays a function of the batch and runs of steps still leap.
"""

from __future__ import annotations

import numpy as np

from backend.base import Batch, Host, StepCost
from backend.evidence import REGIMES
from backend.profile import Calibrated, Profile, ProfileError
from backend.residuals import QUANTILES

MASK = (1 << 64) - 1


class Resampled(Calibrated):
    """Step costs of ``profile``, off by the ``draw``-th draw of its errors. Raises `ProfileError` if it knows none."""

    def __init__(self, profile: Profile, graph_tokens: int | None, draw: int) -> None:
        super().__init__(profile, graph_tokens)
        if not profile.residuals or not profile.run_factors:
            raise ProfileError(f"profile {profile.name} carries no errors to draw from: calibrate it without --fast")
        chance = np.random.default_rng([int(profile.digest, 16), draw])
        self._key = int(chance.integers(1 << 62))
        self._steps: list[tuple[np.ndarray, float]] = []
        self._runs: list[float] = []
        for regime in REGIMES:
            logs = np.array(profile.residuals.get(regime, [0.0] * len(QUANTILES)))
            self._steps.append((logs, float(np.exp(logs).mean())))
            factors = profile.run_factors.get(regime, [1.0])
            self._runs.append(factors[int(chance.integers(len(factors)))])

    def _factor(self, regime: int, *what: int) -> float:
        """The factor of a step that computes ``what``."""
        word = self._key
        for each in what:
            word = _mixed(word ^ (each & MASK))
        logs, mean = self._steps[regime]
        drawn = float(np.interp(word / 2**64, QUANTILES, logs))
        return self._runs[regime] * float(np.exp(drawn)) / mean

    def _decode_only(self, slots: int) -> tuple[int, int, Host]:
        fixed, kv, host = super()._decode_only(slots)
        factor = self._factor(0, slots)
        return max(1, round(fixed * factor)), round(kv * factor), host

    def _with_chunks(self, batch: Batch) -> StepCost:
        cost = super()._with_chunks(batch)
        shape = [number for chunk in batch.prefills for number in chunk]
        factor = self._factor(2 if batch.decodes else 1, batch.decodes, batch.context, *shape)
        host = cost.host._replace(launch=round(cost.host.launch * factor))
        return StepCost(max(1, round(cost.first * factor)), 0, 1, host)

    def assumptions(self) -> dict[str, str]:
        """As the profile's, and that errors were drawn."""
        return {**super().assumptions(), "errors": "drawn from those of the profile on experiments left out of the fit"}


def _mixed(word: int) -> int:
    """Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): 64 bits, well stirred."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
