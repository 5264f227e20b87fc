"""Predictions of recorded experiments beside what was recorded, metric by metric.

The policy of the recorded engine, ``vllm`` or ``sglang``, replays the arrivals, lengths and prefix groups of each
experiment under the recorded limits, and a profile prices the steps. Metrics are those of `sim.results.metrics`; the
distance between two CDFs is Kolmogorov and Smirnov's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from chairlift.backend import memory, specs
from chairlift.backend.calibrated.profile import Profile
from chairlift.backend.calibrated.settings import Given
from chairlift.backend.checked import wrong
from chairlift.backend.cuda_graphs import graph_limit
from chairlift.backend.fitting.recording import LIMIT_COLUMNS, Experiment, Recording, RecordingError
from chairlift.backend.fitting.residuals import pace
from chairlift.backend.fitting.steps import steps_of, without_stalls
from chairlift.policies.base import KvGroups
from chairlift.policies.routers import RoundRobin
from chairlift.policies.sglang import VERSIONS, Sglang
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_versions import nearest
from chairlift.sim.calibration.recorded_host import on_recorded_host
from chairlift.sim.results.metrics import Latencies, inter_token_gaps, per_output_token
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Limits, ReplicaGroup, Setup, Slo, Speculate
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.acceptance import Acceptance
from chairlift.sim.workload.trace import Trace

Floats = npt.NDArray[np.float64]
SERIES = ("ttft", "tpot", "e2el", "itl")
QUANTILES = (("median", 50), ("p90", 90), ("p99", 99))
EXACT = ("steps", "preemptions")  # equal, or not
BANDS = (  # as `allowed` has them, in a line
    "2 % of duration and throughput; 5 % of percentiles of TPOT and E2E; 8 % or 5 ms of those of TTFT;"
    " or the engine's own noise, if that is more"
)
SAME_TIME_S = 0.1  # requests that all arrive within it are a burst


@dataclass(frozen=True)
class Cell:
    """One metric of one experiment."""

    experiment: str
    metric: str
    predicted: float
    recorded: float
    noise: float | None = None  # relative difference of the engine's own repeat

    @property
    def relative_error(self) -> float | None:
        """Predicted over recorded, less one; None where nothing was recorded."""
        return self.predicted / self.recorded - 1 if self.recorded else None

    def json(self) -> dict[str, Any]:
        """A row of ``validate --json``."""
        return {
            "experiment": self.experiment,
            "metric": self.metric,
            "predicted": self.predicted,
            "recorded": self.recorded,
            "relative_error": self.relative_error,
            "noise": self.noise,
        }


@dataclass(frozen=True)
class Observed:
    """The figures of an experiment, recorded or predicted."""

    scalars: dict[str, float]
    series: dict[str, Floats]  # milliseconds; ITL may be missing

    def metrics(self) -> dict[str, float]:
        """Every metric by its name in ``summary.json``."""
        found = dict(self.scalars)
        for name, values in self.series.items():
            if len(values):
                found[f"mean_{name}_ms"] = float(values.mean())
                for label, q in QUANTILES:
                    found[f"{label}_{name}_ms"] = float(np.percentile(values, q))
        return found


def recorded(experiment: Experiment) -> Observed:
    """The figures of what the engine did."""
    table = experiment.requests
    arrival, first, last = (table[c] for c in ("arrival_s", "first_token_s", "last_token_s"))
    outputs = table["output_tokens"]
    series = {
        "ttft": (first - arrival) * 1e3,
        "tpot": per_output_token((last - first) * 1e3, outputs)[outputs > 1],
        "e2el": (last - arrival) * 1e3,
    }
    if experiment.itl_s is not None:
        gaps = experiment.itl_s
        if experiment.steps["proposes"].any():  # tokens that came in one message have no gap between them
            gaps = gaps[gaps > 0]
        series["itl"] = gaps * 1e3
    duration = float(last.max() - arrival.min())
    scalars = rates(duration, len(outputs), int(outputs.sum()))
    scalars["steps"] = len(experiment.steps["done_s"])
    scalars["preemptions"] = int(experiment.steps["preempted"].sum())
    return Observed(scalars, series)


def predict(
    experiment: Experiment, recording: Recording, profile: Profile, leap: bool = True, recorded_host: bool = False
) -> Observed:
    """The figures that the simulator predicts for ``experiment``. Raises `BadInput` or PolicyError, as any run does.

    ``recorded_host``: launched as fast as it was recorded to schedule (`on_recorded_host`).
    """
    setup = setup_of(experiment, recording, profile)
    if recorded_host and profile.host.schedule_chunk_s:  # older profiles do not say what scheduling a chunk takes
        setup = on_recorded_host(setup, experiment, profile.host)
    return observed(simulate(setup, leap))


def observed(outcome: Outcome) -> Observed:
    """The figures of a run."""
    times = Latencies(outcome.requests)
    gaps, weights = inter_token_gaps(outcome.runs)
    series = {**{name: times.of(name) for name in ("ttft", "tpot", "e2el")}, "itl": np.repeat(gaps, weights)}
    scalars = rates(times.span_s, len(times), int(times.outputs.sum()))
    scalars["steps"] = outcome.summary["steps"]
    scalars["preemptions"] = outcome.summary["preemptions"]
    return Observed(scalars, series)


def rates(duration: float, requests: int, tokens: int) -> dict[str, float]:
    """Duration in seconds, and what was done a second."""
    return {
        "duration": duration,
        "request_throughput": requests / duration if duration else 0.0,
        "output_throughput": tokens / duration if duration else 0.0,
    }


def setup_of(experiment: Experiment, recording: Recording, profile: Profile) -> Setup:
    """The run that replays ``experiment``: one replica, under the recorded engine's policy, version and limits."""
    limits = experiment.limits
    try:
        model = specs.model(profile.model)
    except LookupError as error:
        raise RecordingError(f"{recording.folder}: {error.args[0]}") from None
    policy: type[Vllm | Sglang] = Sglang if "sglang" in recording.engine else Vllm
    known = {f.name for f in fields(policy) if f.init}
    settings = {key: value for key, value in limits.items() if key in known}
    hints = get_type_hints(policy, include_extras=True)
    for key, value in settings.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            rule = (
                f"{recording.folder}: the engine of {experiment.name}: {key} {wrong(error).removeprefix('the file ')}"
            )
            raise RecordingError(rule) from None
    if policy is Sglang:
        settings["version"] = nearest(recording.engine["sglang"], VERSIONS)
    elif "vllm" in recording.engine:
        settings["version"] = nearest(recording.engine["vllm"])
    parallel = profile.parallel
    drafts, speculate, speculation = recording.drafts, None, None
    if drafts != profile.drafts:
        asked, own = (f"{each}" if each else "without drafts" for each in (drafts, profile.drafts))
        raise RecordingError(f"{recording.folder}: recorded {asked}, but profile {profile.name} was measured {own}")
    if drafts is not None:
        kept = Acceptance(synthetic=recording.accepted)
        try:
            speculate = Speculate.model_validate({**vars(drafts), "acceptance": kept})
        except ValueError:
            raise RecordingError(f"{recording.folder}: drafts by {drafts.method} are not modelled") from None
        speculation = Vllm(**settings).speculation(drafts.method, drafts.tokens)
    group = ReplicaGroup(
        count=1,
        role="mixed",
        gpu=specs.gpu(profile.gpu),
        parallel=parallel,
        scheduler=policy,
        scheduler_settings=settings,
        backend=Given(profile, graph_limit(limits)),
        blocks=limits["num_gpu_blocks"] - 1,
        block_size=limits["block_size"],
        kv_source=f"recorded num_gpu_blocks {limits['num_gpu_blocks']}, one of them the engine's null block",
        speculation=speculation,
        kv_groups=KvGroups(memory.windows(model, parallel), model.chunked) if model.window_layers else None,
    )
    return Setup(
        variant="",
        case=experiment.name,
        trace=trace_of(experiment),
        model=model,
        max_model_len=model.max_model_len,
        groups=[group],
        router=RoundRobin,
        router_settings={},
        slo=Slo(),
        seed=0,
        limits=Limits(),
        speculate=speculate,
    )


