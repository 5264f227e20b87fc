"""Loads and files made after public reports of people who use benchmarks and simulators; each test names its report.

What counts is not the bug of the tool that was reported, but what its users brought and expected: that is tried here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import load as load_scenario
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build
from kit.made import workload

SECOND = 10**12
LENGTHS = {"prompt_tokens": 8, "output_tokens": 8}


def refusal(call: Any, *args: Any, **keys: Any) -> list[str]:
    with pytest.raises(BadInput) as error:
        call(*args, **keys)
    return [str(problem) for problem in error.value.problems]


def written(folder: Path, name: str, *rows: object) -> Path:
    """A file of JSON lines; a row that is a text is written as it is."""
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def seconds(trace: Trace) -> Any:
    return trace.arrival_ps / SECOND


# ---- loads ----


def test_inference_perfs_constant_load_can_be_said() -> None:
    """Its ``constant`` is random: a whole number of requests a stage, which fill the stage exactly.

    https://github.com/inference-sim/inference-sim/issues/845
    """
    stages = [{"rate": 5, "duration": 600}, {"rate": 10, "duration": 600}]
    spread = build(workload(arrivals={"stages": {"type": "spread", "stages": stages}}, **LENGTHS), 0)
    times = seconds(spread)

    assert len(spread) == 3000 + 6000
    assert np.sum(times <= 600) == 3000
    assert (times[2999], times[-1]) == (600, 1200)
    for gaps in (np.diff(times[:3000]), np.diff(times[3000:])):
        assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.1)  # those of exponential gaps
    # uniform over the stage: of 3,000 requests half come in its first half, give or take 4 deviations
    assert np.sum(times <= 300) == pytest.approx(1500, abs=4 * math.sqrt(3000) / 2)


def test_whoever_copies_type_constant_is_told_the_difference() -> None:
    """https://github.com/inference-sim/inference-sim/issues/845, the other way round."""
    stages = [{"rate": 5, "duration": 6}]
    copied = build(workload(arrivals={"stages": {"type": "constant", "stages": stages}}, **LENGTHS), 0)
    plain = build(workload(arrivals={"stages": stages}, **LENGTHS), 0)

    assert copied.notes == (
        "stages: constant has equal gaps; inference-perf's constant, of random ones, is type: spread",
    )
    assert plain.notes == ()
    assert copied.arrival_ps.tolist() == plain.arrival_ps.tolist()


@pytest.mark.parametrize("kind", ["constant", "spread"])
def test_stages_keep_their_own_rates(kind: str) -> None:
    """Two stages of 5 and 10 requests/s were flattened into one of 7.5.

    https://github.com/inference-sim/inference-sim/issues/503
    """
    load = {"type": kind, "stages": [{"rate": 5.0, "duration": 600}, {"rate": 10.0, "duration": 600}]}
    prefix = {"groups": 5, "tokens": 100}
    trace = build(workload(arrivals={"stages": load}, prefix=prefix, prompt_tokens=566, output_tokens=247), 42)
    each_minute = np.histogram(seconds(trace), bins=20, range=(0, 1200))[0]

    assert np.sum(seconds(trace) <= 600) == 3000
    assert len(trace) == 9000
    assert each_minute[:10].mean() == pytest.approx(300, abs=1)
    assert each_minute[10:].mean() == pytest.approx(600, abs=1)


def test_a_shared_prefix_workload_of_inference_perf() -> None:
    """Nine system prompts of 100 tokens, questions of 447, two stages: without a client definition for each.

    https://github.com/inference-sim/inference-sim/issues/252
    """
    trace = build(
        workload(
            arrivals={"stages": [{"rate": 8.0, "duration": 60}, {"rate": 20.0, "duration": 60}]},
            prefix={"groups": 9, "tokens": 100},
            prompt_tokens=547,
            output_tokens=248,
        ),
        0,
    )
    assert trace.prefix_group is not None
    assert trace.prefix_tokens is not None
    times = seconds(trace)

    assert (np.sum(times <= 60), len(trace)) == (480, 480 + 1200)
    assert times[-1] <= 120
    assert np.bincount(trace.prefix_group).tolist() == pytest.approx([1680 / 9] * 9, abs=60)
    assert set(trace.prefix_tokens.tolist()) == {100}
    assert set(trace.prompt_tokens.tolist()) == {547}


