"""What commands do with the results of ``vllm bench serve``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chairlift.backend.calibrated.profile import load as load_profile
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.calibration import bench, from_bench, validate
from chairlift.sim.cli.shipped import find_scenario
from chairlift.sim.scenario.load import load, study_of
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.scenario.yaml_document import read as read_document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_S
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
    burst = int(setup.trace.arrival_ps[-1]) <= validate.SAME_TIME_S * PS_PER_S
    return cells, burst, notes


def _setup(scenario: str) -> Setup:
    path = find_scenario(scenario)
    setups = load(path).setups
    if len(setups) > 1:
        raise BadInput(Problem(f"must be one run, not {len(setups)}: leave out compare and cases", file=str(path)))
    return setups[0]


def fitted(
    files: Sequence[Path],
    deployment: str | tuple[str, str],
    start: str | None,
    hold_out: bool,
    progress: Callable[[str], None],
) -> from_bench.Fitted:
    """A profile of the results ``files``, all measured on one deployment.

    Args:
        files: results of ``vllm bench serve``.
        deployment: a scenario, whose workload and backend are not looked at; or a model and a GPU, which vLLM then
            served with its own defaults.
        start: the profile to start from; None: the nearest.
        hold_out: whether each of several is predicted by a fit to the others.
        progress: is told what is done.

    Raises:
        BadInput: a file cannot be read, is another's copy or of another model, or the deployment is not one replica of
            one kind.
    """
    runs: list[from_bench.Run] = []
    for file in files:
        result = vllm_bench.result(file)
        _one_more(runs, result)
        setup = _deployed(deployment, file)
        runs.append(from_bench.Run(result, bench.replayed(setup, result)))
    group = runs[0].setup.groups[0]
    if start is None:
        version = str(getattr(group.make_scheduler(), "version", ""))
        near = from_bench.nearest(runs[0].setup.model, group.gpu, group.parallel.tensor, version)
    else:
        near = load_profile(start)
    return from_bench.fit(runs, near, group.gpu, progress, hold_out)


def _one_more(runs: Sequence[from_bench.Run], result: vllm_bench.Result) -> None:
    """Refuse ``result`` beside ``runs``, if no one server can have given all of them."""
    for other in (run.result for run in runs):
        if other.path.resolve() == result.path.resolve():
            raise BadInput(Problem("is given twice", file=str(result.path)))
        told = other.model_id, result.model_id
        if None not in told and told[0] != told[1]:
            rule = f"must be of one model with {other.path}, whose server calls it {other.model_id!r}"
            raise BadInput(Problem(rule, str(result.path), None, "model_id", result.model_id))


def _deployed(deployment: str | tuple[str, str], file: Path) -> Setup:
    """The run of a result's requests on a deployment."""
    if isinstance(deployment, str):
        path = find_scenario(deployment)
        document = read_document(path)
        for key in ("workload", "backend"):
            document.data.pop(key, None)
    else:
        path = Path("calibrate --bench")
        document = Document({"model": deployment[0], "gpu": deployment[1], "policy": "vllm"}, {}, str(path))
    document.data["workload"] = {"file": str(file.resolve())}
    setups = study_of(document, path).setups
    if len(setups) > 1:
        raise BadInput(Problem(f"must be one run, not {len(setups)}: leave out compare and cases", file=str(path)))
    [setup] = setups
    if len(setup.groups) > 1 or setup.groups[0].count > 1 or not setup.groups[0].parallel.only_tensor:
        raise BadInput(Problem("must be one replica, of GPUs in tensor parallelism alone", file=str(path)))
    return setup
