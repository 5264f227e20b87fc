"""The journal of an executed run, on the CPU and by the wall clock: against its records and its simulated twin."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chairlift.backend.gpu.settings import Torch
from chairlift.sim.replica import executing
from chairlift.sim.report.slots import seat
from chairlift.sim.results import reader as results
from chairlift.sim.results.records import Kind
from chairlift.sim.study import Limits, Setup
from chairlift.sim.workload.trace import Trace
from kit.clusters import serve
from kit.command import chairlift
from kit.executions import POLICIES, Ticking, made, many
from kit.journals import check_lives, check_slots, seats, story
from kit.pages import Page
from kit.tiny import Answers, Kept, check_greedy, executed, save, system


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights."""
    return save(tmp_path_factory.mktemp("weights"))


def setup_of(trace: Trace, name: str, backend: Any = None, **more: Any) -> Setup:
    """One replica, simulated if without a backend; vLLM's pools are too small for all."""
    scheduler, chosen = POLICIES[name]
    return system(trace, scheduler, chosen(4), backend, blocks=12 if "vllm" in name else 40, **more)


def told(folder: Path, trace: Trace, name: str, **more: Any) -> Answers:
    """An executed run whose journal agrees with its records."""
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=8))
    served = executed(setup_of(trace, name, kept, **more), journal=True)
    [engine] = served.engines
    runs = engine.records.runs()
    events = engine.records.events()
    gaps = check_lives(served.requests.columns(), runs, events, engine.scheduler.batch_synchronous)
    assert sorted(gaps.items()) == served.gaps()[0]
    check_slots(seats(engine), runs, engine.scheduler.asynchronous)
    return Answers(served, kept.built[-1].generated)


@pytest.mark.parametrize("name", POLICIES)
def test_it_tells_every_life_as_it_was_measured(folder: Path, name: str) -> None:
    rows = [(4 * i, prompt, output) for i, (_, prompt, output) in enumerate(many(8, 5))]

    check_greedy(told(folder, made(rows, 2, 40), name))


@pytest.mark.parametrize("name", ["orca", "static", "vllm", "vllm-async"])
def test_clients_that_give_up(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "time", Ticking())
    got = told(folder, made([(0, 20, 3), *[(0, 40, 110)] * 4]), name, limits=Limits(timeout_s=0.1))

    assert got.served.columns()["status"] == ([3] * 5 if name == "static" else [1, 3, 3, 3, 3])  # one of them held


@pytest.mark.parametrize("name", POLICIES)
def test_what_happens_is_what_happens_to_the_simulated_twin(folder: Path, name: str) -> None:
    trace = made(many(9, 2), 3, 40)
    got = told(folder, trace, name).served
    twin = serve(setup_of(trace, name), leap=False, journal=True)

    happened, expected = (served.engines[0].records.events() for served in (got, twin))
    assert story(happened) == story(expected)
    assert (Kind.PREEMPT in happened["kind"]) == ("vllm" in name)
    assert happened["time_ps"].tolist() != expected["time_ps"].tolist()


# the command

SCENARIO = """\
model: {name: tiny, layers: 1, hidden: 32, heads: 2, kv_heads: 2, head_size: 16, ffn: 48, vocab: 97,
         max_model_len: 160}
gpu: h200
kv: {blocks: 14}
policy: {name: vllm, max_num_batched_tokens: 40, max_num_seqs: 5}
workload: {requests: 12, arrivals: {burst: {}}, prompt_tokens: {uniform: {low: 10, high: 70}},
           output_tokens: {uniform: {low: 20, high: 40}}}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on the CPU, with its page; the same, simulated, in ``twin`` beside it."""
    place = tmp_path_factory.mktemp("executed")
    file = place / "s.yaml"
    file.write_text(SCENARIO)
    torch = ("--set", "backend={name: torch, device: cpu}")
    for name, more in (("out", torch), ("twin", ("--no-leap",))):
        result = chairlift("run", str(file), "--quiet", "--report", "--out", str(place / name), *more)
        assert (result.status, result.err) == (0, "")
    return place / "out"


