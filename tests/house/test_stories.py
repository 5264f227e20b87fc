"""Three strangers, each with a question, who know the READMEs alone: a researcher, a planner and an engineer.

What they type are commands of the READMEs, word for word, in files of the READMEs, changed only where a README says
that one changes them. The time that each may take is from a checkout that is set up to the answer.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chairlift.sim.cli import run as cli
from house.test_readme import NAMES, commands, scene
from kit.command import Result, chairlift, replaced
from kit.places import IMPORTS

__all__ = ["scene"]
KNOWN = [command for readme in NAMES for command in commands(readme)]


def typed(command: str) -> Result:
    """What a command of a README comes to; it must stand in one."""
    words = shlex.split(command)
    assert shlex.join(words) in KNOWN, f"no README says {command!r}"
    if words[0] == "python":
        done = subprocess.run(
            [sys.executable, *words[1:]], env={"PYTHONPATH": str(IMPORTS)}, capture_output=True, text=True, timeout=300
        )
        return Result(done.returncode, done.stdout, done.stderr)
    assert words[0] == "chairlift"
    return chairlift(*words[1:])


@pytest.fixture(autouse=True)
def _a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "out", cli.console(least=140))


def test_a_researcher_compares_a_policy_of_their_own_with_vllm(scene: Path) -> None:
    started = time.monotonic()
    checked = typed("chairlift check shortest.py")
    compared = typed("chairlift run my.yaml --policy vllm --policy shortest.py")
    minutes = (time.monotonic() - started) / 60

    assert (checked.status, checked.err) == (0, "")
    assert "0 broken, 0 not checked" in checked.out
    assert (compared.status, compared.err) == (0, "")
    tables = {name: re.findall(rf"^ {name} +.*$", compared.out, re.MULTILINE) for name in ("vllm", "shortest.py")}
    assert [len(rows) for rows in tables.values()] == [2, 2]  # throughput and latency
    assert "engine loop: synchronous" in compared.out  # one loop for both: a fair comparison
    assert "warning" not in compared.out
    assert minutes < 5


def test_a_planner_buys_for_a_model_of_their_own(scene: Path) -> None:
    started = time.monotonic()
    result = typed("chairlift plan my_plan.yaml --rate 2 --set model=config.json")
    minutes = (time.monotonic() - started) / 60
    said = " ".join(result.out.split())

    assert result.status == 0, result.err
    assert all(re.match(r"\d+(\.\d+)?/s: ", line) for line in result.err.splitlines())  # how far the search is
    assert re.search(r"Cheapest for 2 requests/s: gpu \w+, replicas \d", said)
    assert "roofline, assumed efficiencies" in said  # no profile fits a model that nobody measured
    assert "does not fit: " in said
    assert re.search(r"vllm serve \. --tensor-parallel-size \d --max-model-len \d+ --max-num-batched-tokens \d+", said)
    assert "# the model is the folder of config.json: its weights must lie there" in said
    assert Path("runs/my_plan/plan.html").stat().st_size > 100_000
    assert minutes < 10


def test_an_engineer_puts_a_prediction_beside_their_benchmark(scene: Path) -> None:
    """The benchmark is vLLM's recorded burst of 1,000 requests on an H200, with OPT-13B."""
    text = Path("mine.yaml").read_text()
    text = replaced("model: llama-3.1-8b ", "model: opt-13b ", text)
    text = replaced("backend: h200-llama-3.1-8b-vllm-0.23 ", "backend: h200-opt-13b-vllm-0.23 ", text)
    Path("mine.yaml").write_text(text)

    started = time.monotonic()
    beside = typed("chairlift validate mine.yaml --bench bench.json")
    minutes = (time.monotonic() - started) / 60

    assert (beside.status, beside.err) == (0, "")
    found = re.findall(r"^ *(\w+) +[\d.,]+ +[\d.,]+ +([+-][\d.]+) %", beside.out, re.MULTILINE)
    errors = {name: abs(float(error)) for name, error in found}
    within = {"duration": 3, "median_ttft_ms": 3, "p99_ttft_ms": 3, "median_tpot_ms": 3, "p99_tpot_ms": 10}
    assert all(errors[name] < most for name, most in within.items()), errors
    assert minutes < 10
