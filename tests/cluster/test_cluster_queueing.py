"""Queueing theory of several servers and of closed loops, which knows nothing of this program.

A step takes QUANTUM ps whoever is in it, so a request's service is its number of tokens; with exponential lengths of
mean 200 that is M/M/c but for the wait until a step ends, below 1 %. Samples are thinned as in `test_queueing`.
Standard errors quoted were measured over 40 seeds on recursions of a few lines, not on the simulator.
"""

from __future__ import annotations

from functools import cache
from heapq import heapreplace
from math import factorial

import numpy as np
import numpy.typing as npt
import pytest

from chairlift.policies.base import Router
from chairlift.policies.orca import Orca
from chairlift.policies.routers import LeastOutstanding, RandomChoice, RoundRobin
from chairlift.sim.workload.random_streams import stream
from kit.clusters import Served, check_endings, check_nothing_left, group, serve, setup_of
from kit.worlds import Affine, trace_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

QUANTUM = 1_000
TOKENS = 200
SERVICE = QUANTUM * TOKENS  # mean
N = 40_000
SEED = 7


def exponential(n: int, purpose: str) -> Floats:
    """``n`` values of mean 1, each quantile once, in random order."""
    quantiles = -np.log1p(-(np.arange(n) + 0.5) / n)
    return stream(SEED, purpose).permutation(quantiles)


def lengths(n: int, purpose: str = "tokens") -> list[int]:
    return np.maximum(1, np.rint(exponential(n, purpose) * TOKENS)).astype(np.int64).tolist()


def servers(replicas: int, each: int, router: type[Router], load: float, sample: str = "") -> Served:
    """Poisson arrivals at ``replicas`` replicas that serve up to ``each`` requests side by side."""
    gaps = exponential(N, "arrivals" + sample) * SERVICE / (replicas * each * load)
    arrivals = np.cumsum(gaps).astype(np.int64).tolist()
    trace = trace_of([(at, 1, tokens) for at, tokens in zip(arrivals, lengths(N, "tokens" + sample), strict=True)])
    policy = {"max_batch": each, "reserve": "oracle"}
    cost = Affine(fixed=QUANTUM, token=0, context=0)
    groups = [group(Orca, policy, replicas, blocks=10**6, cost=cost)]
    served = serve(setup_of(trace, groups, router, max_model_len=10**6, seed=1))
    check_endings(served)
    check_nothing_left(served)
    return served


