"""What a sweep says of its systems: paired differences, ranks and Pareto fronts.

A *system* is a value of the axes compared (by default the policy); a *setting* is a combination of all others, such as
a load. Within a setting all systems meet the same random numbers at each seed, so they are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.results import loops
from chairlift.sim.results.catalogue import sign
from chairlift.sim.sweep.statistics import Interval, interval, undominated
from chairlift.sim.sweep.table import Results

METRICS = ("p99_ttft_ms", "p99_tpot_ms", "mean_e2el_ms", "request_throughput", "request_goodput")  # if none is named
_FIRST = ("policy", "variant")  # axes to compare if none is named

System = tuple[Any, ...]
Setting = tuple[Any, ...]


@dataclass(frozen=True)
class Difference:
    """A system beside the baseline in one setting and metric."""

    setting: Setting
    system: System
    metric: str
    base: Interval  # the baseline's own mean, over the seeds that both have
    own: Interval  # the system's
    gain: Interval  # system − baseline, paired by seed

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``same`` (the interval holds 0), or ``unknown`` with fewer than two seeds."""
        if self.gain.n < 2:
            return "unknown"
        if self.gain.low <= 0 <= self.gain.high:
            return "same"
        return "better" if self.gain.mean * sign(self.metric) > 0 else "worse"

    def percent(self) -> Interval:
        """The gain in percent of the baseline's mean; NaN where that is 0."""
        scale = 100 / abs(self.base.mean) if self.base.mean else math.nan
        mean, low, high, n = self.gain
        return Interval(mean * scale, low * scale, high * scale, n)


