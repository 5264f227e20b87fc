"""Predictions beside results of ``vllm bench serve``, made of vLLM's recorded burst of 1,000 requests on an H200."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit import benched
from kit.command import Result, chairlift

SCENARIO = {
    "model": "opt-13b",
    "gpu": "h200",
    "backend": "h200-opt-13b-vllm-0.23",
    "policy": {"name": "vllm", "version": 0.23, "max_num_batched_tokens": 8192, "max_num_seqs": 256},
    "workload": {"file": "bench.json"},
}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    document = benched.burst()
    Path("bench.json").write_text(json.dumps(document))
    return document


def beside(**changes: Any) -> tuple[Result, dict[str, dict[str, Any]]]:
    Path("s.json").write_text(json.dumps(SCENARIO | changes))
    result = chairlift("validate", "s.json", "--bench", "bench.json", "--json", "cells.json")
    cells = json.loads(Path("cells.json").read_text()) if result.status == 0 else []
    return result, {cell["metric"]: cell for cell in cells}


def test_what_was_measured_is_the_files_own_account(bench: dict[str, Any]) -> None:
    """The client's own sums stand in the file: duration and percentiles that this module does not compute."""
    result, cells = beside()

    assert (result.status, result.err) == (0, "")
    for name in ("duration", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"):
        assert cells[name]["recorded"] == pytest.approx(bench[name], rel=1e-6)
    stall_s = 0.385  # of the recorded engine, near the end (tests/backend/test_stalls.py), which nothing predicts
    assert cells["duration"]["predicted"] + stall_s == pytest.approx(bench["duration"], rel=0.01)
    assert abs(cells["median_ttft_ms"]["relative_error"]) < 0.03
    assert "note: prompts are taken to share nothing" in result.out


def test_a_workload_says_what_prompts_share(bench: dict[str, Any]) -> None:
    """All prompts begin with the same 480 tokens: then far less has to be computed, and the run is shorter."""
    rows = zip(bench["input_lens"], bench["output_lens"], strict=True)
    text = "".join(f"0,{prompt},{output},0,480\n" for prompt, output in rows)
    Path("w.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,prefix_group,prefix_tokens\n{text}")
    plain, alone = beside()
    result, shared = beside(workload={"file": "w.csv"})

    assert (result.status, "share nothing" in result.out) == (0, False)
    assert shared["duration"]["predicted"] < 0.95 * alone["duration"]["predicted"]
    assert plain.status == 0


def test_requests_that_failed_are_left_out_and_told(bench: dict[str, Any]) -> None:
    for row in range(0, 1000, 2):
        bench["errors"][row], bench["output_lens"][row], bench["itls"][row], bench["ttfts"][row] = "x", 0, [], 0.0
    bench["completed"] = 500
    Path("bench.json").write_text(json.dumps(bench))
    result, cells = beside()

    assert "500 of 1,000 requests failed" in result.out
    answered = np.array(bench["output_lens"])
    throughput = answered.sum() / cells["duration"]["recorded"]
    assert cells["output_throughput"]["recorded"] == pytest.approx(throughput)


@pytest.mark.parametrize(
    ("workload", "rule"),
    [
        (
            {"requests": 9, "prompt_tokens": 5, "output_tokens": 5, "arrivals": {"poisson": {"rate_per_s": 9}}},
            "it has 9 requests, bench.json 1,000",
        ),
        (
            {"requests": 1000, "prompt_tokens": 512, "output_tokens": 5, "arrivals": {"poisson": {"rate_per_s": 9}}},
            "must be the workload that was benchmarked: request 0 of bench.json has 512 and",
        ),
    ],
)
def test_another_workload_is_refused(bench: dict[str, Any], workload: dict[str, Any], rule: str) -> None:
    result, _ = beside(workload=workload)

    assert result.status == 2
    assert rule in result.err


def test_a_result_of_another_model_is_refused(bench: dict[str, Any]) -> None:
    Path("bench.json").write_text(json.dumps(bench | {"model_id": "meta-llama/Llama-3.1-8B-Instruct"}))
    result, _ = beside()

    assert result.status == 2
    assert "bench.json: model_id: must be of the model that was benchmarked: llama-3.1-8b is not opt-13b" in result.err
    Path("bench.json").write_text(json.dumps(bench | {"model_id": "facebook/opt-13b"}))
    assert beside()[0].status == 0


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["s.json"], "give both a scenario and --bench FILE"),
        (["--bench", "bench.json"], "give both a scenario and --bench FILE"),
        ([], "give a scenario and --bench FILE, or --recording DIR and --model M"),
        (["s.json", "--bench", "bench.json", "--model", "opt-13b"], "--model: must not be given beside a scenario"),
        (["s.json", "--bench", "no.json"], "no.json: no such file"),
    ],
)
def test_what_cannot_be_compared_is_said(bench: dict[str, Any], arguments: list[str], rule: str) -> None:
    Path("s.json").write_text(json.dumps(SCENARIO))
    result = chairlift("validate", *arguments)

    assert result.status == 2
    assert rule in result.err