STAGED = """
model: llama-3.1-8b
gpu: h100
policy: vllm
workload:
  prompt_tokens: 8
  output_tokens: 8
  arrivals:
    stages:
      type: TYPE
      interval: 15
      stages:
      - rate: 100
        duration: 30
      - rate: 200
        duration: 30
      - rate: 300
        duration: 30
"""


def test_a_load_block_that_is_copied_whole(tmp_path: Path) -> None:
    """Stages with 15 s between them; what belongs to the load generator's own processes is refused by name.

    https://github.com/kubernetes-sigs/inference-perf/issues/245
    """
    path = tmp_path / "s.yaml"
    path.write_text(STAGED.replace("TYPE", "spread") + "      worker_max_concurrency: 1000\n", encoding="utf-8")
    assert refusal(load_scenario, path) == [
        f"{path}:19: workload.arrivals.stages.worker_max_concurrency: unknown key – allowed: interval, stages, type"
    ]
    path.write_text(STAGED.replace("TYPE", "spread"), encoding="utf-8")
    times = seconds(load_scenario(path).setups[0].trace)

    assert [int(np.sum((times >= a) & (times <= a + 30))) for a in (0, 45, 90)] == [3000, 6000, 9000]
    assert len(times) == 18_000  # so nobody comes in between


def test_a_closed_loop_is_not_a_kind_of_stages(tmp_path: Path) -> None:
    """``load: {type: concurrent, stages: [{num_requests, concurrency_level}]}`` says where to say so instead.

    https://github.com/kubernetes-sigs/inference-perf/issues/319
    """
    path = tmp_path / "s.yaml"
    copied = STAGED[: STAGED.index("      interval")].replace("TYPE", "concurrent")
    path.write_text(copied + "      stages:\n      - {num_requests: 2700, concurrency_level: 45}\n", encoding="utf-8")

    assert refusal(load_scenario, path) == [
        f"{path}:9: workload.arrivals.stages: type concurrent has no rates: in place of arrivals give clients, "
        "{concurrency: N}, and requests"
    ]


def test_a_misspelt_type_does_not_hide_which_keys_there_are(tmp_path: Path) -> None:
    """Of the same copied block: the key beside the wrong type was said to be one of none allowed.

    https://github.com/kubernetes-sigs/inference-perf/issues/319
    """
    path = tmp_path / "s.yaml"
    path.write_text(STAGED.replace("TYPE", "posson") + "      num_workers: 4\n", encoding="utf-8")

    assert refusal(load_scenario, path) == [
        f"{path}:10: workload.arrivals.stages.type: must be one of 'constant', 'poisson' or 'spread'"
        " – did you mean 'poisson'? (got 'posson')",
        f"{path}:19: workload.arrivals.stages.num_workers: unknown key – allowed: interval, stages, type",
    ]


@pytest.mark.parametrize("kind", ["constant", "spread"])
def test_rates_below_one_a_second_stay_apart(kind: str) -> None:
    """Ten rates of a linear sweep came out as 1, 1, 2, 2, 2, 3, 3, 3, 4, 4.

    https://github.com/kubernetes-sigs/inference-perf/issues/229
    """
    rates = [0.45 * k for k in range(1, 11)]
    load = {"type": kind, "interval": 10, "stages": [{"rate": rate, "duration": 300} for rate in rates]}
    times = seconds(build(workload(arrivals={"stages": load}, **LENGTHS), 0))

    counts = [int(np.sum((times > 310 * k) & (times <= 310 * k + 300))) for k in range(10)]
    assert counts == [135 * k for k in range(1, 11)]


