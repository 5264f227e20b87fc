"""Names are text on a terminal, whatever they look like, and any encoding and any path will do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.command import SCENARIO, chairlift
from kit.places import IMPORTS

NAMES = ("vllm [tuned]", "vllm [base]", "x[/x]", ":x:", "[red]r[/red]", "a\\")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_scenario_is_called_as_it_is(name: str) -> None:
    text = SCENARIO + f"name: 'run {name.replace('/', '')}'\n"
    Path("s.yaml").write_text(text)
    result = chairlift("run", "s.yaml", "--out", "o")
    assert (result.status, result.err) == (0, "")
    assert f"run {name.replace('/', '')}" in result.out


@pytest.mark.parametrize("tables", ["throughput", "latency", "fleet", "cdf"])
def test_a_variant_and_a_case_are_called_as_they_are(tables: str) -> None:
    compared = ", ".join(f"{{name: '{name}'}}" for name in NAMES)
    head = f"tables: [{tables}]\nbaseline: ['{NAMES[0]}', '{NAMES[2]}']\n"
    Path("s.yaml").write_text(SCENARIO + f"compare: [{compared}]\n{head}cases: [{{name: 'c [bold]'}}]\n")
    result = chairlift("run", "s.yaml", "--out", "o")
    assert (result.status, result.err) == (0, "")
    for name in (*NAMES, "c [bold]"):
        assert name in result.out


def test_a_message_says_a_name_as_it_is() -> None:
    for name in (":x:y", "[/x]", "[red]a"):
        result = chairlift("run", name)
        assert result.status == 2
        assert f"(got '{name}')" in result.err or f"{name}: no such file" in result.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_a_sign_gets_another(encoding: str) -> None:
    command = [sys.executable, "-m", "chairlift", "run", "s.yaml", "--out", "o"]
    env = {**os.environ, "PYTHONPATH": str(IMPORTS), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"<=" in done.stdout


@pytest.mark.parametrize("name", ["y" * 5000, "y" * 5000 + ".yaml", "/dev/null", "."])
def test_a_path_that_is_no_file_is_one_line(name: str) -> None:
    for arguments in (["run", name], ["sweep", name], ["plan", name], ["trace", "describe", name], ["report", name]):
        result = chairlift(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), (arguments, result)
    result = chairlift("run", "s.yaml", "--out", "y" * 5000)
    assert (result.status, result.err.count("\n")) == (2, 1)
