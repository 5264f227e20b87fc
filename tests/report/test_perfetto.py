"""``chairlift report --perfetto``: against the Trace Event Format, and against the run that it shows.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kit.command import chairlift, replaced

Event = dict[str, Any]

NEEDED = {  # phase → keys beside ph, pid, tid, name
    "M": {"args"},
    "X": {"ts", "dur"},
    "C": {"ts", "args"},
    "b": {"ts", "cat", "id"},
    "e": {"ts", "cat", "id"},
    "s": {"ts", "cat", "id"},
    "t": {"ts", "cat", "id"},
    "f": {"ts", "cat", "id"},
    "i": {"ts", "s"},
}
CLOSE = 1e-3  # µs: a nanosecond, what is left of picoseconds in a double


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Of a run with two replicas, preemptions and a failure."""
    monkeypatch.chdir(tmp_path)
    text = (
        replaced("max_model_len: 2048", "max_model_len: 496", replaced("tokens: 4000", "tokens: 500"))
        + "replicas: 2\nfailures: {schedule: [{replica: 1, at_s: 3, for_s: 2}]}\n"
    )
    Path("small.yaml").write_text(text)
    assert chairlift("run", "small.yaml", "--out", "out", "--quiet").status == 0
    result = chairlift("report", "out", "--perfetto")
    assert (result.status, result.err) == (0, "")
    assert "open it in ui.perfetto.dev" in result.out
    trace = json.loads(Path("out/trace.json").read_text(), parse_constant=pytest.fail)
    assert trace["displayTimeUnit"] == "ms"
    found: list[Event] = trace["traceEvents"]
    return found


def of(events: list[Event], *phases: str) -> list[Event]:
    return [event for event in events if event["ph"] in phases]


def test_every_event_has_what_its_phase_needs(events: list[Event]) -> None:
    assert {event["ph"] for event in events} == set(NEEDED)
    for event in events:
        assert {"pid", "tid", "name"} | NEEDED[event["ph"]] <= set(event), event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if "ts" in event:
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] > 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")


def test_slices_of_a_track_do_not_overlap(events: list[Event]) -> None:
    tracks = defaultdict(list)
    for event in of(events, "X"):
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))

    for slices in tracks.values():
        slices.sort()
        assert all(later[0] >= earlier[1] - CLOSE for earlier, later in pairwise(slices))


def test_asynchronous_slices_pair_up_and_flows_bind_to_slices(events: list[Event]) -> None:
    begun, ended = (Counter(e["id"] for e in of(events, ph)) for ph in ("b", "e"))
    assert begun == ended
    assert set(begun.values()) == {1}
    flows = defaultdict(list)
    for event in of(events, "s", "t", "f"):
        flows[event["id"]].append(event)
    slices = of(events, "X")
    for steps in flows.values():
        steps.sort(key=lambda e: e["ts"])
        assert [e["ph"] for e in steps] == ["s", *["t"] * (len(steps) - 2), "f"]
        for step in steps:
            inside = [
                e
                for e in slices
                if (e["pid"], e["tid"]) == (step["pid"], step["tid"]) and e["ts"] <= step["ts"] <= e["ts"] + e["dur"]
            ]
            assert len(inside) == 1
            assert inside[0]["args"]["request"] == int(step["id"].split(".")[1])
    assert len(flows) > 20


def test_it_shows_the_run(events: list[Event]) -> None:
    steps = pq.read_table("out/steps.parquet").to_pylist()
    requests = pq.read_table("out/requests.parquet").to_pylist()
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in of(events, "M") if e["name"] == "process_name"}
    assert list(names.values()) == ["requests", "replica 0", "replica 1"]

    drawn = [e for e in of(events, "X") if e["cat"] == "step"]
    assert sum(e["args"]["steps"] for e in drawn) == sum(row["steps"] for row in steps)
    assert sum(e["args"]["prefill_tokens"] for e in drawn) == sum(row["prefill_tokens"] for row in steps)
    spans = {e["id"]: e["ts"] for e in of(events, "b")}
    ends = {e["id"]: e["ts"] for e in of(events, "e")}
    for row in requests:
        assert spans[f"0.{row['id']}"] == pytest.approx(row["arrival_ps"] / 1e6)
        assert ends[f"0.{row['id']}"] == pytest.approx(row["finished_ps"] / 1e6)
    marks = Counter(e["name"].split()[1] for e in of(events, "i"))
    assert marks["preempted"] == sum(row["preempted"] for row in steps) > 0
    assert marks["lost"] > 0
    running = [e["args"]["running"] for e in of(events, "C") if e["name"] == "running"]
    assert max(running) == max(row["running"] for row in steps)


def test_a_stretch_compressed(events: list[Event]) -> None:
    result = chairlift("report", "out", "--perfetto", "--out", "part.json.gz", "--from", "2", "--to", "4")
    part = json.loads(gzip.decompress(Path("part.json.gz").read_bytes()))["traceEvents"]

    assert result.status == 0
    assert 0 < len(of(part, "X")) < len(of(events, "X"))
    whole = {json.dumps(e) for e in events}
    steps = [
        e for e in of(events, "X") if e["cat"] == "step" and e["ts"] + e["dur"] >= 2e6 and e["ts"] + e["dur"] < 4e6
    ]
    assert [e for e in of(part, "X") if e["cat"] == "step"] == steps
    assert all(json.dumps(e) in whole for e in of(part, "M", "b", "e", "X"))
    assert all(e["ts"] <= 4e6 for e in of(part, "b"))
    assert all(e["ts"] >= 2e6 for e in of(part, "e"))


def test_without_a_journal_it_has_steps_and_requests_and_says_so(events: list[Event]) -> None:
    assert chairlift("run", "small.yaml", "--out", "bare", "--quiet", "--no-events").status == 0
    result = chairlift("report", "bare", "--perfetto")
    bare = json.loads(Path("bare/trace.json").read_text())["traceEvents"]

    assert "no slots of small: run again with --events" in result.out
    assert {e["cat"] for e in of(bare, "X")} == {"step"}
    assert len(of(bare, "b")) == 30


def test_a_stretch_that_ends_before_it_begins_is_an_error(events: list[Event]) -> None:
    result = chairlift("report", "out", "--perfetto", "--from", "4", "--to", "2")

    assert (result.status, result.err) == (2, "error: --to: must be after --from (4) (got 2.0)\n")
