"""What somebody meets in the first hour: names, help, and messages that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.cli import completion
from chairlift.sim.cli.shipped import SCENARIOS, complete, shipped
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.command import SCENARIO, chairlift


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SCENARIO)


@pytest.mark.parametrize("name", ["routing", "policy_zoo", "research/policy_zoo", "chat_knee", "n_plus_one"])
def test_show_prints_the_file_with_its_comments(name: str) -> None:
    [path] = SCENARIOS.rglob(f"{name.rpartition('/')[2]}.yaml")

    assert chairlift("show", name).out == path.read_text()


@pytest.mark.parametrize("name", ["anyscale_23x", "anyscale_latency", "routing", "policy_zoo"])
def test_new_begins_with_a_copy_that_is_the_same_study(name: str) -> None:
    (Path("deep") / "er").mkdir(parents=True)
    made = chairlift("new", "deep/er/my.yaml", "--from", name)

    assert (made.status, made.err) == (0, "")
    assert "next: chairlift run deep/er/my.yaml" in made.out
    original, copy = (next(p for full, p in shipped().items() if full.endswith(name)), Path("deep/er/my.yaml"))
    said = [line for line in original.read_text().splitlines() if "#" in line]
    assert [line for line in said if line not in copy.read_text().splitlines()] == []
    ours, theirs = load(copy), load(original)
    assert [(s.case, s.variant, s.trace.prompt_tokens.tolist()) for s in ours.setups] == [
        (s.case, s.variant, s.trace.prompt_tokens.tolist()) for s in theirs.setups
    ]


def test_new_says_which_command_runs_it() -> None:
    assert "next: chairlift sweep a.yaml" in chairlift("new", "a.yaml", "--from", "chat_knee").out
    assert "next: chairlift plan b.yaml" in chairlift("new", "b.yaml", "--from", "n_plus_one").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "small.yaml", "--from", "routing"], "small.yaml: is there already: choose another name"),
        (["new", "a.txt", "--from", "routing"], "FILE: must end in .yaml (got 'a.txt')"),
        (["new", "no/where.yaml", "--from", "routing"], "no/where.yaml: cannot be written: No such file or directory"),
        (["new", "a.yaml", "--from", "routin"], "did you mean 'routing'?"),
        (["show", "chat_kne"], "did you mean 'chat_knee'?"),
        (["run", "small.yaml", "--set", "model=qwen3-30b-a3x-7b"], "known: "),
        (["run", "small.yaml", "--set", "model=llama-3.1-8"], "did you mean 'llama-3.1-8b'?"),
        (["run", "sweep.yaml"], "sweep.yaml:1: base: is a key of sweeps and plans, not of scenarios: run this file"),
        (["run", "sweep.yaml"], "with chairlift sweep"),
        (["run", "plan.yaml"], "run this file with chairlift plan"),
    ],
)  # fmt: skip
def test_messages_say_what_to_do(arguments: list[str], said: str) -> None:
    Path("sweep.yaml").write_text("base: small.yaml\naxes: {seed: [1]}\n")
    Path("plan.yaml").write_text("base: small.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\n")
    result = chairlift(*arguments)

    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert Path("small.yaml").read_text() == SCENARIO


def test_a_setting_may_be_set_where_the_policy_is_a_bare_name() -> None:
    Path("bare.yaml").write_text(SCENARIO.replace("{name: vllm}", "vllm"))
    [setup] = load(Path("bare.yaml"), ["policy.max_num_seqs=3"]).setups

    assert setup.groups[0].scheduler_settings["max_num_seqs"] == 3


def test_backends_are_listed_with_their_settings() -> None:
    told = chairlift("list", "backends").out

    assert "mfu: float = 0.55" in told
    assert "profile: str" in told


def test_explain_report_and_compare_take_the_name_of_a_run() -> None:
    chairlift("run", "small.yaml", "-q")

    assert chairlift("explain", "1", "--in", "small").out == chairlift("explain", "1", "--in", "runs/small").out != ""
    assert chairlift("report", "small").status == 0
    assert Path("runs/small/report.html").is_file()


def test_a_run_without_a_journal_is_named() -> None:
    chairlift("run", "small.yaml", "-q", "--no-events")

    assert "the run: kept no journal" in chairlift("explain", "1", "--in", "small").err


def test_names_and_keys_are_completed() -> None:
    assert complete("policy_z") == ["policy_zoo"]
    assert completion.policies("vl") == ["vllm", "vllm_v0"]
    assert completion.routers("round") == ["round_robin"]
    assert "h200-llama-3.1-8b-vllm-0.23" in completion.backends("h200")
    assert completion.keys("workload.rate") == ["workload.rate_per_s="]
    assert completion.keys("slo.t") == ["slo.ttft_ms=", "slo.tpot_ms="]


def test_doctor_says_what_there_is_and_checks_it() -> None:
    told = chairlift("doctor")

    assert told.status == 0
    for words in ("chairlift", "python", "numpy", "torch", "GPUs", "check passed: 2,000 requests"):
        assert words in told.out


def test_doctor_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(setup: Any, leap: bool = True) -> Any:
        outcome = simulate(setup, leap=leap)
        if not leap:
            outcome.requests.finished[3] += 1
        return outcome

    monkeypatch.setattr("chairlift.sim.cli.doctor.simulate", other)
    told = chairlift("doctor")

    assert told.status == 1
    assert "differ in finished_ps" in told.out
