"""The recorder of live servers: by hand, line for line; and in the engine process of a real vLLM, if there is one."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from chairlift.backend.fitting.recording import Recording, RecordingError, read
from chairlift.backend.parallel import Parallel
from chairlift.backend.recorder import folder as converting
from chairlift.backend.recorder import journal
from chairlift.backend.recorder.folder import convert
from chairlift.backend.recorder.journal import Journal
from kit import vllm_on_cpu
from kit.places import IMPORTS, TESTS

DRAFTS = {"speculative": {"method": "ngram", "num_speculative_tokens": 2}}
ENGINE = {"vllm": "0.26.0", "gpu": "g", "extra": DRAFTS}
LIMITS = {"num_gpu_blocks": 9, "max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": 16}


@dataclass
class Served:
    """A request as an engine has it."""

    num_prompt_tokens: int
    num_computed_tokens: int


class Clock:
    """A monotonic clock that is set by hand; the Unix time is 1,000 s ahead of it."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(journal, "time", made)
    return made


def engine_of(folder: Path) -> Journal:
    return Journal(folder, ENGINE | {"limits": LIMITS})


def a_run(folder: Path, clock: Clock) -> None:
    """Requests a (5 tokens, 2 out) and b (70, 2 out), in a budget of 64, and c, whose client goes away.

    Step 1: a's 5 tokens and 59 of b's. Step 2: a's decode (context 6) and the other 11 of b's. Step 3: b's decode,
    which verifies two drafts as well: three tokens, context 71 to 73.
    """
    log = engine_of(folder)
    a, b = Served(5, 5), Served(70, 59)
    for name, arrival, tokens in (("a", 1050.0, 5), ("b", 1050.25, 70), ("c", 1050.25, 8)):
        clock.now = arrival - 1000 + 0.5
        log.added(name, arrival, tokens)
    plans = [object(), object(), object()]
    log.dropped(["c"])

    def step(i: int, at: tuple[float, float, float], tokens: dict[str, int], drafts: dict[str, object]) -> None:
        clock.now = at[1]
        log.scheduled(plans[i], at[0], tokens, {"a": a, "b": b}, drafts, (2, 0, 3, i))
        clock.now = at[2]
        log.launched(plans[i])

    step(0, (51.0, 51.125, 51.25), {"a": 5, "b": 59}, {})
    clock.now = 52.5
    log.done(plans[0], 52.0, [("a", 1, False)])
    a.num_computed_tokens, b.num_computed_tokens = 6, 70
    step(1, (52.75, 53.0, 53.0), {"a": 1, "b": 11}, {})
    clock.now = 54.0
    log.done(plans[1], 53.5, [("a", 1, True), ("b", 1, False)])
    b.num_computed_tokens = 73
    step(2, (54.0, 54.0, 54.0), {"b": 3}, {"b": [8, 9]})
    clock.now = 55.0
    log.done(plans[2], 55.0, [("b", 2, True)])
    log.rest()
    log.close()


