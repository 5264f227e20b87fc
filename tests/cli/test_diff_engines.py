"""``chairlift diff-engines``: loads on which one rule acts, worked out by hand; settings carried over; mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.engines import Engine, as_other, engine, known, of_engines, rules_between
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.ablation import effect
from kit.command import chairlift

BASE = "model: llama-3.1-8b\ngpu: h100\nworkload: {file: t.csv}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(rows: str, more: str, columns: str = "") -> None:
    """A trace of these rows, and ``s.yaml`` that serves it."""
    Path("t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens{columns}\n{rows}\n")
    Path("s.yaml").write_text(BASE + more)


def diff(engines: str, *options: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    result = chairlift("diff-engines", "s.yaml", "--engines", engines, "--json", *options)
    assert result.status == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def figures(found: dict[str, Any], name: str) -> list[float]:
    return [each["figures"][name] for each in found["engines"]]


def acted(found: dict[str, Any]) -> list[str]:
    return [each["rule"] for each in found["rules"] if each["acted"] != "no"]


def notes(engines: str, policy: str, more: str = "gpu: h100\n") -> list[str]:
    """What is said of the settings of ``policy`` for each engine."""
    write("0,10,2", f"policy: {policy}\n{more.replace('gpu: h100', '')}")
    return [each["note"] for each in diff(engines, "--no-rules")["engines"]]


# One rule acts, and it is known which


def test_a_lone_prompt_is_cut_until_0_30() -> None:
    """100 tokens at 40 a step take steps of 40, 40 and 20, and then 4 decodes; in 0.33 one step, and 4 decodes."""
    write("0,100,5", "policy: {name: vllm, long_prefill_token_threshold: 40}\n")
    found = diff("vllm-0.30,vllm-0.33")

    assert figures(found, "steps") == [7, 5]
    of_drafts = ["skips_drafts", "finds_kept_drafts", "hashes_ahead"]
    assert [each["rule"] for each in found["rules"]] == ["uncapped_alone", *of_drafts, "on_after_itself"]
    assert acted(found) == ["uncapped_alone"]
    lone = found["rules"][0]
    assert (lone["added_to_first"]["steps_more"], lone["removed_from_second"]["steps_more"]) == (-2, 2)
    assert lone["added_to_first"]["requests_changed"] == 1


def test_a_cached_block_is_evicted_before_an_uncached_one_until_0_23() -> None:
    """Six blocks of 16. Requests 0 and 1 leave two cached blocks and a tail each; request 2 takes two blocks.

    0.23 has the queue tail 0, block 2 of 0, block 1 of 0, tail 1, …, so request 3 finds 16 of the tokens that it
    shares with request 0. Since 0.24 both tails come first, and it finds 32. Prompts have 140 tokens in all.
    """
    rows = "0,40,2,0,32\n10,40,2,1,32\n20,20,2,,\n30,40,2,0,32"
    free = "policy: vllm\nbackend: {name: roofline, host: none}\n"  # a host takes as long for 8 tokens as for 24
    write(rows, f"{free}max_model_len: 96\nkv: {{blocks: 6}}\n", ",prefix_group,prefix_tokens")
    found = diff("vllm-0.23,vllm-0.33")

    assert figures(found, "prefix_hit_rate") == [pytest.approx(16 / 140), pytest.approx(32 / 140)]
    assert acted(found) == ["uncached_first"]
    for way in ("added_to_first", "removed_from_second"):
        assert found["rules"][0][way]["requests_changed"] == 1
        assert found["rules"][0][way]["first_s"] == pytest.approx(30.006, abs=1e-3)  # request 3's first token


def test_a_large_gpu_takes_twice_the_tokens_since_0_28() -> None:
    """12,000 tokens of prompts are two steps of at most 8192, and one of at most 16384."""
    write("0,4000,1\n0,4000,1\n0,4000,1", "policy: vllm\n")
    found = diff("vllm-0.27,vllm-0.28", "--set", "gpu={name: h200, memory_gib: 178}")

    assert figures(found, "steps") == [2, 1]
    assert acted(found) == ["largest_gpus"]
    assert [each["settings"][0]["max_num_batched_tokens"] for each in found["engines"]] == [8192, 16384]
    [_, large] = found["rules"]
    assert (large["added_to_first"]["steps_more"], large["removed_from_second"]["steps_more"]) == (-1, 1)


def test_a_setting_that_only_one_version_has_is_switched_too() -> None:
    """Ten blocks, nine usable here: with half of them to stay free the second request waits for the first."""
    write("0,48,10\n0,48,10", "policy: {name: vllm, watermark: 0.5}\nmax_model_len: 96\nkv: {blocks: 9}\n")
    found = diff("vllm-0.23,vllm-0.24")

    assert figures(found, "peak_running") == [2, 1]
    assert acted(found) == ["watermark"]
    assert found["rules"][-1]["added_to_first"] is None
    assert found["rules"][-1]["removed_from_second"]["requests_changed"] == 2  # they then share steps
    back = diff("vllm-0.24,vllm-0.23")
    assert acted(back) == ["watermark"]
    assert back["rules"][-1]["removed_from_second"] is None


def test_who_ends_by_length_decodes_once_more_in_sglang_0_5_17() -> None:
    """Three tokens: a step of the prompt, two decodes, and in 0.5.17 one for nothing, for it is planned by then."""
    write("0,10,3,3", "policy: sglang\n", ",max_tokens")
    found = diff("sglang-0.5.17,sglang-0.5.23")

    assert figures(found, "steps") == [4, 3]
    assert acted(found) == ["who ends by length is left out of the next decode"]


def test_equal_results_are_not_tried_rule_by_rule() -> None:
    write("0,100,5", "policy: vllm\n")
    found = diff("vllm-0.24,vllm-0.33")

    assert len(found["rules"]) == 11
    assert acted(found) == []
    assert {each["added_to_first"] for each in found["rules"]} == {None}
    shown = chairlift("diff-engines", "s.yaml", "--engines", "vllm-0.24,vllm-0.33")
    assert "all results are the same to the picosecond" in shown.out
    assert "no rule tells the two apart" in chairlift("diff-engines", "s.yaml", "--engines", "vllm-0.25,vllm-0.26").out


@settings(max_examples=15)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2)), min_size=2),
    threshold=st.sampled_from([0, 16, 48]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_the_rules_are_all_that_two_versions_differ_by(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], threshold: int, policy: str
) -> None:
    """0.23 with all rules switched is 0.33, and the other way round, whatever the load."""
    folder = tmp_path_factory.mktemp("load")
    lines = "".join(f"{at / 1000},{prompt},{output},{priority}\n" for at, prompt, output, priority in sorted(rows))
    (folder / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,priority\n{lines}")
    said = f"policy: {{name: vllm, long_prefill_token_threshold: {threshold}, scheduling_policy: {policy}}}\n"
    (folder / "s.yaml").write_text(f"{BASE}{said}max_model_len: 160\nkv: {{blocks: 12}}\n")
    old, new = Engine("vllm", "0.23"), Engine("vllm", "0.33")
    setups = of_engines(folder / "s.yaml", [old, new]).setups
    rules = rules_between(old, new)

    for setup, other in (setups, setups[::-1]):
        assert not effect(simulate(as_other(setup, other, rules)), simulate(other)).any


# vLLM and SGLang


def test_mechanisms_are_measured() -> None:
    """Request 1 comes while request 0 decodes: in vLLM one of two steps with prompts has decodes, in SGLang none."""
    write("0,100,40\n0.1,100,2", "policy: vllm\n")
    found = diff("vllm-0.33,sglang-0.5.23")

    shares = [each["mechanisms"]["steps with prompts in which somebody decodes"] for each in found["engines"]]
    assert shares == [0.5, 0]
    mixed = [each for each in found["trials"] if "enable_mixed_chunk" in each["settings"]]
    assert [each["effect"]["steps_more"] for each in mixed] == [-1]  # the prompt's step is a decode step too
    assert [each["effect"]["steps_more"] for each in found["trials"] if each["engine"] == "vllm-0.33"] == [0]
    assert found["rules"] == []


def test_the_table_shows_figures_rules_and_mechanisms() -> None:
    write("0,100,5\n1,100,5", "policy: {name: vllm, long_prefill_token_threshold: 40}\n")
    result = chairlift("diff-engines", "s.yaml")
    said = " ".join(result.out.split())

    assert result.status == 0
    assert (
        "engine steps 14 10 -28.6 % 12 -14.3 %" in said
    )  # SGLang decodes once more after an end that it cannot foresee
    assert "by which rule: vllm-0.23 → vllm-0.33" in said
    assert "uncapped_alone 0.31 yes A request that is alone is not held" in said
    assert "vllm-0.23 with uncapped_alone 2" in said
    assert "by which mechanism: vLLM and SGLang" in said
    for setting in ("max_num_batched_tokens", "chunked_prefill_size", "enable_mixed_chunk"):
        assert setting in said  # in one piece, narrow as a column may be
    assert "sglang-0.5.23: left out: long_prefill_token_threshold 40 (SGLang has none)" in said
    assert "no request declares max_tokens, so SGLang reckons with an answer as long as the model allows" in said
    assert all(len(line) <= 120 for line in result.out.splitlines())


def test_runs_are_kept_for_other_commands() -> None:
    write("0,100,5", "policy: vllm\n")
    result = chairlift("diff-engines", "s.yaml", "--engines", "vllm,sglang", "--out", "kept")
    assert result.status == 0, result.err
    told = chairlift("explain", "0", "--in", "kept", "--variant", "sglang-0.5.23")
    assert told.status == 0, told.err
    again = chairlift("run", "kept/scenario.yaml", "--out", "again", "-q")
    assert again.status == 0, again.err
    assert Path("kept/requests.parquet").read_bytes() == Path("again/requests.parquet").read_bytes()


# Settings are carried over


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("{name: vllm, max_num_seqs: 8}", "max_num_seqs 8 → max_running_requests 8"),
        ("{name: vllm, max_num_seqs: 8, max_num_active_seqs: 4}", "max_num_seqs 4 → max_running_requests 4"),
        (
            "{name: vllm, max_num_batched_tokens: 512, max_num_seqs: 8, max_num_scheduled_tokens: 256}",
            "max_num_seqs 8 → max_running_requests 8; max_num_batched_tokens 256 → chunked_prefill_size 256",
        ),
        ("{name: vllm, block_size: 32}", "block_size 32 → page_size 32"),
        ("{name: vllm, enable_prefix_caching: false}", "enable_prefix_caching false → disable_radix_cache true"),
        ("{name: vllm, async_scheduling: false}", "async_scheduling false → disable_overlap_schedule true"),
        ("{name: vllm, prefill_schedule_interval: 3}", "prefill_schedule_interval 3 → prefill_decode_interval 2"),
        (
            "{name: vllm, scheduling_policy: priority}",
            "scheduling_policy priority → enable_priority_scheduling, schedule_low_priority_values_first",
        ),
        ("{name: vllm, num_gpu_blocks: 1001}", "num_gpu_blocks 1001 → kv.tokens 16000"),
        ("{name: vllm, watermark: 0.1}", "left out: watermark 0.1 (SGLang has none)"),
        ("{name: orca, reserve: max}", "settings of policy orca left out: it is none of the engines'"),
        ("orca", ""),
    ],
)
def test_settings_of_vllm_become_sglangs(policy: str, said: str) -> None:
    assert notes("sglang-0.5.23,sglang-0.5.17", policy, "max_model_len: 4096\n")[0] == said


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("{name: sglang, max_running_requests: 8}", "max_running_requests 8 → max_num_seqs 8"),
        ("{name: sglang, chunked_prefill_size: -1}", "chunked_prefill_size -1 → enable_chunked_prefill false"),
        ("{name: sglang, page_size: 64}", "page_size 64 → block_size 64"),
        ("{name: sglang, page_size: 1}", "left out: page_size 1 (vLLM's blocks have more tokens)"),
        ("{name: sglang, schedule_policy: lpm}", "left out: schedule_policy lpm (vLLM has none)"),
        ("{name: sglang, disable_overlap_schedule: true}", "disable_overlap_schedule true → async_scheduling false"),
        (
            "{name: sglang, prefill_decode_interval: 2}",
            "prefill_decode_interval 2 → prefill_schedule_interval 3",
        ),
    ],
)
def test_settings_of_sglang_become_vllms(policy: str, said: str) -> None:
    assert notes("vllm-0.33,sglang", policy, "max_model_len: 4096\n") == [said, ""]


def test_what_a_version_lacks_is_left_out_and_said() -> None:
    policy = "{name: vllm, watermark: 0.1, max_num_active_seqs: 4, max_num_seqs: 8}"

    assert notes("vllm-0.23,vllm-0.24,vllm-0.33", policy) == [
        "left out: watermark 0.1 (exists since vLLM 0.24); left out: max_num_active_seqs 4 (exists since vLLM 0.31)",
        "left out: max_num_active_seqs 4 (exists since vLLM 0.31)",
        "",
    ]


def test_both_run_the_same_loop() -> None:
    write("0,10,2", "policy: {name: vllm, async_scheduling: false}\n")
    found = diff("vllm-0.33,sglang-0.5.23", "--no-rules", "--set", "workload.max_tokens=9")

    assert found["hint"] == ""
    assert [each["loop"] for each in found["engines"]] == ["synchronous", "synchronous"]
    assert found["warning"] == ""


def test_a_variant_lends_its_keys() -> None:
    compare = (
        "compare:\n"
        "  - {name: first, policy: orca}\n"
        "  - {name: second, policy: {name: vllm, max_num_seqs: 8}, kv: {tokens: 4000}}\n"
        "  - {name: third, policy: {name: vllm, max_num_seqs: 4}}\n"
    )
    write("0,10,2", f"max_model_len: 2048\n{compare}")

    assert figures(diff("vllm-0.23,vllm", "--no-rules"), "kv_tokens") == [4000, 4000]  # the first of an engine
    found = diff("vllm-0.23,vllm", "--no-rules", "--variant", "third")
    assert [each["settings"][0]["max_num_seqs"] for each in found["engines"]] == [4, 4]


def test_groups_keep_policies_of_their_own() -> None:
    groups = "replicas: [{policy: {name: vllm, max_num_seqs: 8}}, {count: 2}]\npolicy: {name: vllm, max_num_seqs: 4}\n"
    write("0,10,2\n1,10,2", groups)
    found = diff("vllm-0.33,sglang-0.5.23")

    assert [s["max_running_requests"] for s in found["engines"][1]["settings"]] == [8, 4]


def test_a_case_is_chosen() -> None:
    write("0,10,2", "policy: vllm\ncases:\n  - {name: a, set: {kv.tokens: 4000}}\n  - {name: b, set: {gpu: l4}}\n")
    found = diff("vllm-0.23,vllm", "--no-rules", "--case", "a", "--set", "max_model_len=2048")

    assert figures(found, "kv_tokens") == [4000, 4000]


def test_a_trace_is_enough_with_a_model_and_a_gpu() -> None:
    write("0,10,2", "")
    options = ("--set", "model=llama-3.1-8b", "--set", "gpu=h100", "--engines", "vllm,sglang", "--json")
    result = chairlift("diff-engines", "t.csv", *options)

    assert result.status == 0, result.err
    assert figures(json.loads(result.out), "completed") == [1, 1]


# Mistakes


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("vllm", "vllm-0.33"),
        ("sglang", "sglang-0.5.23"),
        ("vllm-0.33.0", "vllm-0.33"),
        ("vllm-0.23.1", "vllm-0.23"),
        ("sglang-0.5.17", "sglang-0.5.17"),
    ],
)
def test_an_engine_is_a_name_and_a_version(told: str, meant: str) -> None:
    assert engine(told).name == meant
    assert meant in known()


@pytest.mark.parametrize(
    ("told", "near"),
    [
        ("vllm-0.34", "vllm-0.3"),
        ("vlm-0.33", "vllm-0.33"),
        ("sglang-0.5.22", "sglang-0.5.2"),
        ("vllm-0.3", "vllm-0.30"),
    ],
)
def test_an_unknown_engine_is_refused_with_a_near_one(told: str, near: str) -> None:
    with pytest.raises(BadInput, match=rf"no such engine – did you mean '{near}"):
        engine(told)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("s.yaml", "--engines", "vllm-0.33"), "--engines: must name at least two engines"),
        (("s.yaml", "--engines", "vllm-0.33,vllm"), "--engines: is given twice (got 'vllm-0.33')"),
        (("s.yaml", "--engines", "tgi,vllm"), "--engines: no such engine – allowed: "),
        (("s.yaml", "--case", "x"), "--case: the scenario has no cases (got 'x')"),
        (("s.yaml", "--variant", "x"), "--variant: the scenario compares nothing (got 'x')"),
        (("t.csv",), "t.csv: model: is required"),
        (("s.yaml", "--set", "policy.max_num_seq=3"), "policy.max_num_seq: unknown key – did you mean 'max_num_seqs'?"),
        (
            ("s.yaml", "--set", "policy={name: sglang, enable_priority_scheduling: true}"),
            "policy.enable_priority_scheduling: vLLM serves low values first: say schedule_low_priority_values_first",
        ),
        (
            ("s.yaml", "--set", "policy={name: sglang, chunked_prefill_size: 100, max_running_requests: 200}"),
            "--engines vllm-0.23: compare.0.policy.max_num_batched_tokens: must be at least max_num_seqs",
        ),
        (("s.yaml", "--set", "backend=torch"), "backend"),
        (
            ("s.yaml", "--set", "cases=[{name: low}, {name: high}]"),
            "cases: choose one of them with --case: low, high",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    write("0,10,2", "policy: vllm\n")
    result = chairlift("diff-engines", *arguments)

    assert result.status == 2
    assert said in result.err
    assert "Traceback" not in result.err
