"""Loads recorded on H200s lie on the side of a simulated knee on which they were recorded.

A recorded load lies below the knee of a promise that it kept, and above the knee of one that it broke. Limits just
above and just below a recorded figure tell most: the first was kept, the second broken. Where the figure is one that
the simulated load may have, no knee contradicts either. So each of a load's figures must lie in the interval that
simulated replications of the load predict for it: as many requests as were recorded, drawn from the recorded ones,
Poisson arrivals at the load's rate, and step costs off by a draw of their errors, as in the wider interval of a plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from chairlift.backend.fitting.recording import Recording, read
from chairlift.sim.calibration.validate import Observed, observed, recorded, trace_of
from chairlift.sim.plan.errors import drawn
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_S
from kit.places import TRUTH

REPLICATIONS = 20
LEVEL = 0.99  # of a prediction interval; with 28 figures 95 % would leave one or two outside
needs_truth = pytest.mark.skipif(not TRUTH.is_dir(), reason="the recordings of shared/truth are not here")


@dataclass(frozen=True)
class Load:
    """A run recorded at a Poisson load of Azure's chat."""

    version: float  # of vLLM
    model: str
    rate_per_s: float
    gpus: int = 1

    def __str__(self) -> str:
        return f"{self.model} {self.rate_per_s:g}/s vLLM {self.version}"

    @property
    def name(self) -> str:
        return self.model + (f"-tp{self.gpus}" if self.gpus > 1 else "")

    def recording(self) -> Recording:
        return read(TRUTH / f"h200-vllm-{self.version}", self.name)

    def setup(self) -> Setup:
        """The deployment that served it, as a plan simulates it."""
        keys = {
            "model": self.model,
            "gpu": "h200",
            "tensor_parallel": self.gpus,
            "max_model_len": 16384,
            "backend": f"h200-{self.name}-vllm-{self.version}",
            "policy": {"name": "vllm", "version": self.version, "max_num_batched_tokens": 8192, "max_num_seqs": 256},
            "workload": {"requests": 1, "arrivals": {"burst": {}}, "prompt_tokens": 1, "output_tokens": 1},
        }
        return prepare(Document(keys, {}, "s.yaml"), Path())


LOADS = [
    Load(0.23, "llama-3.1-8b", 6),
    Load(0.23, "llama-3.1-8b", 20),
    Load(0.26, "llama-3.1-8b", 16),
    Load(0.26, "llama-3.1-8b-fp8", 24),
    Load(0.26, "llama-3.1-70b-fp8", 4.5, 2),
    Load(0.26, "qwen3-30b-a3b", 16),
    Load(0.26, "gpt-oss-120b", 16),
]


def figures(found: Observed) -> dict[str, float]:
    return {f"p{q} {name}": float(np.percentile(found.series[name], q)) for name in ("ttft", "tpot") for q in (90, 99)}


@needs_truth
@pytest.mark.parametrize("load", LOADS, ids=str)
def test_recorded_figures_are_among_those_that_a_plan_expects(load: Load) -> None:
    [run] = load.recording().select([f"conv_poisson_q{load.rate_per_s:g}"])
    requests = trace_of(run)
    setup = load.setup()
    expected = []
    for draw in range(REPLICATIONS):
        chance = np.random.default_rng(draw)
        row = chance.integers(0, len(requests), len(requests))
        arrival_s = np.cumsum(chance.exponential(1 / load.rate_per_s, len(requests)))
        trace = replace(
            requests,
            arrival_ps=np.rint(arrival_s * PS_PER_S).astype(np.int64),
            prompt_tokens=requests.prompt_tokens[row],
            output_tokens=requests.output_tokens[row],
        )
        expected.append(figures(observed(simulate(drawn(replace(setup, trace=trace), draw)))))

    # Student's prediction interval of one more observation, of logarithms
    reach = float(stats.t.ppf((1 + LEVEL) / 2, REPLICATIONS - 1)) * math.sqrt(1 + 1 / REPLICATIONS)
    for name, value in figures(recorded(run)).items():
        logs = [math.log(each[name]) for each in expected]
        assert abs(math.log(value) - np.mean(logs)) <= reach * np.std(logs, ddof=1), (name, value)