def busy(served: Served) -> list[int]:
    """Time in steps of each replica, ps."""
    found = []
    for engine in served.engines:
        runs = engine.records.runs()
        steps = runs["steps"]
        found.append(int((steps * runs["first_ps"] + runs["slope_ps"] * (steps * (steps - 1) // 2)).sum()))
    return found


def waits(served: Served) -> Ints:
    return np.array(served.requests.admitted) - np.array(served.requests.arrival)


def sojourns(served: Served) -> Ints:
    return np.array(served.requests.finished) - np.array(served.requests.arrival)


@cache
def three_servers() -> list[Served]:
    return [servers(1, 3, RoundRobin, 0.7, sample) for sample in ("", " again", " once more")]


@cache
def shortest_of_two() -> Served:
    return servers(2, 1, LeastOutstanding, 0.7)


@cache
def either_of_two() -> Served:
    return servers(2, 1, RandomChoice, 0.5)


def test_three_servers_take_each_request_when_kiefer_and_wolfowitzs_recursion_says() -> None:
    # start(i) = max(arrival(i), the first server free), but for the step under way then
    served = three_servers()[0]
    free = [0, 0, 0]
    expected = []
    for arrival, tokens in zip(served.requests.arrival, served.setup.trace.output_tokens.tolist(), strict=True):
        start = max(arrival, free[0])
        expected.append(start - arrival)
        heapreplace(free, start + tokens * QUANTUM)

    # the steps of those who run go on; half of one is added on average to whoever starts beside them
    late = waits(served) - np.array(expected)
    assert 0 <= late.mean() < QUANTUM
    assert abs(late).max() < 10 * QUANTUM


def test_mean_wait_for_three_servers_is_erlangs() -> None:
    # W = C(3, a) / (3 - a) services, with C the share that waits and a = 2.1 servers busy on average.
    # A wait is independent of its own service and of the gap after it, so its products with them (less means)
    # average 0: control variates. Standard error 0.9 % (1.9 % without them).
    count, a = 3, 2.1
    last = a**count / factorial(count) / (1 - a / count)
    share = last / (sum(a**k / factorial(k) for k in range(count)) + last)
    estimates = []
    for served in three_servers():
        wait = waits(served) / SERVICE
        service = served.setup.trace.output_tokens / TOKENS
        gap = np.diff(served.setup.trace.arrival_ps) / SERVICE * a
        estimates.append(wait.mean() + 3 * np.mean(wait[:-1] * (gap - 1)) - 3 * np.mean(wait * (service - 1)))

    assert np.mean(estimates) == pytest.approx(share / (count - a), rel=0.03)


def joint_shortest_queue(load: float, most: int = 60) -> float:
    """Mean number in an M/M/2 with a queue each, arrivals joining the shorter: the chain of (shorter, longer), cut off.

    Arrivals at 2·load, service at 1 each. The chain is that of Haight, "Two Queues in Parallel", Biometrika 1958.
    """
    states = [(i, j) for j in range(most + 1) for i in range(j + 1)]
    number = {state: k for k, state in enumerate(states)}
    rates = np.zeros((len(states), len(states)))

    def move(state: tuple[int, int], to: tuple[int, int], rate: float) -> None:
        low, high = sorted(to)
        if high <= most:
            rates[number[state], number[low, high]] += rate
            rates[number[state], number[state]] -= rate

    for i, j in states:
        move((i, j), (i + 1, j), 2 * load)
        if i:
            move((i, j), (i - 1, j), 1)
        if j:
            move((i, j), (i, j - 1), 1)
    balance = rates.T.copy()
    balance[0] = 1  # the probabilities add up
    shares = np.linalg.solve(balance, np.eye(len(states))[0])
    return float(sum(p * (i + j) for p, (i, j) in zip(shares, states, strict=True)))


def test_mean_sojourn_with_the_shorter_of_two_queues_is_that_of_its_markov_chain() -> None:
    # T = L / lambda: 2.1 services at 0.7, between 1.96 with one queue for both and 3.33 with random choice.
    # Standard error 1.3 %.
    expected = joint_shortest_queue(0.7, 40) / (2 * 0.7)

    assert expected == pytest.approx(joint_shortest_queue(0.7, 30) / (2 * 0.7), rel=1e-4)  # cut off far enough out
    assert 1 / (1 - 0.7**2) < expected < 1 / (1 - 0.7)
    assert sojourns(shortest_of_two()).mean() / SERVICE == pytest.approx(expected, rel=0.03)


def test_random_choice_of_two_makes_two_independent_single_servers() -> None:
    # each is M/M/1: T = 1 / (1 - 0.5) = 2 services; standard error 1 %
    served = either_of_two()
    replica = np.array(served.requests.replica)

    assert abs((replica == 0).mean() - 0.5) < 4 * 0.5 / N**0.5
    assert sojourns(served).mean() / SERVICE == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("run", [shortest_of_two, either_of_two], ids=["shortest", "random"])
def test_single_servers_are_busy_for_as_long_as_their_requests_need(run: object) -> None:
    # work conserving, one at a time: the time in steps is the sum of the services, to the picosecond
    assert callable(run)
    served = run()
    replica, tokens = np.array(served.requests.replica), served.setup.trace.output_tokens

    assert busy(served) == [int(tokens[replica == k].sum()) * QUANTUM for k in (0, 1)]


# closed loop

CLIENTS = 5
THINK = 4  # services, mean
TURNS = 5_000


@cache
def loop() -> Served:
    """Each client sends its next request a think time after its last answer; one server."""
    n = CLIENTS * TURNS
    think = (exponential(n, "think") * THINK * SERVICE).astype(np.int64)
    think[:CLIENTS] = 0
    trace = trace_of(
        [(0, 1, tokens) for tokens in lengths(n)],
        follows=[row - CLIENTS if row >= CLIENTS else -1 for row in range(n)],
        think_ps=think.tolist(),
    )
    cost = Affine(fixed=QUANTUM, token=0, context=0)
    policy = {"max_batch": 1, "reserve": "oracle"}
    served = serve(setup_of(trace, [group(Orca, policy, blocks=10**6, cost=cost)], max_model_len=10**6))
    check_endings(served)
    return served


def repairman() -> float:
    """Answers per mean service time with one server and CLIENTS that think: the machine repair model M/M/1//N."""
    weights = [factorial(CLIENTS) / factorial(CLIENTS - k) / THINK**k for k in range(CLIENTS + 1)]
    return 1 - weights[0] / sum(weights)


def steady() -> tuple[int, float, Floats, Floats]:
    """Up to when all clients are at work; answers per ps until then; answers' sojourns and thoughts before them."""
    served = loop()
    finished = np.array(served.requests.finished).reshape(TURNS, CLIENTS)
    until = int(finished[-1].min())
    within = (finished <= until).ravel()
    assert served.setup.trace.think_ps is not None
    return until, within.sum() / until, sojourns(served)[within], served.setup.trace.think_ps[within]


def test_throughput_of_a_closed_loop_is_the_machine_repair_models() -> None:
    _, rate, _, _ = steady()

    assert rate * SERVICE == pytest.approx(repairman(), rel=0.03)


def test_throughput_of_a_closed_loop_is_clients_over_response_and_think_time() -> None:
    # the interactive response time law X = N / (R + Z); it is exact but for the requests under way at the end
    _, rate, response, think = steady()

    assert rate == pytest.approx(CLIENTS / (response.mean() + think.mean()), rel=0.001)


def test_a_turn_is_sent_its_think_time_after_the_answer_before() -> None:
    served = loop()
    arrival, finished = np.array(served.requests.arrival), np.array(served.requests.finished)
    think = served.setup.trace.think_ps
    assert think is not None

    assert np.array_equal(arrival[CLIENTS:], finished[:-CLIENTS] + think[CLIENTS:])
