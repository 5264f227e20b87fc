"""What commands do with the results of ``vllm bench serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.calibration import bench, validate
from chairlift.sim.cli.shipped import find_scenario
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.workload.formats import vllm_bench


def compared(scenario: str, file: Path, progress: Callable[[str], None]) -> tuple[list[validate.Cell], bool, list[str]]:
    """The cells of a benchmark's result, predicted by a scenario; whether it is a burst; and notes.

    Raises:
        BadInput: the file cannot be read, or the scenario has several runs or another workload.
    """
    result = vllm_bench.result(file)
    setup = bench.replayed(_setup(scenario), result)
    progress(f"predict {file.name}")
    outcome = simulate(setup)
    notes = list(bench.notes(setup, result))
    if (lost := len(setup.trace) - outcome.summary["completed"]) > 0:
        notes.append(f"{lost:,} requests that the server answered are not completed in the prediction")
    cells = validate.compare(file.name, validate.observed(outcome), bench.recorded(result))
    burst = int(setup.trace.arrival_ps[-1]) <= validate.SAME_TIME_S * 1e12
    return cells, burst, notes


def _setup(scenario: str) -> Setup:
    path = find_scenario(scenario)
    setups = load(path).setups
    if len(setups) > 1:
        raise BadInput(Problem(f"must be one run, not {len(setups)}: leave out compare and cases", file=str(path)))
    return setups[0]
