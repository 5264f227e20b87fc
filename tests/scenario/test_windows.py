"""Scenarios of models whose layers have windows: what pool they get, what is printed of it, and that they leap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chairlift.policies.base import KvGroups
from chairlift.sim.bad_input import BadInput
from chairlift.sim.cluster.run import run
from chairlift.sim.replica.hybrid_pool import HybridPool, HybridStandIn
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from kit.command import chairlift
from kit.serving import serve_line

WORKLOAD = {
    "requests": 150,
    "arrivals": {"poisson": {"rate_per_s": 12}},
    "prompt_tokens": {"uniform": {"low": 10, "high": 3000}},
    "output_tokens": {"uniform": {"low": 1, "high": 300}},
}
SHARED = {**WORKLOAD, "prefix": {"groups": 4, "tokens": 1500}}


def ready(**system: Any) -> Setup:
    data = {"gpu": "h200", "policy": "vllm", "workload": WORKLOAD, "max_model_len": 8192, **system}
    return prepare(Document(data, {}, "test"), Path())


def test_gpt_oss_has_the_blocks_that_vllm_told() -> None:
    """vLLM 0.26 on an H200, utilisation 0.9, 8192 tokens and 256 requests a step: 106,049 blocks in two groups."""
    setup = ready(model="gpt-oss-120b", policy={"name": "vllm", "max_num_seqs": 256})
    [group] = setup.groups
    assert group.blocks == pytest.approx(106_049, rel=0.03)
    assert group.kv_groups == KvGroups((128, 0))
    [engine] = run(setup).engines
    assert type(engine.pool) is HybridStandIn  # its prompts have nothing in common
    assert engine.pool.total == group.blocks
    assert f"= {group.blocks:,} blocks, each of 16 tokens of one of 2 groups of 18 layers" in group.kv_source


def test_chunks_are_told_from_windows() -> None:
    [group] = ready(model="llama-4-scout", tensor_parallel=8).groups
    assert group.kv_groups == KvGroups((8192, 8192, 8192, 0), chunked=True)


def test_without_the_hybrid_manager_all_layers_keep_everything() -> None:
    apart = ready(model="gemma-3-12b").groups[0]
    alike = ready(model="gemma-3-12b", policy={"name": "vllm", "disable_hybrid_kv_cache_manager": True}).groups[0]
    assert alike.kv_groups is None
    assert alike.blocks == pytest.approx(apart.blocks / 6, rel=0.001)  # of 48 layers, not of 8
    assert ready(model="llama-3.1-8b").groups[0].kv_groups is None
    assert ready(model="gemma-3-12b", policy="sglang").groups[0].kv_groups is None


def test_blocks_are_the_engines_and_tokens_are_whole() -> None:
    assert ready(model="gpt-oss-20b", kv={"blocks": 3000}).groups[0].blocks == 3000
    assert ready(model="gpt-oss-20b", kv={"tokens": 160_000}).groups[0].blocks == 20_000
    own = {"name": "vllm", "num_gpu_blocks": 3001, "block_size": 32}
    assert ready(model="gpt-oss-20b", policy=own).groups[0].blocks == 3000


@pytest.mark.parametrize("workload", [WORKLOAD, SHARED], ids=["own prompts", "shared prefixes"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("model", "blocks"), [("gemma-3-12b", 6 * 400), ("gpt-oss-20b", 400), ("mistral-7b-v0.1", 900)]
)
def test_a_run_that_leaps_is_the_run_step_by_step(
    model: str, blocks: int, asynchronous: bool, workload: dict[str, Any]
) -> None:
    """Small pools: requests are preempted, and find their own prefixes and others'."""
    policy = {"name": "vllm", "max_num_batched_tokens": 512, "max_num_seqs": 64, "async_scheduling": asynchronous}
    setup = ready(model=model, policy=policy, kv={"blocks": blocks}, workload=workload, max_model_len=None)
    leapt, stepped = simulate(setup), simulate(setup, leap=False)

    one, other = leapt.summary, stepped.summary
    for key in ("completed", "steps", "preemptions", "prefix_hit_rate", "median_itl_ms", "p99_itl_ms", "p99_tpot_ms"):
        assert one[key] == other[key], key
    assert leapt.requests.columns().keys() == stepped.requests.columns().keys()
    for name, column in leapt.requests.columns().items():
        assert list(column) == list(stepped.requests.columns()[name]), name
    assert leapt.summary["preemptions"] > 0 or model == "gpt-oss-20b"
    assert leapt.summary["runs"] < stepped.summary["runs"]
    shares = [leapt.summary[f"kv_{share}"] for share in ("utilization", "reserved", "internal", "free")]
    assert sum(shares) == pytest.approx(1)
    assert 0.3 < shares[0] < 1