def test_a_run_by_hand(tmp_path: Path, clock: Clock) -> None:
    a_run(tmp_path, clock)
    assert convert(tmp_path, "m") == ["served"]
    found = read(tmp_path, "m").experiments["served"]
    requests, steps = found.requests, found.steps

    assert requests["arrival_s"].tolist() == [0.0, 0.25]
    assert requests["added_s"].tolist() == [0.5, 0.75]
    assert requests["prompt_tokens"].tolist() == [5, 70]
    assert requests["output_tokens"].tolist() == [2, 3]
    assert requests["first_token_s"].tolist() == [2.5, 4.0]
    assert requests["last_token_s"].tolist() == [4.0, 5.0]
    assert found.itl_s is not None
    assert found.itl_s.tolist() == [1.5, 1.0, 0.0]
    assert steps["schedule_s"].tolist() == [1.0, 2.75, 4.0]
    assert steps["done_s"].tolist() == [2.0, 3.5, 5.0]
    assert steps["schedule_cpu_s"].tolist() == [0.125, 0.25, 0.0]
    assert steps["update_cpu_s"].tolist() == [0.5, 0.5, 0.0]
    assert steps["launch_call_s"].tolist() == [0.125, 0.0, 0.0]
    assert steps["wait_s"].tolist() == [0.75, 0.5, 1.0]
    assert steps["prefill_requests"].tolist() == [2, 1, 0]
    assert steps["prefill_tokens"].tolist() == [64, 11, 0]
    assert steps["prefill_pairs"].tolist() == [15 + 59 * 60 // 2, sum(range(60, 71)), 0]
    assert steps["decode_requests"].tolist() == [0, 1, 1]
    assert steps["decode_context_tokens"].tolist() == [0, 6, 73]
    assert steps["decode_tokens"].tolist() == [0, 1, 3]
    assert steps["preempted"].tolist() == [0, 1, 2]
    assert found.limits == LIMITS
    assert read(tmp_path, "m").engine == ENGINE


def test_an_engine_that_was_killed_leaves_what_it_wrote(tmp_path: Path, clock: Clock) -> None:
    a_run(tmp_path, clock)
    [steps] = tmp_path.glob("raw-*.steps.csv")
    steps.write_text(steps.read_text()[:-20])
    convert(tmp_path, "m")

    assert len(read(tmp_path, "m").experiments["served"].steps["done_s"]) == 2


def test_processes_are_experiments(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for process in (7, 8):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        a_run(tmp_path, clock)

    assert convert(tmp_path, "m", "q4") == ["q4_7", "q4_8"]


def test_what_is_no_recording_is_one_line(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["chairlift-record", *arguments, "--model", "m"])
        with pytest.raises(SystemExit) as left:
            converting.main()
        assert left.value.code == 2
        return capsys.readouterr().err

    assert said(str(tmp_path / "no")).endswith("no: no such folder\n")
    engine_of(tmp_path).close()
    assert "no engine recorded a request that ended" in said(str(tmp_path))
    a_run(tmp_path, clock)
    [requests] = tmp_path.glob("raw-*.requests.jsonl")
    text = requests.read_text()
    requests.write_text(f"{text}[1.0, 2.0, ")
    assert "requests.jsonl:3: not a request of the recorder's" in said(str(tmp_path))
    requests.write_text(text)
    (tmp_path / "raw-0.json").write_text(json.dumps({"vllm": "0.33.0", "limits": LIMITS}))
    (tmp_path / "raw-0.requests.jsonl").write_text(text)
    with pytest.raises(RecordingError, match="engines of several kinds wrote here"):
        convert(tmp_path, "m")


def test_a_conversion_that_is_interrupted_is_one_line(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C comes as the first table is written: what is there then is no recording, and the raw files stay."""

    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    a_run(tmp_path, clock)
    raw = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["chairlift-record", str(tmp_path), "--model", "m"])
    with monkeypatch.context() as cut:
        cut.setattr(converting, "_write", stop)
        with pytest.raises(SystemExit) as left:
            converting.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted: the same command begins again\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == raw
    converting.main()
    assert (tmp_path / "m_summary.json").exists()


def test_what_is_no_recording_leaves_an_older_one(tmp_path: Path, clock: Clock) -> None:
    a_run(tmp_path, clock)
    convert(tmp_path, "m")
    before = (tmp_path / "m_summary.json").read_bytes()
    [requests] = tmp_path.glob("raw-*.requests.jsonl")
    first, *others = requests.read_text().splitlines()
    limited = [*json.loads(first), 1000, 0] if len(json.loads(first)) == 4 else json.loads(first)[:4]
    requests.write_text("\n".join([json.dumps(limited), *others]) + "\n")
    with pytest.raises(RecordingError, match="some requests say their limits, some do not"):
        convert(tmp_path, "m")
    assert (tmp_path / "m_summary.json").read_bytes() == before


def test_how_gpus_share_the_model_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's configuration says reaches the recording's `Parallel`, by way of what the recorder writes of it."""
    modules = {
        "vllm.platforms": {"current_platform": SimpleNamespace(get_device_name=lambda: "NVIDIA H200")},
        "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": type("AsyncScheduler", (), {})},
        "vllm.v1.core.sched.scheduler": {"Scheduler": type("Scheduler", (), {})},
    }
    for name, contents in modules.items():
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
    name = "chairlift.backend.recorder.vllm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    written = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(written, "version", lambda _: "0.26.0")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
        cache_config=SimpleNamespace(num_gpu_blocks=9, block_size=16, enable_prefix_caching=True),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4]),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1, enable_expert_parallel=True),
        model_config=SimpleNamespace(model="m"),
    )
    engine = written._engine(SimpleNamespace(vllm_config=config))

    assert Recording(Path("r"), "m", engine, {}).parallel == Parallel(tensor=2, expert=2)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("scheduler", ["RecordingScheduler", "SynchronousRecordingScheduler"])
def test_a_real_engine_is_recorded(tmp_path: Path, scheduler: str) -> None:
    """What 30 prompts come to is known in closed form, whatever the steps: tokens, pairs and contexts."""
    vllm_on_cpu.prepare(tmp_path)
    out = tmp_path / "out"
    paths = [str(tmp_path), str(IMPORTS), str(TESTS / "kit"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["CHAIRLIFT_RECORDING"] = str(out)
    program = [sys.executable, str(TESTS / "kit" / "vllm_on_cpu.py"), str(tmp_path), scheduler]
    done = subprocess.run([*program, "details"], env=environment, capture_output=True, text=True, timeout=600)
    prompts, output = vllm_on_cpu.PROMPTS, vllm_on_cpu.OUTPUT
    assert f"tokens {len(prompts) * output}" in done.stdout, done.stderr[-2000:]

    convert(out, "m")
    found = read(out, "m").experiments["served"]
    requests, steps = found.requests, found.steps
    assert sorted(requests["prompt_tokens"].tolist()) == prompts
    assert requests["output_tokens"].tolist() == [output] * len(prompts)
    assert steps["prefill_tokens"].sum() == sum(prompts)
    assert steps["prefill_pairs"].sum() == sum(n * (n + 1) // 2 for n in prompts)
    assert steps["decode_requests"].sum() == len(prompts) * (output - 1)
    contexts = sum(sum(range(n + 1, n + output)) for n in prompts)
    assert steps["decode_context_tokens"].sum() == contexts
    assert (steps["prefill_tokens"] + steps["decode_requests"]).max() <= 512
    assert (steps["decode_requests"] + steps["prefill_requests"]).max() <= 16
    assert np.median(np.diff(steps["done_s"])) >= vllm_on_cpu.STEP_S
    [stats] = out.glob("stats-*.csv")
    with stats.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["generation_tokens"]) for row in rows) == len(prompts) * output
    assert sum(int(row["prefill_tokens"] or 0) for row in rows) == sum(prompts)
