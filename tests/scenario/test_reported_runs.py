"""Runs made after public reports of people who serve, benchmark and simulate; each test names its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate

SYSTEM = {"model": "llama-3.1-8b", "gpu": "h100", "policy": "vllm"}


def served(folder: Path = Path(), **keys: Any) -> Outcome:
    return simulate(prepare(Document(SYSTEM | keys, {}, "report.yaml"), folder))


def test_a_range_of_lengths_that_outgrows_the_model() -> None:
    """``--random-input-len 6200 --random-range-ratio 0.5`` where the model takes 9,014 tokens.

    The server failed without saying what had made the requests so long; here the refusal has the sum.
    https://github.com/intel/llm-scaler/issues/255
    """
    workload = {
        "requests": 200,
        "arrivals": {"poisson": {"rate_per_s": 0.8}},
        "prompt_tokens": {"uniform": {"low": 3100, "high": 9300}},
        "output_tokens": {"uniform": {"low": 675, "high": 2025}},
    }
    outcome = served(workload=workload, max_model_len=9014)
    trace = outcome.setup.trace
    total = trace.prompt_tokens + trace.output_tokens
    longest = int(total.argmax())

    assert outcome.summary["rejected"] == int(np.sum(total > 9014)) > 0
    assert outcome.assumptions["refused"] == (
        f"{outcome.summary['rejected']} longer than the model's 9,014 tokens (prompt and output; the longest "
        f"{trace.prompt_tokens[longest]:,} + {trace.output_tokens[longest]:,} = {total[longest]:,})"
    )


def test_a_trace_in_vidurs_columns_that_outgrows_the_model(tmp_path: Path) -> None:
    """``mooncake_conversation_trace.csv`` on a model of 8,192 tokens fails in vLLM, and did not in the simulation.

    https://github.com/microsoft/vidur/issues/60
    """
    rows = "\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", "0,6758,500", "0,7322,990", "3,12000,100"])
    (tmp_path / "t.csv").write_text(rows + "\n", encoding="utf-8")
    outcome = served(tmp_path, workload={"file": "t.csv"}, max_model_len=8192)

    assert (outcome.summary["completed"], outcome.summary["rejected"]) == (1, 2)
    assert outcome.assumptions["refused"] == (
        "2 longer than the model's 8,192 tokens (prompt and output; the longest 12,000 + 100 = 12,100)"
    )


def test_a_closed_loop_never_has_more_inside_than_it_has_clients() -> None:
    """A concurrency of 45 was seen to reach 74.5, with 45 prompts of 30,000 tokens that pairs of requests share.

    https://github.com/kubernetes-sigs/inference-perf/issues/319
    """
    workload = {
        "requests": 270,
        "clients": {"concurrency": 45},
        "prefix": {"groups": 45, "tokens": 3000},
        "prompt_tokens": 3256,
        "output_tokens": 24,
    }
    columns = served(workload=workload).requests.columns()
    came, went = (np.asarray(columns[name]) for name in ("arrival_ps", "finished_ps"))
    instants = np.unique(np.concatenate([came, went]))
    inside = np.searchsorted(np.sort(came), instants, "right") - np.searchsorted(np.sort(went), instants, "right")

    assert inside.max() == 45
    assert set(inside[instants < came.max()].tolist()) == {45}  # and never fewer while there are requests to send
    assert inside[-1] == 0


def test_first_tokens_and_gaps_have_times_where_prefill_is_elsewhere() -> None:
    """A benchmark of disaggregated prefill said TTFT 0 ms and ITL 0 ms.

    https://github.com/sgl-project/sglang/issues/9585
    """
    workload = {"requests": 32, "clients": {"concurrency": 16}, "prompt_tokens": 25_000, "output_tokens": 100}
    replicas = [{"count": 1, "role": "prefill"}, {"count": 1, "role": "decode"}]
    summary = served(policy="sglang", workload=workload, replicas=replicas, link={"gb_per_s": 50}).summary

    # 25,000 tokens of 2 · 8.03e9 FLOP at no more than 989 TFLOP/s
    assert summary["median_ttft_ms"] > 2 * 8.03e9 * 25_000 / 989e12 * 1000
    assert summary["median_itl_ms"] > 8.03e9 * 2 / 3.35e12 * 1000  # the weights are read once a step
    # 25,000 tokens of 131,072 bytes at 50 GB/s, and 10 µs
    assert summary["median_transfer_ms"] == pytest.approx(25_000 * 131_072 / 50e9 * 1000 + 0.01, rel=0.01)
    assert summary["std_itl_ms"] > 0


def test_longest_prefix_first_starves_who_shares_none() -> None:
    """In a short queue, each newcomer with a long cached prefix goes before a request without one.

    https://github.com/sgl-project/sglang/issues/31954
    """
    shared = {"prompt_tokens": 16_200, "output_tokens": 200}
    hot = {"arrivals": {"poisson": {"rate_per_s": 4}}, "prefix": {"groups": 1, "tokens": 16_000}}
    mix = {
        "hot": {"requests": 300, **hot, **shared},
        "cold": {"requests": 15, "arrivals": {"poisson": {"rate_per_s": 0.2}}, **shared},
    }
    waits: dict[str, dict[str, float]] = {}
    for order in ("fcfs", "lpm"):
        policy = {"name": "sglang", "schedule_policy": order, "max_running_requests": 16}
        outcome = served(policy=policy, workload={"mix": mix})
        columns = outcome.requests.columns()
        ttft = (np.asarray(columns["first_token_ps"]) - np.asarray(columns["arrival_ps"])) / 1e12
        tenant = outcome.setup.trace.tenant
        waits[order] = {name: float(ttft[tenant == i].mean()) for i, name in enumerate(mix)}
        assert outcome.summary["completed"] == 315

    assert waits["lpm"]["cold"] > 2 * waits["fcfs"]["cold"]
    assert waits["lpm"]["hot"] < waits["fcfs"]["hot"]


def test_bursts_cost_first_tokens_and_no_throughput() -> None:
    """Gamma gaps of CV 3 beside Poisson's at one rate: TTFT rises severalfold, and the more the higher the load.

    https://github.com/inference-sim/inference-sim/pull/818
    """
    ratios = []
    for rate in (8, 20):
        found = {}
        for name, process in (("poisson", {"poisson": {}}), ("gamma", {"gamma": {"cv": 3}})):
            arrivals = {kind: keys | {"rate_per_s": rate} for kind, keys in process.items()}
            workload = {"requests": 2000, "arrivals": arrivals, "prompt_tokens": 1000, "output_tokens": 200}
            summaries = [served(workload=workload, seed=seed).summary for seed in range(2)]
            found[name] = np.mean(
                [[s["mean_ttft_ms"], s["request_throughput"] / s["offered_rate"]] for s in summaries], 0
            )
        ratios.append(found["gamma"][0] / found["poisson"][0])
        assert found["gamma"][1] == pytest.approx(found["poisson"][1], rel=0.03)

    assert ratios[1] > ratios[0] > 1
    assert ratios[1] > 2
