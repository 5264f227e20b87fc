"""A profile from results of ``vllm bench serve``: the nearest profile, changed until the simulator gives what was seen.

A result says nothing of steps, only how long requests waited, so steps cannot be fitted one by one. Instead all results
are replayed by the simulator, and a dozen factors on parts of a profile (`PARTS`) are fitted by least squares on the
logarithms of what was measured over what is predicted: durations, percentiles of latencies, and TTFT by prompt length.
Each factor is drawn to 1, the nearest profile, by as much as profiles differ from one another; a factor that the
results do not tell stays there, and its interval says so.

Each result has a further factor, the pace of its host: other work on the machine makes everything that the host does
slower for seconds or minutes at a time. It is drawn to 1 likewise, and what is fitted is the host at pace 1. For
example: at the same rate TTFTs of one result are twice those of another. No factor of all results explains that, and
without paces the slower one would lengthen GPU times in all. What one result shows of its host, is part its day's.
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
from chairlift.backend.calibrated.profile import Knots, Profile, between
from chairlift.backend.calibrated.settings import Given
from chairlift.backend.shapes import GPU, Model
from chairlift.sim.calibration import bench
from chairlift.sim.calibration.validate import Cell, Observed, compare, observed
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.workload.formats.vllm_bench import Result

Floats = npt.NDArray[np.float64]

DECODES = (1, 16, 256)  # sequences of steps of decodes alone at which their matmuls have a factor of their own
CHUNKS = (128, 1024, 8192)  # tokens of steps with chunks, likewise
PARTS = (
    *(f"decode steps of {n}" for n in DECODES),
    "attention of decodes",
    *(f"steps with chunks of {n:,} tokens" for n in CHUNKS),
    "attention of prompts",
    "launches by graph pieces",
    "launches kernel by kernel",
    "scheduling and updating",
    "the client's own time",
)
CLIENT = len(PARTS) - 1
# By how much the parts of two profiles differ, in logarithms: of one model and GPU (vLLM 0.23 and 0.26 on an H200), and
# of different models, `carried` from one to the other.
ALIKE = (0.05, 0.05, 0.08, 0.06, 0.2, 0.08, 0.05, 0.08, 0.25, 0.3, 0.35)
OTHER = (0.5, 0.5, 0.7, 0.25, 0.7, 0.5, 0.3, 0.3, 0.6, 0.6, 0.5)
APART = 0.5  # by how much of that the factors of neighbouring sizes differ from each other
PACE = 0.25  # by how much a run's host differs from its usual pace, in logarithms: launches of 20 and 31 ms, 57 and 90
CLIENT_S = 0.002  # what the client and the server's front may add to TTFT
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
NOISE = {
    "ttft": 0.05,
    "tpot": 0.03,
    "e2el": 0.03,
    "itl": 0.1,
}  # of an engine's own repeat and of a profile's form, relative
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
        """The figures of `outcome`."""
        return observed(self.outcome(profile))


def nearest(model: Model, gpu: GPU, tensor: int, version: str) -> Profile:
    """The shipped profile of vLLM that is nearest, for the first of these that tells two apart.

    It is of the model; of one with experts too, or without too; of the GPU; of weights as wide; of vLLM's ``version``;
    of a model of which a token reads about as many bytes; of the latest version. Profiles of engines that speculate
    are left out.

    Raises `profiles.ProfileError` if none is of as many GPUs.
    """
    known = [profiles.load(name) for name in profiles.shipped()]
    found = [
        each
        for each in known
        if each.tensor_parallel == tensor and each.engine.startswith("vllm") and each.drafts is None
    ]
    if not found:
        raise profiles.ProfileError(f"no shipped profile is of {tensor} GPUs")

    def order(each: Profile) -> tuple[object, ...]:
        own = specs.model(each.model)
        return (
            each.model == model.name,
            bool(own.experts) == bool(model.experts),
            each.gpu == gpu.name,
            round(_width(own)) == round(_width(model)),
            each.engine.startswith(f"vllm {version}."),
            -abs(math.log(_read(own) / _read(model))),
            each.engine,
        )

    return max(found, key=order)


def _width(model: Model) -> float:
    """Bytes of a weight on average."""
    return model.weight_bytes / model.parameters


def _read(model: Model) -> float:
    """Bytes of weights that a token reads, if those it reads are as wide as the others."""
    return model.active_parameters * _width(model)


def changed(profile: Profile, logs: Floats) -> Profile:
    """``profile`` with its parts multiplied by the exponentials of ``logs``. Shape of ``logs``: ``(len(PARTS),)``."""
    decodes, chunks = logs[: len(DECODES)], logs[len(DECODES) + 1 :][: len(CHUNKS)]
    kv = float(np.exp(logs[len(DECODES)]))
    pair, piecewise, eager, host = np.exp(logs[len(DECODES) + 1 + len(CHUNKS) : CLIENT]).tolist()
    times = profile.gpu_time
    own = {name: getattr(profile.host, name) * host for name in vars(profile.host) if name not in _LAUNCHES}
    return replace(
        profile,
        gpu_time=replace(
            times,
            kv_s=times.kv_s * kv,
            kv_mixed_s=times.kv_mixed_s * kv,
            pair_s=times.pair_s * pair,
            sequence_s=times.sequence_s * float(np.exp(decodes[-1])),
            decode_residual=_bent(times.decode_residual, DECODES, decodes),
            chunk_residual=_bent(times.chunk_residual, CHUNKS, chunks),
        ),
        host=replace(
            profile.host,
            **own,
            piecewise_s=profile.host.piecewise_s * piecewise,
            eager_s=profile.host.eager_s * eager,
        ),
    )


_LAUNCHES = ("graph_s", "piecewise_s", "eager_s", "tail_s", "head_s")


def _bent(residual: Knots, at: tuple[int, ...], logs: Floats) -> Knots:
    """``residual`` times factors whose logarithms are ``logs`` at ``at``, and linear between in log tokens."""
    knots = sorted({tokens for tokens, _ in residual} | set(at))
    tokens = np.array(knots, dtype=np.float64)
    factors = between(residual, tokens) * np.exp(np.interp(np.log(tokens), np.log(at), logs))
    return tuple(zip(knots, np.clip(factors, 0.01, 100).tolist(), strict=True))


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
        noises.append(NOISE["ttft"])
    return np.log(np.maximum(values, 1e-3)), np.array(noises)


class _Problem:
    """The least squares of some runs, from a profile to start from.

    A point ``at`` has the logarithms of the factors, the client's own seconds, and the logarithm of each run's pace.
    """

    def __init__(self, runs: Sequence[Run], start: Profile, width: Floats, progress: Callable[[str], None]) -> None:
        self._runs, self._start, self._progress = runs, start, progress
        self._width = np.concatenate([width, np.full(len(runs), PACE)])
        self._pull = np.eye(len(self._width))
        self._pull[: len(PARTS), : len(PARTS)] = _pull(width)
        measured = [_figures(bench.recorded(run.result), run.result.trace.prompt_tokens) for run in runs]
        self._logs = [logs for logs, _ in measured]
        self._noise = [noise for _, noise in measured]

    def _off(self, at: Floats, i: int) -> Floats:
        run, pace = self._runs[i], math.exp(at[len(PARTS) + i])
        profile = changed(self._start, at[: len(PARTS)])
        profile = replace(profile, host=profile.host.at(pace))
        found = _figures(run.predicted(profile), run.setup.trace.prompt_tokens, float(at[CLIENT]))[0]
        off: Floats = (found - self._logs[i]) / self._noise[i]
        return off

    def off(self, at: Floats) -> Floats:
        """Predicted over measured, in noises, at the point ``at``."""
        return np.concatenate([self._off(at, i) for i in range(len(self._runs))])

    def slopes(self, at: Floats, here: Floats, count: int) -> Floats:
        """The derivatives of `off`, in widths of the first ``count`` factors. Shape: ``(figures, count)``."""
        columns = []
        ends = np.cumsum([0, *map(len, self._logs)])
        for part, width in enumerate(self._width[:count].tolist()):
            step = min(width, STEP)
            moved = at.copy()
            moved[part] += step
            if part < len(PARTS):
                there = self.off(moved)
            else:  # a pace moves its own run alone
                i = part - len(PARTS)
                there = here.copy()
                there[ends[i] : ends[i + 1]] = self._off(moved, i)
            columns.append((there - here) * width / step)
        return np.stack(columns, axis=1)

    def solved(self, start: Floats, rounds: int, paces: bool = True) -> tuple[Floats, Floats]:
        """The best point from ``start`` on, and its standard deviations. Shape of each: ``(len(PARTS) + runs,)``.

        Without ``paces`` those stay where they are.
        """
        count = len(self._width) if paces else len(PARTS)
        pull, width = self._pull[:count, :count], self._width[:count]
        at, here = start, self.off(start)
        damping = 0.1
        slopes = self.slopes(at, here, count)
        for turn in range(rounds):
            self._progress(f"fit, round {turn + 1}: {_cost(here, at / self._width, self._pull):,.0f}")
            weight = _weights(here)
            inner = slopes.T @ (slopes * weight[:, None]) + pull
            downhill = -(slopes.T @ (weight * here) + pull @ (at[:count] / width))
            for _ in range(4):
                step = np.linalg.solve(inner + damping * np.diag(np.diag(inner)), downhill) * width
                there = at.copy()
                there[:count] += step
                there[CLIENT] = max(0.0, there[CLIENT])
                off = self.off(there)
                if _cost(off, there / self._width, self._pull) < _cost(here, at / self._width, self._pull):
                    damping /= 5
                    break
                damping *= 5
            else:
                break
            moved = np.abs(there - at).max()
            at, here = there, off
            if moved < CLOSE or turn == rounds - 1:
                break
            slopes = self.slopes(at, here, count)
        weight = _weights(here)
        inner = slopes.T @ (slopes * weight[:, None])
        worse = max(1.0, float((weight * here**2).sum() / max(1, len(here) - len(PARTS))))
        spread = np.zeros(len(self._width))
        spread[:count] = np.sqrt(np.diag(np.linalg.inv(inner / worse + pull))) * width
        return at, spread

    def best(self) -> tuple[Floats, Floats]:
        """As `solved`, from paces of 1 and the profile as it is.

        What all runs have in common comes first, and paces explain what is left. Sought together, paces of one half
        stood in for the launches of a model that take half as long as the profile's.
        """
        common, _ = self.solved(np.zeros(len(self._width)), ROUNDS, paces=False)
        return self.solved(self.point(common[: len(PARTS)]), ROUNDS)

    def point(self, factors: Floats) -> Floats:
        """Where hosts take as long as with ``factors`` and paces of 1, but what these have in common is a pace.

        No run tells the two apart; their widths do. It is where the sum of squares of all, in widths, is the smallest.
        Shape of ``factors``: ``(len(PARTS),)``.
        """
        host = slice(CLIENT - 3, CLIENT)
        stiff = self._width[host] ** -2
        pace = float(stiff @ factors[host]) / (float(stiff.sum()) + len(self._runs) * PACE**-2)
        found = np.concatenate([factors, np.full(len(self._runs), pace)])
        found[host] -= pace
        return found


def _weights(off: Floats) -> Floats:
    """Of a soft-L1 loss: a figure that is far off pulls less than its square."""
    found: Floats = 1 / np.sqrt(1 + (off / 3) ** 2)
    return found


def _pull(width: Floats) -> Floats:
    """How factors are drawn to 1, and those of neighbouring sizes to each other. Shape: ``(parts, parts)``."""
    found = np.eye(len(PARTS))
    chunks = len(DECODES) + 1
    for first, count in ((0, len(DECODES)), (chunks, len(CHUNKS))):
        for one in range(first, first + count - 1):
            apart = np.zeros(len(PARTS))
            both = APART * min(width[one], width[one + 1])
            apart[one], apart[one + 1] = width[one] / both, -width[one + 1] / both
            found += np.outer(apart, apart)
    return found


def _cost(off: Floats, at: Floats, pull: Floats) -> float:
    return float((18 * (np.sqrt(1 + (off / 3) ** 2) - 1)).sum() + at @ pull @ at)


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
    width = np.array([*(ALIKE if (start.model, start.gpu) == (model.name, gpu.name) else OTHER), CLIENT_S])
    near = carried(start, model, gpu, replace(start.parallel, expert=start.expert_parallel if model.experts else 1))
    problem = _Problem(runs, near, width, progress)
    at, spread = problem.best()
    at, spread, paces = at[: len(PARTS)], spread[: len(PARTS)], np.exp(at[len(PARTS) :]).tolist()
    parts = list(_told(at, spread, np.sqrt(np.diag(np.linalg.inv(_pull(width)))) * width))
    cells: dict[str, list[Cell]] = {}
    for i, run in enumerate(runs):
        name = run.result.path.name
        found = at
        if hold_out and len(runs) > 1:
            progress(f"fit without {name}")
            rest = [*runs[:i], *runs[i + 1 :]]
            others = _Problem(rest, near, width, progress)
            begin = np.concatenate([at, np.log([pace for j, pace in enumerate(paces) if j != i])])
            found = others.solved(begin, ROUNDS_AGAIN)[0][: len(PARTS)]
        cells[name] = compare(name, run.predicted(changed(near, found)), bench.recorded(run.result))
    untold = [each.part for each in parts if not each.told]
    notes = [f"fitted to {len(runs)} results of vllm bench serve, from profile {start.name}"]
    notes += [f"as in {start.name}, for the results do not tell: {', '.join(untold)}"] * bool(untold)
    for run, pace in zip(runs, paces, strict=True):
        if abs(math.log(pace)) > PACE / 2:
            notes.append(f"the host of {run.result.path.name} took {pace:.2f} times as long as it is taken to, usually")
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
