"""Every shipped sweep is sound, and shows at a reduced size what its question says."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from chairlift.sim.sweep.file import read_sweep
from kit.command import chairlift
from kit.places import ROOT
from kit.sweeping import table

SWEEPS = sorted((ROOT / "scenarios" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_sound(path: Path) -> None:
    plan = read_sweep(path)

    assert plan.name == path.stem
    assert "?" in plan.question
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert len(plan.seeds) >= 3
    assert path.stem in chairlift("list", "sweeps").out


def means(folder: Path, *axes: str) -> dict[tuple[Any, ...], dict[str, float]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in table(folder).to_pylist():
        assert row["error"] == ""
        found[tuple(row[axis] for axis in axes)].append(row)
    metrics = ("p99_ttft_ms", "p99_itl_ms", "request_goodput")
    return {at: {m: fmean(row[m] for row in rows) for m in metrics} for at, rows in found.items()}


def test_chat_knee_shows_who_gives_in_where(tmp_path: Path) -> None:
    # up to the load at which its p99 TTFT would tell nothing in so short a run
    result = chairlift("sweep", "chat_knee", "--out", str(tmp_path), "--set", "workload.requests=700")
    assert result.status == 0, result.err
    found = means(tmp_path, "policy", "workload.rate_per_s")
    rates = sorted({rate for _, rate in found})
    good = {at: row["request_goodput"] / at[1] for at, row in found.items()}

    assert good["tgi", rates[0]] > 0.9
    assert good["tgi", rates[3]] < 0.5
    for policy in ("vllm", "vllm 8k", "orca"):
        assert good[policy, rates[3]] > 0.8
    assert found["vllm 8k", 16]["p99_itl_ms"] > 1.5 * found["vllm", 16]["p99_itl_ms"]


def test_budget_search_finds_what_sets_which_tail(tmp_path: Path) -> None:
    result = chairlift("sweep", "budget_search", "--out", str(tmp_path), "--set", "workload.requests=400")
    assert result.status == 0, result.err
    found = means(tmp_path, "workload.arrivals", "policy.max_num_batched_tokens", "policy.max_num_seqs")
    steady = sorted((budget, row["p99_itl_ms"]) for (how, budget, _), row in found.items() if how == "steady")

    assert len(found) == 48
    assert steady[-1][1] > 3 * steady[0][1]
    assert steady[0][1] > 26  # launched kernel by kernel
    few = [row["request_goodput"] for (how, _, seqs), row in found.items() if how == "steady" and seqs < 30]
    many = [row["request_goodput"] for (how, _, seqs), row in found.items() if how == "steady" and seqs > 60]
    assert max(few) < min(many)
