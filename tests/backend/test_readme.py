"""What `backend/README.md` shows works as it stands; its commands for a GPU are only looked up."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.parallel import ONE
from chairlift.sim.cli import main as cli
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.command import chairlift
from kit.places import ROOT
from kit.synthetic import Planted, record, write

README = (ROOT / "backend" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(language: str) -> list[list[str]]:
    lines = [line for block in blocks(language) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("chairlift ", "python "))]


def test_the_scenario_runs_and_says_what_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(blocks("yaml")[0], encoding="utf-8")

    result = chairlift("run", "my.yaml", "--set", "workload.requests=50")

    assert result.status == 0, result.err
    said = " ".join(result.out.split())
    for name in ("h100 (memory_gib 94)", "llama-3.1-8b (bytes_per_param 1)", "mine"):
        assert name in said


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenario = blocks("yaml")[0].replace("{name: llama-3.1-8b, bytes_per_param: 1}", "llama-3.1-8b")
    scenario = scenario.replace("{name: h100, memory_gib: 94}", "h100").partition("compare:")[0]
    Path("my.yaml").write_text(f"{scenario}workload: {{name: azure-conv-2023, requests: 50, rate_per_s: 4}}\n")
    write(tmp_path / "recording", [record(Planted())])

    for command in commands(""):
        if command[0] != "chairlift":
            continue
        arguments = ["recording" if each == "DIR" else each for each in command[1:]]
        result = chairlift(*arguments)
        assert result.status == 0, (command, result.err)
    assert Path("mine.json").is_file()


def test_the_commands_for_a_gpu_exist() -> None:
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    found = commands("gpu")

    assert {command[1] for command in found if command[0] == "chairlift"} <= known
    modules = [command[2] for command in found if command[:2] == ["python", "-m"]]
    assert modules == ["chairlift.backend.gpu.bench", "pytest"]
    assert find_spec(modules[0]) is not None
    for file in re.findall(r"tests/\S+\.py", README):
        assert (ROOT / file).is_file()
    for file in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / "backend" / file).is_file()


def test_the_backend_of_ones_own_prices_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fixed_cost.py").write_text(blocks("python")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    backend = import_module("fixed_cost").FixedCost(us_per_token=20)
    (tmp_path / "my.yaml").write_text(
        "model: opt-13b\ngpu: h100\npolicy: vllm\nworkload: {requests: 3, arrivals: {burst: {}}, prompt_tokens: 10,"
        " output_tokens: 5}\n",
        encoding="utf-8",
    )
    [setup] = load(tmp_path / "my.yaml").setups
    setup = replace(setup, groups=[replace(group, backend=backend) for group in setup.groups])

    built = backend.build(setup.model, setup.groups[0].gpu, ONE)
    assert built.step(Batch((Chunk(0, 7),), 2, 100))[:3] == (9 * 20_000_000, 0, 1)
    assert simulate(setup).summary["duration"] == pytest.approx((30 + 4 * 3) * 20e-6)