def read(folder: Path) -> tuple[results.RunResults, dict[str, Any], dict[str, Any]]:
    """A run with its steps and its events."""
    run = results.read(folder).pick(None, None)
    [steps], [events] = run.steps("start_ps", "first_ps", "slope_ps", "steps", "decodes", "waiting"), run.events()
    return run, steps, events


def test_its_tables_agree(out: Path) -> None:
    run, steps, events = read(out)
    names = ("arrival_ps", "admitted_ps", "first_token_ps", "finished_ps", "status", "emitted_tokens", "preemptions")
    gaps = check_lives(run.requests(*names, "cached_tokens"), steps, events)

    mean = sum(gap * count for gap, count in gaps.items()) / gaps.total() / 1e9
    assert run.summary["mean_itl_ms"] == pytest.approx(mean)
    assert run.summary["preemptions"] == (events["kind"] == Kind.PREEMPT).sum() > 0


def test_its_page_draws_the_slots_of_the_journal(out: Path) -> None:
    _, steps, events = read(out)
    slots = seat(events, steps)
    page, twin = (Page(folder / "report.html") for folder in (out, out.with_name("twin")))
    [[shown]], [[expected]] = (json.loads(each.unpacked("data"))["slots"].values() for each in (page, twin))

    assert shown["rows"] == len(steps["steps"])
    assert shown["stay"]["request"] == slots.request.tolist()
    assert shown["stay"]["slot"] == slots.slot.tolist()
    assert shown["chunk"]["tokens"] == slots.chunk_tokens.tolist()
    assert shown["first"] == (steps["first_ps"] // 1000).tolist()
    assert shown.keys() == expected.keys()
    assert shown["stay"] == expected["stay"]


def test_explain_tells_a_life_in_measured_times(out: Path) -> None:
    run, _, events = read(out)
    victim = int(events["request"][events["kind"] == Kind.PREEMPT][0])
    facts = {name: column[victim] for name, column in run.requests("first_token_ps", "finished_ps").items()}
    lives = []
    for folder in (out, out.with_name("twin")):
        result = chairlift("explain", str(victim), "--in", str(folder), "--json")
        assert (result.status, result.err) == (0, "")
        lives.append(json.loads(result.out)[0]["moments"])
    moments, twin = lives

    times = [moment["time_s"] for moment in moments]
    assert times == sorted(times)
    assert times[-1] == facts["finished_ps"] / 1e12
    [first] = [moment for moment in moments if moment["what"].startswith("first token")]
    assert first["time_s"] == facts["first_token_ps"] / 1e12
    assert any(moment["what"].startswith("preempted: ") for moment in moments)
    assert [moment["what"].split()[0] for moment in moments] == [moment["what"].split()[0] for moment in twin]


def test_its_trace_for_perfetto_has_slots(out: Path) -> None:
    _, steps, events = read(out)
    result = chairlift("report", str(out), "--perfetto")
    assert (result.status, result.err) == (0, "")
    assert "no slots" not in result.out
    drawn = json.loads((out / "trace.json").read_text())["traceEvents"]

    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    kinds: Counter[str] = Counter()
    for event in drawn:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            kinds[event["cat"]] += 1
    assert len(tracks) == 1 + seat(events, steps).count
    assert (kinds["step"], kinds["prefill"]) == (len(steps["steps"]), (events["kind"] == Kind.CHUNK).sum())
    assert all(b[0] >= a[1] - 1e-3 for slices in tracks.values() for a, b in pairwise(sorted(slices)))


def test_one_without_a_journal_keeps_none(out: Path) -> None:
    bare = out.with_name("bare")
    arguments = ("--quiet", "--no-events", "--set", "backend={name: torch, device: cpu}", "--out", str(bare))
    assert chairlift("run", str(out.with_name("s.yaml")), *arguments).status == 0

    assert not (bare / "events.parquet").exists()
