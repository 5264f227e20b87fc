"""Predicted lengths: as good as asked, never better, and drawn apart from everything else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from chairlift.policies.base import PolicyError, Predictor, Request, Step
from chairlift.policies.sjf import Sjf
from chairlift.sim.cluster.predicted_lengths import IntArray, described, predictions, wanted
from chairlift.sim.simulate import simulate
from chairlift.sim.workload.random_streams import stream
from kit.clusters import group, setup_of
from kit.worlds import trace_of


def kendall(a: IntArray, b: IntArray) -> float:
    """Kendall's τ by its definition: concordant less discordant pairs, over all pairs; ties count as neither."""
    first, second = (np.sign(x[:, None] - x[None, :]) for x in (a, b))
    n = len(a)
    return float((first * second).sum()) / (n * (n - 1))


def lengths(n: int, seed: int = 0) -> IntArray:
    """Lengths without ties, so that τ is what the definition says."""
    return stream(seed, "test").permutation(np.arange(1, n + 1) ** 2)


@pytest.mark.parametrize("tau", [-0.5, 0.0, 0.25, 0.5, 0.75, 0.95])
def test_the_order_has_the_tau_that_was_asked_for(tau: float) -> None:
    # the standard deviation of τ over samples of 1500 is at most some 0.02
    found = [kendall(truth := lengths(1500, s), predictions(truth, Predictor(tau=tau), s)) for s in range(4)]

    assert np.mean(found) == pytest.approx(tau, abs=0.03)


def test_a_tau_of_one_is_the_truth_ties_and_all() -> None:
    truth = stream(1, "test").integers(1, 9, 500)

    assert (predictions(truth, Predictor(tau=1.0), 3) == truth).all()


def test_guesses_are_the_true_lengths_dealt_out_anew() -> None:
    truth = stream(1, "test").integers(1, 900, 500)
    guesses = predictions(truth, Predictor(tau=0.3), 3)

    assert (np.sort(guesses) == np.sort(truth)).all()
    assert (guesses != truth).mean() > 0.9


def test_the_same_seed_gives_the_same_guesses_and_others_differ() -> None:
    truth = lengths(300)
    one, again, other = (predictions(truth, Predictor(tau=0.5), seed) for seed in (1, 1, 2))

    assert (one == again).all()
    assert (one != other).any()


def test_buckets_are_right_as_often_as_said() -> None:
    truth = lengths(4000)
    sure = predictions(truth, Predictor("buckets", buckets=8), 0)
    names = np.unique(sure)

    assert len(names) == 8
    for name in names:  # each in the midst of its members, an eighth of all
        members = truth[sure == name]
        assert len(members) == pytest.approx(500, abs=2)
        assert members.min() <= name <= members.max()
    unsure = predictions(truth, Predictor("buckets", buckets=8, accuracy=0.7), 0)
    assert (unsure == sure).mean() == pytest.approx(0.7, abs=0.03)


def test_one_cluster_has_one_predictor() -> None:
    assert wanted([Sjf(), Sjf(predictions="noisy", tau=0.5)]) == Predictor("noisy", tau=0.5)
    assert wanted([Sjf()]) is None
    with pytest.raises(PolicyError, match="different predictions"):
        wanted([Sjf(predictions="noisy", tau=0.4), Sjf(predictions="noisy", tau=0.5)])


def test_a_policy_that_sees_the_truth_says_so() -> None:
    assert Sjf().oracle
    assert Sjf(predictions="noisy", tau=1.0).oracle
    assert not Sjf(predictions="noisy", tau=0.99).oracle
    assert not Sjf(predictions="buckets").oracle
    assert "τ 0.5" in described(Predictor(tau=0.5))
    assert "70%" in described(Predictor("buckets", accuracy=0.7))


SEEN: list[tuple[int | None, int | None]] = []


class Nosy(Sjf):
    """Writes down what it is told of lengths."""

    def schedule(self, step: Step) -> int:
        SEEN.extend((r.output_tokens, r.predicted_tokens) for r in everybody(step))
        return super().schedule(step)


def everybody(step: Step) -> Iterator[Request]:
    yield from step.waiting
    yield from step.running


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        ({}, ("oracle", "this policy reads true output lengths")),
        ({"predictions": "noisy", "tau": 0.2}, ("predicted lengths", described(Predictor(tau=0.2)))),
    ],
)
def test_a_run_says_what_its_policy_knows_of_lengths_and_tells_it_no_more(
    chosen: dict[str, object], line: tuple[str, str]
) -> None:
    SEEN.clear()
    truth = [37 + 2 * i for i in range(20)]
    trace = trace_of([(0, 10, output) for output in truth])
    outcome = simulate(setup_of(trace, [group(Nosy, chosen)], seed=5))

    assert line in outcome.assumptions.items()
    if "tau" in chosen:
        assert "oracle" not in outcome.assumptions
        assert {told for told, _ in SEEN} == {None}
        assert {guess for _, guess in SEEN} == set(predictions(truth, Predictor(tau=0.2), 5).tolist())
    else:
        assert {told for told, _ in SEEN} == set(truth)
        assert {guess for _, guess in SEEN} == {None}
