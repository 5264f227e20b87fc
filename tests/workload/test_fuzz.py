"""Whatever a file holds: a trace or a scenario is read, or refused in words, and soon.

``CHAIRLIFT_FUZZ=10000 pytest tests/workload/test_fuzz.py`` tries that many mutations of each kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import datetime

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import load as load_scenario
from chairlift.sim.workload.describe import describe
from chairlift.sim.workload.formats.azure import _alike
from chairlift.sim.workload.formats.read import load, names
from chairlift.sim.workload.formats.text_tables import _digits, stamp_ps, whole

EXAMPLES = int(os.environ.get("CHAIRLIFT_FUZZ", "300"))
LONGEST_S = 5.0

TRACES = [
    b"TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:17:03.9799600,1,5,6\r\n2023-11-16 18:17:04.0,0,7,8",
    b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"5.5,a,1,G,9,8,17,x\n7,,1,G,0,0,0,x\n",
    b"arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,6\n0.5,7,8\n",
    b"arrival_s,prompt_tokens,output_tokens,max_tokens,priority,tenant,session,prefix_group,prefix_tokens,follows,"
    b"think_s\n0,9,9,9,0,a,1,1,4,-1,0\n0,9,9,9,1,,,,,0,2.5\n",
    b"arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block\n0,40,9,1 2 3,16\n1,40,9,1 2 4,16\n",
    *(
        "".join(json.dumps(row) + "\n" for row in rows).encode()
        for rows in (
            [{"timestamp": t, "input_length": 600, "output_length": 5, "hash_ids": [1, 2 + t]} for t in range(3)],
            [{"timestamp": 1.5, "input_length": 30, "output_length": 5, "hash_ids": [1, 2]}],
            [{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 30, "output_length": 5,
              "type": "text", "turn": 1, "hash_ids": [1, 2]},
             {"chat_id": 2, "parent_chat_id": 1, "timestamp": 9, "input_length": 40, "output_length": 5, "turn": 2,
              "hash_ids": [1, 2, 3]}],
            [{"session_id": "a", "timestamp": 0, "input_length": 300, "output_length": 40},
             {"session_id": "a", "delay": 5000, "input_length": 500, "output_length": 40}],
            [{"session_id": "a", "created_time": 0, "input_tokens": 300, "output_tokens": 40},
             {"session_id": "a", "delay_ms": 50, "input_tokens": 500, "output_tokens": 40}],
            [{"metadata": {"request_start_ns": 10, "turn_index": 0, "x_correlation_id": "q"}, "error": None,
              "metrics": {"input_sequence_length": {"value": 5}, "output_sequence_length": {"value": 9}}}],
            [{"timestamp": "5", "input_length": 40, "output_length": 3, "session_id": "s",
              "hash_ids": {"sys_prompt": [1], "passages_ids": [2], "history": [], "web_search": [],
                           "user_input": [3]}}],
            [{"id": "t", "models": ["m"], "block_size": 64, "hash_id_scope": "local", "requests": [
                {"t": 0, "type": "n", "model": "m", "in": 128, "out": 3, "hash_ids": [1, 2], "api_time": 1.5,
                 "think_time": 0.5}]}],
        )
    ),
    json.dumps({"benchmarks": [{"requests": {"successful": [
        {"request_start_time": 1.5, "prompt_tokens": 5, "output_tokens": 6}], "errored": [{}]}}]}).encode(),
    json.dumps([{"start_time": 7.25, "info": {"input_tokens": 30, "output_tokens": 4}, "error": None}]).encode(),
]  # fmt: skip
SNIPPETS = [
    *(
        b"",
        b"-1",
        b"1e400",
        b"nan",
        b"-inf",
        b"9" * 30,
        b"0",
        b"null",
        b"true",
        b'"',
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"\n",
    ),
    *(b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xd9\xa1", b"[[[[[[[[", b'{"a":1}', b"hash_ids", b"follows", b"  "),
]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of ``seeds`` with a few cuts, insertions and exchanges."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.sampled_from([0, 1, 2, 5, 20])))
        other = draw(st.sampled_from(seeds))
        new = draw(st.sampled_from(SNIPPETS) | st.binary(max_size=3) | st.just(other[at:until]))
        data = data[:at] + new + data[until:]
    return data


@settings(max_examples=EXAMPLES)
@given(mutated(TRACES), st.sampled_from([None, *names()]), st.booleans())
def test_a_mutated_trace_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, format: str | None, times: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.trace"
    path.write_bytes(data)
    begin = time.monotonic()
    trace = None
    with contextlib.suppress(BadInput):
        trace = load(path, format, times=times)
    if trace is not None:
        described = describe(trace)
        assert described["requests"] == len(trace) > 0
        assert int(trace.prompt_tokens.min()) >= 1
        assert int(trace.output_tokens.min()) >= 1
        assert (np.diff(trace.arrival_ps) >= 0).all()
        assert trace.arrival_ps[0] >= 0
        assert trace.follows is None or (trace.follows < np.arange(len(trace))).all()
    assert time.monotonic() - begin < LONGEST_S


SCENARIOS = [
    yaml.safe_dump(document, sort_keys=False).encode()
    for document in (
        {
            "model": "llama-3.1-8b", "gpu": "h100", "policy": {"name": "vllm", "max_num_seqs": 8}, "replicas": 2,
            "failures": {"schedule": [{"replica": 0, "at_s": 1, "for_s": 2}]}, "limits": {"timeout_s": 5},
            "autoscale": {"max": 3, "schedule": [{"at_s": 1, "replicas": 2}]},
            "workload": {"requests": 5, "arrivals": {"poisson": {"rate_per_s": 2}}, "prompt_tokens": {"normal": {
                "mean": 20, "std": 5, "min": 3, "max": 90}}, "output_tokens": 4, "tenants": {"a": 1}},
        },
        {
            "model": "opt-13b", "gpu": {"name": "a100-40gb", "memory_gib": 41}, "kv": {"blocks": 300},
            "max_model_len": 500, "policy": "sarathi",
            "workload": {"duration_s": 3, "arrivals": {"stages": [{"rate": 1, "to": 3, "duration": 2}]},
                         "prompt_tokens": {"values": [3, 4]}, "output_tokens": {"exponential": {"mean": 9, "cap": 20}}},
            "compare": [{"name": "a", "policy": "fair"}, {"name": "b", "router": "prefix_affinity"}],
            "cases": [{"name": "c", "set": {"seed": 3}}], "claims": [{"says": "z", "published": [1, 2], "of": "a"}],
        },
    )
]  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(mutated(SCENARIOS))
def test_a_mutated_scenario_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    if b"9999999" in data:
        return  # as many requests as that are a wish, not a mistake
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    begin = time.monotonic()
    with contextlib.suppress(BadInput):
        assert load_scenario(path).setups
    assert time.monotonic() - begin < LONGEST_S


FRACTIONS = st.one_of(st.just(""), st.integers(1, 12).map(lambda digits: f".{'123456789012'[:digits]}"))
ZONES = st.sampled_from(["", "", "+00:00", "+00:00", "+01:00", "Z", "\n"])


@given(
    st.lists(st.tuples(st.datetimes(datetime(1600, 1, 1), datetime(2400, 1, 1)), FRACTIONS), min_size=1, max_size=5),
    ZONES,
)
def test_stamps_of_one_kind_are_read_as_each_alone(stamps: list[tuple[datetime, str]], zone: str) -> None:
    cells = [f"{stamp:%Y-%m-%d %H:%M:%S}{fraction}{zone}" for stamp, fraction in stamps]

    assert _alike(cells) in (None, [stamp_ps(cell) for cell in cells])


@given(st.lists(st.tuples(st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)), ZONES), min_size=2, max_size=4))
def test_stamps_of_several_kinds_are_read_as_each_alone(stamps: list[tuple[datetime, str]]) -> None:
    cells = [f"{stamp:%Y-%m-%d %H:%M:%S}.5{zone}" for stamp, zone in stamps]

    assert _alike(cells) in (None, [stamp_ps(cell) for cell in cells])


@pytest.mark.parametrize(
    "cells", [["1"] * 3, ["12", "", "3"], ["1", "٣"], ["1", "2.0"], ["9" * 20], [1, "2"], ["-1"], [" 1"]]
)
def test_numbers_of_a_column_are_read_as_each_alone(cells: list[object]) -> None:
    together = _digits(cells)
    try:
        alone = [whole(cell) for cell in cells]
    except ValueError:
        assert together is None
    else:
        assert together in (None, alone)