def trace_of(experiment: Experiment) -> Trace:
    """The requests of ``experiment``. Those of a grid arrive when they were taken in: its waves waited."""
    table = experiment.requests
    arrival = table["added_s"] if experiment.is_grid else table["arrival_s"]
    order = np.argsort(arrival, kind="stable")
    columns: dict[str, Any] = {}
    groups = table["prefix_group"]
    if (groups >= 0).any():
        shared = table.get("prefix_tokens")
        if shared is None:
            given = experiment.summary.get("prefix_tokens", experiment.limits.get("prefix_tokens"))
            if not isinstance(given, int):
                rule = "prompts share prefixes, but nothing says prefix_tokens"
                raise RecordingError(f"{experiment.folder}: {experiment.name}: {rule}")
            shared = np.where(groups >= 0, given, 0)
        columns = {"prefix_group": groups[order], "prefix_tokens": np.minimum(shared, table["prompt_tokens"])[order]}
    columns |= {name: table[name][order] for name in LIMIT_COLUMNS if name in table}
    return Trace(
        arrival_ps=np.rint(arrival[order] * PS_PER_S).astype(np.int64),
        prompt_tokens=table["prompt_tokens"][order],
        output_tokens=table["output_tokens"][order],
        source=f"recording, experiment {experiment.name}",
        **columns,
    )


