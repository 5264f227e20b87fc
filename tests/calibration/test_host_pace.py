"""What predictions of recorded runs miss is their host, which is fast or slow for a second or so at a time.

vLLM 0.26 launches a step that has chunks and more than 512 tokens kernel by kernel. Over `conv_poisson_q16` of EAGLE3
that took between 18 and 48 ms while the GPU stood idle; a profile has one launch time. What tells how fast a host was
is how long it took to schedule, in which no GPU and no launch has a part. With launches as fast as a run was recorded
to schedule within half a second, and nothing else changed, its cells are in band. It is no prediction: nothing tells a
slow spell beforehand.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import load
from chairlift.backend.fitting.recording import Experiment, Recording, read
from chairlift.backend.fitting.residuals import paces
from chairlift.backend.fitting.steps import EAGER, launch_times, predicted, steps_of
from chairlift.policies.vllm import Vllm
from chairlift.sim.calibration import fit as fitting
from chairlift.sim.calibration import validate
from chairlift.sim.calibration.recorded_host import AtPace, Paced, on_recorded_host
from chairlift.sim.simulate import simulate
from kit.places import TRUTH
from kit.synthetic import Planted, record, write

recorded = pytest.mark.skipif(not TRUTH.is_dir(), reason="the recordings of shared/truth are not here")
PROFILE = load("h200-llama-3.1-8b-vllm-0.26")


def one(model: str, name: str) -> tuple[Recording, Experiment]:
    """A run of vLLM 0.26 and the recording that it is of."""
    recording = read(TRUTH / "h200-vllm-0.26", model)
    return recording, recording.experiments[name]


@recorded
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama-3.1-8b-eagle3", "conv_poisson_q16"),
        ("llama-3.1-8b-fp8", "seed_burst"),
        ("qwen3-30b-a3b", "seed_burst"),
    ],
)
def test_a_run_that_misses_is_in_band_where_its_hosts_pace_is_known(model: str, name: str) -> None:
    recording, run = one(model, name)
    [(_, profile)] = fitting.leave_one_out(recording, list(recording.experiments.values()), [run])
    assert not isinstance(profile, str)

    def misses(recorded_host: bool) -> set[str]:
        cells = validate.validate(recording, [run], lambda _run: profile, recorded_host=recorded_host)
        return {c.metric for c in cells if validate.allowed(c, validate.is_burst(run)) is False}

    assert misses(recorded_host=False)
    assert not misses(recorded_host=True)


@recorded
@pytest.mark.parametrize("model", ["llama-3.1-8b-fp8", "qwen3-30b-a3b", "llama-3.1-8b-eagle3"])
def test_a_host_that_is_slow_to_schedule_a_step_is_slow_to_launch_it(model: str) -> None:
    """In every run. Launches are those that outlast the GPU's work, kernel by kernel; they differ by half and more."""
    profile = load(f"h200-{model}-vllm-0.26")
    recording = read(TRUTH / "h200-vllm-0.26", model)
    typical = np.array([[profile.host.graph_s, profile.host.piecewise_s, profile.host.eager_s]])
    for run in recording.experiments.values():
        if run.is_grid:
            continue
        steps = steps_of([validate.without_stalls(run)], profile.gpu_time.hot_token_s)
        rows, seconds = launch_times(steps, predicted(profile.gpu_time, steps), typical, profile.host.head_s)
        when, took = paces(profile.host, steps)
        eager = (steps.kind[rows] == EAGER) & np.isin(steps.schedule[rows], when)
        rows, seconds = rows[eager], seconds[eager]

        assert len(rows) > 80
        assert np.quantile(seconds, 0.95) > 1.5 * np.quantile(seconds, 0.05)
        assert spearmanr(took[np.searchsorted(when, steps.schedule[rows])], seconds).statistic > 0.5


def test_steps_with_chunks_are_launched_at_the_pace_and_all_else_stays() -> None:
    own, paced = Calibrated(PROFILE), Paced(Calibrated(PROFILE), lambda: 1.5)
    prompt, decodes = Batch((Chunk(0, 2048),), 8, 8000), Batch((), 8, 8000)

    for _ in range(3):  # on a GPU that gets warm
        usual, found = own.step(prompt), paced.step(prompt)
        assert found.host.launch == pytest.approx(1.5 * usual.host.launch, abs=1)
        assert found._replace(host=usual.host) == usual
        assert paced.step(decodes) == own.step(decodes)
        for each in (own, paced):
            each.ran(2056, usual.first, 0, 1)
    assert paced.remembers
    assert own.step(prompt).first > Calibrated(PROFILE).step(prompt).first


def test_a_run_is_launched_as_fast_as_it_was_scheduled_at_the_time(tmp_path: Path) -> None:
    """A made-up host that takes twice as long to schedule from the middle of the run on."""
    recording = read(write(tmp_path, [record(Planted())]), "llama-3.1-8b")
    [run] = recording.select(None)
    schedule = run.steps["schedule_s"]
    slow = np.where(schedule > schedule.mean(), 2.0, 1.0)
    late = np.array([0.0, 0.0, 0.9 * schedule.max()])
    run = replace(
        run,
        steps={**run.steps, "schedule_cpu_s": slow * run.steps["schedule_cpu_s"]},
        requests={**run.requests, "arrival_s": late, "added_s": late},
    )
    setup = on_recorded_host(validate.setup_of(run, recording, PROFILE), run, PROFILE.host)
    [group] = setup.groups
    assert isinstance(group.backend, AtPace)
    assert issubclass(group.scheduler, Vllm)
    begins = group.backend.pace()
    simulate(setup)

    assert group.backend.pace() == pytest.approx(2 * begins, rel=0.1)  # as the last plan had it
