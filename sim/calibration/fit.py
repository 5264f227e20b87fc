"""From a recording to a profile: fit all of it, and tell how far off it is on runs that a fit has not seen.

Each experiment is left out in turn, a profile is fitted to the others, and its predictions of that experiment are
compared with the recording. A repeat of an experiment is left out together with it, for it would give the answer away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np

from chairlift.backend import specs
from chairlift.backend.automatic import chosen, version
from chairlift.backend.calibrated.profile import DraftTime, Errors, Profile, Sizes, load, shipped
from chairlift.backend.cuda_graphs import GRAPH_TOKENS
from chairlift.backend.fitting import fit as calibrate
from chairlift.backend.fitting import residuals
from chairlift.backend.fitting.recording import Experiment, Recording, RecordingError
from chairlift.backend.fitting.residuals import Foreseen
from chairlift.backend.fitting.steps import steps_of, without_stalls
from chairlift.sim.calibration.validate import Cell, compare, predict, recorded

Progress = Callable[[str], None]
SIGNIFICANT = 6  # digits of a number in a profile


@dataclass
class Held:
    """By experiment: what a profile that was fitted to the other experiments predicts of it, beside the recording."""

    steps: dict[str, Foreseen] = field(default_factory=dict)
    gpu: dict[str, Foreseen] = field(default_factory=dict)
    launches: dict[str, Foreseen] = field(default_factory=dict)
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # why there is no fit without the experiment


def fitted(recording: Recording, experiments: Sequence[Experiment], name: str = "", gpu: str = "") -> Profile:
    """A profile of ``experiments``, without errors (`with_errors`). Raises `CalibrationError` or `RecordingError`."""
    if not experiments:
        raise calibrate.CalibrationError("there is nothing to fit")
    engine = recording.engine
    try:
        gpu = specs.gpu(gpu or str(engine.get("gpu", ""))).name
    except LookupError as error:
        raise RecordingError(f"{recording.folder}: {error.args[0]}; say which by --gpu") from None
    try:
        shape = specs.model(recording.shape)
    except LookupError as error:
        raise RecordingError(f"{recording.folder}: {error.args[0]}") from None
    kinds = ("vllm", "sglang", "chairlift", "engine")
    label = next((f"{key} {engine[key]}" for key in kinds if key in engine), "unknown engine")
    base = None
    if recording.drafts is None:
        share = shape.experts_per_token / max(1, shape.experts)
        fit = calibrate.fit(steps_of(list(experiments)), share, _sizes_before(recording, shape.name, gpu))
    else:
        base = _without_drafts(recording, gpu, label.split()[0])
        fit = calibrate.fit_drafts(steps_of(list(experiments), base.gpu_time.hot_token_s), base.gpu_time)
    release = ".".join(label.split()[-1].split(".")[: 3 if "sglang" in engine else 2])
    return Profile(
        name=name or f"{gpu}-{recording.model}-{label.split()[0]}-{release}",
        model=shape.name,
        gpu=gpu,
        engine=label,
        gpu_time=fit.gpu,
        host=fit.host,
        graph_tokens=max(each.limits.get("graph_tokens", GRAPH_TOKENS) for each in experiments),
        tensor_parallel=recording.parallel.tensor,
        expert_parallel=recording.parallel.expert,
        drafts=recording.drafts,
        piecewise=all(each.limits.get("piecewise_graphs", True) for each in experiments),
        provenance={
            "gpu": engine.get("gpu"),
            "torch": engine.get("torch"),
            "date": datetime.now(UTC).date().isoformat(),
            "experiments": [each.name for each in experiments],
            "rows": fit.rows,
            **({} if base is None else {"without drafts": f"{base.name} ({base.digest})"}),
        },
        notes=fit.notes,
    )


def _without_drafts(recording: Recording, gpu: str, engine: str) -> Profile:
    """The shipped profile of the same model, GPU, parallelism and ``engine``, to which drafts add their time."""
    name = chosen(specs.model(recording.shape), specs.gpu(gpu), recording.parallel, engine=engine)
    found = None if name is None else load(name)
    if found is None or found.gpu != gpu or not found.engine.startswith(engine):
        raise calibrate.CalibrationError(
            f"what drafts add cannot be told: no shipped profile of {recording.shape} by {engine} on {gpu} tells a step"
            " without"
        )
    return found


def _sizes_before(recording: Recording, model: str, gpu: str) -> Sizes:
    """``size_factors`` of the shipped profile of the engine's newest earlier version that ran on the same torch.

    Kernels of matmuls are of a library that comes with torch.
    """
    engine = recording.engine
    torch, own = engine.get("torch"), engine.get("vllm")
    if torch is None or own is None:
        return ()
    earlier = []
    for each in map(load, shipped()):
        number = version(each.engine)[:2]
        same = (each.model, each.gpu, each.parallel, each.drafts) == (model, gpu, recording.parallel, None)
        alike = same and each.engine.startswith("vllm ") and each.provenance.get("torch") == torch
        if alike and number < version(own)[:2]:
            earlier.append((number, each.gpu_time.size_factors))
    return max(earlier)[1] if earlier else ()


def leave_one_out(
    recording: Recording,
    experiments: Sequence[Experiment],
    only: Sequence[Experiment] | None = None,
    progress: Progress = lambda _name: None,
) -> Iterator[tuple[Experiment, Profile | str]]:
    """Each experiment of ``only`` (None: all), with a profile fitted to the others or the reason why there is none."""
    profiles: dict[str, Profile | str] = {}
    for each in experiments if only is None else only:
        base = each.repeats or each.name
        if base not in profiles:
            progress(f"fit without {base}")
            rest = [other for other in experiments if base not in (other.name, other.repeats)]
            try:
                profiles[base] = fitted(recording, rest)
            except calibrate.CalibrationError as error:
                profiles[base] = str(error)
        yield each, profiles[base]


def hold_out(recording: Recording, experiments: Sequence[Experiment], progress: Progress = lambda _name: None) -> Held:
    """How far off each experiment a fit without it is: step by step and, unless it is a grid, end to end.

    The clock stands still in the engine's stalls (`without_stalls`).
    """
    held = Held()
    for each, profile in leave_one_out(recording, experiments, None, progress):
        if isinstance(profile, str):
            held.skipped[each.name] = profile
            continue
        running = without_stalls(each)
        table = steps_of([running], profile.gpu_time.hot_token_s)
        held.steps[each.name] = residuals.foresee(profile.gpu_time, profile.host, table)
        held.gpu[each.name] = residuals.on_gpu(profile.gpu_time, profile.host, table)
        held.launches[each.name] = residuals.launches(profile.gpu_time, profile.host, table)
        if not each.is_grid:
            progress(f"predict {each.name}")
            held.cells[each.name] = compare(each.name, predict(running, recording, profile), recorded(running))
    return held


def with_errors(profile: Profile, held: Held) -> Profile:
    """``profile`` with the errors that `hold_out` found, and its numbers cut to `SIGNIFICANT` digits."""
    foreseen = list(held.steps.values())
    runs: dict[str, dict[str, float]] = {
        name: {c.metric: round(c.relative_error, 4) for c in cells if c.relative_error is not None}
        for name, cells in held.cells.items()
    }
    cut = replace(
        profile,
        gpu_time=replace(profile.gpu_time, **_cut(vars(profile.gpu_time))),
        host=replace(profile.host, **_cut(vars(profile.host))),
    )
    return replace(
        cut,
        errors_of=cut.numbers,
        errors=cast(
            "Errors",
            {"steps": residuals.summary(foreseen), "gpu": residuals.summary(list(held.gpu.values())), "runs": runs}
            if foreseen
            else {},
        ),
        spread=residuals.spreads(foreseen, list(held.gpu.values()), list(held.launches.values())),
    )


def _cut(numbers: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, DraftTime):
            return DraftTime(**_cut(vars(value)))
        if value is None:
            return None
        return value if isinstance(value, int) else float(np.format_float_scientific(value, SIGNIFICANT - 1))

    return {
        key: tuple((int(at), short(factor)) for at, factor in value) if isinstance(value, tuple) else short(value)
        for key, value in numbers.items()
    }
