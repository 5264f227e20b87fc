"""Bounds hold for any policy, by the limits that it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chairlift.backend.base import Batch
from chairlift.sim.plan.bounds import SLACK, Wanted, bound, served
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local
from chairlift.sim.units import PS_PER_S

OWN = """\
from dataclasses import dataclass

from chairlift.policies.base import Scheduler, Step


@dataclass
class Mine(Scheduler):
    \"\"\"First come, first served, so many at a time.\"\"\"

    at_once: int | None = None
    tokens: int | None = None

    @property
    def sequence_limit(self) -> int | None:
        return self.at_once

    @property
    def token_limit(self) -> int | None:
        return self.tokens

    def schedule(self, step: Step) -> int:
        step.decode_all()
        while step.waiting and len(step.running) < (self.at_once or 10**9):
            request = step.waiting[0]
            if not step.admit(request, request.remaining, request.prompt_tokens + request.max_tokens):
                break
        return 1
"""

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: {name: roofline, host: none}
  max_model_len: 4096
  policy: {name: mine.py:Mine}
  workload:
    arrivals: {poisson: {rate_per_s: 1}}
    prompt_tokens: {constant: {tokens: 20}}
    output_tokens: {constant: {tokens: 101}}
    max_tokens: 200
slo: [{percentile: 95, e2el_ms: 100000}]
axes:
"""


def candidates(folder: Path, axes: str) -> list[Candidate]:
    (folder / "mine.py").write_text(OWN)
    (folder / "plan.yaml").write_text(PLAN + axes)
    return read_plan(folder / "plan.yaml", trust=True).candidates


def most_per_s(candidate: Candidate) -> float:
    return bound(candidate, []).rate_per_s


def test_a_users_own_limit_is_the_decode_batch_of_the_bound(tmp_path: Path) -> None:
    """A decode is memory-bound, so the cheapest batch is the largest: eight requests' tokens for one step's price."""
    [eight] = candidates(tmp_path, "  policy.at_once: [8]\n")
    assert eight.setup is not None
    [group] = eight.setup.groups
    step = group.make_backend(eight.setup.model).step(Batch((), 8, 8 * (20 + 50) + 4)).first  # a mean context of 70.5
    by_hand = 8 / (100 * SLACK * step / PS_PER_S)

    assert 0.99 * by_hand < most_per_s(eight) <= by_hand  # the prompts' 20 tokens take what little is missing


def test_the_best_mix_of_steps_by_hand() -> None:
    """1000 prompt tokens and 10 decodes by steps of 500 tokens and a decode (30 ms) or of a decode alone (10 ms)."""
    steps = np.array([[500, 1, 0, 0.030], [0, 1, 0, 0.010]])

    assert served([steps], [1.0], Wanted(1000, 10, 0)) == pytest.approx(1 / (2 * 0.030 + 8 * 0.010))
    # a replica of each kind makes 33 1/3 and 100 decodes a second, ten a request
    assert served([steps[:1], steps[1:]], [1.0, 1.0], Wanted(1000, 10, 0)) == pytest.approx(13 + 1 / 3)
    assert served([steps], [1.0], Wanted(0, 10, 0)) == pytest.approx(10.0)
    # twelve decodes a request in long steps alone would see 30 ms each: half short ones make that 20 ms on average
    assert served([steps], [1.0], Wanted(6000, 12, 0)) == pytest.approx(1 / (12 * 0.030))
    assert served([steps], [1.0], Wanted(6000, 12, 0, 0.020)) == pytest.approx(1 / (12 * 0.030 + 12 * 0.010))


def test_each_decode_takes_one_of_a_steps_tokens(tmp_path: Path) -> None:
    """Steps of at most 8 tokens: a request's 20 prompt tokens and 100 decodes need 15, its decodes alone 12.5."""
    by_tokens, by_requests, free = candidates(
        tmp_path, "  policy: [{name: 'mine.py:Mine', tokens: 8}, {name: 'mine.py:Mine', at_once: 8}, 'mine.py:Mine']\n"
    )

    assert most_per_s(by_tokens) == pytest.approx(most_per_s(by_requests) * 12.5 / 15, rel=0.01)
    assert most_per_s(free) > 10 * most_per_s(by_requests)


@pytest.mark.parametrize("at_once", [4, 64])
def test_a_users_own_policy_serves_no_more_than_its_bound(tmp_path: Path, at_once: int) -> None:
    [candidate] = candidates(tmp_path, f"  policy.at_once: [{at_once}]\n")
    limit = most_per_s(candidate)
    with Journal(tmp_path) as journal:
        [sample] = Simulations(journal, Local(1), ()).of(candidate)(3 * limit, 400, 1)

    assert 0.5 * limit < 400 / sample.simulated_s <= limit