def test_a_number_of_samples_is_kept_or_refused(tmp_path: Path) -> None:
    """``samples: 10000`` was ignored; lengths by mean, deviation and bounds.

    https://github.com/vllm-project/guidellm/issues/542
    """
    text = """
model: llama-3.1-8b
gpu: h100
policy: vllm
workload:
  prompt_tokens: {normal: {mean: 600, std: 100, min: 200, max: 1000}}
  output_tokens: {normal: {mean: 300, std: 100, min: 50, max: 500}}
  arrivals: {constant: {rate_per_s: 5}}
  NUMBER: 10000
"""
    path = tmp_path / "s.yaml"
    path.write_text(text.replace("NUMBER", "samples"), encoding="utf-8")
    [said] = refusal(load_scenario, path)
    assert said.startswith(f"{path}:9: workload.samples: unknown key")
    path.write_text(text.replace("NUMBER", "requests"), encoding="utf-8")
    trace = load_scenario(path).setups[0].trace

    assert len(trace) == 10_000
    assert trace.prompt_tokens.mean() == pytest.approx(600, abs=4)
    assert (trace.prompt_tokens.min() >= 200, trace.prompt_tokens.max() <= 1000) == (True, True)
    assert (trace.output_tokens.min() >= 50, trace.output_tokens.max() <= 500) == (True, True)


@pytest.mark.parametrize(
    ("low", "high", "mean"),
    [(4096, 12_288, 8192), (4096, 8192, 6144)],  # vLLM: len · (1 ± ½); SGLang: len · ½ … len
)
def test_one_range_ratio_means_two_things(low: int, high: int, mean: int) -> None:
    """``--random-range-ratio 0.5`` of 8,192 tokens: here the bounds are said.

    https://github.com/sgl-project/sglang/issues/7253
    """
    spec = {"requests": 20_000, "arrivals": {"burst": {}}, "output_tokens": 1}
    drawn = build(workload(prompt_tokens={"uniform": {"low": low, "high": high}}, **spec), 0).prompt_tokens

    assert (drawn.min() >= low, drawn.max() <= high) == (True, True)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)


# ---- files ----


def test_an_id_for_each_block_of_a_prompt(tmp_path: Path) -> None:
    """A plan for testing had two ids for 20 tokens, of blocks of 512: they fit blocks of 16, and so does the reading.

    https://github.com/vllm-project/guidellm/pull/948
    """
    rows = [
        {"timestamp": 0.0, "input_length": 10, "output_length": 5, "hash_ids": [0]},
        {"timestamp": 0.2, "input_length": 20, "output_length": 8, "hash_ids": [0, 1]},
        {"timestamp": 0.4, "input_length": 15, "output_length": 6, "hash_ids": [2]},
    ]
    path = written(tmp_path, "mooncake.jsonl", *rows)
    assert refusal(formats.load, path, "mooncake") == [
        f"{path}:2: hash_ids: must have an id for each 512 of the 20 tokens, rounded up"
        " (hash_block: 16 would fit every row) (got '2 ids')",
        f"{path}: format: this file looks like vllm_timed_trace (got 'mooncake')",
    ]
    trace = formats.load(path)

    assert seconds(trace).tolist() == [0, 0.2, 0.4]
    assert trace.hash_block == 16
    assert "timestamp read as seconds, as the vllm_timed_trace format has them" in trace.notes


@pytest.mark.parametrize(("tokens", "right"), [(1536, False), (1537, True), (2048, True), (2049, False)])
def test_four_blocks_are_of_1537_to_2048_tokens(tokens: int, right: bool, tmp_path: Path) -> None:
    """A documented example had as many ids as its prompt has not blocks of 512.

    https://github.com/ai-dynamo/aiperf/pull/581
    """
    row = {"timestamp": 0, "input_length": tokens, "output_length": 52, "hash_ids": [0, 1, 2, 3]}
    path = written(tmp_path, "trace.jsonl", row)
    if right:
        assert formats.load(path).prompt_tokens.tolist() == [tokens]
        return
    [said] = refusal(formats.load, path)
    assert said.startswith(f"{path}:1: hash_ids: must have an id for each 512 of the {tokens} tokens, rounded up")


