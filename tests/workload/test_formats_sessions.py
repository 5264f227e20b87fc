"""RAGPulse and coding agents' sessions: what prompts share, and what a request waits for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import load as load_scenario
from chairlift.sim.simulate import simulate
from chairlift.sim.workload.describe import describe
from chairlift.sim.workload.formats.kv_cache_tester import DERIVED
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build
from kit.made import needs_traces
from kit.places import TRACES

SECOND = 10**12


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- RAGPulse ----

PARTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")


def asked(time: int, session: str, prompt: int, *chunks: list[int]) -> dict[str, Any]:
    ids = dict(zip(PARTS, chunks, strict=True))
    return {"timestamp": str(time), "input_length": prompt, "output_length": 5, "hash_ids": ids, "session_id": session}


def pulse(folder: Path, rows: list[dict[str, Any]], maps: bool = True) -> Path:
    named = ("1_sys_prompt", "2_passages", "3_history", "5_web_search", "4_user_input")
    keys = ("sys_prompt_id", "passage_id", "history_id", "web_search_id", "user_input_id")
    for name, key in zip(named, keys, strict=True):
        if maps:
            lines(folder / f"{name}.jsonl", [{key: i, "token_length": 10 * i} for i in range(1, 9)])
    return lines(folder / "0_trace.jsonl", rows)


def test_prompts_share_blocks_as_far_as_they_consist_of_the_same_chunks(tmp_path: Path) -> None:
    rows = [
        asked(7, "a", 105, [4], [2, 3], [], [], [1]),  # 40 + 20 + 30 + 10, and 5 of the template
        asked(9, "b", 105, [4], [2, 1], [], [], [3]),  # the same 60 tokens, then others
        asked(9, "a", 62, [4], [2], [], [], []),
        asked(9, "c", 62, [], [4, 2], [], [], []),  # the same numbers, but of another kind
    ]
    trace = load(pulse(tmp_path, rows))
    ids = [trace.hash_ids.row(i).tolist() for i in range(4)] if trace.hash_ids else []

    assert trace.arrival_ps.tolist() == [0, 2 * SECOND, 2 * SECOND, 2 * SECOND]
    assert trace.session is not None
    assert trace.session.tolist() == [0, 1, 0, 2]
    assert trace.hash_block == 16
    assert list(map(len, ids)) == [6, 6, 3, 3]  # full blocks of chunks: 100, 100, 60 and 60 tokens
    shared = [sum(a == b for a, b in zip(ids[0], other, strict=False)) for other in ids]
    assert shared == [6, 3, 3, 0]


def test_without_the_maps_it_has_lengths_alone_and_says_so(tmp_path: Path) -> None:
    trace = load(pulse(tmp_path, [asked(7, "a", 105, [4], [2, 3], [], [], [1])] * 2, maps=False))

    assert (trace.hash_ids, trace.session) == (None, None)
    assert "no prefixes" in " ".join(trace.notes)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"timestamp": "x"}, "1: timestamp: must be a number of seconds"),
        ({"input_length": 0}, "1: input_length: must be at least 1"),
        ({"hash_ids": {"sys_prompt": [1]}}, "1: hash_ids: must be a mapping with the lists"),
        ({"hash_ids": {key: ["x"] for key in PARTS}}, "1: hash_ids: must be a whole number"),
        ({"session_id": ...}, "1: session_id: missing key"),
        ({"input_length": -9_999_999_999_999_999_999}, "1: input_length: must fit in 64 bits"),
        ({"output_length": 10**30}, "1: output_length: must fit in 64 bits"),
    ],
)
def test_a_wrong_row_of_ragpulse_is_named(tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    row = asked(7, "a", 105, [4], [2, 3], [], [], [1]) | change
    with pytest.raises(BadInput, match=rule):
        load(pulse(tmp_path, [{k: v for k, v in row.items() if v is not ...}]))


def test_a_week_of_ragpulse_is_no_longer_than_the_clock(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="2: timestamp: must be within 106 days of time 0"):
        load(pulse(tmp_path, [asked(t, "a", 9, [], [], [], [], []) for t in (0, 10**8)]))


def test_rows_of_ragpulse_are_brought_in_order_of_time(tmp_path: Path) -> None:
    rows = [asked(9, "a", 41, [1], [3], [], [], []), asked(7, "b", 40, [4], [], [], [], [])]
    trace = load(pulse(tmp_path, rows))

    assert (trace.arrival_ps // SECOND).tolist() == [0, 2]
    assert trace.prompt_tokens.tolist() == [40, 41]
    assert trace.session is not None
    assert trace.session.tolist() == [1, 0]  # numbered in order of the file
    assert trace.hash_ids is not None
    assert np.diff(trace.hash_ids.offsets).tolist() == [2, 2]
    assert "rows brought in order of time" in trace.notes
    with pytest.raises(BadInput, match="1: input_length: must be at least 1"):  # the line of the file, not of the trace
        load(pulse(tmp_path, [rows[0] | {"input_length": 0}, rows[1]]))


@needs_traces
def test_the_real_week_of_ragpulse() -> None:
    trace = load(TRACES / "ragpulse_0_trace.jsonl.gz")
    truth = json.loads((TRACES / "stats.json").read_text())["ragpulse"]
    said = describe(trace)

    assert said["requests"] == truth["n"] == 7106
    for ours, theirs in (("prompt_tokens", "inp"), ("output_tokens", "out")):
        assert [said[ours][k] for k in ("mean", "p50", "p99")] == pytest.approx(
            [truth[theirs][k] for k in ("mean", "p50", "p99")]
        )
    assert said["sessions"]["count"] == 3990
    # The traces' README has 0.315 for whole chunks; blocks of 16 lose a little at the end of each shared run.
    assert 0.310 < said["prefix"]["token_hit"] < 0.315


# ---- coding agents ----


def request(t: float, prompt: int, out: int, api: float, think: float, ids: list[int]) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": prompt, "out": out, "hash_ids": ids, "api_time": api, "think_time": think}


def session(*requests: dict[str, Any], block: int = 64) -> dict[str, Any]:
    return {"id": "trace_0001", "models": [], "block_size": block, "hash_id_scope": "local", "requests": list(requests)}


SUBAGENT = {
    "t": 10.0,
    "type": "subagent",
    "duration_ms": 9000,
    "requests": [request(0, 64, 3, 2, 0, [9]), request(5, 128, 3, 2.5, 3, [9, 10])],
}


def test_requests_wait_for_the_one_before_and_the_main_agent_for_its_subagent(tmp_path: Path) -> None:
    sessions = [
        session(request(0, 130, 7, 4, 0, [1, 2]), SUBAGENT, request(21, 200, 7, 4, 17, [1, 2, 3])),
        session(request(0, 130, 0, 4, 0, [1, 2]), SUBAGENT | {"duration_ms": 99_000}, request(21, 200, 7, 4, 17, [1])),
    ]
    trace = load(lines(tmp_path / "s.jsonl", sessions))

    assert trace.follows is not None
    assert trace.think_ps is not None
    assert trace.follows.tolist() == [-1, 0, 1, 2, -1, 4, 5, 4]
    # subagent 6 s after the first answer, then its own pace; the main agent 21 − 19 s after it, or its own 17 s
    assert (trace.think_ps // SECOND).tolist() == [0, 6, 3, 2, 0, 6, 3, 17]
    assert trace.output_tokens.tolist() == [7, 3, 3, 7, 1, 3, 3, 7]
    assert trace.hash_block == 64
    assert trace.hash_ids is not None
    first, second = (set(trace.hash_ids.values[slice(*trace.hash_ids.offsets[[a, b]])]) for a, b in ((0, 4), (4, 8)))
    assert not first & second  # ids restart in every session
    assert trace.hash_ids.row(0).tolist() == trace.hash_ids.row(3).tolist()[:2]
    assert "1 requests without output" in trace.notes[1]


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([session(request(0, 130, 7, 4, 0, [1, 2, 3, 4]))], "1: hash_ids: at most one id for each 64"),
        ([session({"t": 0, "type": "n", "in": 3, "out": 1})], "1: not a session of kv-cache-tester: hash_ids is miss"),
        ([session(request(0, 0, 7, 4, 0, []))], "1: in: must be at least 1"),
        ([session(request(0, 9, -7, 4, 0, []))], r"1: out: must be at least 1 \(got -7\)"),
        ([session(request(0, 10**30, 7, 4, 0, []))], "1: in: must fit in 64 bits"),
        ([session(request(0, 9, 7, 4, 0, []), request(9, 9, 7, 4, 1e18, []))], "1: think_ps: must be at most 106 days"),
        ([session(request(0, 9, 7, 4, 0, [10**30]))], "1: .*hash ids, with those of all .* must fit in 64 bits"),
        ([session(request(0, 9, 7, 4, 0, [-1]))], r"1: .*hash ids must not be below 0 \(got -1\)"),
        ([session(request(0, 9, 7, 4, 0, [2**62]))] * 2, "2: .*with those of all sessions before, must fit in 64 bits"),
        ([session(request(0, 9, 7, 4, 0, [1]), block=10**30)], "1: hash_block: must fit in 64 bits"),
        ([session(request(0, 9, 7, 4, 0, [])), session(request(0, 9, 7, 4, 0, []), block=32)], "2: .*before, 64"),
        ([{"id": "x", "hash_id_scope": "local"}], "1: not a session of kv-cache-tester: block_size is missing"),
    ],
)
def test_a_wrong_session_is_named(tmp_path: Path, rows: list[dict[str, Any]], rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        load(lines(tmp_path / "s.jsonl", rows))


@needs_traces
def test_the_real_sessions_share_as_much_as_was_computed_elsewhere() -> None:
    trace = load(TRACES / "kvcachetester_sessions_first.jsonl.gz")
    said = describe(trace)

    assert (said["requests"], said["sessions"]["count"]) == (4232, 61)
    assert said["prefix"]["token_hit"] == pytest.approx(0.950, abs=5e-4)  # the traces' README
    derived = load(TRACES / "kvcachetester_requests_derived.csv.gz")
    first = derived.head(4232)
    assert sorted(first.prompt_tokens.tolist()) == sorted(trace.prompt_tokens.tolist())
    assert (len(derived), describe(derived)["sessions"]["count"]) == (49_334, 710)
    assert first.think_ps is not None
    assert trace.think_ps is not None
    assert np.median(first.think_ps) == np.median(trace.think_ps)


def reuse(trace: Trace, rows: list[int]) -> float:
    """Share of these requests' prompt tokens that lie in blocks which an earlier one of them began with, too."""
    assert trace.hash_ids is not None
    seen: set[int] = set()
    hit = 0
    for row in rows:
        ids = trace.hash_ids.row(row).tolist()
        known = next((i for i, each in enumerate(ids) if each not in seen), len(ids))
        hit += min(known * trace.hash_block, int(trace.prompt_tokens[row]))
        seen.update(ids)
    return hit / int(trace.prompt_tokens[rows].sum())


