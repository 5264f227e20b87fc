"""Guesses of answers' lengths, for policies that ask for them. A policy sees the guess and never the true length.

No predictor is modelled, only how good one is: the true lengths are disturbed to a stated degree, with a random stream
of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from chairlift.policies.base import PolicyError, Predictor, Scheduler
from chairlift.sim.workload.random_streams import stream

IntArray = npt.NDArray[np.int64]


def wanted(schedulers: Iterable[Scheduler]) -> Predictor | None:
    """The predictor that the policies of one cluster want; None if none wants one.

    Raises `PolicyError` if two policies want different ones: a request has one guess, whichever replica it goes to.
    """
    found = list(dict.fromkeys(p for s in schedulers if (p := s.predictor) is not None))
    if len(found) > 1:
        raise PolicyError("the replicas' policies want different predictions: " + " and ".join(map(described, found)))
    return found[0] if found else None


def predictions(outputs: npt.ArrayLike, predictor: Predictor, seed: int) -> IntArray:
    """A guess at each of the true lengths ``outputs``. Shapes: ``(n,)``.

    The same draws serve every ``tau`` and every accuracy, so two runs differ in the quality of their guesses alone.
    """
    truth = np.asarray(outputs, dtype=np.int64)
    rng = stream(seed, "predictions")
    return _noisy(truth, predictor.tau, rng) if predictor.kind == "noisy" else _buckets(truth, predictor, rng)


def described(predictor: Predictor) -> str:
    """One line for readers of the results."""
    if predictor.kind == "noisy":
        return f"true lengths in an order of Kendall τ {predictor.tau:g} with the true one; no predictor is modelled"
    return (
        f"the true length's bucket, one of {predictor.buckets}, right in {predictor.accuracy:.0%} of cases;"
        " no predictor is modelled"
    )


def _noisy(truth: IntArray, tau: float, rng: np.random.Generator) -> IntArray:
    """The true lengths dealt out in another order: of all pairs (1 + τ) / 2 stand as in truth.

    A Gaussian copula: for two normal variables of correlation ρ, τ = 2/π · asin ρ (Greiner 1909). Equal lengths count
    as pairs in random order, so that a τ that gives ties half weight comes out a little different.
    """
    n = len(truth)
    rank = _ranks(truth, rng.permutation(n))
    normal = np.sort(rng.standard_normal(n))[rank]
    rho = math.sin(math.pi / 2 * tau)
    noise = math.sqrt(max(0.0, 1 - rho * rho)) if abs(tau) < 1 else 0.0
    score = rho * normal + noise * rng.standard_normal(n)
    return np.sort(truth)[_ranks(score, rank)]


def _buckets(truth: IntArray, predictor: Predictor, rng: np.random.Generator) -> IntArray:
    """The middle of each length's bucket; where the guess is wrong, of another bucket, all equally likely."""
    levels = np.quantile(truth, np.arange(1, predictor.buckets) / predictor.buckets)
    bucket = np.searchsorted(levels, truth, side="left")
    wrong = rng.random(len(truth)) >= predictor.accuracy
    shift = rng.integers(1, max(2, predictor.buckets), len(truth))
    middles = np.array([_middle(truth[bucket == b], truth) for b in range(predictor.buckets)])
    return middles[np.where(wrong, (bucket + shift) % predictor.buckets, bucket)]


def _middle(members: IntArray, everybody: IntArray) -> int:
    """A bucket's median; of an empty bucket (many lengths are equal) the median of all."""
    return int(np.median(members if len(members) else everybody))


def _ranks(values: npt.NDArray[np.generic], ties: IntArray) -> IntArray:
    """The place of each value among all, from 0 for the smallest; equal values in the order of ``ties``."""
    rank = np.empty(len(values), np.int64)
    rank[np.lexsort((ties, values))] = np.arange(len(values))
    return rank
