"""Rows of one table are over one population: ITL of completed requests, shares of the pool, requests refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.results.refusals import why_refused
from chairlift.sim.results.token_gaps import all_gaps, gaps_of_finished
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate

BASE = {
    "model": "llama-3.1-8b",
    "gpu": "h100",
    "kv": {"blocks": 3000},
    "max_model_len": 4000,
    "workload": {
        "requests": 200,
        "arrivals": {"poisson": {"rate_per_s": 25}},
        "prompt_tokens": {"uniform": {"low": 50, "high": 400}},
        "output_tokens": {"uniform": {"low": 1, "high": 200}},
    },
}
FAILING = {"replicas": 2, "failures": {"mtbf_s": 1, "mttr_s": 0.5, "on_failure": "fail"}}


def served(**keys: Any) -> Any:
    return simulate(prepare(Document(BASE | keys, {}, "case.yaml"), Path()))


@pytest.mark.parametrize("policy", ["vllm", "vllm_v0", "sglang", "sarathi", "orca", "tgi", "sjf", "srpt", "fair"])
@pytest.mark.parametrize("more", [{"limits": {"timeout_s": 0.8}}, FAILING, FAILING | {"limits": {"timeout_s": 0.9}}])
def test_gaps_of_completed_requests_add_up_to_their_times(policy: str, more: dict[str, Any]) -> None:
    outcome = served(policy=policy, **more)
    columns = outcome.requests.columns()
    done = columns["status"] == 1
    assert 0 < done.sum() < len(done)
    assert outcome.summary["preemptions"] == 0
    gaps = gaps_of_finished(outcome.requests, outcome.runs)

    assert gaps.of_others == 0
    assert int(gaps.often.sum()) == int((columns["output_tokens"][done].astype(np.int64) - 1).sum())
    between = sum(int(gap) * int(count) for gap, count in zip(gaps.ps, gaps.often, strict=True))
    assert between == int((columns["finished_ps"] - columns["first_token_ps"])[done].sum())


def test_requests_that_cannot_be_told_apart_are_said_to_be_counted() -> None:
    outcome = served(policy="vllm", kv={"blocks": 150}, max_model_len=1000, limits={"timeout_s": 6})
    gaps = gaps_of_finished(outcome.requests, outcome.runs)

    assert outcome.summary["preemptions"] > 0
    assert gaps.of_others > 0
    said = f"of completed requests, and of {gaps.of_others} that were preempted and then given up"
    assert outcome.assumptions["ITL"] == said


def test_where_all_complete_nothing_is_taken_out() -> None:
    outcome = served(policy="vllm")
    pool, finished = all_gaps(outcome.runs), gaps_of_finished(outcome.requests, outcome.runs)

    assert (pool.ps.tolist(), pool.often.tolist()) == (finished.ps.tolist(), finished.often.tolist())


@pytest.mark.parametrize("policy", ["vllm", "sglang", "sarathi", "orca", "static"])
def test_shares_of_the_pool_add_up_to_the_whole(policy: str) -> None:
    shared = BASE["workload"] | {"prefix": {"groups": 2, "tokens": 1000}, "prompt_tokens": 1040}  # type: ignore[operator]
    summary = served(policy=policy, workload=shared).summary
    shares = [summary[key] for key in ("kv_utilization", "kv_reserved", "kv_internal", "kv_free")]

    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) == pytest.approx(1)


def test_a_shared_prompt_is_stored_once() -> None:
    workload = {
        "requests": 640,
        "clients": {"concurrency": 64},
        "prefix": {"groups": 1, "tokens": 4096},
        "prompt_tokens": 4160,
        "output_tokens": 64,
    }
    policy = {"name": "vllm", "max_num_batched_tokens": 8192}
    summary = served(kv={"blocks": 1000}, max_model_len=5000, policy=policy, workload=workload).summary

    # 256 blocks are shared, and each of the 64 has 4 to 8 of its own: 512 to 768 of 1000
    assert 0.5 <= summary["kv_utilization"] <= 0.77
    assert summary["kv_free"] >= 0.23


# ---- refused requests ----


def test_a_refused_request_says_why_with_the_sum(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n0,5000,100\n1,100,100\n2,4000,1\n3,2000,500\n"
    )
    document = Document(
        BASE | {"policy": "sarathi", "kv": {"blocks": 100}, "workload": {"file": "t.csv"}}, {}, str(tmp_path / "c.yaml")
    )
    outcome = simulate(prepare(document, tmp_path))

    assert outcome.summary["rejected"] == 3
    assert outcome.assumptions["refused"] == (
        "2 longer than the model's 4,000 tokens (prompt and output; the longest 5,000 + 100 = 5,100); "
        "1 larger than the KV pool of 1,600 tokens (prompt and output; the longest 2,000 + 500 = 2,500)"
    )


def test_a_full_queue_is_no_matter_of_length() -> None:
    outcome = served(policy={"name": "vllm", "max_num_seqs": 2}, limits={"queue": 1})

    assert outcome.summary["rejected"] > 0
    assert "that would fit: 1 were waiting there already" in outcome.assumptions["refused"]


@pytest.mark.parametrize(
    ("prompt", "output", "words"),
    [
        (4000, 1, "prompt 4,000 + output 1 = 4,001 tokens, over the model's 4,000"),
        (3000, 500, "prompt 3,000 + output 500 = 3,500 tokens, over the KV pool's 3,200"),
        (100, 1, "its replica's queue is full, or the policy will not have it"),
    ],
)
def test_one_request_says_its_own_sum(prompt: int, output: int, words: str) -> None:
    assert why_refused(prompt, output, 4000, 3200) == words
