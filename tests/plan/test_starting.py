"""Systems that a plan offers start: lengths fit the pool, and what an engine refuses is never simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.file import read_plan
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from kit.command import chairlift

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: l4
  policy: {name: vllm, max_num_batched_tokens: 2048}
  workload: {requests: 500, arrivals: {poisson: {rate_per_s: 0.5}}, prompt_tokens: 500, output_tokens: 50}
slo: [{percentile: 95, ttft_ms: 5000}]
rate_per_s: 0.5
search: {requests: 200}
axes:
"""


def candidates(folder: Path, axes: str, text: str = PLAN) -> list[Candidate]:
    (folder / "plan.yaml").write_text(text + axes)
    return read_plan(folder / "plan.yaml").candidates


def test_a_length_beyond_the_pool_is_cut_to_it_and_said(tmp_path: Path) -> None:
    """By hand: an L4 of 22.49 GiB has 22.49 · 0.9 − 14.96 − 1.9 = 3.38 GiB for KV of 128 KiB a token: 27,7xx tokens."""
    [one] = candidates(tmp_path, "  replicas: [1]\n")
    assert one.setup is not None
    longest = one.setup.max_model_len

    assert 0.97 * 27_700 < longest < 27_700  # the pool is worked out: an engine's own may be a little smaller
    assert longest % 16 == 0
    assert one.notes == (f"max_model_len cut from 131,072 to {longest:,}, for which the KV pool has room",)
    assert one.setup.groups[0].caution == ""


def test_a_given_pool_is_used_to_its_last_token(tmp_path: Path) -> None:
    [given, fixed, fits] = candidates(
        tmp_path,
        "zip:\n  - kv.blocks: [1000, null, 9000]\n    policy.num_gpu_blocks: [null, 1001, null]\n",
        PLAN.replace("axes:\n", "").replace("gpu: l4", "gpu: h100").replace("2048}", "2048, max_num_seqs: 64}"),
    )

    assert given.setup is not None
    assert fixed.setup is not None
    assert fits.setup is not None
    assert given.setup.max_model_len == fixed.setup.max_model_len == 16_000
    assert fits.setup.max_model_len == 131_072
    assert fits.notes == ()


def test_ranks_of_dp_attention_each_have_room_for_a_request(tmp_path: Path) -> None:
    gpu = "gpu: h100\n  parallel: {data: 2, expert: 2}\n  kv: {blocks: 1000}"
    plan = PLAN.replace("llama-3.1-8b", "qwen3-30b-a3b").replace("gpu: l4", gpu)
    [one, asked] = candidates(tmp_path, "  max_model_len: [null, 20000]\n", plan)

    assert one.setup is not None
    assert one.setup.max_model_len == 1000 * 16  # of a rank
    assert asked.setup is None  # a length that is asked for is not cut
    assert asked.misfit == "max_model_len: must be at most the 16000 tokens that the KV pool holds (got 20000)"


def test_the_answer_says_what_was_cut_and_its_line_starts(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN + "  replicas: [1]\n")
    result = chairlift("plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1")
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    [line] = [command for command in told["commands"] if command.startswith("vllm serve")]
    words = line.split()
    longest = int(words[words.index("--max-model-len") + 1])

    assert result.status == 0, result.err
    assert f"max_model_len cut from 131,072 to {longest:,}" in " ".join(result.out.split())
    assert longest < 27_700


def test_settings_with_which_the_engine_does_not_start_are_said_where_they_stand(tmp_path: Path) -> None:
    text = PLAN.replace("max_num_batched_tokens: 2048", "max_num_batched_tokens: 128, max_num_seqs: 256")
    (tmp_path / "plan.yaml").write_text(text + "  replicas: [1]\n")
    result = chairlift("plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"))

    assert result.status == 2
    assert "policy.max_num_batched_tokens: must be at least max_num_seqs, 256 (got 128)" in " ".join(result.err.split())


# ---- a scenario ----


def pool(**keys: Any) -> int:
    """Blocks of the pool. Raises `BadInput` if the engine does not start with it."""
    workload = {"requests": 2, "arrivals": {"burst": {}}, "prompt_tokens": 1000, "output_tokens": 10}
    data = {"model": "llama-3.1-8b", "gpu": "h100", "policy": "vllm", "workload": workload, **keys}
    return prepare(Document(data, {}, "test"), Path()).groups[0].blocks


@pytest.mark.parametrize("policy", ["vllm", "vllm_v0"])
def test_a_run_says_that_the_engine_would_not_start(policy: str) -> None:
    with pytest.raises(BadInput, match=r"must be at most the 4800 tokens that the KV pool holds \(got 4801\)"):
        pool(policy=policy, max_model_len=4801, kv={"blocks": 300})
    assert pool(policy=policy, max_model_len=4800, kv={"blocks": 300}) == 300
    assert pool(policy="sarathi", max_model_len=4801, kv={"blocks": 300}) == 300


def test_a_larger_budget_leaves_a_smaller_pool_and_at_last_none_that_starts() -> None:
    """An engine's log of a 24 GB card: 1,952 blocks after profiling 20,000 tokens, 1,478 and no start after 29,000."""
    card = {
        **{"name": "card24", "bf16_tflops": 71, "hbm_gb_per_s": 936, "memory_gib": 23.58, "nvlink_gb_per_s": 0},
        **{"host_gb_per_s": 31.5, "tdp_w": 350, "usd_per_gpu_hour": 0.3, "price_date": "2026"},
        **{"price_source": "none", "source": "none"},
    }
    policy = {"name": "vllm_v0", "max_num_batched_tokens": 20_000}
    assert pool(gpu=card, max_model_len=20_000, policy=policy) == pytest.approx(1952, rel=0.03)

    policy["max_num_batched_tokens"] = 29_000
    assert pool(gpu=card, max_model_len=20_000, policy=policy) == pytest.approx(1478, rel=0.03)
    with pytest.raises(BadInput, match="tokens that the KV pool holds"):
        pool(gpu=card, max_model_len=29_000, policy=policy)
