"""Stretches of recorded files, held to what the variance of their mean is by hand and by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.pacing import paced
from chairlift.sim.plan.promises import BINS, Promise, Sample
from chairlift.sim.plan.stretches import Stretch, recorded, rows_of, stretched, turned, worth
from chairlift.sim.plan.verdict import Verdict, judge
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.units import PS_PER_S
from kit.worlds import trace_of

GOLDEN = 0.6180339887498949
PROMISE = Promise(percentile=95, ttft_ms=500)


# ---- which rows ----


def test_a_turned_trace_by_hand() -> None:
    """Gaps of 1, 2 and 3 s, a mean of 2 s; around the end stands the mean. At 1/s all gaps are half as long."""
    trace = trace_of([(0, 10, 1), (1 * PS_PER_S, 11, 2), (3 * PS_PER_S, 12, 3), (6 * PS_PER_S, 13, 4)])
    here, _ = turned(trace, 0, 6, 1.0)
    there, part = turned(trace, 1, 3, 1.0)  # 0.618 · 4: from row 2 on

    assert here.prompt_tokens.tolist() == [10, 11, 12, 13, 10, 11]
    assert (here.arrival_ps / PS_PER_S).tolist() == [1, 1.5, 2.5, 4, 5, 5.5]
    assert there.output_tokens.tolist() == [3, 4, 1]
    assert (np.diff(there.arrival_ps) / PS_PER_S).tolist() == [1.5, 1]
    assert part == Stretch(2, 3, 4)


def test_seeds_begin_far_from_one_another() -> None:
    trace = trace_of([(i * PS_PER_S, i + 1, 1) for i in range(1000)])

    assert [int(turned(trace, seed, 1, 1.0)[0].prompt_tokens[0]) - 1 for seed in range(3)] == [0, 618, 236]


def test_what_cannot_be_turned_is_told() -> None:
    with pytest.raises(BadInput, match="arrive at once"):
        turned(trace_of([(5, 1, 1), (5, 1, 1)]), 0, 2, 1.0)
    with pytest.raises(BadInput, match="follow one another"):
        turned(trace_of([(0, 1, 1), (0, 1, 1)], follows=np.array([-1, 0]), think_ps=np.array([0, 1])), 0, 2, 1.0)


def scenario(**workload: Any) -> Document:
    return Document({"model": "opt-13b", "gpu": "a100-40gb", "policy": "vllm", "workload": workload}, {}, "s.yaml")


def written(folder: Path, rows: int) -> None:
    (folder / "t.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},{10 + i},{1 + i % 5}\n" for i in range(rows))
    )


def test_drawn_arrivals_serve_other_rows_in_each_replication(tmp_path: Path) -> None:
    written(tmp_path, 1000)
    document = scenario(file="t.csv", arrivals={"poisson": {"rate_per_s": 1}})
    first, second = (stretched(paced(document, 5.0, 200, seed=seed), tmp_path, seed)[0] for seed in (0, 1))

    assert first.prompt_tokens.tolist() == list(range(10, 210))
    assert second.prompt_tokens.tolist() == list(range(628, 828))
    assert first.arrival_ps.tolist() != second.arrival_ps.tolist()
    assert 200 / first.duration_s == pytest.approx(5, rel=0.25)


def test_sessions_of_a_file_stay_whole(tmp_path: Path) -> None:
    """Five sessions of 1, 2, 3, 1, 2 turns; 0.618 · 5: the second seed begins at the fourth session."""
    lines = ["arrival_s,prompt_tokens,output_tokens,session,follows,think_s"]
    rows: list[tuple[int, int]] = []  # session, row that is followed
    for session, turns in enumerate([1, 2, 3, 1, 2]):
        for turn in range(turns):
            rows.append((session, len(rows) - 1 if turn else -1))
            lines.append(f"{session},{100 + 10 * session + turn},5,{session},{rows[-1][1]},{1 if turn else 0}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    document = scenario(file="t.csv", arrivals={"poisson": {"rate_per_s": 1}})
    trace, [part] = stretched(paced(document, 1.0, 5, seed=1), tmp_path, 1)

    assert trace.prompt_tokens.tolist() == [130, 140, 141, 100, 110]  # the last session is cut
    assert trace.follows is not None
    assert trace.follows.tolist() == [-1, -1, 1, -1, -1]
    assert trace.arrival_ps[1] == trace.arrival_ps[2]
    assert part == Stretch(3, 4, 5)


def test_a_part_of_a_mix_that_is_a_file_is_another_stretch_too(tmp_path: Path) -> None:
    written(tmp_path, 1000)
    drawn = {"arrivals": {"poisson": {"rate_per_s": 1}}, "prompt_tokens": 5000, "output_tokens": 5, "requests": 9}
    document = scenario(mix={"logs": {"file": "t.csv", "rate_per_s": 3}, "drawn": drawn})
    found = [stretched(paced(document, 8.0, 400, seed=seed), tmp_path, seed) for seed in (0, 1)]
    logs = [trace.prompt_tokens[trace.prompt_tokens < 5000].tolist() for trace, _ in found]

    assert recorded(document)
    assert rows_of(document, tmp_path) == 1000
    assert logs[0][:3] == [10, 11, 12]
    assert logs[1][:3] == [628, 629, 630]
    assert all(len(each) == pytest.approx(300, abs=40) for each in logs)
    assert [part.first for _, parts in found for part in parts] == [0, 618]


# ---- what stretches are worth ----


def test_worth_by_hand() -> None:
    assert worth([Stretch(0, 100, 1000), Stretch(100, 100, 1000), Stretch(950, 50, 1000)]) == pytest.approx(
        250 / (250 / 3)
    )
    assert worth([Stretch(0, 100, 1000), Stretch(50, 100, 1000)]) == pytest.approx(200**2 / (100 + 4 * 50) / 100)
    assert worth([Stretch(900, 200, 1000), Stretch(0, 100, 1000)]) == pytest.approx(300**2 / (100 + 4 * 100) / 150)
    assert worth([Stretch(0, 50, 1000)] * 7) == pytest.approx(1)
    assert worth([Stretch(0, 2000, 30), Stretch(18, 2000, 30)]) == pytest.approx(30 / 2000, rel=1e-3)


def verdict_of(failed: np.ndarray, replications: int, rows: int) -> Verdict:
    """The verdict on stretches of a file whose requests miss `PROMISE` where ``failed``."""
    n = len(failed)
    samples = []
    for seed in range(replications):
        first = int(seed * GOLDEN % 1 * n)
        parts = failed[(first + np.arange(rows)) % n].reshape(BINS, -1)
        each, missed = parts.shape[1], parts.sum(axis=1)
        starts = [float(i) for i in range(BINS)]
        samples.append(
            Sample(
                *(starts, float(BINS), 0.0, [0.0] * BINS, [[each] * BINS], [(each - missed).tolist()]),
                *({}, 100.0, 0.0),
                stretches=[[first, rows, n]],
            )
        )
    return judge([PROMISE], samples, 1.0, rows)


@pytest.mark.parametrize("cluster", [1, 25], ids=["independent", "in clusters"])
def test_the_interval_of_stretches_covers_the_truth_of_all_days(cluster: int) -> None:
    """A day of 4000 rows, of which 8 % fail; each of 200 days is judged by 32 stretches of 500 of its rows."""
    chance = np.random.default_rng(5)
    covered = wide = naive = 0
    for _ in range(200):
        failed = np.repeat(chance.random(4000 // cluster) < 0.08, cluster)
        verdict = verdict_of(failed, 32, 500)
        [kept] = verdict.kept
        covered += kept.low <= 0.92 <= kept.high
        wide += kept.high - kept.low > 0.5
        half = (kept.high - kept.low) / 2 * np.sqrt((verdict.worth - 1) / 31)  # as 32 independent ones would have it
        naive += abs(kept.share - 0.92) <= half

    assert verdict.worth == pytest.approx(8, abs=0.3)
    assert 184 <= covered <= 200
    assert wide == 0
    assert naive < 160  # the test can tell


def test_stretches_that_do_not_overlap_count_as_replications() -> None:
    failed = np.random.default_rng(1).random(200_000) < 0.05
    apart = verdict_of(failed, 8, 500)

    assert apart.worth == 8
    assert apart.freedom == 7


def test_a_file_gone_round_proves_nothing() -> None:
    failed = np.zeros(30, dtype=bool)
    verdict = verdict_of(failed, 16, 2100)

    assert verdict.worth < 0.02
    assert verdict.proof == 0
    assert (verdict.kept[0].low, verdict.kept[0].high) == (0.0, 1.0)
    failed[:2] = True
    assert verdict_of(failed, 16, 2100).proof == 0


# ---- plans ----

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  max_model_len: 16384
  policy: vllm
  workload: {file: t.csv}
slo: [{percentile: 95, ttft_ms: 120}]
rate_per_s: 10
axes: {replicas: [1, 2]}
"""


def test_a_file_too_short_for_a_proof_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 799)
    (tmp_path / "plan.yaml").write_text(PLAN)
    with pytest.raises(BadInput, match=r"plan.yaml:6: base.workload.file: has 799 requests, .* 800 are needed"):
        read_plan(tmp_path / "plan.yaml")


def test_replications_are_short_enough_for_some_that_do_not_overlap(tmp_path: Path) -> None:
    written(tmp_path, 3000)
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = read_plan(tmp_path / "plan.yaml")
    effort = plan.effort()

    assert plan.rows == 3000
    assert (effort.requests, effort.most_requests) == (375, 750)
    assert plan.candidates[0].setup is not None
    assert len(plan.candidates[0].setup.trace) == 3000  # bounds are of the whole file
