"""Command lines hold what was simulated: read back by a parser of our own, and by the engines' own where they are.

``CHAIRLIFT_ENGINE_PYTHON`` may name another interpreter that has vLLM or SGLang installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chairlift.policies.sglang import Sglang
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_versions import SETTINGS, VERSIONS
from chairlift.sim.plan.emit import emitted
from chairlift.sim.plan.launch import beside, kv_of, launches
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.study import Setup
from kit.command import chairlift
from kit.serving import commands, flags, serve_line

WORKLOAD = {"requests": 3, "arrivals": {"burst": {}}, "prompt_tokens": 50, "output_tokens": 5}
BASE = {"model": "llama-3.1-8b", "gpu": "h100", "max_model_len": 8192, "workload": WORKLOAD}
DRAFTS = {"method": "mtp", "tokens": 1, "acceptance": {"length": 1.8}}
DRAFTED_BY_8B: dict[str, Any] = {
    "model": "llama-3.1-70b",
    "tensor_parallel": 4,
    "speculate": {**DRAFTS, "method": "draft_model", "draft": "llama-3.1-8b"},
}
KV_BYTES = 131_072  # of a token of Llama-3.1-8B: 2 · 32 layers · 8 heads · 128 · 2 B


def document(**keys: Any) -> Document:
    return Document({"policy": "vllm", **BASE, **keys}, {}, "s.yaml")


def ready(**keys: Any) -> Setup:
    return prepare(document(**keys), Path())


def line_of(**keys: Any) -> str:
    one = document(**keys)
    setup = prepare(one, Path())
    [part] = launches(setup, kv_of(one, 1))
    return shlex.join(part.argv)


# ---- vLLM ----


@st.composite
def vllm_policies(draw: st.DrawFn) -> dict[str, Any]:
    version = draw(st.sampled_from(VERSIONS))
    sequences = draw(st.integers(1, 1024))
    tokens = draw(st.integers(max(sequences, 16), 16384))
    drawn = {
        "enable_chunked_prefill": st.just(True) if tokens < 8192 else st.booleans(),
        "long_prefill_token_threshold": st.integers(0, 8192),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "scheduler_reserve_full_isl": st.booleans(),
        "enable_prefix_caching": st.booleans(),
        "async_scheduling": st.booleans(),
        "watermark": st.floats(0, 0.5),
        "max_num_scheduled_tokens": st.none() | st.integers(1, 20000),
        "max_num_active_seqs": st.none() | st.integers(1, sequences),
        "long_prefill_token_threshold_adaptive": st.booleans(),
        "prefill_schedule_interval": st.integers(1, 9),
        "max_num_queued_reqs": st.none() | st.integers(0, 999),
        "max_num_queued_tokens": st.none() | st.integers(0, 99999),
        "block_size": st.none() | st.sampled_from([16, 32]),
        "num_gpu_blocks": st.none() | st.integers(1000, 20000),
    }
    known = {n: s for n, s in drawn.items() if n not in SETTINGS or SETTINGS[n].holds(version)}
    some = draw(st.sets(st.sampled_from(sorted(known))))
    settings = {name: draw(known[name]) for name in sorted(some)}
    return {"name": "vllm", "version": version, "max_num_batched_tokens": tokens, "max_num_seqs": sequences, **settings}


def read_back(policy: type[Vllm], line: str) -> dict[str, Any]:
    """The settings of vLLM's policy that a line gives, by the names and types of the policy's fields."""
    given_flags = flags(line)
    assert str(policy.__name__) == "Vllm"
    found: dict[str, Any] = {}
    for each in dataclasses.fields(policy):
        name = {"num_gpu_blocks": "num_gpu_blocks_override"}.get(each.name, each.name)
        if name in given_flags:
            value = given_flags[name]
            whole = value if isinstance(value, bool) else float(value) if each.name == "watermark" else value
            number = isinstance(whole, str) and whole.isdigit()
            found[each.name] = int(str(whole)) if number else whole
    return found


@given(vllm_policies(), st.none() | st.integers(700, 9000))
def test_a_vllm_line_holds_every_setting(policy: dict[str, Any], blocks: int | None) -> None:
    setup = ready(policy=policy, **({} if blocks is None else {"kv": {"blocks": blocks}}))
    [part] = launches(
        setup, kv_of(document(policy=policy, **({} if blocks is None else {"kv": {"blocks": blocks}})), 1)
    )
    line = shlex.join(part.argv)
    read = read_back(Vllm, line)
    simulated = setup.groups[0].make_scheduler()
    told = flags(line)

    for each in dataclasses.fields(Vllm):
        if each.name in ("version", "block_size", "num_gpu_blocks"):
            continue
        assert read.get(each.name, each.default) == getattr(simulated, each.name), (each.name, line)
    [group] = setup.groups
    assert part.engine == f"vLLM {policy['version']}"
    assert read["block_size"] == group.block_size
    assert told["max_model_len"] == str(min(setup.max_model_len, group.blocks * group.block_size))
    if blocks is not None or policy.get("num_gpu_blocks") is not None:
        assert read["num_gpu_blocks"] == group.blocks + 1  # one is the null block
    else:
        assert "num_gpu_blocks" not in read
        assert any("GPU KV cache size" in note for note in part.notes)
    by_length = group.blocks * group.block_size < setup.max_model_len
    assert any("max_model_len cut" in note for note in part.notes) == by_length


def test_the_reported_case() -> None:
    """A pool of 3000 blocks from an engine's log, and admission by whole prompts switched off."""
    policy = {"name": "vllm", "max_num_batched_tokens": 2048, "scheduler_reserve_full_isl": False}
    line = line_of(policy=policy, kv={"blocks": 3000})

    assert "--num-gpu-blocks-override 3001" in line
    assert "--no-scheduler-reserve-full-isl" in line


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kv": {"tokens": 32000}}, "--num-gpu-blocks-override 2001"),
        ({"kv": {"reserve_gib": 4}}, "--num-gpu-blocks-override"),
        ({"kv": {"memory_utilization": 0.85}}, "--gpu-memory-utilization 0.85"),
        ({"model": "llama-3.1-8b-fp8"}, "meta-llama/Llama-3.1-8B --quantization fp8"),
        ({"model": {"name": "llama-3.1-8b", "kv_bytes_per_element": 1}}, "--kv-cache-dtype fp8_e4m3"),
        ({"model": "llama-3.1-70b", "tensor_parallel": 4}, "--tensor-parallel-size 4"),
        ({"model": "llama-3.1-70b", "parallel": {"pipeline": 2, "tensor": 2}}, "--pipeline-parallel-size 2"),
        (
            {"backend": {"name": "profile", "profile": "h200-llama-3.1-8b-vllm-0.23", "graph_tokens": 64}},
            "--max-cudagraph-capture-size 64",
        ),
        ({"model": "deepseek-v3", "gpu": "h200", "tensor_parallel": 8}, "vllm serve deepseek-ai/DeepSeek-V3 --tensor"),
        (DRAFTED_BY_8B, '"model": "meta-llama/Llama-3.1-8B"'),
    ],
)
def test_memory_parallelism_and_dtypes_are_in_the_line(keys: dict[str, Any], said: str) -> None:
    assert said in line_of(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model": "llama-3.1-70b-awq", "tensor_parallel": 2}, "weights in int4: name such a checkpoint"),
        ({"model": {"name": "llama-3.1-8b", "layers": 16}}, "the model was simulated with layers 16"),
        ({"policy": {"name": "sarathi"}}, "policy Sarathi: none of vLLM's or SGLang's"),
        ({"speculate": {**DRAFTS, "method": "eagle3"}}, 'say the checkpoint that drafts as "model"'),
        ({"replicas": 3}, "in front of the replicas: RoundRobin: any load balancer"),
        ({"replicas": 2, "router": "prefix_affinity", "router_stale_ms": 50}, "as they were 50 ms ago: a prefix-aware"),
        ({"replicas": 2, "router": "session_sticky"}, "sticky sessions do"),
        ({"limits": {"queue": 9, "timeout_s": 30}}, "limits.queue 9: of the gateway"),
        ({"autoscale": {"max": 4, "target_waiting": 2}}, "autoscaling: max 4, target_waiting 2"),
    ],
)
def test_what_no_flag_says_stands_beside_the_line(keys: dict[str, Any], said: str) -> None:
    assert any(said in line for line in commands(ready(**keys)) if line.startswith("# ")), commands(ready(**keys))