@needs_traces
@pytest.mark.parametrize("file", ["kvcachetester_sessions_first.jsonl.gz", "ragpulse_0_trace.jsonl.gz"])
def test_real_files_run_and_find_their_prefixes(tmp_path: Path, file: str) -> None:
    (tmp_path / "s.yaml").write_text(
        "model: llama-3.1-8b\ngpu: h200\nmax_model_len: 131072\npolicy: {name: vllm, max_num_batched_tokens: 8192}\n"
        f"workload: {{file: {TRACES / file}, requests: 120, arrivals: {{poisson: {{rate_per_s: 0.2}}}}}}\n"
    )
    [setup] = load_scenario(tmp_path / "s.yaml").setups
    outcome = simulate(setup)
    summary = outcome.summary

    assert summary["completed"] + summary["rejected"] == len(setup.trace) == 120  # some are too long
    # the pool is too small for an infinite cache of what was served, and blocks of answers are found in no prompt here
    most = reuse(setup.trace, np.flatnonzero(np.frombuffer(outcome.requests.admitted, np.int64) >= 0).tolist())
    assert 0.5 * most < summary["prefix_hit_rate"] <= most


def test_the_derived_table_is_told_from_sessions_also_when_the_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(DERIVED) + "\nt1,main,0,0,130,7,4,0\nt1,main,1,9,150,7,4,5\n")
    trace = load(tmp_path / "t.csv", "kv_cache_tester")

    assert trace.source == "t.csv (kv_cache_tester, derived format)"
    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, 0]


def test_arrivals_are_those_of_sessions(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "s.jsonl", [session(request(0, 130, 7, 4, 0, [1, 2]), request(9, 150, 7, 4, 5, [1, 2]))] * 3
    )
    made = Workload.model_validate({"file": str(path), "arrivals": {"constant": {"rate_per_s": 0.5}}, "requests": 5})
    trace = build(made, 0)

    assert (trace.arrival_ps // SECOND).tolist() == [2, 2, 4, 4, 6]
    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, 0, -1, 2, -1]
