"""Numbers beyond what anybody has built are refused with their bound, before they take hours or all memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from chairlift.backend import machine
from chairlift.sim.cli import effort
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from kit.command import SCENARIO, chairlift

LONGEST = r"\(prompt and output; the longest ([\d,]+) \+ ([\d,]+) = ([\d,]+)\)"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["workload.requests=1000000000"], "must be at most 100,000,000: their records alone would take 75 GiB"),
        (["workload.requests=99999999999999999999"], "workload.requests: must be"),
        (["replicas=1000000000"], "must be at most 10000"),
        (["replicas=100000"], "must be at most 10000"),
        (["kv={blocks: 1000000000000000}"], "kv.blocks: must be at most 1000000000 "),
        (
            ["failures={mtbf_s: 0.001, mttr_s: 1}", "replicas=2"],
            "failures.mtbf_s: must be at least 1: a replica that fails sooner answers nobody (got 0.001)",
        ),
        (["failures={mtbf_s: 1e-9, mttr_s: 1e-9}", "replicas=2"], "failures.mtbf_s: must be at least 1"),
        (
            ["autoscale={min: 1, max: 2, every_s: 1e-9, provision_s: 60, target_outstanding: 60}"],
            "autoscale.every_s: must be at least 0.001",
        ),
        (
            ["replicas=[{role: prefill}, {role: decode}]", "link={gb_per_s: 1e-30}"],
            "link.gb_per_s: must be at least 0.001",
        ),
        (["policy={name: static, batch: 8, pause_ms: 1.0e+300}"], "policy.pause_ms: must be at most 1000000000"),
        (["policy={name: priority, age_s: .inf}"], "policy.age_s: must be"),
        (["backend={name: roofline, overhead_ms: 1.0e+300}"], "backend.overhead_ms: must be at most 1000000"),
        (["kv={host_gib: 1e300}"], "kv.host_gib: must be at most 1000000"),
        (["tensor_parallel=1000000"], "tensor_parallel: must be at most 1024"),
    ],
)
def test_a_number_out_of_bounds_is_refused(assignments: list[str], says: str) -> None:
    given = [word for text in assignments for word in ("--set", text)]
    result = chairlift("run", "s.yaml", "-q", *given)
    assert (result.status, result.out) == (2, "")
    assert says in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["max_model_len=1"], f"30 longer than the model's 1 tokens {LONGEST}"),
        (
            ["kv={blocks: 1}", "policy=sarathi"],
            f"30 larger than the KV pool of 16 tokens {LONGEST}",
        ),  # vLLM would not start
        (["workload.prompt_tokens=200000"], f"30 longer than the model's 2,048 tokens {LONGEST}"),
        (["policy={name: tgi, max_batch_total_tokens: 10}"], "30 that would fit: the policy would not have them"),
    ],
)
def test_a_run_that_completes_nothing_says_why_and_exits_with_1(changes: list[str], why: str) -> None:
    result = chairlift("run", "s.yaml", "-q", *(word for text in changes for word in ("--set", text)))
    assert (result.status, result.out) == (1, "")
    found = re.fullmatch(rf"s: no request was completed: 30 rejected \({why}\)\n", result.err)
    assert found is not None, result.err
    assert not found.groups() or number(found[1]) + number(found[2]) == number(found[3])
    assert Path("runs/s/summary.json").exists()


def test_a_sweep_that_completes_nothing_says_so() -> None:
    Path("w.yaml").write_text("base: s.yaml\naxes: {max_model_len: [1, 2]}\n")
    result = chairlift("sweep", "w.yaml", "-q", "-j", "1")
    assert (result.status, result.err) == (1, "no request was completed in 2 of 2 runs\n")
    Path("w.yaml").write_text("base: s.yaml\naxes: {max_model_len: [1, 2048]}\n")
    result = chairlift("sweep", "w.yaml", "-q", "-j", "1")
    assert (result.status, result.err) == (0, "no request was completed in 1 of 2 runs\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("schema --sweep --plan", "--plan: must not be given beside --sweep"),
        ("sweep w.yaml --policy vllm", "--policy vllm: stands in the axis policy already"),
        ("sweep w.yaml --policy orca --policy orca", "--policy orca: stands in the axis policy already"),
    ],
)
def test_what_would_be_done_twice_or_not_at_all_is_refused(words: str, says: str) -> None:
    Path("w.yaml").write_text("base: s.yaml\naxes: {policy: [vllm, tgi]}\n")
    result = chairlift(*words.split())
    assert (result.status, result.out, result.err) == (2, "", f"error: {says}\n")


def test_what_takes_long_says_so_first() -> None:
    def told(**changes: object) -> str:
        data = {**yaml.safe_load(SCENARIO), **changes}
        setup = prepare(Document(data, {}, "test"), Path())
        return effort.said([setup], 2)

    def busy(requests: int, rate: float) -> dict[str, object]:
        arrivals = {"poisson": {"rate_per_s": rate}}
        return {"requests": requests, "arrivals": arrivals, "prompt_tokens": 10, "output_tokens": 10}

    assert told() == ""
    assert told(workload=busy(200_000, 1000)) == ""
    assert told(workload=busy(10_000_000, 1000)) == "some 17 minutes: 2 runs, 20,000,000 requests"
    scale = {"min": 1, "max": 2, "every_s": 0.001, "target_outstanding": 60}
    assert told(workload=busy(1000, 0.001), autoscale=scale).startswith("some 1.")
    failing = {"mtbf_s": 1, "mttr_s": 1}
    assert told(workload=busy(1000, 0.001), failures=failing, replicas=100).endswith("hours: 2 runs, 2,000 requests")


@pytest.mark.skipif(machine.memory_to_give() is None, reason="the machine does not say what memory it has")
def test_what_takes_more_memory_than_there_is_says_so_before_it_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 GiB; with what this machine has the same numbers might fit."""
    monkeypatch.setattr(machine, "memory_to_give", lambda: 2**30)
    cases = [
        (["workload.requests=50000000"], "the records of 50,000,000 requests would take some 3.73 GiB"),
        (
            ["workload.requests=5000000", "workload.arrivals={poisson: {rate_per_s: 1000}}"],
            "5,000,000 requests would take",
        ),
        (
            ["kv={blocks: 100000000}", "workload.prefix={groups: 2, tokens: 10}"],
            "30 requests and 100,000,000 blocks of a prefix cache would take some 4.47 GiB",
        ),
        (
            ["kv={blocks: 100000}", "replicas=1000", "workload.prefix={groups: 2, tokens: 10}"],
            "30 requests and 100,000,000 blocks of a prefix cache would take some 4.47 GiB",
        ),
    ]
    for assignments, says in cases:
        given = [word for text in assignments for word in ("--set", text)]
        result = chairlift("run", "s.yaml", "-q", *given)
        assert (result.status, result.out) == (2, ""), result
        assert result.err.startswith(f"error: not enough memory: {says}")
        assert result.err.endswith("this machine has 1 to give\n")
        assert list(Path("runs").rglob("*")) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "seeds: 1000\naxes: {max_model_len: {linear: {low: 1, high: 2000, points: 2000, whole: true}}}\n",
            "2,000,000",
        ),
        ("seeds: 100000\naxes: {policy: [vllm, orca], max_model_len: [1, 2, 3, 4, 5, 6]}\n", "1,200,000"),
    ],
)
def test_more_runs_than_anybody_waits_for_are_refused(text: str, says: str) -> None:
    Path("w.yaml").write_text("base: s.yaml\n" + text)
    result = chairlift("sweep", "w.yaml", "--dry-run")
    assert (result.status, result.out) == (2, "")
    assert result.err == f"error: w.yaml: at most 1,000,000 runs: its points, seeds, variants and cases make {says}\n"


def test_more_systems_than_a_plan_can_look_at_are_refused() -> None:
    Path("s.yaml").write_text(SCENARIO.replace("seed: 7\n", ""))
    plan = "base: s.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: 1\n"
    lengths = "{linear: {low: 1, high: 2000, points: 2000, whole: true}}"
    Path("p.yaml").write_text(f"{plan}axes: {{max_model_len: {lengths}, replicas: [1, 2, 3, 4, 5, 6]}}\n")
    result = chairlift("plan", "p.yaml", "--dry-run")
    assert (result.status, result.out) == (2, "")
    assert "axes: must make at most 10,000 systems" in result.err
