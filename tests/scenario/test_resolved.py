"""What a run leaves as ``scenario.yaml`` runs again as it is, and gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.command import POLICY, ROUTER, SCENARIO, chairlift

CASES = """\
compare: [{name: a}, {name: b, policy: orca}]
cases: [{name: few, set: {workload.requests: 5}}, {name: all}]
"""
SETTING = "cases: [{name: few, set: {policy.max_num_seqs: 3}}, {name: all, set: {seed: 3}}]\n"
WITHIN = """\
compare: [{name: a}, {name: b, policy: {name: orca}}]
cases: [{name: x, set: {compare.1.policy.max_batch: 2}}]
"""
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,40,5\n1,80,9\n1.5,10,3\n"
FILE = "workload: {file: rows.csv}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(POLICY)
    Path("last.py").write_text(ROUTER)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text(TRACE)


def left(folder: str) -> dict[str, Any]:
    """What a run left, by file, without wall-clock times and without where files lie."""
    found: dict[str, Any] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".json":
            found[path.name] = _without_wall(json.loads(path.read_text()))
        elif path.suffix == ".yaml":
            found[path.name] = yaml.safe_load(path.read_text())
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def _without_wall(data: Any) -> Any:
    if isinstance(data, list):
        return [_without_wall(each) for each in data]
    return {key: value for key, value in data.items() if "wall" not in key} if isinstance(data, dict) else data


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ("", ["--policy", "orca"]),
        ("", ["--policy", "vllm", "--policy", "orca"]),
        ("", ["--policy", "mine.py", "--router", "last.py", "--set", "replicas=2"]),
        ("", ["--policy", "vllm", "--policy", "mine.py:Mine", "--router", "round_robin", "--router", "last.py"]),
        ("", ["--set", "model=llama-3.1-8b", "--set", "gpu=h200", "--backend", "h200-llama-3.1-8b-vllm-0.23"]),
        ("", ["--set", "cases=[{name: a, set: {gpu: h200}},{name: b, set: {gpu: l4}}]", "--set", "model=llama-3.1-8b"]),
        (CASES, ["--set", "workload.requests=7"]),
        (CASES, ["--policy", "tgi"]),
        (CASES, ["--policy", "tgi", "--policy", "mine.py", "--backend", "roofline"]),
        (CASES, ["--set", "cases.1.set={workload.requests: 3}"]),
        (SETTING, ["--set", "policy=orca"]),
        (SETTING, ["--set", "policy=orca", "--set", "policy={name: tgi}", "--set", "seed=4"]),
        (SETTING, ["--policy", "static"]),
        (WITHIN, ["--policy", "static"]),
        (WITHIN, ["--policy", "static", "--policy", "orca"]),
        (CASES + "tables: [latency]\nbaseline: [b]\nwaterfall: [{variant: a}, {variant: b}]\n", ["--policy", "orca"]),
        ("name: called so\n", []),
    ],
)
def test_it_runs_again_as_it_is(more: str, options: list[str]) -> None:
    Path("small.yaml").write_text(SCENARIO + more)

    first = chairlift("run", "small.yaml", "--out", "first", "-q", *options)
    again = chairlift("run", "first/scenario.yaml", "--out", "again", "-q", "--trust")

    assert (first.status, first.err, again.status, again.err) == (0, "", 0, "")
    assert left("first") == left("again")


def test_it_says_what_the_command_line_chose() -> None:
    Path("small.yaml").write_text(SCENARIO)

    chairlift("run", "small.yaml", "--out", "one", "-q", "--policy", "orca", "--backend", "roofline")
    chairlift("run", "small.yaml", "--out", "two", "-q", "--policy", "vllm", "--policy", "orca")
    one, two = (yaml.safe_load(Path(name, "scenario.yaml").read_text()) for name in ("one", "two"))

    assert (one["policy"], one["backend"], one.get("compare")) == ("orca", "roofline", None)
    assert two["compare"] == [{"name": "vllm", "policy": "vllm"}, {"name": "orca", "policy": "orca"}]


def test_cases_of_the_command_line_run() -> None:
    Path("small.yaml").write_text(SCENARIO)

    cases = "cases=[{name: few, set: {workload.requests: 3}},{name: more, set: {workload.requests: 4}}]"
    chairlift("run", "small.yaml", "--out", "out", "-q", "--set", cases)

    found = json.loads(Path("out/comparison.json").read_text())
    assert [(each["case"], each["completed"]) for each in found] == [("few", 3), ("more", 4)]


@pytest.mark.parametrize("case", ["", "cases: [{name: a, set: {workload: {file: rows.csv, limit: 2}}}]\n"])
def test_files_are_named_from_the_folder_of_the_run(case: str) -> None:
    Path("data/s.yaml").write_text(SCENARIO.partition("workload:")[0] + FILE + case)

    first = chairlift("run", "data/s.yaml", "--out", "deep/er/first", "-q")
    assert (first.status, first.err) == (0, "")
    again = chairlift("run", "deep/er/first/scenario.yaml", "--out", "deep/er/again", "-q")

    assert (again.status, again.err) == (0, "")
    assert (
        yaml.safe_load(Path("deep/er/first/scenario.yaml").read_text())["workload"]["file"] == "../../../data/rows.csv"
    )
    assert left("deep/er/first") == left("deep/er/again")


def test_a_sweep_may_build_on_it() -> None:
    Path("small.yaml").write_text(SCENARIO)
    chairlift("run", "small.yaml", "--out", "first", "-q")
    Path("sweep.yaml").write_text("base: first/scenario.yaml\naxes: {policy.max_num_seqs: [1, 2]}\n")

    assert chairlift("sweep", "sweep.yaml", "-q", "--jobs", "1").status == 0
