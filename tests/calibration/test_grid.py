"""The designed grid: that its runs show what they are made to show."""

from __future__ import annotations

import numpy as np
import pytest

from chairlift.backend import specs
from chairlift.backend.calibrated.profile import load
from chairlift.backend.calibrated.settings import Given
from chairlift.backend.cuda_graphs import graph_sizes
from chairlift.backend.parallel import ONE
from chairlift.policies.routers import RoundRobin
from chairlift.policies.vllm import Vllm
from chairlift.sim.calibration.grid import BESIDE, REPEATS, grid
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Limits, ReplicaGroup, Setup, Slo


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-8b-fp8", "qwen3-30b-a3b", "opt-13b"])
def test_a_chunk_meets_decodes_in_a_step_of_every_size(name: str) -> None:
    """However fast the engine is: each prompt comes while those before it are computed."""
    profile = load(f"h200-{name}-chairlift-0.1")
    model, blocks = specs.model(name), 8000
    [(trace, budget)] = [(trace, budget) for run, trace, budget in grid(model, blocks * 16) if run == "grid_sizes"]
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": 256}
    backend = Given(profile, profile.graph_tokens)
    group = ReplicaGroup(1, "mixed", specs.gpu("h200"), ONE, Vllm, settings, backend, blocks, 16, "made up")
    setup = Setup("", "sizes", trace, model, model.max_model_len, [group], RoundRobin, {}, Slo(), 0, Limits())

    steps = simulate(setup).runs[0].runs()

    met = (steps["chunks"] == 1) & (steps["decodes"] == BESIDE)
    rows = (steps["prefill_tokens"] + steps["decodes"])[met]
    sizes = np.array([size for size in graph_sizes(min(4096, model.max_model_len)) if size > 3 * BESIDE])
    found = np.bincount(np.searchsorted(sizes, rows), minlength=len(sizes) + 1)
    assert (found[1:-1] == REPEATS).all(), found
