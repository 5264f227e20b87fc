"""Whether promises are kept in the long run: independent runs at one load judged together, without their warm-up.

The runs of one verdict are replications: equal but for their seed, and so independent of one another.

- Warm-up. The mean of the replications' severities is cut by MSER (White, Simulation 69(6), 1997): at the part from
  which on the standard error of the mean of what is left is least.
- Share. The share of requests that miss a promise is a ratio of sums over replications. Its standard error is that of
  the residuals, failed − share · eligible (Law, Simulation Modeling and Analysis, 5th ed., 9.3).
- Interval. Student's t on the logit of that share, since a share near 0 is skewed.
- Hardly anybody missed. Then the share says little of how far off the limit is, and the promised percentile itself is
  judged: the mean of its logarithm over the replications, by Student's t, where each replication's percentile has at
  least `TAIL` requests beyond it. Else, where nobody missed, `unseen` bounds the share.
- Several promises. All are kept if each is: a test of each at the whole level proves it (Berger, Technometrics 24,
  1982). That one is broken takes a level for each (Bonferroni).
- Recorded files. Replications that are overlapping stretches of one file count as the k independent ones that they are
  `worth`. Of R equally correlated values the spread shows only what is not common to them, and R − 1 becomes k − 1:
  the squared standard error of the mean is Σ residual² / R / (k − 1), that of R independent ones where k = R.

Worked example: two replications of 1000 requests miss "p99 TTFT ≤ 500 ms" 15 and 25 times. The share that misses is
40 / 2000 = 2 %, where 1 % is allowed. The residuals are 15 − 20 and 25 − 20; the standard error is √(50 / 1 / 2) / 1000
= 0.5 %, on the logit 0.005 / (0.02 · 0.98) = 0.255. Student's t at 97.5 % with one degree of freedom is 12.7, so the
interval of the logit is −3.89 ± 3.24, that of the share 0.08 % to 34 %: too close to say, with two replications.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chairlift.sim.plan.promises import BINS, Promise, Sample, window
from chairlift.sim.plan.stretches import Stretch, worth
from chairlift.sim.sweep.statistics import student

Floats = npt.NDArray[np.float64]

# Where none of n independent requests failed (or all did), −ln(1 − level) / n bounds the share (at 95 % 3 / n, the rule
# of three). Requests of one run are not independent: a queue makes neighbours fail together. They count here as if they
# failed in clusters of so many: at 97.5 % 100 / n bounds the share.
CLUSTER = 27.1
TAIL = 5  # requests of a replication beyond its percentile, at least: with fewer, it is little but its largest value
LEAST_WORTH = 1.5  # independent replications: of fewer, Student's t says next to nothing
MOST_CUT = BINS // 2  # parts that the warm-up can take at most
LONG_STAY = 0.3  # of a run: requests that stay longer make it too short to show a long run
DRIFT_T = 3.5  # a run drifts if its second half is worse than its first by this many standard errors,
DRIFT = 0.02  # and by this much of the limit


@dataclass(frozen=True)
class Kept:
    """What became of one promise at one load."""

    share: float  # of the requests (for ITL: of the gaps) that met the limits
    low: float  # the interval of that share
    high: float
    logit_gap: float  # logit of the share that missed less logit of the share that may: above 0 the promise is broken
    logit_se: float  # standard error of `logit_gap`
    proof: int  # 1: proven kept, -1: proven broken, 0: too close to say


@dataclass(frozen=True)
class Verdict:
    """What became of all promises at one load."""

    rate_per_s: float
    requests: int  # a replication
    replications: int
    kept: tuple[Kept, ...]  # one a promise
    warm_up: int  # parts of `BINS` that were left out at the start
    cool_down: int  # parts that were left out at the end
    drifting: bool  # after the warm-up, the second half of the runs is still worse than the first
    worsening: float  # by how much, as a fraction of the limit
    figures: dict[str, tuple[float, float, float]]  # name → mean over replications, low and high of its interval
    simulated_s: float  # of all replications
    wall_s: float
    worth: float = math.inf  # independent replications that these stand for: fewer where stretches of a file overlap
    fleeting: bool = False  # requests or sessions stayed for more than `LONG_STAY` of a run
    replicas: tuple[float, ...] = ()  # of each group, paid for on average; none where none come and go
    first: dict[str, float] = field(default_factory=dict)  # `figures` of the first replication alone
    strain: float | None = None  # greatest logarithm of a promised percentile over its limit; None: some have no figure
    stays: float = 0.0  # mean over the replications of `Sample.stay_s`, over the time in which requests arrive
    overloaded: bool = False  # runs were still drifting at the greatest length that the search may simulate

    @property
    def gap(self) -> float:
        """The greatest `Kept.logit_gap`: above 0, at least one promise seems broken. At least 1 if overloaded."""
        worst = max(kept.logit_gap for kept in self.kept)
        return max(worst, 1.0) if self.overloaded else worst

    @property
    def gap_se(self) -> float:
        """Standard error of the greatest `Kept.logit_gap`."""
        return max(self.kept, key=lambda kept: kept.logit_gap).logit_se

    @property
    def proof(self) -> int:
        """1: all promises are proven kept, -1: at least one is proven broken, 0: too close to say."""
        return -1 if self.overloaded else min(kept.proof for kept in self.kept)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of its standard errors."""
        return min(self.replications, self.worth) - 1

    @property
    def is_used_up(self) -> bool:
        """Whether replications share so much of a recorded file that more of them would say nothing new."""
        return self.worth < self.replications / 2

    @property
    def is_short(self) -> bool:
        """Whether longer runs are needed: most of a run was cut off, or the runs have not settled."""
        return self.drifting or self.fleeting or self.warm_up + self.cool_down > 0.6 * BINS

    @property
    def is_hopeless(self) -> bool:
        """Whether it is proven that a promise breaks, by more than the runs' start: settled, or still getting worse."""
        return self.proof < 0 and (self.drifting or not self.is_short)

    @property
    def holds(self) -> bool:
        """Whether all promises seem kept: the best guess, which need not be proven."""
        return self.gap <= 0


