"""How the GPUs of a replica share a model, as scenarios say it: `parallel`, and `tensor_parallel` for short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.by_part import ByPart
from chairlift.backend.parallel import Parallel, labelled
from chairlift.sim.bad_input import BadInput
from chairlift.sim.plan.bounds import bound, work_of
from chairlift.sim.plan.file import read_plan
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_S
from kit.command import chairlift
from kit.serving import commands, serve_line

WORKLOAD = {
    "requests": 60,
    "arrivals": {"poisson": {"rate_per_s": 30}},
    "prompt_tokens": {"uniform": {"low": 10, "high": 3000}},
    "output_tokens": {"uniform": {"low": 1, "high": 300}},
}


def ready(**system: Any) -> Setup:
    data = {"gpu": "h200", "policy": "vllm", "workload": WORKLOAD, "max_model_len": 8192, **system}
    return prepare(Document(data, {}, "test"), Path())


def test_tensor_parallel_is_short_for_parallel_tensor() -> None:
    [short] = ready(model="llama-3.1-70b-fp8", tensor_parallel=4).groups
    [long] = ready(model="llama-3.1-70b-fp8", parallel={"tensor": 4}).groups
    assert short.parallel == long.parallel == Parallel(tensor=4)
    assert (short.blocks, short.kv_source) == (long.blocks, long.kv_source)
    assert ready(model="llama-3.1-8b").groups[0].parallel == Parallel()


def test_the_nearest_place_says_how(tmp_path: Path) -> None:
    groups = [{"count": 1, "tensor_parallel": 1}, {"count": 1}]
    setup = ready(model="qwen3-30b-a3b", parallel={"tensor": 2, "expert": 2}, replicas=groups)
    assert [group.parallel for group in setup.groups] == [Parallel(), Parallel(tensor=2, expert=2)]
    file = tmp_path / "s.yaml"
    base = {"model": "qwen3-30b-a3b", "gpu": "h200", "policy": "vllm", "workload": WORKLOAD, "tensor_parallel": 2}
    file.write_text(json.dumps({**base, "compare": [{"name": "a"}, {"name": "b", "parallel": {"tensor": 4}}]}))
    result = chairlift("run", str(file), "--out", str(tmp_path / "out"))
    assert result.status == 0, result.err
    told = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert "tensor_parallel" in json.dumps(told)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ({"parallel": {"tensor": 2}, "tensor_parallel": 2}, "tensor_parallel: must not be given beside parallel"),
        ({"parallel": {"tensors": 2}}, "parallel.tensors: unknown key"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor: must be at least 1"),
        ({"parallel": {"tensor": 3}}, "must divide the 32 heads"),
        ({"parallel": {"expert": 2}}, r"expert must divide tensor × data, 1 \(got 2\)"),
        ({"parallel": {"tensor": 16}}, "tensor must be at most 8: all-reduces beyond one host"),
        ({"model": "llama-3.1-8b", "parallel": {"data": 2}}, "so its ranks are replicas"),
        (
            {"model": "llama-3.1-8b", "backend": "torch", "parallel": {"tensor": 2, "pipeline": 2}},
            r"by tensors and experts, or by stages \(got TP 2, PP 2\)",
        ),
        ({"model": "llama-3.1-8b", "backend": "h200-llama-3.1-8b-vllm-0.23", "parallel": {"pipeline": 2}}, "2 .PP 2."),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(system: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        simulate(ready(**{"model": "qwen3-30b-a3b", **system}))


def test_an_executing_backend_refuses_what_it_does_not_build() -> None:
    with pytest.raises(BadInput, match="runs models with full attention by head"):
        simulate(ready(model="gpt-oss-20b", backend="torch"))


@pytest.mark.parametrize(
    "system",
    [
        {"model": "qwen3-30b-a3b"},
        {"model": "qwen3-30b-a3b", "parallel": {"tensor": 2, "expert": 2}},
        {"model": "gpt-oss-120b"},
        {"model": "gemma-3-27b-fp8"},
        {"model": "deepseek-v3", "parallel": {"data": 8, "expert": 8}},
        {"model": "deepseek-v3", "parallel": {"tensor": 4, "data": 2, "expert": 8}, "gpu": "b200"},
        {"model": "gpt-oss-120b", "parallel": {"tensor": 2, "data": 3, "expert": 2}, "kv": {"blocks": 1200}},
        {"model": "llama-4-scout", "parallel": {"data": 4, "expert": 4}, "policy": "sglang"},
        {"model": "qwen3-30b-a3b", "parallel": {"data": 2}, "kv": {"blocks": 520}},
        {"model": "llama-3.3-70b-fp8", "parallel": {"tensor": 2, "pipeline": 2}},
        {"model": "mixtral-8x7b", "backend": {"name": "roofline", "skew": 1.2}},
    ],
    ids=str,
)
def test_leaps_are_the_steps_they_leap_over(system: dict[str, Any]) -> None:
    setup = ready(**system)
    assert isinstance(setup.groups[0].make_backend(setup.model), ByPart)
    leapt, stepped = simulate(setup), simulate(ready(**system), leap=False)
    assert leapt.requests.finished == stepped.requests.finished
    assert leapt.requests.first_token == stepped.requests.first_token
    assert min(leapt.requests.finished) > 0


PLAN = {
    "base": {
        "model": "qwen3-30b-a3b",
        "gpu": "h200",
        "policy": {"name": "vllm", "max_num_batched_tokens": 32768},
        "max_model_len": 8192,
        "workload": WORKLOAD,
    },
    "slo": [{"percentile": 90, "ttft_ms": 5000}],
    "rate_per_s": 5,
    "axes": {"parallel": [{"tensor": 1}, {"tensor": 2, "expert": 2}, {"data": 4, "expert": 4}], "replicas": [1, 2]},
}


def test_plans_count_and_price_every_gpu_of_a_replica(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(json.dumps(PLAN))
    candidates = read_plan(tmp_path / "p.yaml").candidates
    assert [candidate.gpus for candidate in candidates] == [1, 2, 2, 4, 4, 8]
    assert [candidate.usd_per_hour for candidate in candidates] == [4 * n for n in (1, 2, 2, 4, 4, 8)]
    rates = [bound(candidate, []).rate_per_s for candidate in candidates]
    # four ranks have prompts of their own: a chunk on one of them, while the others wait, is no bound
    setup = candidates[4].setup
    assert setup is not None
    alone = setup.groups[0].make_backend(setup.model).step(Batch((Chunk(0, 16384),), 0, 0)).first / PS_PER_S
    assert rates[4] > 1.5 * 16384 / alone / float(setup.trace.prompt_tokens.mean())


def test_the_command_says_the_degrees_and_the_limits_of_a_rank() -> None:
    policy = {"name": "vllm", "max_num_batched_tokens": 16384, "max_num_seqs": 512}
    parallel = {"tensor": 2, "data": 4, "expert": 8}
    line = serve_line(ready(model="qwen3-30b-a3b", policy=policy, parallel=parallel))
    for flags in (
        *("--tensor-parallel-size 2", "--data-parallel-size 4", "--enable-expert-parallel"),
        *("--max-num-batched-tokens 16384", "--max-num-seqs 512"),
    ):
        assert flags in line
    other = commands(ready(model="qwen3-30b-a3b", policy=policy, parallel={**parallel, "expert": 4}))
    assert other[0] == "# vLLM has 8 groups of experts, of which 4 were simulated"
    given = {"name": "sglang", "chunked_prefill_size": 2048, "max_running_requests": 64}
    line = serve_line(ready(model="qwen3-30b-a3b", policy=given, parallel=parallel))
    # SGLang shares these two out over its ranks, and takes three tenths of the third
    for flags in ("--chunked-prefill-size 8192", "--max-running-requests 256", "--schedule-conservativeness 1 "):
        assert flags in line + " "


def test_limits_and_pools_that_are_given_are_those_of_a_rank() -> None:
    parallel = {"data": 4, "expert": 4}
    [own] = ready(model="qwen3-30b-a3b", parallel=parallel, kv={"blocks": 1000}).groups
    assert (own.blocks, own.room(100_000)) == (4000, 16_000)
    assert own.kv_source.startswith("given, for each of 4 ranks")
    [one], [four] = (ready(model="qwen3-30b-a3b", parallel=p).groups for p in ({"tensor": 1}, parallel))
    assert four.blocks % 4 == 0
    assert four.blocks // 4 > one.blocks  # a quarter of the experts on each GPU
    [plain], [ranked] = (ready(model="qwen3-30b-a3b", policy="sglang", parallel=p).groups for p in ({}, parallel))
    size = plain.scheduler_settings["chunked_prefill_size"]
    assert ranked.scheduler_settings["chunked_prefill_size"] == size // 4
    assert ranked.scheduler_settings["schedule_conservativeness"] == 0.3


def test_pools_are_those_of_the_policys_step() -> None:
    few = {"name": "vllm", "max_num_seqs": 256}  # whose sampling needs less than the reserve that always stays
    small = ready(model="llama-3.1-8b", policy={**few, "max_num_batched_tokens": 2048}).groups[0]
    large = ready(model="llama-3.1-8b", policy={**few, "max_num_batched_tokens": 65536}).groups[0]
    given = ready(model="llama-3.1-8b", kv={"reserve_gib": 3}).groups[0]
    assert small.blocks > large.blocks
    assert "1.90 reserve = " in small.kv_source
    assert "activations 6.75" in large.kv_source  # 65,536 tokens of 110,592 B
    assert "3.00 reserve = " in given.kv_source


def test_a_config_json_beside_the_scenario_gives_the_model(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = {"model": "config.json", "gpu": "l4", "policy": "vllm", "workload": WORKLOAD}
    (tmp_path / "s.yaml").write_text(json.dumps(data))
    setup = prepare(read(tmp_path / "s.yaml"), tmp_path)
    assert (setup.model.experts, setup.model.expert_ffn) == (8, 1024)
    (tmp_path / "config.json").write_text(json.dumps(config | {"memory_slots": 4}))
    with pytest.raises(BadInput, match="not understood: memory_slots"):
        prepare(read(tmp_path / "s.yaml"), tmp_path)


def test_a_step_is_under_way_in_each_stage_if_the_policy_fills_them() -> None:
    said = {
        policy: simulate(ready(model="llama-3.1-8b", policy=policy, parallel={"pipeline": 2})).assumptions["pipeline"]
        for policy in ("vllm", "sarathi")
    }

    assert said == {
        "vllm": "a step under way in each of 2 stages, which take equal times",
        "sarathi": "a step passes all stages before the next begins: more at a time is not modelled here",
    }


@pytest.mark.parametrize(("version", "executes"), [("0.26", True), ("0.26", False), ("0.27", True)])
def test_where_steps_are_executed_all_versions_fill_a_pipeline_as_the_newest(version: str, executes: bool) -> None:
    more = {"backend": {"name": "torch", "device": "cpu"}} if executes else {}
    policy = {"name": "vllm", "version": version}
    [group] = ready(model="qwen2.5-0.5b", policy=policy, parallel={"pipeline": 2}, **more).groups

    caveat = "who is preempted waits for its tokens in flight" in group.said["pipeline"]
    assert caveat is (executes and version == "0.26")


@pytest.mark.parametrize(
    "system",
    [
        {"parallel": {"pipeline": 4}},
        {"speculate": {"method": "eagle3", "tokens": 3, "acceptance": {"length": 2.4}}},
    ],
    ids=["stages", "drafts"],
)
def test_no_run_serves_more_than_the_bound(system: dict[str, Any]) -> None:
    """A crowd that fills its stages, or keeps its drafts, is served faster than one step after the other."""
    crowd = {"requests": 300, "clients": {"concurrency": 128}, "prompt_tokens": 16, "output_tokens": 100}
    setup = ready(model="llama-3.1-8b", backend={"name": "roofline", "by_part": True}, workload=crowd, **system)
    served = simulate(setup).summary["request_throughput"]
    bounds = max(work_of(setup, setup.groups[0]))
    plain = ready(model="llama-3.1-8b", backend={"name": "roofline", "by_part": True}, workload=crowd)

    assert served <= 1 / bounds
    assert bounds < max(work_of(plain, plain.groups[0]))


@pytest.mark.parametrize(
    ("name", "model", "parallel"),
    [
        ("qwen3-30b-a3b", "qwen3-30b-a3b", Parallel()),
        ("qwen3-30b-a3b-tp2-ep", "qwen3-30b-a3b", Parallel(tensor=2, expert=2)),
        ("llama-3.1-70b-fp8-tp4", "llama-3.1-70b-fp8", Parallel(tensor=4)),
        ("llama-3.1-70b-pp4", "llama-3.1-70b", Parallel(pipeline=4)),
        ("my-tp2-model", "my-tp2-model", Parallel()),
    ],
)
def test_the_name_of_a_recording_says_how_gpus_share_the_model(name: str, model: str, parallel: Parallel) -> None:
    assert labelled(name) == (model, parallel)
    assert model + parallel.label == name
