"""vLLM's versions, its defaults by GPU, what it refuses to start with, and whom its queue turns away."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from chairlift.policies.base import HybridCache
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_versions import NEWEST, RULES, VERSIONS, named, nearest
from chairlift.sim.bad_input import BadInput
from chairlift.sim.results.records import Status
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from kit.serving import serve_line
from kit.worlds import Affine, play, trace_of

BASE = """\
model: llama-3.1-8b
workload: {requests: 5, arrivals: {constant: {rate_per_s: 2}}, prompt_tokens: 20, output_tokens: 5}
"""


def setup(folder: Path, policy: str, more: str = "gpu: h100\n") -> Setup:
    (folder / "s.yaml").write_text(f"{BASE}policy: {policy}\n{more}")
    [found] = load(folder / "s.yaml").setups
    return found


def refusals(folder: Path, policy: str, more: str = "gpu: h100\n") -> list[str]:
    with pytest.raises(BadInput) as caught:
        setup(folder, policy, more)
    return [f"{problem.path}: {problem.rule}" for problem in caught.value.problems]


@pytest.mark.parametrize(("told", "meant"), [(0.33, "0.33"), (0.3, "0.30"), ("0.23.1", "0.23"), ("0.26", "0.26")])
def test_a_version_is_the_minor_one(told: str | float, meant: str) -> None:
    assert named(told) == meant


@pytest.mark.parametrize("told", [0.22, 0.34, "0.5", "newest", 1])
def test_an_unknown_version_is_refused(told: str | float) -> None:
    with pytest.raises(ValueError, match=r"from 0\.23 to 0\.33 \(got "):
        Vllm(version=told)


def test_a_recordings_version_is_replayed_by_the_nearest() -> None:
    assert [nearest(v) for v in ("0.22.1", "0.23.0", "0.30.2", "0.99.0", "1.0.0")] == [
        "0.23",
        "0.23",
        "0.30",
        NEWEST,
        NEWEST,
    ]


def test_rules_hold_from_their_version_on() -> None:
    changed = {name: next(filter(rule.holds, VERSIONS)) for name, rule in RULES.items()}

    assert changed == {
        "uncached_first": "0.24",
        "pads_joining": "0.25",
        "waits_for_flight": "0.27",
        "any_victim_shifts": "0.28",
        "largest_gpus": "0.28",
        "retains_little": "0.29",
        "null_block_apart": "0.29",
        "uncapped_alone": "0.31",
        "skips_drafts": "0.33",
        "finds_kept_drafts": "0.33",
        "hashes_ahead": "0.33",
        "on_after_itself": "0.33",
    }
    assert all(rule.holds(NEWEST) for rule in RULES.values())


@pytest.mark.parametrize(
    ("settings", "cache"),
    [  # CacheConfig.prefix_cache_retention_interval since 0.29, before that an environment variable that is not set
        ({"version": "0.28"}, HybridCache(2 * 2048, None, null_counts=True)),
        ({"version": "0.29"}, HybridCache(2 * 2048, 0)),
        ({"async_scheduling": False}, HybridCache(2048, 0)),
        ({"prefix_cache_retention_interval": 64}, HybridCache(2 * 2048, 64)),
        ({"prefix_cache_retention_interval": "dense"}, HybridCache(2 * 2048, None)),
        ({"max_num_scheduled_tokens": 100}, HybridCache(2 * 2048, 0)),
        ({"disable_hybrid_kv_cache_manager": True}, None),
    ],
)
def test_windows_are_cached_as_the_version_does_it(settings: dict[str, Any], cache: HybridCache | None) -> None:
    assert Vllm(**settings).hybrid == cache


@pytest.mark.parametrize(
    ("gpu", "policy", "tokens", "sequences"),
    [  # EngineArgs.get_batch_defaults and _set_default_max_num_seqs_and_batched_tokens_args, an API server's
        ("h100", "vllm", 8192, 1024),
        ("h200", "{name: vllm, version: 0.23}", 8192, 1024),
        ("l4", "vllm", 2048, 256),
        ("a100-80gb", "vllm", 2048, 256),
        ("{name: h200, memory_gib: 178}", "vllm", 16384, 1024),
        ("{name: h200, memory_gib: 178}", "{name: vllm, version: 0.27}", 8192, 1024),
        ("h100", "{name: vllm, max_num_batched_tokens: 300}", 300, 300),
        ("h100", "{name: vllm, max_num_seqs: 2}", 8192, 2),
        ("h100", "{name: vllm, enable_chunked_prefill: false}", 20000, 1024),
    ],
)
def test_defaults_are_the_servers(tmp_path: Path, gpu: str, policy: str, tokens: int, sequences: int) -> None:
    more = f"gpu: {gpu}\nmax_model_len: 20000\nkv: {{tokens: 30000}}\n"
    [group] = setup(tmp_path, policy, more).groups
    scheduler = group.make_scheduler()

    assert isinstance(scheduler, Vllm)
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs) == (tokens, sequences)


def test_a_budget_is_no_larger_than_all_sequences_together(tmp_path: Path) -> None:
    [group] = setup(tmp_path, "{name: vllm, max_num_seqs: 3}", "gpu: h100\nmax_model_len: 100\n").groups

    assert group.scheduler_settings["max_num_batched_tokens"] == 300


@pytest.mark.parametrize(
    ("policy", "more", "said"),
    [
        (
            "{name: vllm, version: 0.23, watermark: 0}",
            "",
            "policy.watermark: exists since vLLM 0.24, and the version is 0.23",
        ),
        (
            "{name: vllm, version: 0.32, prefill_schedule_interval: 2}",
            "",
            "policy.prefill_schedule_interval: exists since vLLM 0.33, and the version is 0.32",
        ),
        (
            "{name: vllm, max_num_partial_prefills: 2}",
            "",
            "policy.max_num_partial_prefills: exists until vLLM 0.26, and the version is 0.33",
        ),
        (
            "{name: vllm, version: 0.26, max_num_partial_prefills: 2}",
            "",
            "policy.max_num_partial_prefills: not modelled: concurrent partial prefills, which V1 takes as a setting"
            " only",
        ),
        ("{name: vllm, version: 0.2}", "", "policy: version must be one of vLLM's from 0.23 to 0.33 (got 0.2)"),
        (
            "{name: vllm, max_num_batched_tokens: 128, max_num_seqs: 256}",
            "",
            "policy.max_num_batched_tokens: must be at least max_num_seqs, 256 (got 128)",
        ),
        (
            "{name: vllm, long_prefill_token_threshold: 8192}",
            "max_model_len: 4096\n",
            "policy.long_prefill_token_threshold: must be at most max_model_len, 4096 (got 8192)",
        ),
        (
            "{name: vllm, max_num_seqs: 8, max_num_active_seqs: 9}",
            "",
            "policy.max_num_active_seqs: must be at most max_num_seqs, 8 (got 9)",
        ),
        (
            "vllm",
            "max_model_len: 200000\n",
            "max_model_len: must be at most the model's own 131072 tokens",
        ),
        (
            "vllm",
            "max_model_len: 131072\nkv: {blocks: 1000}\n",
            "max_model_len: must be at most the 16000 tokens that the KV pool holds (got 131072)",
        ),
        (
            "{name: vllm, num_gpu_blocks: 1001, block_size: 32}",  # one of them is the null block
            "max_model_len: 32001\n",
            "max_model_len: must be at most the 32000 tokens that the KV pool holds (got 32001)",
        ),
        (
            "vllm_v0",
            "max_model_len: 131072\nkv: {blocks: 1000}\n",
            "max_model_len: must be at most the 16000 tokens that the KV pool holds (got 131072)",
        ),
    ],
)
def test_what_vllm_does_not_start_with_is_refused(tmp_path: Path, policy: str, more: str, said: str) -> None:
    assert refusals(tmp_path, policy, f"gpu: h100\n{more}") == [said]


def test_a_length_that_nobody_asked_for_may_exceed_the_pool(tmp_path: Path) -> None:
    found = setup(tmp_path, "vllm", "gpu: h100\nkv: {blocks: 1000}\n")

    assert found.max_model_len == 131072
    assert "--max-model-len 16000 " in serve_line(found)
    assert simulate(found).assumptions["max_model_len"] == (
        "the engine itself does not start without a max_model_len:"
        " it must be at most the 16000 tokens that the KV pool holds (got 131072)"
    )


@pytest.mark.parametrize("more", ["max_model_len: 16000\nkv: {blocks: 1000}\n", ""])
def test_a_length_that_fits_needs_no_word(tmp_path: Path, more: str) -> None:
    found = setup(tmp_path, "vllm", f"gpu: h100\n{more}")  # without KV given, 131,072 tokens fit an H100

    assert "max_model_len" not in simulate(found).assumptions


def test_ranks_have_pools_of_their_own(tmp_path: Path) -> None:
    text = BASE.replace("llama-3.1-8b", "qwen3-30b-a3b") + "policy: vllm\ngpu: h200\nmax_model_len: 16000\n"
    (tmp_path / "s.yaml").write_text(text + "kv: {blocks: 750}\nparallel: {data: 2}\n")

    with pytest.raises(BadInput, match="must be at most the 12000 tokens that the KV pool holds"):
        load(tmp_path / "s.yaml")


@pytest.mark.parametrize("policy", ["sglang", "sarathi", "orca", "tgi", "static", "vllm_v0", "mlfq"])
def test_no_policy_takes_more_than_the_model_does(tmp_path: Path, policy: str) -> None:
    assert refusals(tmp_path, policy, "gpu: h100\nmax_model_len: 131073\n") == [
        "max_model_len: must be at most the model's own 131072 tokens"
    ]
    longer = "gpu: h100\nmax_model_len: 131073\nmodel: {name: llama-3.1-8b, max_model_len: 131073}\n"
    (tmp_path / "s.yaml").write_text(f"{BASE.partition(chr(10))[2]}policy: {policy}\n{longer}")
    assert load(tmp_path / "s.yaml").setups[0].max_model_len == 131073


def test_python_is_told_too() -> None:
    with pytest.raises(ValueError, match=r"watermark exists since vLLM 0\.24 \(version is 0\.23\)"):
        Vllm(version="0.23", watermark=0.1)


def test_results_and_commands_say_the_version(tmp_path: Path) -> None:
    policy = "{name: vllm, version: 0.31, watermark: 0.05, max_num_active_seqs: 7, scheduler_reserve_full_isl: false}"
    found = setup(tmp_path, policy)
    line = serve_line(found)

    assert simulate(found).assumptions["scheduler"] == "vLLM 0.31, at most 8192 tokens and 7 requests a step"
    assert line.endswith("  # vLLM 0.31")
    for flag in ("--watermark 0.05", "--max-num-active-seqs 7", "--no-scheduler-reserve-full-isl"):
        assert flag in line
    assert "--prefill-schedule-interval" not in line


@pytest.mark.parametrize("ahead", [False, True])
def test_the_queues_limits_turn_arrivals_away(ahead: bool) -> None:
    # Requests come each microsecond; a step takes 10 us or so, so that none ends before all are there.
    rows = list(zip(range(0, 6_000_000, 1_000_000), itertools.repeat(30), itertools.repeat(4), strict=False))

    def served(**limits: int) -> list[bool]:
        world = play(trace_of(rows), lambda: Vllm(async_scheduling=ahead, **limits), lambda: Affine(fixed=10_000_000))
        return [status == Status.FINISHED for status in world.requests.status]

    assert served() == [True] * 6
    assert served(max_num_queued_reqs=2) == [True, True, False, False, False, False]
    assert served(max_num_queued_reqs=0) == [False] * 6
    assert served(max_num_queued_tokens=31) == [True, True, False, False, False, False]  # 0, 30, then 60 tokens
    assert served(max_num_queued_tokens=0) == [False] * 6