class Comparison:
    """A sweep's results seen as systems in settings.

    Raises `BadInput`: an axis, metric or baseline that the results do not have, or nothing to compare.
    """

    def __init__(
        self,
        results: Results,
        over: Sequence[str] = (),
        metrics: Sequence[str] = (),
        baseline: str | None = None,
        confidence: float = 0.95,
    ) -> None:
        self.results = results
        self.over = [results.known(axis, results.axes, "axis") for axis in over] or _default_axis(results)
        self.aside = [axis for axis in results.axes if axis not in self.over]
        if metrics:
            self.metrics = [results.known(metric, results.metrics, "metric") for metric in metrics]
        else:
            self.metrics = [m for m in METRICS if any(row.get(m) is not None for row in results.rows)]
        for metric in self.metrics:
            sign(metric)
        self.confidence = confidence
        self._found: dict[tuple[Setting, System], dict[int, dict[str, Any]]] = {}
        for row in results.rows:
            place = tuple(row[axis] for axis in self.aside), tuple(row[axis] for axis in self.over)
            self._found.setdefault(place, {})[row["seed"]] = row
        self.settings = list(dict.fromkeys(setting for setting, _ in self._found))
        self.systems = list(dict.fromkeys(system for _, system in self._found))
        if len(self.systems) < 2:
            rule = f"only one value of {' and '.join(self.over)}: nothing to compare"
            raise BadInput(Problem(rule, results.file, value=self.called(self.systems[0]) if self.systems else "none"))
        names = {self.called(system): system for system in self.systems}
        self.baseline = self.systems[0] if baseline is None else names[results.known(baseline, list(names), "system")]
        ran = ((self.called(tuple(row[axis] for axis in self.over)), row.get("loop") or "") for row in results.rows)
        told = dict.fromkeys(ran)
        self.loops = list(dict.fromkeys(loop for _, loop in told if loop))  # that the engines ran
        self.warning = loops.warning(told)  # where they are not one and the same
        self.failed = sum(1 for row in results.rows if row["error"])

    def called(self, values: tuple[Any, ...]) -> str:
        """A system, or a setting, in words."""
        return " / ".join("–" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values)

    def figures(self, setting: Setting, system: System, metric: str) -> dict[int, float]:
        """Seed → figure, of runs that went well and have the metric."""
        rows = self._found.get((setting, system), {})
        return {seed: row[metric] for seed, row in rows.items() if not row["error"] and row[metric] is not None}

    def mean(self, setting: Setting, system: System, metric: str) -> Interval:
        """Mean over the seeds with its interval."""
        return interval(list(self.figures(setting, system, metric).values()), self.confidence)

    def differences(self) -> list[Difference]:
        """Every system but the baseline, beside it: metric by metric, setting by setting."""
        found = []
        for metric in self.metrics:
            for setting in self.settings:
                base = self.figures(setting, self.baseline, metric)
                for system in self.systems:
                    own = self.figures(setting, system, metric)
                    seeds = [seed for seed in base if seed in own]
                    if system == self.baseline or not seeds:
                        continue
                    ours, theirs = [own[s] for s in seeds], [base[s] for s in seeds]
                    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
                    found.append(
                        Difference(setting, system, metric, *(self._interval(x) for x in (theirs, ours, gains)))
                    )
        return found

    def ranks(self) -> dict[System, dict[str, float]]:
        """Mean rank over settings by metric: 1 is best, equals share theirs, without a figure is last."""
        sums: dict[System, dict[str, list[float]]] = {s: {m: [] for m in self.metrics} for s in self.systems}
        for metric in self.metrics:
            for setting in self.settings:
                means = self._means(setting, metric)
                merits = [means[s] * sign(metric) if s in means else -math.inf for s in self.systems]
                for system, merit in zip(self.systems, merits, strict=True):
                    before = sum(1 for other in merits if other > merit)
                    sums[system][metric].append(before + (merits.count(merit) + 1) / 2)
        return {s: {m: fmean(r) for m, r in by.items()} for s, by in sums.items()}

    def fronts(self, metrics: Sequence[str]) -> dict[Setting, list[System]]:
        """In each setting the systems that no other beats in one of ``metrics`` without losing in another, by means.

        Raises `BadInput` if one of them was never measured.
        """
        for metric in metrics:
            sign(self.results.known(metric, self.results.metrics, "metric"))
            if not any(self._means(setting, metric) for setting in self.settings):
                rule = "has no value in any run, so that there is no front (goodput needs an slo)"
                raise BadInput(Problem(rule, self.results.file, value=metric))
        return {setting: self._front(setting, metrics) for setting in self.settings}

    def _front(self, setting: Setting, metrics: Sequence[str]) -> list[System]:
        columns = [self._means(setting, metric) for metric in metrics]
        points = {
            system: [column[system] * sign(metric) for column, metric in zip(columns, metrics, strict=True)]
            for system in self.systems
            if all(system in column for column in columns)
        }
        return [system for system, best in zip(points, undominated(list(points.values())), strict=True) if best]

    def _means(self, setting: Setting, metric: str) -> dict[System, float]:
        """Means over the seeds that all systems with any result share; without such seeds, over each one's own."""
        figures = {s: f for s in self.systems if (f := self.figures(setting, s, metric))}
        common = set.intersection(*(set(f) for f in figures.values())) if figures else set()
        return {s: fmean(f[seed] for seed in sorted(common or f)) for s, f in figures.items()}

    def _interval(self, values: list[float]) -> Interval:
        return interval(values, self.confidence)

    def as_json(self, pareto: Sequence[str] = ()) -> dict[str, Any]:
        """All of it, ready for JSON; what is not known is null."""
        return {
            "sweep": self.results.name,
            "over": self.over,
            "baseline": _named(self.over, self.baseline),
            "confidence": self.confidence,
            "failed_runs": self.failed,
            "loops": self.loops,
            "warning": self.warning,
            "differences": [
                {
                    "setting": _named(self.aside, d.setting),
                    "system": _named(self.over, d.system),
                    "metric": d.metric,
                    "seeds": d.gain.n,
                    "baseline_mean": _known(d.base.mean),
                    "mean": _known(d.own.mean),
                    "difference": _known(d.gain.mean),
                    "low": _known(d.gain.low),
                    "high": _known(d.gain.high),
                    "percent": _known(d.percent().mean),
                    "verdict": d.verdict,
                }
                for d in self.differences()
            ],
            "ranks": [
                {"system": _named(self.over, system), **{m: _known(r) for m, r in by.items()}}
                for system, by in self.ranks().items()
            ],
            "pareto": [
                {
                    "setting": _named(self.aside, setting),
                    "metrics": list(pareto),
                    "front": [_named(self.over, s) for s in front],
                }
                for setting, front in (self.fronts(pareto) if pareto else {}).items()
            ],
        }


def _named(axes: Sequence[str], values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(axes, values, strict=True))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _default_axis(results: Results) -> list[str]:
    for axis in _FIRST:
        if axis in results.axes:
            return [axis]
    apart = [axis for axis in results.axes if axis != "case" and not axis.startswith("workload.")]
    if not apart:
        rule = "no axis but the workload's varies: name the axis to compare with --over"
        raise BadInput(Problem(rule, results.file))
    return apart[:1]
