"""Numbers beyond what anybody has built are refused with their bound, before they take hours or all memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    ("change", "why"),
    [
        ("max_model_len=1", f"30 longer than the model's 1 tokens {LONGEST}"),
        ("kv={blocks: 1}", f"30 larger than the KV pool of 16 tokens {LONGEST}"),
        ("workload.prompt_tokens=200000", f"30 longer than the model's 2,048 tokens {LONGEST}"),
        ("policy={name: tgi, max_batch_total_tokens: 10}", "30 that would fit: the policy would not have them"),
    ],
)
def test_a_run_that_completes_nothing_says_why_and_exits_with_1(change: str, why: str) -> None:
    result = chairlift("run", "s.yaml", "-q", "--set", change)
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