def judge(
    promises: Sequence[Promise], samples: Sequence[Sample], rate_per_s: float, requests: int, confidence: float = 0.95
) -> Verdict:
    """The verdict on at least two replications of ``requests`` requests each.

    Of two risks each takes half of 1 − ``confidence``: that a promise is wrongly proven kept, and that one is wrongly
    proven broken. The lower ends of the intervals are bounds each by itself, the upper ends all together.
    """
    severity = np.array([sample.severity for sample in samples])
    warm = max(_mser(severity.mean(axis=0)), _first_generation(samples))
    cool = _last_generation(samples)
    tail = slice(warm, max(warm + 2, BINS - cool))
    risk = (1 - confidence) / 2
    sure = 1 - risk, 1 - risk / len(promises)  # of a bound below, and of one above
    known = _worth(samples)
    strains = [_strain(promise, samples) for promise in promises]
    kept = tuple(
        _kept(
            promise.wanted,
            np.array([s.eligible[j][tail] for s in samples]).sum(axis=1),
            np.array([s.met[j][tail] for s in samples]).sum(axis=1),
            strains[j],
            sure,
            known,
        )
        for j, promise in enumerate(promises)
    )
    drifting, worsening = _drift(severity[:, tail], known)
    figures = {}
    for name in samples[0].figures:
        values = np.array([s.figures[name] for s in samples if name in s.figures])
        each = min(known, len(values))
        half = 0.0
        if len(values) > 1:
            half = student(1 - (1 - confidence) / 2, each - 1) * _error(values - values.mean(), each)
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
        known,
        any(s.stay_s > LONG_STAY * (s.end_s - s.starts_s[0]) for s in samples),
        tuple(np.mean([s.replicas for s in samples], axis=0).tolist()) if samples[0].replicas else (),
        dict(samples[0].figures),
        _greatest(strains),
        float(np.mean([s.stay_s / max(s.end_s - s.starts_s[0], 1e-12) for s in samples])),
    )


def _strain(promise: Promise, samples: Sequence[Sample]) -> Floats | None:
    """Logarithm of each replication's promised percentile over its limit, shape (R,); None: it has no such figure."""
    if len(limits := promise.limits()) > 1 or promise.tenant is not None or promise.priority is not None:
        return None  # figures are of one latency, and of all requests
    [(metric, limit)] = limits.items()
    name = f"p{100 * promise.wanted:g}_{metric}_ms"
    if not all(sample.figures.get(name, 0.0) > 0 for sample in samples):
        return None
    return np.log([sample.figures[name] / limit for sample in samples])


def _greatest(strains: Sequence[Floats | None]) -> float | None:
    """The greatest of the means; None where one is not known."""
    means = [None if each is None else float(each.mean()) for each in strains]
    known = [mean for mean in means if mean is not None]
    return max(known) if len(known) == len(means) else None


