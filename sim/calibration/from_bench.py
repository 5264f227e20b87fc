"""A profile from results of ``vllm bench serve``: the nearest profile, changed until the simulator gives what was seen.

A result says nothing of steps, only how long requests waited, so steps cannot be fitted one by one. Instead all results
are replayed by the simulator, and a dozen factors on parts of a profile (`PARTS`) are fitted by least squares on the
logarithms of what was measured over what is predicted: durations, percentiles of latencies, and TTFT by prompt length.
Each factor is drawn to 1, the nearest profile, by as much as profiles were measured to differ (`bench_parts`); a factor
that the results do not tell stays there, and its interval says so.

Each result has two further factors. One is the pace of its host: other work on the machine makes everything that the
host does slower for seconds or minutes at a time. Most paces are near 1 and a few are far off, so one slow result among
several is taken for that and does not change what the others tell. For example: at the same rate TTFTs of one result
are twice those of another. No factor of all results explains that, and without paces the slower one would lengthen GPU
times in all. The other is the speed of its GPU, for an engine's repeats differ by 1 or 2 % in all GPU times. The
profile is that of the usual host, at pace 1, and of the usual GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.backend import specs
from chairlift.backend.calibrated import profile as profiles
from chairlift.backend.calibrated.carry import carried
from chairlift.backend.calibrated.profile import Profile
from chairlift.backend.calibrated.settings import Given
from chairlift.backend.parts import TILES
from chairlift.backend.shapes import GPU, Model
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.calibration import bench
from chairlift.sim.calibration.bench_parts import CLIENT, GPU_TIME, HOST, PARTS, changed, is_plain_vllm, precision
from chairlift.sim.calibration.validate import Cell, Observed, compare, observed
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.workload.formats.vllm_bench import Result

Floats = npt.NDArray[np.float64]

# The logarithm of the pace of a run's host: Student's t of two degrees of freedom, with one scale for slower hosts and
# one for faster, fitted to the paces of 58 recorded experiments (`validate.host_pace`). Most are within a tenth of the
# usual one, and a few take half as long again.
SLOWER, FASTER = 0.077, 0.044
FREEDOM = 2
RARE = 2.92  # scales within which that distribution has 9 in 10 paces
UNEVEN = 0.3  # of it, by how much the parts of a host differ in it: launches took 1.6 times as long, and scheduling 1.4
PACES = np.linspace(-0.8, 0.8, 9)  # at which a fit may begin, logarithms
SPEED = 0.015  # by how much GPU times of one run differ from another's, in logarithms
STEP = 0.2  # of a factor's logarithm at most, for derivatives: small ones drown in decisions that happen to differ
ROUNDS = 8
ROUNDS_AGAIN = 3  # of a fit without one result, from where all of them led
CLOSE = 0.003  # a round that changes no factor by more is the last
QUANTILES = {
    "ttft": (10, 25, 50, 75, 90, 99),
    "tpot": (10, 50, 90, 99),
    "e2el": (50, 90, 99),
    "itl": (50, 75, 90, 95, 99),
}
# Of figures, relative, and of their medians by prompt length: what is left between an engine's repeats, and between
# recorded runs and their own profile. Percentiles of one metric go together, so each is taken to be off by √2 as much.
NOISE = {"ttft": 0.07, "tpot": 0.03, "e2el": 0.03, "itl": 0.15}
GROUP_NOISE = 0.1
DURATION_NOISE = 0.01
GROUPS = 6  # of prompts by length
UNTOLD = 0.7  # an interval that is so much as wide as what was taken for granted tells nothing
Z90 = 1.645  # standard deviations of an interval that holds 9 in 10


class Told(NamedTuple):
    """A factor, and the interval that holds it in 9 of 10 cases. Of the client's own time: seconds."""

    part: str
    factor: float
    low: float
    high: float
    told: bool  # whether the results narrow it


