"""A scenario, or a recorded file, at another rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.plan.pacing import paced, replayed, replays, turned
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.units import PS_PER_S
from kit.command import SCENARIO
from kit.worlds import trace_of

RECORDED = SCENARIO[: SCENARIO.index("workload:")].replace("seed: 7\n", "") + "workload: {file: t.csv, requests: 3}\n"


def scenario(folder: Path, text: str = SCENARIO) -> Document:
    (folder / "s.yaml").write_text(text)
    return read(folder / "s.yaml")


def test_a_turned_trace_by_hand() -> None:
    """Gaps of 1, 2 and 3 s, a mean of 2 s; around the end stands the mean. At 1/s all gaps are half as long."""
    trace = trace_of([(0, 10, 1), (1 * PS_PER_S, 11, 2), (3 * PS_PER_S, 12, 3), (6 * PS_PER_S, 13, 4)])
    here = turned(trace, 0, 6, 1.0)
    there = turned(trace, 1, 3, 1.0)  # 0.618 · 4: from row 2 on

    assert here.prompt_tokens.tolist() == [10, 11, 12, 13, 10, 11]
    assert (here.arrival_ps / PS_PER_S).tolist() == [1, 1.5, 2.5, 4, 5, 5.5]
    assert there.output_tokens.tolist() == [3, 4, 1]
    assert (np.diff(there.arrival_ps) / PS_PER_S).tolist() == [1.5, 1]


def test_seeds_begin_far_from_one_another() -> None:
    trace = trace_of([(i * PS_PER_S, i + 1, 1) for i in range(1000)])

    assert [int(turned(trace, seed, 1, 1.0).prompt_tokens[0]) - 1 for seed in range(3)] == [0, 618, 236]


def test_a_recorded_file_is_read_whole_and_then_turned(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},{10 + i},2\n" for i in range(8))
    )
    base = scenario(tmp_path, RECORDED)
    whole = prepare(replayed(base, 5), tmp_path)

    assert replays(base)
    assert not replays(scenario(tmp_path))
    assert (len(whole.trace), whole.seed) == (8, 5)
    assert len(prepare(base, tmp_path).trace) == 3


def test_what_cannot_be_turned_is_told() -> None:
    with pytest.raises(BadInput, match="arrive at once"):
        turned(trace_of([(5, 1, 1), (5, 1, 1)]), 0, 2, 1.0)
    with pytest.raises(BadInput, match="follow one another"):
        turned(trace_of([(0, 1, 1), (0, 1, 1)], follows=np.array([-1, 0]), think_ps=np.array([0, 1])), 0, 2, 1.0)


def test_paced_arrivals_keep_their_pattern_and_bursts_replace_it(tmp_path: Path) -> None:
    document = scenario(tmp_path)
    same, bursty = paced(document, 20.0, 50, seed=3), paced(document, 20.0, 50, cv=2.0)
    slow, fast = (prepare(paced(document, rate, 50, seed=3), tmp_path).trace for rate in (2.0, 20.0))

    assert same.data["workload"]["arrivals"] == {"poisson": {"rate_per_s": 20.0}}
    assert bursty.data["workload"]["arrivals"] == {"gamma": {"rate_per_s": 20.0, "cv": 2.0}}
    assert (same.data["seed"], same.data["workload"]["requests"]) == (3, 50)
    assert document.data["workload"]["arrivals"] == {"poisson": {"rate_per_s": 2}}  # untouched
    assert slow.prompt_tokens.tolist() == fast.prompt_tokens.tolist()
    assert slow.arrival_ps.tolist() == pytest.approx((10 * fast.arrival_ps).tolist(), abs=20)
