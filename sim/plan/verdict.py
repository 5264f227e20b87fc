"""Whether promises are kept in the long run: independent runs judged together, without their warm-up.

The runs of one judgement are replications: equal but for their seed, and so independent. The warm-up is found on
their mean by MSER (White, Simulation 69(6), 1997): cut where the standard error of what is left is least. A share is
a ratio of sums over replications, its error that of the residuals (Law, Simulation Modeling and Analysis, 5th ed.,
9.3), its interval Student's t on the logit, since a share near 1 is skewed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chairlift.sim.plan.promises import BINS, Promise, Sample, window
from chairlift.sim.sweep.statistics import student

Floats = npt.NDArray[np.float64]

# Where none of n requests failed (or all did), 3 / n bounds the share at 95 % if they are independent (the rule of
# three). Requests of a run are not: they count as if they failed in clusters of some 30, so 100 / n bounds it.
FEW = 100
MOST_CUT = BINS // 2  # of the warm-up
LONG_STAY = 0.3  # of a run
DRIFT_T = 3.5  # Student's t beyond which a second half is worse than the first
DRIFT = 0.02  # and by so much, as a part of the limit


@dataclass(frozen=True)
class Kept:
    """One promise: the share that met it."""

    share: float
    low: float  # of its interval
    high: float
    logit_gap: float  # log odds of a failure over those allowed: above 0 it is broken
    logit_se: float  # its standard error
    proof: int  # 1: kept, -1: broken, 0: too close to say


@dataclass(frozen=True)
class Verdict:
    """All promises at one load."""

    rate_per_s: float
    requests: int  # a replication
    replications: int
    kept: tuple[Kept, ...]
    warm_up: int  # bins cut off at the start
    cool_down: int  # and at the end
    drifting: bool  # the second half is still worse than the first
    worsening: float  # by how much, as a part of the limit
    figures: dict[str, tuple[float, float, float]]  # percentile → mean over replications, its interval
    simulated_s: float
    wall_s: float
    fleeting: bool = False  # requests, or sessions, stayed for much of a run: it shows no long run
    overloaded: bool = False  # it worsened for as long as one was ready to look

    @property
    def gap(self) -> float:
        """The worst promise's: above 0 it is broken."""
        worst = max(kept.logit_gap for kept in self.kept)
        return max(worst, 1.0) if self.overloaded else worst

    @property
    def gap_se(self) -> float:
        """Standard error of `gap`."""
        return max(self.kept, key=lambda kept: kept.logit_gap).logit_se

    @property
    def proof(self) -> int:
        """1: all promises are kept, -1: one is broken, 0: too close to say."""
        return -1 if self.overloaded else min(kept.proof for kept in self.kept)

    @property
    def is_short(self) -> bool:
        """Whether most of it was warm-up, or it has not settled."""
        return self.drifting or self.fleeting or self.warm_up + self.cool_down > 0.6 * BINS

    @property
    def holds(self) -> bool:
        """The best guess: all promises are kept."""
        return self.gap <= 0


def judge(
    promises: Sequence[Promise], samples: Sequence[Sample], rate_per_s: float, requests: int, confidence: float = 0.95
) -> Verdict:
    """``samples``: at least two replications of ``requests`` each."""
    severity = np.array([sample.severity for sample in samples])
    warm = max(_mser(severity.mean(axis=0)), _first_generation(samples))
    cool = _last_generation(samples)
    tail = slice(warm, max(warm + 2, BINS - cool))
    level = 1 - (1 - confidence) / 2 / len(promises)  # Bonferroni: any of them may be the one that binds
    kept = tuple(
        _kept(
            promise.wanted,
            np.array([s.eligible[j][tail] for s in samples]).sum(axis=1),
            np.array([s.met[j][tail] for s in samples]).sum(axis=1),
            level,
        )
        for j, promise in enumerate(promises)
    )
    drifting, worsening = _drift(severity[:, tail])
    figures = {}
    for name in samples[0].figures:
        values = np.array([s.figures[name] for s in samples if name in s.figures])
        half = 0.0
        if len(values) > 1:
            half = (
                student(1 - (1 - confidence) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
            )
        figures[name] = (float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)
    return Verdict(
        rate_per_s,
        requests,
        len(samples),
        kept,
        warm,
        cool,
        drifting,
        worsening,
        figures,
        sum(s.simulated_s for s in samples),
        sum(s.wall_s for s in samples),
        any(s.stay_s > LONG_STAY * (s.end_s - s.starts_s[0]) for s in samples),
    )


def _mser(series: Floats) -> int:
    """How many of the first values to leave out, at most `MOST_CUT`."""
    values = series[::-1]
    count = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / count
    spread = np.maximum(np.cumsum(values**2) / count - mean**2, 0)
    error = (spread / count)[::-1]  # of what is left after leaving out the first d
    return int(np.argmin(error[: MOST_CUT + 1]))


def _first_generation(samples: Sequence[Sample]) -> int:
    """Bins that began before nearly all of the first requests had left: until then the system was filling up."""
    cut = 0
    for sample in samples:
        begin, _ = window(sample.starts_s[0], sample.end_s, sample.stay_s)
        cut = max(cut, int(np.searchsorted(sample.starts_s, begin)))
    return min(cut, MOST_CUT)


def _last_generation(samples: Sequence[Sample]) -> int:
    """Bins whose requests stayed when none came any more."""
    cut = 0
    for sample in samples:
        _, close = window(sample.starts_s[0], sample.end_s, sample.stay_s)
        ends = [*sample.starts_s[1:], sample.end_s]
        cut = max(cut, len(ends) - int(np.searchsorted(ends, close, side="right")))
    return min(cut, BINS // 4)


def _kept(wanted: float, eligible: npt.NDArray[np.int64], met: npt.NDArray[np.int64], level: float) -> Kept:
    """Ratio estimate of a share over replications; shape (R,) each."""
    total, failed = int(eligible.sum()), int((eligible - met).sum())
    allowed = 1 - wanted
    if total == 0:  # nobody to promise to
        return Kept(1.0, 1.0, 1.0, -math.inf, 0.0, 1)
    share = failed / total
    clipped = min(max(share, 0.5 / total), 1 - 0.5 / total)
    gap = _logit(clipped) - _logit(allowed)
    if failed == 0 or failed == total:
        unseen = min(1.0, FEW / total)
        low, high = (0.0, unseen) if failed == 0 else (1 - unseen, 1.0)
        proof = 1 if high <= allowed else -1 if low > allowed else 0
        return Kept(1 - share, 1 - high, 1 - low, gap, 0.0 if proof else math.inf, proof)
    replications = len(eligible)
    residual = (eligible - met) - share * eligible
    se = float(np.sqrt((residual**2).sum() / (replications - 1) / replications)) / (total / replications)
    logit_se = se / (share * (1 - share))
    half = student(level, replications - 1) * logit_se
    low, high = _share(_logit(share) - half), _share(_logit(share) + half)
    proof = 1 if high <= allowed else -1 if low > allowed else 0
    return Kept(1 - share, 1 - high, 1 - low, gap, logit_se, proof)


def _drift(severity: Floats) -> tuple[bool, float]:
    """Whether the second half is worse than the first; shape (replications, bins)."""
    middle = severity.shape[1] // 2
    worse = severity[:, -middle:].mean(axis=1) - severity[:, :middle].mean(axis=1)
    mean, spread = float(worse.mean()), float(worse.std(ddof=1)) / math.sqrt(len(worse))
    return mean > DRIFT and mean > DRIFT_T * spread, mean


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))