def test_prefill_and_decode_replicas_have_a_connector() -> None:
    setup = ready(replicas=[{"count": 2, "role": "prefill"}, {"count": 1, "role": "decode"}], link={"gb_per_s": 50})
    lines = commands(setup)

    assert lines[0] == "# 2 prefill replicas, 1 × h100 each"
    assert sum("--kv-transfer-config" in line for line in lines) == 2
    [connector] = {json.dumps(json.loads(str(flags(line)["kv_transfer_config"]))) for line in lines if "--kv-" in line}
    assert "NixlConnector" in connector
    assert any("50 GB/s each" in line for line in lines)


# ---- SGLang ----


@st.composite
def sglang_policies(draw: st.DrawFn) -> dict[str, Any]:
    version = draw(st.sampled_from(["0.5.17", "0.5.23"]))
    page = draw(st.sampled_from([1, 16, 64]))
    priorities = draw(st.booleans())
    drawn = {
        "schedule_policy": st.sampled_from(["fcfs", "lof"] if priorities else ["fcfs", "lpm", "dfs-weight", "lof"]),
        "schedule_conservativeness": st.floats(0, 3),
        "chunked_prefill_size": st.sampled_from([-1, 1024, 8192]),
        "max_prefill_tokens": st.integers(1, 40000),
        "max_running_requests": st.integers(1, 5000),
        "prefill_max_requests": st.integers(1, 50),
        "prefill_decode_interval": st.integers(0, 4 if version == "0.5.23" else 0),
        "enable_mixed_chunk": st.booleans(),
        "disable_radix_cache": st.booleans(),
        "disable_overlap_schedule": st.booleans(),
        "schedule_low_priority_values_first": st.booleans(),
        "priority_scheduling_preemption_threshold": st.integers(0, 20),
        "disable_priority_preemption": st.booleans(),
        "retraction_policy": st.sampled_from(["length", "priority"]),
    }
    some = draw(st.sets(st.sampled_from(sorted(drawn))))
    own = {name: draw(drawn[name]) for name in sorted(some)}
    return {"name": "sglang", "version": version, "page_size": page, "enable_priority_scheduling": priorities, **own}


