"""Queueing theory, which knows nothing of this program: long runs must agree with it.

Randomness is thinned so that short runs will do: a sample of n takes each of n equally likely quantiles once, in
random order, and so has the right moments to begin with. Standard errors quoted were measured over many seeds, on
recursions of a few lines rather than on the simulator.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from chairlift.policies.orca import Orca
from chairlift.sim.workload.lengths import Exponential
from chairlift.sim.workload.random_streams import stream
from kit.worlds import Affine, World, check_books, play, trace_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def exponential(n: int, purpose: str) -> Floats:
    """``n`` values of mean 1, each quantile once, in random order."""
    quantiles = -np.log1p(-(np.arange(n) + 0.5) / n)
    return stream(7, purpose).permutation(quantiles)


def sojourns(world: World) -> Ints:
    return np.array(world.requests.finished) - world.requests.trace.arrival_ps


# M/D/1: one request at a time, each a single step of SERVICE ps

SERVICE = 1_000_000
RHO = 0.7


@cache
def one_by_one() -> World:
    n = 40_000
    arrivals = np.cumsum(exponential(n, "arrivals") * SERVICE / RHO).astype(np.int64).tolist()
    trace = trace_of([(t, 1, 1) for t in arrivals])
    return play(
        trace,
        lambda: Orca(max_batch=1, reserve="oracle"),
        lambda: Affine(fixed=SERVICE, token=0, context=0),
    )


def left_behind(world: World) -> float:
    """Mean number in system that a departure leaves behind, from the run rows: one row is one service.

    The row that starts at a departure shows them all, as running or waiting; no such row: nobody was left.
    """
    runs = world.engines[0].records.runs()
    starts = runs["start_ps"]
    assert set(runs["steps"].tolist()) == {1}
    at_once = starts[1:] == starts[:-1] + runs["first_ps"][:-1]
    present = (runs["running"] + runs["waiting"])[1:]
    return float(present[at_once].sum() / len(starts))


def test_one_server_finishes_each_request_when_lindleys_recursion_says() -> None:
    # finish(i) = max(arrival(i), finish(i - 1)) + service, to the picosecond
    world = one_by_one()

    expected = []
    free_at = 0
    for arrival in world.requests.trace.arrival_ps.tolist():
        free_at = max(arrival, free_at) + SERVICE
        expected.append(free_at)

    assert list(world.requests.finished) == expected
    check_books(world)


def test_mean_wait_of_m_d_1_is_pollaczek_and_khinchines() -> None:
    # W = rho / (2 (1 - rho)) services = 7/6 of one at rho 0.7.
    # A wait and the gap after it are independent, so their product (less means) averages 0: it is used as control
    # variate, with the weight that heavy traffic suggests. Standard error 0.7 % (1.9 % without the control).
    world = one_by_one()
    wait = (sojourns(world) - SERVICE) / SERVICE
    gap = np.diff(world.requests.trace.arrival_ps) / SERVICE
    control = np.mean(wait[:-1] * (gap - 1 / RHO)) / (1 / RHO - 1)

    assert wait.mean() + control == pytest.approx(RHO / (2 * (1 - RHO)), rel=0.03)


def test_departures_of_m_d_1_leave_behind_what_littles_law_says() -> None:
    # With Poisson arrivals a departure leaves behind, on average, the time average L = lambda T.
    world = one_by_one()
    finished = list(world.requests.finished)
    per_ps = len(finished) / finished[-1]

    assert left_behind(world) == pytest.approx(per_ps * sojourns(world).mean(), rel=0.03)


# M/M/1 with processor sharing: a step takes QUANTUM ps for every token in it, so a token a step is an equal share

QUANTUM = 1_000
MEAN_TOKENS = 200  # a service is some 200 rounds, and waits half a round to begin: discretisation below 1 %
SHARED_RHO = 0.5


@cache
def shared() -> World:
    n = 40_000
    service = QUANTUM * MEAN_TOKENS
    arrivals = np.cumsum(exponential(n, "arrivals") * service / SHARED_RHO).astype(np.int64).tolist()
    tokens = np.maximum(1, np.rint(exponential(n, "tokens") * MEAN_TOKENS)).astype(np.int64).tolist()
    return play(
        trace_of([(t, 1, k) for t, k in zip(arrivals, tokens, strict=True)]),
        lambda: Orca(max_batch=n, reserve="oracle"),
        lambda: Affine(fixed=0, token=QUANTUM, context=0),
        blocks=10**9,
    )


def test_mean_sojourn_under_processor_sharing_is_service_over_one_less_rho() -> None:
    # T = E[S] / (1 - rho) = 2 services at rho 0.5; standard error 0.9 %
    service = QUANTUM * MEAN_TOKENS

    assert sojourns(shared()).mean() == pytest.approx(service / (1 - SHARED_RHO), rel=0.03)


def test_long_requests_share_the_processor_in_proportion() -> None:
    # What sets sharing apart from a queue: E[T | x] = x / (1 - rho), the same stretch for short and long.
    # Short: up to the median of 139 tokens, and not so short that the wait for a round's end counts. Long: the rest.
    world = shared()
    service = world.requests.trace.output_tokens * QUANTUM
    short = (service > 20 * QUANTUM) & (service <= 139 * QUANTUM)
    long = service > 139 * QUANTUM

    for part in (short, long):
        stretch = sojourns(world)[part].sum() / service[part].sum()
        assert stretch == pytest.approx(1 / (1 - SHARED_RHO), rel=0.03)


def test_littles_law_holds_between_request_columns_and_run_rows() -> None:
    # Time average of running + waiting over the rows, against lambda T over the requests.
    world = shared()
    runs = world.engines[0].records.runs()
    steps = runs["steps"]
    lasts = steps * runs["first_ps"] + runs["slope_ps"] * (steps * (steps - 1) // 2)
    span = max(world.requests.finished)
    number = float((lasts * (runs["running"] + runs["waiting"])).sum() / span)
    per_ps = len(world.requests.trace) / span

    assert number == pytest.approx(per_ps * sojourns(world).mean(), rel=0.03)
    check_books(world)


# two servers, dealt out in turn


def test_two_replicas_in_turn_are_two_servers_of_every_second_request() -> None:
    # finish(i) = max(arrival(i), finish(i - 2)) + service
    n = 10_000
    arrivals = np.cumsum(exponential(n, "arrivals") * SERVICE / (2 * RHO)).astype(np.int64).tolist()

    world = play(
        trace_of([(t, 1, 1) for t in arrivals]),
        lambda: Orca(max_batch=1, reserve="oracle"),
        lambda: Affine(fixed=SERVICE, token=0, context=0),
        replicas=2,
    )

    expected = []
    free_at = [0, 0]
    for i, arrival in enumerate(arrivals):
        free_at[i % 2] = max(arrival, free_at[i % 2]) + SERVICE
        expected.append(free_at[i % 2])
    assert list(world.requests.finished) == expected
    assert list(world.requests.replica) == [i % 2 for i in range(n)]


# what a static batch waits for


@pytest.mark.parametrize("batch", [2, 4, 8, 16])
def test_longest_of_a_batch_of_exponential_lengths_is_harmonic_times_the_mean(batch: int) -> None:
    # E[max of B] = H_B x mean with H_B = 1 + 1/2 + ... + 1/B; at B = 16 the standard error is 0.5 %
    lengths = Exponential(mean=128).sample(100_000, stream(0, "lengths"))
    longest = lengths[: len(lengths) // batch * batch].reshape(-1, batch).max(axis=1)
    harmonic = sum(1 / k for k in range(1, batch + 1))

    assert longest.mean() == pytest.approx(128 * harmonic, rel=0.03)