def test_pools_end_as_they_began() -> None:
    setup = ready(model="gemma-3-12b", kv={"blocks": 4000}, workload=SHARED)
    [engine] = run(setup).engines
    assert type(engine.pool) is HybridPool
    assert engine.pool.free == engine.pool.total
    assert sum(engine.pool.held()) == 0


def test_a_request_that_the_windows_leave_no_room_for_is_refused_with_the_sum() -> None:
    """Groups with a window keep 1,023 + 2 × 512 tokens of it, 129 blocks: of 6 × 130 blocks the last group has 135."""
    workload = {**WORKLOAD, "requests": 2, "prompt_tokens": 6000}
    policy = {"name": "vllm", "max_num_batched_tokens": 512, "max_num_seqs": 8}
    system = {"model": "gemma-3-12b", "policy": policy, "kv": {"blocks": 6 * 130}, "workload": workload}
    with pytest.raises(BadInput, match="must be at most the 2160 tokens that the KV pool holds"):
        ready(**system)
    outcome = simulate(ready(**system, max_model_len=None))
    assert outcome.summary["rejected"] == 2
    assert "2 larger than the KV pool of 2,160 tokens" in outcome.assumptions["refused"]


def test_commands_say_what_was_simulated() -> None:
    policy = {"name": "vllm", "disable_hybrid_kv_cache_manager": True, "prefix_cache_retention_interval": "dense"}
    line = serve_line(ready(model="gpt-oss-20b", policy=policy))
    assert "--disable-hybrid-kv-cache-manager" in line
    assert "--prefix-cache-retention-interval None" in line
    line = serve_line(ready(model="gpt-oss-20b", policy={"name": "vllm", "prefix_cache_retention_interval": 64}))
    assert "--prefix-cache-retention-interval 64" in line


@pytest.mark.parametrize("value", [-1, "sparse", 0.5])
def test_a_retention_is_a_number_of_tokens_or_dense(value: object) -> None:
    with pytest.raises(BadInput, match="prefix_cache_retention_interval"):
        ready(model="gpt-oss-20b", policy={"name": "vllm", "prefix_cache_retention_interval": value})


@pytest.mark.parametrize(
    ("model", "policy", "rule"),
    [
        (
            "llama-3.1-8b",
            {"prefix_cache_retention_interval": 64},
            r"must be 0 where no layer keeps a sliding window \(got 64\)",
        ),
        ("llama-4-scout", {"prefix_cache_retention_interval": 64}, "must be 0 where no layer keeps a sliding window"),
        (
            "gpt-oss-20b",
            {"prefix_cache_retention_interval": 64, "disable_hybrid_kv_cache_manager": True},
            "must be 0 where no layer keeps a sliding window",
        ),
        (
            "gpt-oss-20b",
            {"prefix_cache_retention_interval": 40},
            r"must be a multiple of the block size, 16 \(got 40\)",
        ),
    ],
)
def test_a_retention_that_vllm_does_not_start_with_is_refused(model: str, policy: dict[str, object], rule: str) -> None:
    with pytest.raises(BadInput, match=f"prefix_cache_retention_interval: {rule}"):
        ready(model=model, policy={"name": "vllm", **policy}, kv={"blocks": 9000})


@pytest.mark.parametrize("value", [0, "dense"])
def test_a_model_without_windows_may_retain_nothing_or_all(value: object) -> None:
    ready(model="llama-3.1-8b", policy={"name": "vllm", "prefix_cache_retention_interval": value})


def test_what_a_run_leaves_says_that_a_block_is_of_one_group(tmp_path: Path) -> None:
    for model, tables in (("gpt-oss-20b", 2), ("llama-3.1-8b", None)):
        file = tmp_path / f"{model}.yaml"
        file.write_text(json.dumps({"model": model, "gpu": "h200", "policy": "vllm", "workload": WORKLOAD}))
        result = chairlift("run", str(file), "--out", str(tmp_path / model))
        assert result.status == 0, result.err
        study = json.loads((tmp_path / model / "study.json").read_text(encoding="utf-8"))
        [replica] = study["runs"][0]["replicas"]
        assert replica.get("kv_tables") == tables
        shown = chairlift("report", str(tmp_path / model))
        assert shown.status == 0, shown.err