def test_a_trace_may_have_lengths_and_no_times(tmp_path: Path) -> None:
    """Hash blocks and timestamps are optional there: the payloads are sent at a rate of one's own.

    https://github.com/ai-dynamo/aiperf/pull/273
    """
    path = written(tmp_path, "t.jsonl", *({"input_length": n, "output_length": 7} for n in (6755, 7319, 7234)))
    assert refusal(formats.load, path) == [
        f"{path}:1: timestamp: missing key: the file has lengths only, so the workload must say arrivals of its own"
    ]
    trace = build(workload(file="t.jsonl", arrivals={"constant": {"rate_per_s": 2}}), 0, tmp_path)

    assert seconds(trace).tolist() == [0.5, 1, 1.5]
    assert trace.prompt_tokens.tolist() == [6755, 7319, 7234]
    assert trace.notes == ("the file has no arrival times", "arrival times replaced")

    half = written(
        tmp_path,
        "half.jsonl",
        {"input_length": 5, "output_length": 7, "timestamp": 3},
        '{"input_length": 5, "output_length": 7}',
    )
    for times in (True, False):
        [said] = refusal(formats.load, half, "mooncake", times=times)
        assert said.startswith(f"{half}:2: timestamp: missing key")


def test_rows_as_a_pull_request_shows_them(tmp_path: Path) -> None:
    """A quotation mark is missing in its first row; others of such rows have texts in place of lengths.

    https://github.com/triton-inference-server/perf_analyzer/pull/284
    """
    broken = '{"timestamp": 0, "text_input": "First message!", input_length": 6755, "output_length": 500}'
    path = written(tmp_path, "payload.jsonl", broken, {"timestamp": 0, "input_length": 7319, "output_length": 490})
    [said] = refusal(formats.load, path)
    assert said.startswith(f"{path}:1: not JSON: Expecting property name enclosed in double quotes")

    texts = written(tmp_path, "texts.jsonl", {"timestamp": 0, "text_input": "First message!"})
    [said] = refusal(formats.load, texts)
    assert "this looks like JSON lines with timestamp, text_input; say which are which" in said


def test_two_traces_of_the_same_keys(tmp_path: Path) -> None:
    """Moonshot's have milliseconds and ids for 512 tokens, Alibaba's seconds and ids for 16.

    https://github.com/vllm-project/vllm/pull/39795
    """
    moonshot = written(
        tmp_path,
        "conversation.jsonl",
        {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": list(range(14))},
        {"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, *range(14, 28)]},
    )
    alibaba = written(
        tmp_path,
        "qwen.jsonl",
        {"timestamp": 0, "input_length": 60, "output_length": 500, "hash_ids": [0, 1, 2, 3]},
        {"timestamp": 3, "input_length": 73, "output_length": 490, "hash_ids": [0, 1, 4, 5, 6]},
    )
    one, other = formats.load(moonshot), formats.load(alibaba)

    assert seconds(one).tolist() == seconds(other).tolist() == [0, 3]
    assert (one.hash_block, other.hash_block) == (512, 16)


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize(
    "stamps",
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.9951690", "2023-11-16 18:15:51.2224670"),
        ("2023-01-01 00:00:00.000", "2023-01-01 00:00:04.314", "2023-01-01 00:00:04.541"),
    ],
)
def test_azures_rows_as_they_are_shown(space: str, stamps: tuple[str, ...], tmp_path: Path) -> None:
    """Rows of the report; its documentation came to show a space behind each comma and milliseconds.

    https://github.com/kubernetes-sigs/inference-perf/issues/151
    """
    rows = zip(stamps, ("374", "396", "879"), ("44", "109", "55"), strict=True)
    comma = f",{space}"
    text = "\n".join(map(comma.join, [("TIMESTAMP", "ContextTokens", "GeneratedTokens"), *rows]))
    path = tmp_path / "traces.csv"
    path.write_text(text + "\n", encoding="utf-8")
    trace = formats.load(path)

    assert seconds(trace).tolist() == pytest.approx([0, 4.314, 4.541], abs=1e-3)
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    assert trace.notes == ()