@dataclass(frozen=True)
class Fitted:
    """What was fitted, and how far off it is."""

    profile: Profile
    parts: list[Told]
    cells: dict[str, list[Cell]]  # by result; those of several predicted by a fit without it, where that was asked for


@dataclass(frozen=True)
class Run:
    """A result, and the deployment that it was measured on."""

    result: Result
    setup: Setup  # with the result's requests

    def outcome(self, profile: Profile) -> Outcome:
        """What the simulator gives with the steps of ``profile``."""
        groups = [
            replace(group, backend=Given(profile, getattr(group.backend, "graph_tokens", None)))
            for group in self.setup.groups
        ]
        return simulate(replace(self.setup, groups=groups))

    def predicted(self, profile: Profile) -> Observed:
        """The figures of `outcome`. Raises `BadInput` if the deployment does not answer what the server did."""
        outcome = self.outcome(profile)
        trace, group = self.setup.trace, self.setup.groups[0]
        if lost := len(trace) - int(outcome.summary["completed"]):
            tokens = int((trace.prompt_tokens.astype(np.int64) + trace.output_tokens).max())
            rule = (
                f"the deployment does not answer {lost:,} of its {len(trace):,} requests: the longest has {tokens:,}"
                f" tokens, max_model_len is {self.setup.max_model_len or 0:,}, and the KV pool has room for"
                f" {group.blocks * group.block_size:,}"
            )
            raise BadInput(Problem(rule, str(self.result.path)))
        return observed(outcome)


def nearest(model: Model, gpu: GPU, tensor: int, version: str) -> Profile:
    """The shipped profile of vLLM that is nearest, for the first of these that tells two apart.

    It is of the model; of one with experts too, or without too, and not with experts in tiles (MXFP4) for others, which
    take twice what their kernels measured alone do; of the GPU; of weights as wide; of vLLM's ``version``; of a model
    of which a token reads about as many bytes; of the latest version. Profiles of engines that speculate are left out.

    Raises `profiles.ProfileError` if none is of as many GPUs.
    """
    known = [profiles.load(name) for name in profiles.shipped()]
    found = [each for each in known if each.tensor_parallel == tensor and is_plain_vllm(each)]
    if not found:
        raise profiles.ProfileError(f"no shipped profile is of {tensor} GPUs")

    def order(each: Profile) -> tuple[object, ...]:
        own = specs.model(each.model)
        return (
            each.model == model.name,
            _experts(own) == _experts(model),
            each.gpu == gpu.name,
            round(_width(own)) == round(_width(model)),
            each.engine.startswith(f"vllm {version}."),
            -abs(math.log(_read(own) / _read(model))),
            each.engine,
        )

    return max(found, key=order)


def _experts(model: Model) -> str:
    """What tells models with experts apart: none, plain ones, or the format of those whose kernel computes tiles."""
    if not model.experts:
        return ""
    return model.quantization if model.quantization in TILES else "plain"


def _width(model: Model) -> float:
    """Bytes of a weight on average."""
    return model.weight_bytes / model.parameters


def _read(model: Model) -> float:
    """Bytes of weights that a token reads, if those it reads are as wide as the others."""
    return model.active_parameters * _width(model)


def _figures(seen: Observed, prompts: npt.NDArray[Any], client_s: float = 0.0) -> tuple[Floats, Floats]:
    """Logarithms of the figures of a run, and by how much an engine's own repeats differ in each."""
    values, noises = [seen.scalars["duration"]], [DURATION_NOISE]
    for name, quantiles in QUANTILES.items():
        series = seen.series[name] + (1e3 * client_s if name in ("ttft", "e2el") else 0.0)
        if len(series):
            values += np.percentile(series, quantiles).tolist()
            noises += [NOISE[name]] * len(quantiles)
    edges = np.unique(np.quantile(prompts, np.linspace(0, 1, GROUPS + 1)))
    group = np.clip(np.searchsorted(edges, prompts, "right") - 1, 0, max(0, len(edges) - 2))
    ttft = seen.series["ttft"] + 1e3 * client_s
    for each in np.unique(group):
        values.append(float(np.median(ttft[group == each])))
        noises.append(GROUP_NOISE)
    return np.log(np.maximum(values, 1e-3)), np.array(noises)


