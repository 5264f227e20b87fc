"""Compared policies run the same engine loop, unless a setting says otherwise; and what differs is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.sim.scenario.load import load
from chairlift.sim.sweep import table
from kit.command import POLICY, SCENARIO, chairlift

AHEAD = "{name: vllm, async_scheduling: true}"
OWN = "budget: Positive = 2048\n\n    @property\n    def asynchronous(self):\n        return True\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(POLICY)
    Path("ahead.py").write_text(POLICY.replace("budget: Positive = 2048\n", OWN))
    Path("small.yaml").write_text(SCENARIO)


def ran(more: str = "", **options: list[str]) -> list[str]:
    Path("some.yaml").write_text(SCENARIO + more)
    return [setup.loop for setup in load(Path("some.yaml"), **options).setups]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", ["asynchronous"]),
        ("compare: [{name: a}, {name: b, policy: {name: vllm, max_num_seqs: 2}}]\n", ["asynchronous"] * 2),
        ("compare: [{name: a}, {name: b, policy: orca}]\n", ["synchronous"] * 2),
        (f"compare: [{{name: a, policy: {AHEAD}}}, {{name: b, policy: orca}}]\n", ["asynchronous", "synchronous"]),
        (f"compare: [{{name: a}}, {{name: b, policy: {AHEAD}}}, {{name: c, policy: orca}}]\n",
         ["synchronous", "asynchronous", "synchronous"]),
        ("compare: [{name: a, replicas: [{count: 1}, {policy: orca}]}, {name: b}]\n", ["synchronous"] * 2),
        ("cases: [{name: a}, {name: b, set: {policy: orca}}]\n", ["synchronous"] * 2),
        ("compare: [{name: a}, {name: b, policy: sglang}]\n", ["asynchronous"] * 2),
        ("compare: [{name: a}, {name: b, policy: sglang}, {name: c, policy: orca}]\n", ["synchronous"] * 3),
        ("compare: [{name: a, policy: {name: sglang, disable_overlap_schedule: false}}, {name: c, policy: orca}]\n",
         ["asynchronous", "synchronous"]),
    ],
)  # fmt: skip
def test_compared_policies_run_the_same_loop(more: str, expected: list[str]) -> None:
    assert ran(more) == expected


def test_so_do_those_of_the_command_line() -> None:
    assert ran(policies=["vllm", "mine.py"]) == ["synchronous"] * 2
    assert ran(policies=["vllm"]) == ["asynchronous"]
    assert ran(policies=["vllm", "ahead.py"]) == ["asynchronous"] * 2


def test_vllm_beside_its_equal_gains_nothing() -> None:
    """The synchronous `vllm` decides as `vllm` does, so the two get the same times."""
    Path("equal.yaml").write_text(
        SCENARIO + "compare: [{name: a, policy: vllm}, {name: b, policy: {name: vllm, async_scheduling: false}}]\n"
    )
    chairlift("run", "equal.yaml", "--out", "out", "-q")

    a, b = json.loads(Path("out/comparison.json").read_text())
    assert a["mean_ttft_ms"] == b["mean_ttft_ms"]
    assert a["assumptions"]["engine loop"].startswith("synchronous")


def test_tables_and_page_warn_where_loops_differ() -> None:
    Path("s.yaml").write_text(SCENARIO + f"compare: [{{name: a, policy: {AHEAD}}}, {{name: b, policy: orca}}]\n")
    shown = chairlift("run", "s.yaml", "--out", "out", "--report").out

    assert "not all run the same engine loop (asynchronous: a; synchronous: b)" in " ".join(shown.split())
    assert "not all run the same engine loop (asynchronous: a; synchronous: b)" in Path("out/report.html").read_text()


def test_they_do_not_warn_where_loops_are_the_same() -> None:
    Path("s.yaml").write_text(SCENARIO + "compare: [{name: a}, {name: b, policy: orca}]\n")
    shown = chairlift("run", "s.yaml", "--out", "out", "--report").out

    assert "warning" not in shown
    page = Path("out/report.html").read_text()
    assert "All ran the synchronous engine loop." in page
    assert "not all run" not in page


def sweep(policies: str) -> str:
    Path("sweep.yaml").write_text(f"base: small.yaml\nseeds: 2\naxes: {{policy: {policies}}}\n")
    assert chairlift("sweep", "sweep.yaml", "--trust", "-q", "--jobs", "1").status == 0
    return " ".join(chairlift("compare", "runs/sweep", "--html", "plots.html").out.split())


def test_a_sweep_compares_on_one_loop_and_says_so() -> None:
    told = sweep("[vllm, {name: vllm, async_scheduling: false}, mine.py]")

    assert "All ran the synchronous engine loop." in told
    assert "warning" not in told
    rows = table.read(Path("runs/sweep")).rows
    assert {row["loop"] for row in rows} == {"synchronous"}
    default, said = ([r["mean_ttft_ms"] for r in rows if r["policy"] == name] for name in
                     ("vllm", "vllm async_scheduling=false"))  # fmt: skip
    assert default == said
    assert len(default) == 2
    assert "All ran the synchronous engine loop." in Path("plots.html").read_text()


def test_a_sweep_that_mixes_loops_warns() -> None:
    told = sweep(f"[{AHEAD}, mine.py]")

    assert "warning: not all run the same engine loop (asynchronous: vllm async_scheduling=true; synchron" in told
    assert "not all run the same engine loop" in Path("plots.html").read_text()
    assert "not all run" in json.loads(chairlift("compare", "runs/sweep", "--json").out)["warning"]


def test_a_sweep_of_one_loop_keeps_it() -> None:
    assert "All ran the asynchronous engine loop." in sweep("[vllm, {name: vllm, max_num_seqs: 3}]")
