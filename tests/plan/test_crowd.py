"""Clients in a closed loop and a new tenant, held to a queue that is known in closed form and to sums by hand."""

from __future__ import annotations

import json
import math
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import pytest

from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.crowd import crowd
from chairlift.sim.plan.deciding import Effort, Measure
from chairlift.sim.plan.promises import Latency, Promise, Sample, sample_of
from chairlift.sim.plan.questions import taker
from kit.command import chairlift

PROMISE = Promise(share=0.9, e2el_ms=5757)
THINK_S = 5.0
SOMETHING = Candidate({"replicas": 1}, None, Path(), False, None, usd_per_hour=3.6)  # type: ignore[arg-type]


def met(clients: int, think_s: float = THINK_S, stay_s: float = 5.757) -> float:
    """M/M/1 with so many clients who think: a request sees the others as they are without its own client.

    (Sevcik and Mitrani, J. ACM 28, 1981.) With k before it, it stays for k + 1 exponential services of mean 1 s.
    """
    others, beyond, term, tails, weight = [], 0.0, math.exp(-stay_s), [], 1.0
    for k in range(clients):
        others.append(weight)
        weight *= (clients - 1 - k) / think_s
        beyond += term
        term *= stay_s / (k + 1)
        tails.append(beyond)
    return 1 - sum(p * tail for p, tail in zip(others, tails, strict=True)) / sum(others)


def looped(seed: int, promise: Promise = PROMISE, think_s: float = THINK_S, each: int = 1) -> Measure:
    """That queue, customer by customer; ``each``: requests of a client, at least."""

    def run(clients: int, requests: int, replication: int) -> Sample:
        random = np.random.default_rng([seed, replication])
        firsts = random.uniform(0, think_s, clients) if each > 1 else np.zeros(clients)
        ready = sorted((first, client) for client, first in enumerate(firsts.tolist()))  # a heap
        free, arrivals, stays = 0.0, [], []
        services, thinks = random.exponential(size=requests).tolist(), random.exponential(think_s, requests).tolist()
        for service, think in zip(services, thinks, strict=True):
            arrival, client = heappop(ready)
            free = max(free, arrival) + service
            arrivals.append(arrival)
            stays.append(1e3 * (free - arrival))
            heappush(ready, (free + think, client))
        ms = {"ttft": np.zeros(requests), "tpot": np.zeros(requests), "e2el": np.array(stays)}
        return sample_of([promise], Latency(np.array(arrivals), ms, np.zeros(requests, dtype=bool)))

    return lambda clients, requests, replications: [
        run(int(clients), max(requests, each * int(clients)), r) for r in range(replications)
    ]


def test_the_most_clients_of_a_queue_that_is_known() -> None:
    """Six clients keep the promise and seven break it: 93.0 and 88.3 % stay for at most 5.757 s."""
    most = max(n for n in range(1, 20) if met(n) >= 0.9)
    assert most == 6
    assert [round(met(n), 3) for n in (1, 6, 7)] == [0.997, 0.93, 0.883]  # alone: 1 − e^−5.757

    for guess in (1, 5, 40):
        found = crowd(SOMETHING, looped(1), [PROMISE], guess, Effort(requests=8000, precision=0.01))
        assert (found.kept, found.broken) == (most, most + 1)
        assert f"{most} clients, ${3.6 / most:,.3g}/h each; {most + 1} break one" in str(found)


@pytest.mark.parametrize("guess", [250, 330, 500])
def test_hundreds_of_clients_are_found_by_few_numbers(guess: int) -> None:
    """A second of service and 430 s of thought: 99 % stay for at most 21.5 s with up to 350 clients."""
    think_s, promise = 430.0, Promise(percentile=99, e2el_ms=21_500)
    truth = max(n for n in range(300, 420) if met(n, think_s, 21.5) >= 0.99)
    assert truth == 350
    tried: list[str] = []
    measure = looped(2, promise, think_s, each=16)
    found = crowd(SOMETHING, measure, [promise], guess, Effort(precision=0.05), tried.append)

    assert found.kept <= truth < found.broken <= 1.5 * truth
    assert found.kept >= 0.7 * truth
    assert len(tried) <= 8


def test_one_client_may_be_too_many() -> None:
    """Services alone take longer than 2.3 s in a tenth of all cases."""
    hard = [Promise(share=0.9, e2el_ms=1000)]

    def measure(clients: float, requests: int, replications: int) -> list[Sample]:
        services = [np.random.default_rng(r).exponential(1e3, requests) for r in range(replications)]
        each = np.zeros(requests)
        times = np.arange(requests, dtype=float)
        return [sample_of(hard, Latency(times, {"ttft": each, "tpot": each, "e2el": s}, each > 0)) for s in services]

    found = crowd(SOMETHING, measure, hard, 8, Effort(requests=400))

    assert found.kept == 0
    assert "not even one client" in str(found)