@given(sglang_policies())
def test_an_sglang_line_holds_every_setting(policy: dict[str, Any]) -> None:
    setup = ready(policy=policy)
    [group] = setup.groups
    simulated = group.make_scheduler()
    told = flags(serve_line(setup))

    for each in dataclasses.fields(Sglang):
        if not each.init or each.name == "version":
            continue
        value, read = getattr(simulated, each.name), told.get(each.name, each.default)
        assert (type(value)(read) if isinstance(read, str) else read) == value, each.name
    assert told["max_total_tokens"] == str(group.blocks * group.block_size)
    assert told["context_length"] == "8192"
    share = (14.96 * 2**30 + group.blocks * group.block_size * KV_BYTES) / group.gpu.memory_bytes
    assert float(str(told["mem_fraction_static"])) == pytest.approx(share, abs=2e-3)


# ---- the engines' own parsers ----

VLLM = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
for line in sys.stdin:
    words = json.loads(line)
    assert words[:2] == ["vllm", "serve"]
    print(json.dumps(vars(parser.parse_args(["--model", *words[2:]])), default=str))
"""
SGLANG = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for line in sys.stdin:
    print(json.dumps(vars(parser.parse_args(json.loads(line)[3:])), default=str))
"""


def parsed(engine: str, script: str, lines: list[str]) -> list[dict[str, Any]]:
    """The lines as the engine's own argument parser reads them. Skips where the engine is not installed."""
    python = os.environ.get("CHAIRLIFT_ENGINE_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", f"import {engine}"], capture_output=True, timeout=300, check=False)
    if found.returncode:
        pytest.skip(f"{engine} is not installed, here or in CHAIRLIFT_ENGINE_PYTHON")
    sent = "".join(json.dumps(shlex.split(line, comments=True)) + "\n" for line in lines)
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}  # without one, vLLM's defaults cannot be read
    done = subprocess.run(
        [python, "-c", script], input=sent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


APART = {
    "replicas": [{"count": 2, "role": "prefill"}, {"count": 1, "role": "decode", "tensor_parallel": 2}],
    "link": {"gb_per_s": 50},
}
VLLM_CASES: list[dict[str, Any]] = [
    {},
    {"policy": {"name": "vllm", "max_num_seqs": 64, "max_num_batched_tokens": 2048, "watermark": 0.013}},
    {"policy": {"name": "vllm", "scheduler_reserve_full_isl": False, "num_gpu_blocks": 3001, "block_size": 32}},
    {"policy": {"name": "vllm", "enable_prefix_caching": False, "async_scheduling": False}},
    {"policy": {"name": "vllm", "scheduling_policy": "priority", "long_prefill_token_threshold": 512}},
    {"policy": {"name": "vllm", "enable_chunked_prefill": False, "prefill_schedule_interval": 3}},
    {"policy": {"name": "vllm", "max_num_active_seqs": 5, "max_num_scheduled_tokens": 777}},
    {"policy": {"name": "vllm", "max_num_queued_reqs": 0, "max_num_queued_tokens": 123456}},
    {"policy": {"name": "vllm", "long_prefill_token_threshold_adaptive": True}, "kv": {"memory_utilization": 0.87}},
    {"model": {"name": "llama-3.1-8b-fp8", "kv_bytes_per_element": 1}},
    {"model": "qwen3-30b-a3b", "parallel": {"tensor": 2, "data": 2, "expert": 4}},
    {"parallel": {"tensor": 2, "pipeline": 2}},
    {"backend": {"name": "profile", "profile": "h200-llama-3.1-8b-vllm-0.23", "graph_tokens": 64}},
    {"speculate": {"method": "eagle3", "tokens": 3, "acceptance": {"length": 2.4}}},
    {"parallel": {"tensor": 2, "pipeline": 2}, "speculate": {**DRAFTS, "method": "eagle3"}},
    {"speculate": {**DRAFTS, "method": "ngram"}, "policy": {"name": "vllm", "async_scheduling": False}},
    DRAFTED_BY_8B,
    {"model": "deepseek-v3", "gpu": "h200", "parallel": {"data": 8, "expert": 8}, "speculate": DRAFTS},
]


# Defaults of vLLM's under which the policy's own default, by its version, is what vLLM does
VLLM_OWN = {"disable_hybrid_kv_cache_manager": None, "prefix_cache_retention_interval": 0}


def test_vllm_reads_its_lines_as_they_were_meant() -> None:
    setups = [ready(**keys) for keys in VLLM_CASES]
    documents = [document(**keys) for keys in VLLM_CASES]
    lines = [line_of(**keys) for keys in VLLM_CASES]
    for setup, one, line, read in zip(setups, documents, lines, parsed("vllm", VLLM, lines), strict=True):
        [group] = setup.groups
        policy, parallel = group.make_scheduler(), group.parallel
        ranks = parallel.data
        told = kv_of(one, 1)[0].memory_utilization
        for each in dataclasses.fields(Vllm):
            value = getattr(policy, each.name)
            if each.name in ("version", "block_size", "num_gpu_blocks"):
                continue
            found = read[each.name]
            if found == VLLM_OWN.get(each.name, ...):
                found = each.default
            assert found == (pytest.approx(value) if isinstance(value, float) else value), (each.name, line)
        assert read["block_size"] == group.block_size
        assert read["max_model_len"] == setup.max_model_len
        assert read["gpu_memory_utilization"] == told
        assert (read["tensor_parallel_size"], read["data_parallel_size"]) == (parallel.tensor, ranks)
        assert read["pipeline_parallel_size"] == parallel.pipeline
        assert read["enable_expert_parallel"] == (parallel.expert > 1)
        drafts = json.loads(json.dumps(read["speculative_config"]))
        if setup.speculate is None:
            assert drafts is None
        else:
            told_drafts = (setup.speculate.method, setup.speculate.tokens)
            assert (drafts["method"], drafts["num_speculative_tokens"]) == told_drafts
        assert read["max_cudagraph_capture_size"] == one.data.get("backend", {}).get("graph_tokens")
        given_blocks = isinstance(policy, Vllm) and policy.num_gpu_blocks is not None
        assert read["num_gpu_blocks_override"] == (group.blocks + 1 if given_blocks else None)
        assert read["kv_cache_dtype"] == ("fp8_e4m3" if setup.model.kv_bytes_per_element == 1 else "auto")
        assert read["quantization"] == ("fp8" if "fp8" in setup.model.name else None)


def test_vllm_reads_lines_of_prefill_and_decode_replicas() -> None:
    parts = launches(ready(**APART))
    prefill, decode = parsed("vllm", VLLM, [shlex.join(part.argv) for part in parts])

    assert [part.count for part in parts] == [2, 1]
    assert (prefill["tensor_parallel_size"], decode["tensor_parallel_size"]) == (1, 2)
    for read in (prefill, decode):
        assert "NixlConnector" in str(read["kv_transfer_config"])
        assert "kv_both" in str(read["kv_transfer_config"])


def test_sglang_reads_lines_of_every_way_to_share_a_model() -> None:
    sglang = {"policy": "sglang", "model": "qwen3-30b-a3b"}
    parallels = [{"tensor": 2}, {"tensor": 2, "pipeline": 2}, {"tensor": 4, "expert": 4}, {"data": 2, "expert": 2}]
    lines = [line_of(**sglang, parallel=each) for each in parallels]
    lines += [shlex.join(part.argv) for part in launches(ready(**APART, policy="sglang"))]
    lines.append(line_of(policy="sglang", model={"name": "llama-3.1-8b-fp8", "kv_bytes_per_element": 1}))
    read = parsed("sglang", SGLANG, lines)
    sizes = [tuple(each[f"{kind}_size"] for kind in ("tp", "pp", "dp", "ep")) for each in read]

    assert sizes == [(2, 1, 1, 1), (2, 2, 1, 1), (4, 1, 1, 4), (2, 1, 2, 2), (1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1)]
    assert [each["enable_dp_attention"] for each in read] == [False] * 3 + [True] + [False] * 3
    assert [each["disaggregation_mode"] for each in read[4:6]] == ["prefill", "decode"]
    assert (read[6]["quantization"], read[6]["kv_cache_dtype"]) == ("fp8", "fp8_e4m3")


def test_sglang_reads_its_lines_as_they_were_meant() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"schedule_policy": "lpm", "schedule_conservativeness": 0.3, "page_size": 16, "chunked_prefill_size": -1},
        {
            "enable_priority_scheduling": True,
            "priority_scheduling_preemption_threshold": 3,
            "retraction_policy": "priority",
        },
        {"enable_mixed_chunk": True, "disable_radix_cache": True, "disable_overlap_schedule": True},
        {"max_running_requests": 77, "prefill_max_requests": 3, "prefill_decode_interval": 2},
    ]
    setups = [ready(policy={"name": "sglang", **case}) for case in cases]
    lines = [serve_line(setup) for setup in setups]
    for setup, line, read in zip(setups, lines, parsed("sglang", SGLANG, lines), strict=True):
        [group] = setup.groups
        policy = group.make_scheduler()
        for each in dataclasses.fields(Sglang):
            if each.init and each.name != "version" and (each.name != "prefill_decode_interval"):
                assert read[each.name] == getattr(policy, each.name), (each.name, line)
        assert (read["prefill_decode_interval"] or 0) == vars(policy)["prefill_decode_interval"]
        assert read["max_total_tokens"] == group.blocks * group.block_size
        assert read["context_length"] == setup.max_model_len