class _Problem:
    """The least squares of some runs, from a profile to start from.

    A point ``at`` has the logarithms of the factors, the client's own seconds, the logarithm of each run's pace of the
    host, and that of each run's GPU times over what the factors say. Its shape: ``(len(PARTS) + 2 · runs,)``.
    """

    def __init__(self, runs: Sequence[Run], start: Profile, before: Floats, progress: Callable[[str], None]) -> None:
        self._runs, self._progress = runs, progress
        # What does not price is left out: each run's assumptions quote a hash of all that a profile says.
        self._start = replace(start, provenance={}, errors={}, spread={}, notes=())
        self._size = len(PARTS) + 2 * len(runs)
        self._before = before
        widths = np.sqrt(np.diag(np.linalg.inv(before)))
        self._steps = np.minimum(np.concatenate([widths, np.full(len(runs), 0.1)]), STEP)
        measured = [_figures(bench.recorded(run.result), run.result.trace.prompt_tokens) for run in runs]
        self._logs = [logs for logs, _ in measured]
        self._noises = [noise for _, noise in measured]
        self._noise = list(self._noises)

    @property
    def _paces(self) -> slice:
        return slice(len(PARTS), len(PARTS) + len(self._runs))

    @property
    def _speeds(self) -> slice:
        return slice(len(PARTS) + len(self._runs), self._size)

    def _off(self, at: Floats, i: int) -> Floats:
        run, pace = self._runs[i], math.exp(at[self._paces][i])
        factors = at[: len(PARTS)].copy()
        factors[GPU_TIME] += at[self._speeds][i]
        profile = changed(self._start, factors)
        profile = replace(profile, host=profile.host.at(pace))
        found = _figures(run.predicted(profile), run.setup.trace.prompt_tokens, float(at[CLIENT]))[0]
        off: Floats = (found - self._logs[i]) / self._noise[i]
        return off

    def off(self, at: Floats) -> Floats:
        """Predicted over measured, in noises, at the point ``at``."""
        return np.concatenate([self._off(at, i) for i in range(len(self._runs))])

    def _slopes(self, at: Floats, here: Floats) -> Floats:
        """The derivatives of `off`. Shape: ``(figures, size of a point)``."""
        found = np.zeros((len(here), self._size))
        ends = np.cumsum([0, *map(len, self._logs)])
        for part, step in enumerate(self._steps.tolist()):
            moved = at.copy()
            moved[part] += step
            if part < len(PARTS):
                found[:, part] = (self.off(moved) - here) / step
            else:  # a pace moves its own run alone
                i = part - len(PARTS)
                own = slice(ends[i], ends[i + 1])
                found[own, part] = (self._off(moved, i) - here[own]) / step
        for i, part in enumerate(range(self._size)[self._speeds]):  # as all parts of GPU times together
            own = slice(ends[i], ends[i + 1])
            found[own, part] = found[own, GPU_TIME].sum(axis=1)
        return found

    def _pull(self, at: Floats) -> Floats:
        """The curvature of `_drawn`: how a point is drawn to the profile as it is, paces of 1 and speeds alike."""
        found = np.zeros((self._size, self._size))
        found[: len(PARTS), : len(PARTS)] = self._before
        paces = at[self._paces]
        found[self._paces, self._paces] = np.diag((FREEDOM + 1) / (FREEDOM * _scale(paces) ** 2 + paces**2))
        found[self._speeds, self._speeds] = np.eye(len(self._runs)) * SPEED**-2
        return found

    def _drawn(self, at: Floats) -> float:
        """Twice the logarithm of how much likelier the start is beforehand than the point ``at``."""
        factors = at[: len(PARTS)]
        paces = at[self._paces]
        paces = np.log1p((paces / _scale(paces)) ** 2 / FREEDOM).sum() * (FREEDOM + 1)
        return float(factors @ self._before @ factors + paces + (at[self._speeds] ** 2).sum() / SPEED**2)

    def _cost(self, off: Floats, at: Floats) -> float:
        return _loss(off) + self._drawn(at)

    def solved(self, start: Floats, rounds: int) -> tuple[Floats, Floats]:
        """The best point from ``start`` on, and its standard deviations. Shapes: of a point."""
        at, here = start, self.off(start)
        damping = 0.1
        slopes = self._slopes(at, here)
        for turn in range(rounds):
            self._progress(f"fit, round {turn + 1}: {self._cost(here, at):,.0f}")
            weight, pull = _weights(here), self._pull(at)
            inner = slopes.T @ (slopes * weight[:, None]) + pull
            downhill = -(slopes.T @ (weight * here) + pull @ at)
            for _ in range(4):
                there = at.copy()
                there += np.linalg.solve(inner + damping * np.diag(np.diag(inner)), downhill)
                there[CLIENT] = max(0.0, there[CLIENT])
                off = self.off(there)
                if self._cost(off, there) < self._cost(here, at):
                    damping /= 5
                    break
                damping *= 5
            else:
                break
            moved = np.abs(there - at).max()
            at, here = there, off
            if moved < CLOSE or turn == rounds - 1:
                break
            slopes = self._slopes(at, here)
        weight = _weights(here)
        inner = slopes.T @ (slopes * weight[:, None])
        worse = max(1.0, float((weight * here**2).sum() / max(1, len(here) - len(PARTS))))
        return at, np.sqrt(np.diag(np.linalg.inv(inner / worse + self._pull(at))))

    def best(self) -> tuple[Floats, Floats]:
        """As `solved`, from the profile as it is and the pace at which it is the least wrong about each run.

        A fit that begins at paces of 1 explains a slow host by GPU times, and does not find back.
        """
        first = np.zeros(self._size)
        for i in range(len(self._runs)):
            tried = []
            for pace in PACES:
                first[self._paces][i] = pace
                tried.append(_loss(self._off(first, i)))
            first[self._paces][i] = PACES[int(np.argmin(tried))]
        apart, _ = self.solved(self._usual(first), ROUNDS)
        return self.again(self._usual(apart), ROUNDS)

    def again(self, start: Floats, rounds: int) -> tuple[Floats, Floats]:
        """As `solved`, from a point with paces that are nearly right."""
        self._blur(start)
        return self.solved(self._relaxed(start), rounds)

    def _relaxed(self, at: Floats) -> Floats:
        """``at``, but each factor back at what the others say of it beforehand, where the runs do not mind.

        Figures jump where decisions change, so that a part that hardly matters may be stuck where the pace had put it.
        """
        cost = self._cost(self.off(at), at)
        for part in range(CLIENT):
            other = at.copy()
            rest = np.delete(np.arange(len(PARTS)), part)
            other[part] = -float(self._before[part, rest] @ at[rest]) / self._before[part, part]
            found = self._cost(self.off(other), other)
            if found < cost:
                at, cost = other, found
        return at

    def _usual(self, at: Floats) -> Floats:
        """Where hosts take as long as at ``at``, but another of their paces is the usual one.

        No run tells a host from its pace. It is what is likeliest beforehand: the pace of most runs, or the profile's.
        """
        found = []
        for pace in np.linspace(-1, 1, 401):
            other = at.copy()
            other[HOST] += pace
            other[self._paces] -= pace
            found.append(other)
        return min(found, key=self._drawn)

    def _blur(self, at: Floats) -> None:
        """Trust runs of other than the usual pace less: a host that slows does not do so alike in all that it does."""
        for i, pace in enumerate(at[self._paces].tolist()):
            noise = self._noises[i]
            self._noise[i] = np.where(noise == DURATION_NOISE, noise, np.hypot(noise, UNEVEN * pace))