def compare(name: str, predicted: Observed, truth: Observed, again: Observed | None = None) -> list[Cell]:
    """Each metric of the experiment ``name``, and the distance between each pair of distributions.

    ``again`` is the engine's own repeat of the experiment, whose differences from ``truth`` are its noise.
    """
    ours, theirs = predicted.metrics(), truth.metrics()
    repeat = again.metrics() if again is not None else {}
    cells = []
    for metric, value in theirs.items():
        if metric in ours:
            noise = repeat[metric] / value - 1 if metric in repeat and value else None
            cells.append(Cell(name, metric, ours[metric], value, noise))
    for series, values in truth.series.items():
        if len(values) and len(predicted.series.get(series, ())):
            noise = distance(again.series[series], values) if again is not None and series in again.series else None
            cells.append(Cell(name, f"{series}_cdf_distance", distance(predicted.series[series], values), 0.0, noise))
    return cells


def distance(one: Floats, other: Floats) -> float:
    """The largest difference between two empirical CDFs, 0 to 1."""
    one, other = np.sort(one), np.sort(other)
    at = np.concatenate([one, other])
    return float(
        np.abs(np.searchsorted(one, at, "right") / len(one) - np.searchsorted(other, at, "right") / len(other)).max()
    )


def host_pace(experiment: Experiment, profile: Profile) -> float:
    """How many times as long as ``profile`` says the host of ``experiment`` took for its own work (`residuals.pace`).

    1 if the profile does not say what scheduling a chunk takes, as older ones do not.
    """
    return pace(profile.host, steps_of([experiment])) if profile.host.schedule_chunk_s else 1.0


def validate(
    recording: Recording,
    experiments: Sequence[Experiment],
    profile_of: Callable[[Experiment], Profile],
    progress: Callable[[str], None] = lambda _name: None,
    recorded_host: bool = False,
) -> list[Cell]:
    """The cells of ``experiments``, each predicted by the profile that ``profile_of`` gives for it.

    The clock stands still in the engine's stalls (`backend.fitting.steps.stalls`), which no step costs predict. With
    ``recorded_host`` nor is what other work on its machine does to the host predicted: each run's is taken to launch
    as fast as it was recorded to schedule, at any time.
    """
    repeats = {each.repeats: each for each in recording.experiments.values() if each.repeats}
    cells: list[Cell] = []
    for each in experiments:
        progress(each.name)
        again = repeats.get(each.name)
        running = without_stalls(each)
        predicted = predict(running, recording, profile_of(each), recorded_host=recorded_host)
        noise = None if again is None else recorded(without_stalls(again))
        cells += compare(each.name, predicted, recorded(running), noise)
    return cells


def is_burst(experiment: Experiment) -> bool:
    """Whether all requests arrive at once, so that no decision depends on how long steps take."""
    arrival = experiment.requests["arrival_s"]
    return bool(arrival.max() - arrival.min() <= SAME_TIME_S)


def allowed(cell: Cell, burst: bool) -> bool | None:
    """Whether ``cell`` is within the band that the project holds itself to; None if it has no band.

    The bands: 2 % for duration and throughput; 5 % for percentiles of TPOT and E2E; 8 % or 5 ms for percentiles of
    TTFT; or what the engine's own repeat differs by, if that is more. Steps and preemptions of a burst must be equal.
    """
    if cell.metric in EXACT:
        return cell.predicted == cell.recorded if burst else None
    error = cell.relative_error
    what = cell.metric.removesuffix("_ms").partition("_")
    if error is None or what[0] == "mean" or math.isnan(error):
        return None
    noise = abs(cell.noise or 0.0)
    if cell.metric in ("duration", "request_throughput", "output_throughput"):
        return abs(error) <= max(0.02, noise)
    if what[2] in ("tpot", "e2el"):
        return abs(error) <= max(0.05, noise)
    if what[2] == "ttft":
        return abs(error) <= max(0.08, noise) or abs(cell.predicted - cell.recorded) <= 5.0
    return None