# ---- Docker and Kubernetes ----


def test_kubernetes_starts_the_same_command() -> None:
    setup = ready(replicas=3, policy={"name": "vllm", "version": 0.31}, tensor_parallel=2)
    parts = launches(setup)
    text = emitted("k8s", "My plan: 8B", parts, beside(setup))
    deployment, service = yaml.safe_load_all(text)
    [container] = deployment["spec"]["template"]["spec"]["containers"]

    assert [*container["command"], *container["args"]] == list(parts[0].argv)
    assert container["image"] == "vllm/vllm-openai:v0.31.0"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert deployment["spec"]["replicas"] == 3
    assert deployment["metadata"]["name"] == "my-plan-8b"
    assert (
        deployment["spec"]["selector"]["matchLabels"].items()
        <= deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    assert service["spec"]["selector"] == {"app": "my-plan-8b"}
    assert "# in front of the replicas: RoundRobin" in text


@pytest.mark.parametrize(
    ("rule", "query", "threshold"),
    [
        ({"target_queued": 4}, 'sum(vllm:num_requests_waiting{app="x"})', "4"),
        ({"target_kv": 0.7}, 'sum(vllm:kv_cache_usage_perc{app="x"})', "0.7"),
        (
            {"target_outstanding": 30},
            'sum(vllm:num_requests_waiting{app="x"}) + sum(vllm:num_requests_running{app="x"})',
            "30",
        ),
    ],
)
def test_an_autoscaler_becomes_a_scaled_object(rule: dict[str, Any], query: str, threshold: str) -> None:
    windows = {"stabilise_down_s": 300, "most_down": 1, "tolerance": 0.1}
    limits = {"min": 0, "max": 6, "every_s": 20, "idle_s": 200, "provision_s": 90, "load_s": 45}
    setup = ready(autoscale={**limits, **windows, **rule})
    text = emitted("k8s", "x", launches(setup), [])
    *_, scaled = yaml.safe_load_all(text)
    spec = scaled["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]

    assert (scaled["kind"], spec["scaleTargetRef"]["name"]) == ("ScaledObject", "x")
    assert (spec["minReplicaCount"], spec["maxReplicaCount"], spec["cooldownPeriod"]) == (0, 6, 200)
    assert spec["triggers"][0]["metadata"]["query"] == query
    assert spec["triggers"][0]["metadata"]["threshold"] == threshold
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 20}]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert "90 s to come and 45 s to load" in text
    assert "tolerance" not in text


