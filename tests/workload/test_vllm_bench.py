"""Results of ``vllm bench serve``: read as they are, and refused in one line where they cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.formats.vllm_bench import result
from kit.benched import CLOCK_S, result_of

# three requests: in the file's order the second was sent first
REQUESTS = {
    "arrival_s": np.array([2.0, 0.5, 3.0]),
    "first_token_s": np.array([2.25, 1.0, 3.5]),
    "last_token_s": np.array([3.25, 5.0, 3.5]),
    "prompt_tokens": np.array([100, 200, 300]),
    "output_tokens": np.array([5, 3, 1]),
}


def written(tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    document = result_of(REQUESTS)
    change(document)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    return path


def test_requests_are_read_in_order_of_sending(tmp_path: Path) -> None:
    found = result(written(tmp_path))

    assert found.rows.tolist() == [1, 0, 2]
    assert (found.trace.arrival_ps / 1e12).tolist() == pytest.approx([0, 1.5, 2.5], abs=1e-9)
    assert found.trace.prompt_tokens.tolist() == [200, 100, 300]
    assert found.ttft_s.tolist() == pytest.approx([0.5, 0.25, 0.5])
    assert found.latency_s.tolist() == pytest.approx([4.5, 1.25, 0.5])
    assert found.itl_s.tolist() == pytest.approx([2, 2, 0.25, 0.25, 0.25, 0.25])
    assert (found.sent, found.failed, found.model_id) == (3, 0, "m")


def test_it_is_a_trace_without_being_named(tmp_path: Path) -> None:
    trace = load(written(tmp_path))

    assert trace.source == "bench.json (vllm_bench format)"
    assert trace.output_tokens.tolist() == [3, 5, 1]
    assert load(written(tmp_path), limit=2).prompt_tokens.tolist() == [200, 100]


def test_failed_requests_are_left_out_and_counted(tmp_path: Path) -> None:
    def fail(document: dict[str, Any]) -> None:
        document["errors"][1], document["output_lens"][1] = "Connection refused", 0
        document["ttfts"][1], document["itls"][1] = 0.0, []
        document["completed"], document["failed"] = 2, 1

    found = result(written(tmp_path, fail))

    assert (found.rows.tolist(), found.failed) == ([0, 2], 1)
    assert "1 requests that failed left out" in found.trace.notes


def _milliseconds(document: dict[str, Any]) -> None:
    document["ttfts"] = [1e3 * value for value in document["ttfts"]]
    document["itls"] = [[1e3 * gap for gap in gaps] for gaps in document["itls"]]


def _in_milliseconds(document: dict[str, Any]) -> None:
    document["start_times"] = [1e3 * value for value in document["start_times"]]


def _in_minutes(document: dict[str, Any]) -> None:
    document["start_times"] = [value / 60 for value in document["start_times"]]
    document["duration"] = 95.0


def _two_clocks(document: dict[str, Any]) -> None:
    document["start_times"][2] -= CLOCK_S - 77


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda d: d.pop("start_times"), "has no start_times: run vllm bench serve with --save-result --save-detailed"),
        (lambda d: d.pop("itls"), "has no itls: run vllm bench serve with"),
        (lambda d: d["ttfts"].pop(), "is cut short or put together: these lists must be of one length (start_times 3,"),
        (lambda d: d.update(completed=4), "completed: must be the 3 requests that the lists show as answered (got 4)"),
        (_milliseconds, "ttfts.1, itls.1: must be seconds: an answer took 4,500, more than the run's duration, 4.5"),
        (
            _in_milliseconds,
            "start_times: must be seconds of one clock",
        ),
        (
            _in_minutes,
            "start_times: must be seconds",
        ),
        (_two_clocks, "start_times: must be seconds of one clock: from first to last they span 353,325"),
        (lambda d: d["itls"].__setitem__(0, []), "itls.0: must have the gaps between the 5 tokens of an answer"),
        (lambda d: d["ttfts"].__setitem__(0, 0), "ttfts.0: must be more than 0, of an answer"),
        (lambda d: d["ttfts"].__setitem__(0, -1), "ttfts.0 must be greater than or equal to 0 (got -1"),
        (lambda d: d["ttfts"].__setitem__(0, float("nan")), "ttfts.0 must be a finite number"),
        (lambda d: d["ttfts"].__setitem__(0, "0.1"), "ttfts.0 must be a valid number"),
        (lambda d: d["input_lens"].__setitem__(2, 0), "input_lens.2: must be at least 1 (got 0)"),
        (lambda d: d.update(output_lens=[0, 0, 0]), "none of its 3 requests was answered"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], None], rule: str) -> None:
    path = written(tmp_path, change)
    with pytest.raises(BadInput) as error:
        result(path)

    assert len(error.value.problems) == 1
    assert str(error.value).startswith(f"{path}: ")
    assert rule in str(error.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (lambda text: text[: len(text) // 2], "is cut short: EOF while parsing"),
        (lambda text: f"{text}\n{text}", "holds several results (--append-result): give a file of one"),
        (lambda text: "", "is cut short: EOF while parsing"),
        (lambda text: "[1]", "must be an object"),
        (lambda text: "{1}", "is not one JSON document"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: Callable[[str], str], rule: str) -> None:
    path = written(tmp_path)
    path.write_text(text(path.read_text()))
    with pytest.raises(BadInput) as error:
        result(path)

    assert str(error.value).startswith(f"{path}: {rule}") or rule in str(error.value)