def _mser(series: Floats) -> int:
    """How many of the first values MSER leaves out, at most `MOST_CUT`."""
    values = series[::-1]
    count = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / count
    spread = np.maximum(np.cumsum(values**2) / count - mean**2, 0)
    error = (spread / count)[::-1]  # at d: squared standard error of the mean of all values but the first d
    return int(np.argmin(error[: MOST_CUT + 1]))


def _first_generation(samples: Sequence[Sample]) -> int:
    """How many parts began before 99 % of the first requests had left: until then the system was filling up."""
    cut = 0
    for sample in samples:
        begin, _ = window(sample.starts_s[0], sample.end_s, sample.stay_s)
        cut = max(cut, int(np.searchsorted(sample.starts_s, begin)))
    return min(cut, MOST_CUT)


def _last_generation(samples: Sequence[Sample]) -> int:
    """How many parts, at the end, have requests that stayed on after the last arrival."""
    cut = 0
    for sample in samples:
        _, close = window(sample.starts_s[0], sample.end_s, sample.stay_s)
        ends = [*sample.starts_s[1:], sample.end_s]
        cut = max(cut, len(ends) - int(np.searchsorted(ends, close, side="right")))
    return min(cut, BINS // 4)


def _worth(samples: Sequence[Sample]) -> float:
    """How many independent replications the samples stand for: of several recorded files, by the one worth least."""
    files = zip(*(sample.stretches for sample in samples), strict=True)
    return min([len(samples), *(worth([Stretch(*part) for part in parts]) for parts in files)])


def _error(residuals: Floats, known: float) -> float:
    """Standard error of the mean of R values that stand for ``known`` independent ones; inf for one or fewer.

    ``residuals``: the values less their mean, shape (R,).
    """
    if known <= LEAST_WORTH:
        return math.inf
    return math.sqrt(float((residuals**2).mean()) / (known - 1))


def _kept(
    wanted: float,
    eligible: npt.NDArray[np.int64],
    met: npt.NDArray[np.int64],
    strain: Floats | None,
    sure: tuple[float, float],
    known: float,
) -> Kept:
    """One promise judged on what R replications counted after the warm-up; ``eligible`` and ``met`` of shape (R,).

    ``strain``: as `_strain` has it.

    ``sure`` are the levels of the bounds on the share that met it, below and above, ``known`` how many independent
    replications there are. The module's docstring has a worked example.
    """
    total, failed = int(eligible.sum()), int((eligible - met).sum())
    allowed = 1 - wanted
    if total == 0:  # no request is concerned: the promise holds of all of them
        return Kept(1.0, 1.0, 1.0, -math.inf, 0.0, 1)
    share = failed / total
    clipped = min(max(share, 0.5 / total), 1 - 0.5 / total)
    gap = _logit(clipped) - _logit(allowed)
    least = 1.0  # that the share is proven to be at most, by the percentile
    if failed < TAIL and strain is not None and allowed * eligible.min() >= TAIL:
        half = student(sure[0], known - 1) * _error(strain - strain.mean(), known)
        least = allowed if strain.mean() + half <= 0 else 1.0
    if failed == 0 or failed == total:
        most = min(1.0, unseen(sure[failed > 0]) / (total * known / len(eligible)), least)
        low, high = (0.0, most) if failed == 0 else (1 - most, 1.0)
        proof = 1 if high <= allowed else -1 if low > allowed else 0
        return Kept(1 - share, 1 - high, 1 - low, gap, 0.0 if proof else math.inf, proof)
    se = _error((eligible - met) - share * eligible, known) / (total / len(eligible))
    logit_se = se / (share * (1 - share))
    if math.isinf(logit_se):
        return Kept(1 - share, 0.0, 1.0, gap, math.inf, 0)
    kept, broken = (student(level, known - 1) * logit_se for level in sure)
    low, high = _share(_logit(share) - broken), min(_share(_logit(share) + kept), max(share, least))
    proof = 1 if high <= allowed else -1 if low > allowed else 0
    return Kept(1 - share, 1 - high, 1 - low, gap, logit_se, proof)


def unseen(level: float) -> float:
    """The requests of which none misses a promise if a share of 1 / n of all may: ``unseen / n`` bounds the share."""
    return -math.log(1 - level) * CLUSTER


def _drift(severity: Floats, known: float) -> tuple[bool, float]:
    """Whether the second half is worse than the first, and by how much; ``severity`` of shape (replications, parts)."""
    middle = severity.shape[1] // 2
    worse = severity[:, -middle:].mean(axis=1) - severity[:, :middle].mean(axis=1)
    mean, spread = float(worse.mean()), _error(worse - worse.mean(), known)
    return mean > DRIFT and mean > DRIFT_T * spread, mean


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))