def _scale(paces: Floats) -> Floats:
    """That of the distribution of ``paces``, logarithms."""
    found: Floats = np.where(paces > 0, SLOWER, FASTER)
    return found


def _loss(off: Floats) -> float:
    """Soft L1: a figure that is far off counts less than its square."""
    return float((18 * (np.sqrt(1 + (off / 3) ** 2) - 1)).sum())


def _weights(off: Floats) -> Floats:
    """Of each figure in the curvature of `_loss`."""
    found: Floats = 1 / np.sqrt(1 + (off / 3) ** 2)
    return found


def fit(
    runs: Sequence[Run],
    start: Profile,
    gpu: GPU,
    progress: Callable[[str], None] = lambda _: None,
    hold_out: bool = True,
) -> Fitted:
    """The profile of ``runs``, all of one model on ``gpu``, fitted from ``start``.

    With ``hold_out`` each of several runs is then predicted by a fit to the others, which shows how far off the profile
    is on runs that it has not seen.
    """
    model = runs[0].setup.model
    group = runs[0].setup.groups[0]
    before = precision(start, model, gpu, group.parallel.tensor, str(getattr(group.make_scheduler(), "version", "")))
    near = carried(start, model, gpu, replace(start.parallel, expert=start.expert_parallel if model.experts else 1))
    best, spread = _Problem(runs, near, before, progress).best()
    at, own = best[: len(PARTS)], best[len(PARTS) :].reshape(2, len(runs))  # paces, speeds
    paces = np.exp(own[0]).tolist()
    parts = list(_told(at, spread[: len(PARTS)], np.sqrt(np.diag(np.linalg.inv(before)))))
    cells: dict[str, list[Cell]] = {}
    for i, run in enumerate(runs):
        name = run.result.path.name
        found = at
        if hold_out and len(runs) > 1:
            progress(f"fit without {name}")
            rest = [*runs[:i], *runs[i + 1 :]]
            others = _Problem(rest, near, before, progress)
            begin = np.concatenate([at, np.delete(own, i, axis=1).ravel()])
            found = others.again(begin, ROUNDS_AGAIN)[0][: len(PARTS)]
        cells[name] = compare(name, run.predicted(changed(near, found)), bench.recorded(run.result))
    untold = [each.part for each in parts if not each.told]
    notes = [f"fitted to {len(runs)} results of vllm bench serve, from profile {start.name}"]
    notes += [f"as in {start.name}, for the results do not tell: {', '.join(untold)}"] * bool(untold)
    for run, pace in zip(runs, paces, strict=True):
        if abs(math.log(pace)) > RARE * float(_scale(np.log(pace))):
            notes.append(f"the host of {run.result.path.name} took {pace:.2f} times as long as the usual one")
    made = replace(
        changed(near, at),
        name=f"{gpu.name}-{model.name}-bench",
        scaled="",
        provenance={
            "results": [run.result.path.name for run in runs],
            "from": f"{start.name} ({start.digest})",
            "date": datetime.now(UTC).date().isoformat(),
            "paces": [round(pace, 4) for pace in paces],
            "factors": {each.part: [round(value, 4) for value in each[1:4]] for each in parts},
        },
        notes=tuple(notes),
        errors={},
        spread={},
    )
    return Fitted(made, parts, cells)


def _told(at: Floats, spread: Floats, before: Floats) -> Iterator[Told]:
    for i, part in enumerate(PARTS):
        low, high = at[i] - Z90 * spread[i], at[i] + Z90 * spread[i]
        ends = [max(0.0, float(end)) if i == CLIENT else math.exp(end) for end in (at[i], low, high)]
        yield Told(part, ends[0], ends[1], ends[2], bool(spread[i] < UNTOLD * before[i]))
