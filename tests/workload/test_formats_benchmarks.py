"""Trace and result files of benchmarks: Bailian, AIPerf, Dynamo, vLLM's timed traces, GuideLLM, inference-perf."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.trace import Trace

MS, S = 10**9, 10**12


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: object, name: str = "t.jsonl") -> Path:
        path = tmp_path / name
        rows = content if isinstance(content, list) and name.endswith("jsonl") else None
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) if rows is not None else json.dumps(content))
        return path

    return write


def ids(trace: Trace) -> list[list[int]]:
    assert trace.hash_ids is not None
    return [trace.hash_ids.row(i).tolist() for i in range(len(trace))]


def rules(path: Path, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        load(path, **options)
    return str(caught.value)


# ---- what several formats may be has to be named: units are never taken from names of keys ----

PLAIN = [
    {"timestamp": 0, "input_length": 900, "output_length": 5},
    {"timestamp": 2, "input_length": 9, "output_length": 5},
]


def test_rows_without_ids_may_be_in_seconds_or_milliseconds(write: Callable[..., Path]) -> None:
    path = write(PLAIN)

    assert "may be of several trace formats (mooncake, vllm_timed_trace)" in rules(path)
    assert load(path, "mooncake").arrival_ps.tolist() == [0, 2 * MS]
    assert load(path, "vllm_timed_trace").arrival_ps.tolist() == [0, 2 * S]
    told = load(path, "mooncake", options={"time_unit": "us"})
    assert told.arrival_ps.tolist() == [0, 2 * 10**6]
    assert "timestamp read as microseconds, as time_unit says" in told.notes


def test_blocks_tell_mooncake_from_vllm(write: Callable[..., Path]) -> None:
    def rows(block: int) -> list[dict[str, Any]]:
        return [
            {"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": list(range(-(-n // block)))}
            for t, n in ((0, 900), (2, 40))
        ]

    kimi, vllm = load(write(rows(512))), load(write(rows(16), "v.jsonl"))

    assert kimi.source.endswith("(mooncake format)")
    assert kimi.arrival_ps.tolist() == [0, 2 * MS]
    assert vllm.source.endswith("(vllm_timed_trace format)")
    assert vllm.arrival_ps.tolist() == [0, 2 * S]
    assert (kimi.hash_block, vllm.hash_block) == (512, 16)
    assert "timestamp read as seconds, as the vllm_timed_trace format has them" in vllm.notes


def test_another_size_of_blocks_is_named_and_needs_a_unit(write: Callable[..., Path]) -> None:
    rows = [{"timestamp": 5, "input_length": 130, "output_length": 5, "hash_ids": [1, 2, 3]}]
    path = write(rows)

    assert "must have an id for each 512 of the 130 tokens, rounded up (hash_block: 64 would fit" in rules(path)
    assert "so time_unit must say the unit" in rules(path, options={"hash_block": 64})
    trace = load(path, options={"hash_block": 64, "time_unit": "s"})
    assert (trace.hash_block, trace.arrival_ps.tolist()) == (64, [5 * S])


def test_an_option_that_a_format_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")

    assert "time_unit: the file's format has no such option – allowed: drop_empty (got 'ms')" in rules(
        path, options={"time_unit": "ms"}
    )


def test_ids_in_later_rows_only_are_not_passed_over(write: Callable[..., Path]) -> None:
    rows = [PLAIN[0], {**PLAIN[1], "hash_ids": [1]}]

    assert "t.jsonl:1: hash_ids: missing key" in rules(write(rows), format="mooncake")


# ---- Bailian ----

BAILIAN = [
    {"chat_id": 55, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 32, "output_length": 9, "type": "text",
     "turn": 1, "hash_ids": [1, 2]},
    {"chat_id": 60, "parent_chat_id": -1, "timestamp": 2.0, "input_length": 8, "output_length": 3, "type": "image",
     "turn": 1, "hash_ids": [7]},
    {"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 50, "output_length": 132,
     "type": "text", "turn": 2, "hash_ids": [1, 2, 3, 4]},
    {"chat_id": 160, "parent_chat_id": 159, "timestamp": 90, "input_length": 60, "output_length": 1, "type": "text",
     "turn": 3, "hash_ids": [1, 2, 3, 5]},
]  # fmt: skip


def test_bailian_is_in_seconds_with_blocks_of_16_and_chats_of_parents(write: Callable[..., Path]) -> None:
    trace = load(write(BAILIAN))

    assert trace.source == "t.jsonl (bailian format)"
    assert trace.arrival_ps.tolist() == [1.5 * S, 2 * S, 61_114 * MS, 90 * S]
    assert trace.session is not None
    assert trace.session.tolist() == [0, 1, 0, 0]
    assert ids(trace)[2] == [1, 2, 3, 4]
    assert trace.hash_block == 16
    assert trace.follows is None  # every row has a time of its own
    assert trace.notes[-1] == "columns not used: type, turn"


def test_a_chat_that_is_its_own_parent_is_refused(write: Callable[..., Path]) -> None:
    rows = [{**BAILIAN[0], "chat_id": 1, "parent_chat_id": 2}, {**BAILIAN[2], "chat_id": 2, "parent_chat_id": 1}]

    assert "the parents of this chat lead back to it" in rules(write(rows))
    assert "two rows have this chat_id, the first on line 1" in rules(write([BAILIAN[0], BAILIAN[0]]))


# ---- sessions of AIPerf and Dynamo ----


def test_a_turn_of_aiperf_waits_and_adds_to_its_conversation(write: Callable[..., Path]) -> None:
    rows = [
        {"session_id": "abc", "timestamp": 10, "input_length": 300, "output_length": 40},
        {"session_id": "abc", "delay": 2000, "input_length": 150, "output_length": 20},
        {"timestamp": 20, "input_length": 7, "output_length": 7},
    ]
    trace = load(write(rows))

    assert trace.source == "t.jsonl (aiperf format)"
    assert trace.arrival_ps.tolist() == [10 * MS, 10 * MS, 20 * MS]
    assert trace.prompt_tokens.tolist() == [300, 300 + 40 + 150, 7]
    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, 0, -1]
    assert trace.think_ps is not None
    assert trace.think_ps.tolist() == [0, 2 * S, 0]
    assert trace.session is not None
    assert trace.session.tolist() == [0, 0, -1]
    assert any("1 later turns: input_length added" in note for note in trace.notes)


def test_whole_prompts_of_aiperf_are_said_by_the_rows(write: Callable[..., Path]) -> None:
    mode = {"context_mode": "message_array_with_responses"}
    rows = [
        {"session_id": "a", "timestamp": 0, "input_length": 300, "output_length": 40, **mode},
        {"session_id": "a", "delay": 5, "input_length": 150, "output_length": 20, **mode},
    ]

    assert load(write(rows)).prompt_tokens.tolist() == [300, 150]
    assert "context_mode: must be" in rules(write([{**rows[0], "context_mode": "else"}]))


def test_dynamo_has_whole_prompts_and_must_be_named_where_ids_do_not_tell(write: Callable[..., Path]) -> None:
    rows = [
        {"session_id": "a", "timestamp": 0, "input_length": 600, "output_length": 40, "hash_ids": [1, 2]},
        {"session_id": "b", "timestamp": 3, "input_length": 5, "output_length": 4, "hash_ids": [9]},
        {"session_id": "a", "delay": 250, "input_length": 1100, "output_length": 20, "hash_ids": [1, 2, 3]},
    ]
    path = write(rows)

    assert "may be of several trace formats (aiperf, dynamo)" in rules(path)
    trace = load(path, "dynamo")
    assert trace.prompt_tokens.tolist() == [600, 1100, 5]  # in order of time: the second turn starts with its session
    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, 0, -1]
    assert trace.think_ps is not None
    assert trace.think_ps.tolist() == [0, 250 * MS, 0]
    assert ids(trace) == [[1, 2], [1, 2, 3], [9]]
    alias = [{"session_id": "a", "created_time": 0, "input_tokens": 6, "output_tokens": 4},
             {"session_id": "a", "delay_ms": 7, "input_tokens": 16, "output_tokens": 4}]  # fmt: skip
    assert load(write(alias, "a.jsonl"), "dynamo").prompt_tokens.tolist() == [6, 16]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"session_id": "a", "delay": 5, "input_length": 1, "output_length": 1}, "must be 0 in the first turn"),
        ({"session_id": "a", "timestamp": -5, "input_length": 1, "output_length": 1}, "must be at least 0"),
        (
            {"session_id": "a", "text_input": "x", "input_length": 1, "output_length": 1},
            "prompts as texts have no token",
        ),
        ({"session_id": "a", "delay": "x", "input_length": 1, "output_length": 1}, "must be a number of milliseconds"),
        ({"session_id": "a", "input_length": 1, "output_len": 1}, "missing key – did you mean 'output_len'?"),
    ],
)
def test_wrong_rows_of_sessions_are_refused(write: Callable[..., Path], row: dict[str, Any], rule: str) -> None:
    assert rule in rules(write([row]), format="aiperf")


def test_a_dropped_turn_hands_its_wait_on(write: Callable[..., Path]) -> None:
    rows = [
        {"session_id": "a", "timestamp": 0, "input_length": 300, "output_length": 40},
        {"session_id": "a", "delay": 5, "input_length": 10, "output_length": 0},
        {"session_id": "a", "delay": 7, "input_length": 10, "output_length": 4},
    ]
    trace = load(write(rows), options={"drop_empty": True})

    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, 0]
    assert trace.prompt_tokens.tolist() == [300, 350]
    assert "1 rows without prompt or output tokens dropped" in trace.notes


# ---- result files ----

GUIDE = {
    "metadata": {"guidellm_version": "0.7.3"},
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {"request_start_time": 101.5, "prompt_tokens": 512, "output_tokens": 64},
                    {"info": {"timings": {"request_start": 101.0}}, "prompt_tokens": 500, "output_tokens": 60},
                ],
                "incomplete": [{}],
                "errored": [],
            }
        }
    ],
}


def test_guidellm_gives_the_requests_that_succeeded(write: Callable[..., Path]) -> None:
    trace = load(write(GUIDE, "benchmarks.json"))

    assert trace.arrival_ps.tolist() == [0, S // 2]
    assert trace.prompt_tokens.tolist() == [500, 512]
    assert "1 requests that failed or were cut short left out" in trace.notes


def test_one_of_several_benchmarks_must_be_named(write: Callable[..., Path]) -> None:
    path = write({"benchmarks": GUIDE["benchmarks"] * 2}, "benchmarks.json")

    assert "the file has 2 benchmarks: part must say which" in rules(path)
    assert len(load(path, options={"part": 2})) == 2
    assert "must be at most 2" in rules(path, options={"part": 3})


def test_inference_perf_leaves_failures_out(write: Callable[..., Path]) -> None:
    rows = [
        {"start_time": 7.25, "end_time": 9, "request": "{}", "response": "x", "error": None,
         "info": {"input_tokens": 30, "output_tokens": 4, "output_token_times": []}},
        {"start_time": 8.25, "info": {"request_metrics": {"text": {"input_tokens": 31}},
                                      "response_metrics": {"output_tokens": 5}}, "error": None},
        {"start_time": 8.5, "info": None, "error": {"error_type": "x", "error_msg": "y"}},
    ]  # fmt: skip
    trace = load(write(rows, "per_request_lifecycle_metrics.json"))

    assert trace.source.endswith("(inference_perf format)")
    assert (trace.arrival_ps.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (
        [0, S],
        [30, 31],
        [4, 5],
    )


def test_aiperf_results_are_in_nanoseconds(write: Callable[..., Path]) -> None:
    def row(start: int, error: object = None) -> dict[str, Any]:
        return {
            "metadata": {"request_start_ns": start, "turn_index": 0, "x_correlation_id": "q"},
            "metrics": {"input_sequence_length": {"value": 550}, "output_sequence_length": {"value": 9}},
            "error": error,
        }

    rows = [row(1759813207532900363), row(1759813207532900463), row(1759813207532900563, {"code": 499})]
    trace = load(write(rows, "profile_export.jsonl"))

    assert trace.arrival_ps.tolist() == [0, 100_000]
    assert trace.session is None


def test_a_result_without_a_number_names_the_request(write: Callable[..., Path]) -> None:
    wrong = {
        "benchmarks": [
            {"requests": {"successful": [{"request_start_time": 1, "prompt_tokens": None, "output_tokens": 1}]}}
        ]
    }

    assert "benchmarks.json:1: prompt_tokens: is missing" in rules(write(wrong, "benchmarks.json"))
