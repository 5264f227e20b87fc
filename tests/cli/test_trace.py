"""``chairlift trace``: what is written is what a run of the scenario would serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.sim.workload.formats.chairlift import save
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.workload import build
from kit.command import chairlift
from kit.made import SYNTHETIC, workload

SCENARIO = {"model": "no such", "seed": 5, "workload": SYNTHETIC | {"sessions": {"turns": 3, "think_s": 2}}}


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SCENARIO))
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_a_workload_is_written_as_it_is_drawn(scenario: Path, tmp_path: Path, name: str) -> None:
    result = chairlift("trace", "write", str(scenario), str(tmp_path / name), "--set", "seed=6")
    assert (result.status, "50 requests in" in result.out) == (0, True)

    drawn, written = build(workload(**SCENARIO["workload"]), 6), load(tmp_path / name)  # type: ignore[arg-type]
    for column in ("arrival_ps", "prompt_tokens", "output_tokens", "session", "follows", "think_ps"):
        assert getattr(drawn, column).tolist() == getattr(written, column).tolist()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["s.json", "t.txt"], "t.txt: must end in .csv, .csv.gz or .parquet"),
        (["no.yaml", "t.csv"], "no.yaml: no such file"),
        (["s.json", "no/t.csv"], "cannot be written"),
        (["s.json", "t.csv", "--set", "workload.arivals=1"], "unknown key – did you mean 'arrivals'?"),
        (["s.json", "t.csv", "--set", "seed=-1"], "seed: must be a whole number of at least 0 (got -1)"),
    ],
)
def test_what_cannot_be_written_is_said(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = chairlift("trace", "write", *arguments)

    assert result.status == 2
    assert rule in result.err


def test_describe_takes_what_a_file_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n' * 2)
    assert chairlift("trace", "describe", str(path)).status == 2
    result = chairlift("trace", "describe", str(path), "--format", "mooncake", "--time-unit", "us", "--json")

    assert "timestamp read as microseconds, as time_unit says" in json.loads(result.out)["notes"]


def test_a_tenant_without_a_name_stays_without(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,tenant\n0,1,1,\n0,1,1,a\n")
    save(load(tmp_path / "t.csv"), tmp_path / "again.csv")

    assert load(tmp_path / "again.csv").tenants == ("", "a")