def test_what_no_manifest_of_kedas_says_is_said() -> None:
    llm_d = ready(autoscale={"max": 6, "saturation": {"kv": 0.7}})
    ours = ready(autoscale={"max": 6, "target_waiting": 2})

    assert "thresholds are kv 0.7, queue 5, spare_kv 0.1, spare_queue 3" in emitted("k8s", "x", launches(llm_d), [])
    assert "no rule of KEDA's: max 6, target_waiting 2" in emitted("k8s", "x", launches(ours), [])
    assert len(list(yaml.safe_load_all(emitted("k8s", "x", launches(ours), [])))) == 2


def test_docker_runs_the_same_command() -> None:
    setup = ready(policy={"name": "sglang", "page_size": 16})
    parts = launches(setup)
    words = shlex.split(emitted("docker", "x", parts, []))
    at = words.index("--entrypoint")

    assert [words[at + 1], *words[at + 3 :]] == [*parts[0].argv, "--host", "0.0.0.0"]
    assert words[at + 2] == "lmsysorg/sglang:v0.5.23"
    assert words[words.index("--gpus") + 1] == "1"


def test_the_command_emits(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "base:\n  model: llama-3.1-8b\n  gpu: h100\n  max_model_len: 4096\n  policy: vllm\n"
        "  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 50, output_tokens: 5}\n"
        "slo: [{percentile: 90, ttft_ms: 1000}]\nrate_per_s: 2\nsearch: {requests: 200}\naxes: {replicas: [1, 2]}\n"
    )
    out = ("--out", str(tmp_path / "out"), "--jobs", "1")
    shown = chairlift("plan", str(tmp_path / "p.yaml"), *out, "--emit", "k8s")
    lost = chairlift("plan", str(tmp_path / "p.yaml"), *out, "--rate", "100000", "--emit", "shell")

    assert [each["kind"] for each in yaml.safe_load_all(shown.out)] == ["Deployment", "Service"]
    assert (lost.status, lost.out) == (1, "")
    assert "nothing to start" in lost.err
