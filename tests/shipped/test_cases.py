"""Inputs made from public reports, each with what must come of it (`tests/data/case_*`).

The comment at the head of each scenario says what was reported. The expectations are worked out by hand from the
inputs, or are what the engine's own benchmark says.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.workload.formats.read import load as read_trace
from kit.command import chairlift
from kit.places import TESTS

DATA = TESTS / "data"


def case(number: str, name: str = "scenario.yaml") -> Path:
    return DATA / f"case_{number}_{name}"


def served(number: str, *assignments: str, policy: str | None = None) -> list[Outcome]:
    study = load(case(number), assignments, [policy] if policy else [])
    return [simulate(setup) for setup in study.setups]


def table(outcome: Outcome) -> dict[str, Any]:
    return {key: value for key, value in outcome.summary.items() if "wall" not in key}


def test_01_an_empty_session_is_no_session() -> None:
    [blank], [distinct] = served("01"), served("01", "workload.file=case_01_distinct.csv")

    assert blank.summary["prefix_hit_rate"] == 0
    assert set(np.unique(np.array(blank.requests.replica)).tolist()) == {0, 1, 2, 3}
    assert table(blank) == table(distinct)


def test_02_a_router_that_knows_prefixes_keeps_groups_together() -> None:
    least, affine = served("02")

    # 8 of the 64 prefixes a replica fit its pool: each of them is computed once, 64 times in 4000
    most = 4096 / 4352 * (1 - 64 / 4000)
    assert 0.85 <= affine.summary["prefix_hit_rate"] <= most + 0.001
    assert least.summary["prefix_hit_rate"] < 0.3


def test_03_replicas_that_are_ordered_and_not_wanted_any_more_do_not_come() -> None:
    [outcome] = served("03")

    assert set(np.array(outcome.requests.replica).tolist()) == {0}
    assert outcome.summary["completed"] == 600
    assert round(outcome.summary["replica_hours"], 3) == 0.167


def test_14_a_prefix_that_is_shared_is_stored_once() -> None:
    [outcome] = served("14")
    summary = outcome.summary

    # 256 blocks are shared, and each of 64 requests has 4 to 8 of its own: 512 to 768 of 1000
    assert 0.50 <= summary["kv_utilization"] <= 0.77
    assert sum(summary[f"kv_{part}"] for part in ("utilization", "reserved", "internal", "free")) == pytest.approx(1)
    assert summary["kv_free"] > 0


def test_15_itl_is_of_completed_requests() -> None:
    [outcome] = served("15")
    summary = outcome.summary

    assert (summary["completed"], summary["timed_out"]) == (1, 200)
    assert summary["mean_itl_ms"] == pytest.approx(summary["mean_tpot_ms"])
    assert summary["mean_itl_ms"] == pytest.approx(6.06, abs=0.05)


def test_26_images_are_said_not_to_be_used_and_turns_wait() -> None:
    [outcome] = served("26")
    assert "columns not used: NumImages" in outcome.assumptions["workload"]

    trace = read_trace(case("26", "aiperf2.jsonl"))
    assert trace.follows is not None
    assert trace.think_ps is not None
    assert trace.follows.tolist() == [-1, 0, -1]
    assert trace.think_ps.tolist() == [0, 5 * 10**12, 0]
    assert trace.session is not None
    assert trace.session.tolist() == [0, 0, 1]


def test_37_a_refused_request_says_why(tmp_path: Path) -> None:
    result = chairlift("run", str(case("37")), "--out", str(tmp_path / "out"))

    assert result.status == 0
    assert "refused: 3 longer than the model's 131,072 tokens" in " ".join(result.out.split())
    life = chairlift("explain", "2", "--in", str(tmp_path / "out"))
    assert "131,072 + output 1 = 131,073 tokens, over the model's 131,072" in " ".join(life.out.split())


def test_39_what_is_known_before_a_run_is_checked_before_it(tmp_path: Path) -> None:
    shutil.copy(case("39"), tmp_path / "scenario.yaml")
    begin = time.process_time()
    result = chairlift("run", str(tmp_path / "scenario.yaml"), "--uncertainty", "2", "--out", str(tmp_path / "out"))

    assert result.status == 2
    assert "--uncertainty: needs a calibrated profile" in result.err
    assert not (tmp_path / "out").exists()
    assert time.process_time() - begin < 2


def test_a_time_beyond_the_clock_shows_the_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1e8,1,1\n")

    with pytest.raises(BadInput, match=r"t\.csv:3: arrival_s: must be within 106 days of time 0 \(got '1e8'\)"):
        read_trace(tmp_path / "t.csv")
