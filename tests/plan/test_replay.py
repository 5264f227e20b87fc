"""A system of a plan, run by itself, gives the plan's figures; runs and plans price steps alike."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from chairlift.sim.plan.replay import replayed
from chairlift.sim.simulate import simulate
from kit.command import chairlift

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  max_model_len: 4096
  policy: vllm
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 300, output_tokens: {uniform: {low: 5, high: 40}}}
slo: [{percentile: 95, ttft_ms: 400}, {share: 0.9, e2el_ms: 2000}]
rate_per_s: [5, 20]
search: {requests: 200, seed: 3}
axes: {gpu: [l4, h100], replicas: [1, 2]}
"""


def planned(folder: Path, text: str = PLAN) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "plan.yaml").write_text(text)
    done = chairlift("plan", str(folder / "plan.yaml"), "--out", str(folder / "out"), "--jobs", "1", "--quiet")
    assert done.status == 0, done.err
    return folder / "out" / "plan.json"


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planned(tmp_path_factory.mktemp("replay"))


def test_a_system_of_a_plan_runs_as_it_ran_there(answer: Path, tmp_path: Path) -> None:
    data = json.loads(answer.read_text())
    winner = data["cheapest"][-1]["winner"]["number"]
    replay = replayed(answer, winner, None)
    outcome = simulate(replay.study.setups[0])
    compared = replay.compared(outcome)

    assert replay.rate_per_s == 20
    assert {"p95_ttft_ms", "p99_e2el_ms", "p50_tpot_ms"} <= {name for name, _, _ in compared}
    assert all(there == here for _, there, here in compared)
    done = chairlift("run", str(answer), "--system", str(winner), "--out", str(tmp_path / "run"))
    assert done.status == 0, done.err
    assert "as in the plan, its first replication" in " ".join(done.out.split())
    assert f"results in {tmp_path / 'run'}" in " ".join(done.out.split())
    # the folder's scenario is a run like any other, and needs no plan
    again = chairlift("run", str(tmp_path / "run" / "scenario.yaml"), "--out", str(tmp_path / "again"), "--quiet")
    assert again.status == 0, again.err
    first, second = (pq.read_table(tmp_path / name / "requests.parquet") for name in ("run", "again"))
    assert first == second
    assert len(first) == len(outcome.requests.status)


def test_a_stretch_of_a_file_is_replayed(tmp_path: Path) -> None:
    rows = "".join(f"{0.3 * i + (i % 7) / 50},{100 + i % 900},{5 + i % 30}\n" for i in range(2600))
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    text = PLAN.replace(PLAN[PLAN.index("  workload") : PLAN.index("slo")], "  workload: {file: t.csv}\n")
    path = planned(tmp_path, text.replace("[5, 20]", "5"))
    replay = replayed(path, json.loads(path.read_text())["cheapest"][0]["winner"]["number"], 5.0)
    compared = replay.compared(simulate(replay.study.setups[0]))

    assert compared
    assert all(there == here for _, there, here in compared)
    first = int(3 * 0.6180339887498949 % 1 * 2600)  # seed 3
    assert replay.study.setups[0].trace.prompt_tokens[0] == 100 + first % 900
    assert f"Rows {first + 1:,} and on" in replay.study.resolved["question"]


def test_runs_and_plans_price_alike_and_say_how(answer: Path, tmp_path: Path) -> None:
    """The default of a plan is ``backend: auto``, which a run may have too: the same profile, carried to the L4."""
    (tmp_path / "s.yaml").write_text(
        "model: llama-3.1-8b\ngpu: l4\nmax_model_len: 4096\npolicy: vllm\nseed: 3\n"
        "workload: {requests: 200, arrivals: {poisson: {rate_per_s: 5}}, prompt_tokens: 300, "
        "output_tokens: {uniform: {low: 5, high: 40}}}\n"
    )
    alike = chairlift("run", str(tmp_path / "s.yaml"), "--backend", "auto", "--out", str(tmp_path / "a"))
    number = next(
        s["number"] for s in json.loads(answer.read_text())["systems"] if s["axes"] == {"gpu": "l4", "replicas": 1}
    )
    chairlift("run", str(answer), "--system", str(number), "--rate", "5", "--out", str(tmp_path / "b"), "--quiet")
    tables = [pq.read_table(tmp_path / name / "requests.parquet") for name in ("a", "b")]
    ttft = [table.column("ttft_ms").to_pylist()[:200] for table in tables]

    assert "profile l4-llama-3.1-8b from h200-llama-3.1-8b-vllm-0.26" in " ".join(alike.out.split())
    assert ttft[0] == ttft[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say which of its systems"),
        (("--system", "9"), "no such system"),
        (("--system", "1", "--set", "seed=1"), "--set: must not be given with a plan.json"),
        (("--system", "4"), "plan.json has no simulation of"),
    ],
)
def test_what_a_plan_cannot_replay_is_told(answer: Path, words: tuple[str, ...], said: str) -> None:
    result = chairlift("run", str(answer), *words)

    assert result.status == 2
    assert said in " ".join(result.err.split())


def test_a_scenario_has_no_systems(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("model: llama-3.1-8b\n")
    assert "is no plan.json" in chairlift("run", str(tmp_path / "s.yaml"), "--system", "1").err
    assert "--rate: must not be given" in chairlift("run", str(tmp_path / "s.yaml"), "--rate", "1").err