BASE = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: {name: vllm, max_num_seqs: 1}
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 1000, output_tokens: 100}
search: {requests: 200, most_requests: 400, precision: 0.2, draws: 0}
prices: {h100: 3.6}
"""


def told_of(folder: Path, text: str) -> dict[str, list[str]]:
    (folder / "p.yaml").write_text(BASE + text)
    result = chairlift("plan", str(folder / "p.yaml"), "--out", str(folder / "out"), "--jobs", "1", "--json")
    assert result.status in (0, 1), result.err
    told = json.loads(result.out)
    assert all(line in (folder / "out" / "plan.html").read_text() for line in told["asked"])
    return told  # type: ignore[no-any-return]


def test_clients_of_a_server_that_takes_one_at_a_time(tmp_path: Path) -> None:
    """A request alone takes 0.66 to 0.68 s, and N clients who do not think wait N times as long: three make 2.3 s."""
    told = told_of(tmp_path, "slo: [{share: 0.9, e2el_ms: 2300}]\nask: {clients: {}}\naxes: {replicas: [1]}\n")

    assert "0 s on average: replicas 1 keeps the promises with 3 clients, $1.2/h each; 4 break one" in told["asked"][0]


def cluster(replicas: int, rate: float) -> str:
    load = f"{{arrivals: {{poisson: {{rate_per_s: {rate}}}}}, prompt_tokens: 1000, output_tokens: 100}}"
    return f"{{replicas: {replicas}, workload: {load}}}"


@pytest.mark.parametrize(("west", "outcome", "goes"), [(1, "broken", "east"), (6, "kept", "west")])
def test_the_cluster_with_more_room_takes_the_tenant(tmp_path: Path, west: int, outcome: str, goes: str) -> None:
    """A replica serves some 1.5 requests a second: east has 1 of 4.5, west 2 of 1.5 or of 9, and the new tenant 1."""
    clusters = f"{{east: {cluster(3, 1)}, west: {cluster(west, 2)}}}"
    text = f"slo: [{{share: 0.9, e2el_ms: 8000}}]\nask: {{tenant: {{rate_per_s: 1, clusters: {clusters}}}}}\n"
    told = told_of(tmp_path, text)

    assert told["asked"][-1] == f"the new tenant goes to cluster {goes}"
    said = f"The new tenant goes to cluster {goes}, which keeps p90 E2E ≤ 8000 ms with it."
    assert said in (tmp_path / "out" / "plan.html").read_text()
    lines = [line.replace(" with the new tenant, at", "").split(", up to")[0] for line in told["asked"][:-1]]
    assert sorted(lines) == ["cluster east 2 requests/s: kept", f"cluster west 3 requests/s: {outcome}"]


def test_no_cluster_may_have_room(tmp_path: Path) -> None:
    ask = f"ask: {{tenant: {{rate_per_s: 9, clusters: {{a: {cluster(1, 1)}}}}}}}\n"
    (tmp_path / "p.yaml").write_text(f"{BASE}slo: [{{share: 0.9, e2el_ms: 8000}}]\n{ask}")
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 1
    assert "No cluster takes the new tenant." in result.out
    assert taker([]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate_per_s: 1\nask: {tenant: {rate_per_s: 1, clusters: {a: {}}}}\n", "leave out axes, today and rate_per_s"),
        ("ask: {tenant: {rate_per_s: 1, clusters: {a: {replicas: 2}}}}\n", "must have a workload"),
        ("ask: {tenant: {rate_per_s: 1, clusters: {a: {workload: {prompt_tokens: 1, output_tokens: 1}}}}}\n", "a"),
        (
            "axes: {workload.sessions: [{turns: 2, think_s: 1}]}\nask: {clients: {}}\n",
            "no mix, sessions, servegen",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(BASE + "slo: [{share: 0.9, e2el_ms: 8000}]\n" + text)
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 2, result.out
    assert said in " ".join(result.err.split())


def test_requests_that_cannot_be_served_are_said_so(tmp_path: Path) -> None:
    """Prompts of 5,000 tokens in a context of 4,096: half of all requests are refused at any load."""
    text = BASE.replace("prompt_tokens: 1000", "prompt_tokens: {values: [1000, 5000]}")
    (tmp_path / "p.yaml").write_text(text + "slo: [{share: 0.9, e2el_ms: 8000}]\naxes: {replicas: [1]}\n")
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 1, result.err
    assert "p99_e2el not served" in " ".join(result.out.split())
    assert "e+" not in result.out
