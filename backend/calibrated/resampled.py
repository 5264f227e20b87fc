"""A profile with errors like those that it was seen to make: what an interval around a prediction is drawn from.

Two kinds of error were recorded on runs left out of a fit, by regime and by how long a step takes (`Spread`).

- Whole runs were slower or faster: another day, another temperature. A draw has one factor for each regime. Its
  logarithm is Student's t with as many degrees of freedom as there were runs, times their root mean square.
- Single steps differed from steps like them. A draw has a factor for each step with a chunk, and one for each size of a
  decode batch, with mean 1. The factor follows from what the step computes, by a hash: the same batch costs the same
  whenever it comes, and a run of decode steps stays an arithmetic series.

What made a run slower was its GPU or its host. Where a profile tells launches apart (`HOST`), each has factors of its
own: in a step that the GPU sets the pace of, a slow host changes nothing, and the other way round.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np

from chairlift.backend.base import PS, Batch, Host, StepCost
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import HOST, QUANTILES, REGIMES, Profile, ProfileError

MASK = (1 << 64) - 1
MOST = 0.7  # of the logarithm of a run's factor: half as long, twice as long


class Resampled(Calibrated):
    """Step costs of ``profile``, off by the ``draw``-th draw of its errors. Raises `ProfileError` if it knows none."""

    def __init__(self, profile: Profile, graph_tokens: int | None, draw: int) -> None:
        super().__init__(profile, graph_tokens)
        if not profile.spread:
            raise ProfileError(f"profile {profile.name} carries no errors to draw from: calibrate it without --fast")
        chance = np.random.default_rng([int(profile.digest, 16), draw])
        self._key = int(chance.integers(1 << 62))
        # For each regime: the ps up to which each length reaches, but for the longest; and for each length the run's
        # factor, and the quantiles of the steps' logarithms.
        self._lengths: list[list[float]] = []
        self._spreads: list[list[tuple[float, np.ndarray]]] = []
        for regime in REGIMES:
            known = profile.spread.get(regime, [])
            t = float(chance.standard_t(max((each["runs"] for each in known), default=1)))
            self._lengths.append([PS * (each["upto_s"] or 0.0) for each in known[:-1]])
            self._spreads.append([])
            for each in known:
                logs = np.array(each["steps"])
                run = math.exp(max(-MOST, min(MOST, t * each["rms"])))
                self._spreads[-1].append((run / float(np.exp(logs).mean()), logs))
        self._host: tuple[float, np.ndarray] | None = None  # the run's factor, and quantiles of launches' logarithms
        for each in profile.spread.get(HOST, []):
            logs = np.array(each["steps"])
            run = math.exp(max(-MOST, min(MOST, float(chance.standard_t(each["runs"])) * each["rms"])))
            self._host = run, logs - math.log(float(np.exp(logs).mean()))
            self.arrival, self.arrival_token = round(self.arrival * run), round(self.arrival_token * run)

    def _factor(self, regime: int, ps: int, *what: int) -> float:
        """The factor of a step of this regime that computes ``what`` and is predicted to take ``ps``."""
        if not self._spreads[regime]:
            return 1.0
        run, logs = self._spreads[regime][bisect_left(self._lengths[regime], ps)]
        return run * math.exp(float(np.interp(self._share(*what), QUANTILES, logs)))

    def _share(self, *what: int) -> float:
        """A number from 0 to 1 that follows from ``what`` a step computes."""
        word = self._key
        for each in what:
            word = _mixed(word ^ (each & MASK))
        return word / 2**64

    def _decode_only(self, slots: int, drafts: int = 0, proposes: int = 0) -> tuple[int, int, Host]:
        fixed, kv, host = super()._decode_only(slots, drafts, proposes)
        factor = self._factor(0, fixed, slots, *([drafts] if drafts else []))
        if self._host is not None:
            host = _paced(host, self._host[0])
        return max(1, round(fixed * factor)), round(kv * factor), host

    def _with_chunks(self, batch: Batch) -> StepCost:
        cost = super()._with_chunks(batch)
        shape = [number for chunk in batch.prefills for number in chunk]
        what = batch.decodes, batch.context, *shape
        regime = 2 if batch.decodes else 1
        if self._host is None:
            factor = self._factor(regime, max(cost.first, cost.host.launch), *what)
            host = cost.host._replace(launch=round(cost.host.launch * factor))
            return StepCost(max(1, round(cost.first * factor)), 0, 1, host)
        run, logs = self._host
        host = _paced(cost.host, run)
        own = math.exp(float(np.interp(self._share(*what, 1), QUANTILES, logs)))
        host = host._replace(launch=round(host.launch * own), head=round(host.head * own))
        return StepCost(max(1, round(cost.first * self._factor(regime, cost.first, *what))), 0, 1, host)

    def assumptions(self) -> dict[str, str]:
        """What the profile assumes, and that errors were drawn."""
        return {**super().assumptions(), "errors": "drawn from those of the profile on experiments left out of the fit"}


def _paced(host: Host, pace: float) -> Host:
    """``host`` that takes ``pace`` times as long; what the GPU has left behind a launch stays."""
    launch, head = round(host.launch * pace), round(host.head * pace)
    return Host(round(host.schedule * pace), launch, round(host.update * pace), host.tail, head)


def _mixed(word: int) -> int:
    """Steele, Lea and Flood's SplitMix64 (OOPSLA 2014): 64 bits, well stirred."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
