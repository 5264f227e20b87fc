"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kit.command import SCENARIO, chairlift
from kit.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_policy_of_ones_own_serves_everybody_also_where_kv_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shortest.py").write_text(blocks("python")[0])
    Path("my.yaml").write_text(SCENARIO.replace("tokens: 4000", "tokens: 400"))
    result = chairlift("run", "my.yaml", "--policy", "shortest.py", "--set", "workload.arrivals={burst: {}}")

    assert result.status == 0, result.err
    assert re.search(r"completed +30", result.out)
    assert re.search(r"preemptions +[1-9]", result.out)


def test_the_policy_of_ones_own_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shortest.py").write_text(blocks("python")[0])
    result = chairlift("check", "shortest.py")

    assert result.status == 0, result.out
    assert "9 promises kept, 0 broken, 0 not checked" in result.out


def test_the_cluster_keys_are_all_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = blocks("yaml")[1]
    base = "model: llama-3.1-8b\ngpu: h100\npolicy: vllm\n"
    apart = "\n".join(line for line in keys.splitlines() if not line.startswith("autoscale"))
    together = "\n".join(line for line in keys.splitlines() if not line.startswith(("replicas", "link")))
    for name, text in (("apart", apart), ("together", together)):
        Path(f"{name}.yaml").write_text(base + text)
        result = chairlift("run", f"{name}.yaml", "--set", "workload.requests=200")

        assert result.status == 0, result.err


def test_the_sweep_runs_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(blocks("yaml")[0])
    [sweep] = [block for block in blocks("yaml") if "seeds:" in block]
    Path("sweep.yaml").write_text(sweep)
    small = ("workload.requests=20",)
    result = chairlift("sweep", "sweep.yaml", "--dry-run", *(f"--set={each}" for each in small))

    assert result.status == 0, result.err
    assert "120 points × 8 seeds" in result.err
    Path("sweep.yaml").write_text(sweep.replace("seeds: 8", "seeds: 2").replace("points: 6", "points: 1"))
    result = chairlift("sweep", "sweep.yaml", "-j1", *(f"--set={each}" for each in small))
    assert result.status == 0, result.err
    result = chairlift("compare", "sweep")
    assert result.status == 0, result.err
    assert "mean rank" in result.out


def test_the_scenario_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(blocks("yaml")[0])
    result = chairlift("run", "my.yaml", "--set", "workload.requests=200")

    assert result.status == 0, result.err
    assert "good/s" in result.out


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(blocks("yaml")[0])
    [example] = [block for block in blocks("python") if "simulate(setup)" in block]
    exec(example.replace("requests=2000", "requests=100"), {})

    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["vllm", "orca"]
    assert all("p99 TTFT" in line for line in shown)
