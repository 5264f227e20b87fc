"""Plots of a comparison as one HTML file that needs no network: figures, differences, the Pareto plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import saving
from chairlift.sim.report.html import Figure, Page, curve, error_bars, hue, level, swatch, ticks
from chairlift.sim.results.catalogue import FIELDS, title
from chairlift.sim.sweep.compare import Comparison, Setting
from chairlift.sim.sweep.statistics import Interval

MOST_GROUPS = 12  # of settings, each with figures of its own
HEIGHT = 300  # pixels of a figure
UNITS = {"_gb_per_s": "GB/s", "_per_s": "1/s", "_ms": "ms", "_us": "µs", "_s": "s", "_gib": "GiB"}  # by how keys end
WIDE = 50  # times from the least to the most from which on an axis is logarithmic


def write(path: Path, comparison: Comparison, pareto: Sequence[str], x: str | None = None) -> None:
    """Write the plots to ``path``.

    ``x`` is the axis along which figures are drawn; None: the axis aside that has the most numbers. Raises `BadInput`:
    no such axis, or the file cannot be written.
    """
    x = _x_axis(comparison, x)
    groups = _groups(comparison, x)
    told = [
        {
            "title": rest,
            "metrics": [_over_x(comparison, metric, settings, x) for metric in comparison.metrics],
            "plane": _plane(comparison, pareto, settings) if len(pareto) > 1 else None,
        }
        for rest, settings in groups[:MOST_GROUPS]
    ]
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Page().write(
            path,
            "compare.html",
            kind="comparison",
            name=comparison.results.name,
            question=_said(comparison),
            source=Path(comparison.results.file).name,
            systems=[(swatch(i), comparison.called(system)) for i, system in enumerate(comparison.systems)],
            groups=told,
            pareto=" and ".join(_label(metric) for metric in pareto),
            warning=comparison.warning,
            left_out=max(0, len(groups) - MOST_GROUPS),
        )


def _said(c: Comparison) -> str:
    seeds = len({row["seed"] for row in c.results.rows})
    return (
        f"{len(c.systems)} systems ({', '.join(c.over)}) in {len(c.settings)} settings, {seeds} seeds; baseline "
        f"{c.called(c.baseline)}. Bars: {c.confidence:.0%} intervals (Student's t over seeds); differences "
        "are paired by seed, for all systems meet the same random numbers."
        + (f" All ran the {c.loops[0]} engine loop." if len(c.loops) == 1 else "")
    )


def _label(metric: str) -> str:
    return FIELDS[metric].label if metric in FIELDS else metric


def _with_unit(key: str) -> str:
    """What an axis of the key's values is headed: ``limits.timeout_s`` gives ``limits.timeout_s, s``."""
    return next((f"{key}, {unit}" for end, unit in UNITS.items() if key.endswith(end)), key)


def _x_axis(c: Comparison, wanted: str | None) -> str | None:
    if wanted is not None:
        return c.results.known(wanted, c.aside, "axis that is not compared")
    counts: dict[str, int] = {}
    for i, axis in enumerate(c.aside):
        values = {setting[i] for setting in c.settings}
        if all(isinstance(v, int | float) for v in values):
            counts[axis] = len(values)
    return max(counts, key=lambda axis: counts[axis], default=None)


def _groups(c: Comparison, x: str | None) -> list[tuple[str, list[Setting]]]:
    """Settings that differ only along ``x`` go together, under what they share."""
    found: dict[str, list[Setting]] = {}
    for setting in c.settings:
        rest = ", ".join(f"{axis} {v}" for axis, v in zip(c.aside, setting, strict=True) if axis != x)
        found.setdefault(rest, []).append(setting)
    return list(found.items())


def _over_x(c: Comparison, metric: str, settings: list[Setting], x: str | None) -> dict[str, Any]:
    """The figure itself, and its difference to the baseline."""
    place = c.aside.index(x) if x is not None else None
    names = [setting[place] if place is not None else "all" for setting in settings]
    found = {(d.setting, d.system): d.percent() for d in c.differences() if d.metric == metric}
    absolute, relative = [], []
    for i, system in enumerate(c.systems):
        means = [c.mean(setting, system, metric) for setting in settings]
        absolute.append(_curve(i, c.called(system), names, means))
        if system != c.baseline:
            kept = [(n, found[s, system]) for n, s in zip(names, settings, strict=True) if (s, system) in found]
            relative.append(_curve(i, c.called(system), [n for n, _ in kept], [gain for _, gain in kept]))
    along = "" if x is None else _with_unit(x)
    difference = _figure(relative, along)
    difference["layout"]["shapes"] = [level(0)]
    return {
        "title": title(metric),
        "title_relative": f"{_label(metric)}: difference from {c.called(c.baseline)}, %",
        "absolute": _wide(_figure(absolute, along), "y", metric),
        "relative": difference,
    }


def _curve(i: int, name: str, x: list[Any], means: Sequence[Interval]) -> Figure:
    bars = error_bars([_or_gap(m.high - m.mean) for m in means])
    return curve(i, name, x, [_or_gap(m.mean) for m in means], error_y=bars)


def _figure(traces: list[Figure], x: str, y: str = "") -> Figure:
    axes: Figure = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    swept = {value for trace in traces for value in trace["x"]} if x and not y else set()
    if swept and all(isinstance(value, int | float) for value in swept):
        axes["xaxis"] |= ticks(sorted(swept))
    return {"data": traces, "layout": {"height": HEIGHT, "hovermode": "x unified", "margin": {"t": 8}, **axes}}


def _wide(figure: Figure, axis: str, metric: str) -> Figure:
    """``figure``; its ``axis``, "x" or "y", is logarithmic where a few bad values would press all good ones flat."""
    if metric not in FIELDS or FIELDS[metric].better != "less":
        return figure
    values = [value for trace in figure["data"] for value in trace[axis] if value is not None]
    if values and min(values) > 0 and max(values) > WIDE * min(values):
        figure["layout"][f"{axis}axis"] |= {"type": "log", "dtick": 1}
    return figure


def _plane(c: Comparison, metrics: Sequence[str], settings: list[Setting]) -> Figure:
    """Every system in the plane of the first two metrics; those on the front are filled."""
    fronts = c.fronts(metrics)
    traces = []
    for i, system in enumerate(c.systems):
        points = [(s, [c.mean(s, system, m).mean for m in metrics[:2]]) for s in settings]
        points = [(s, means) for s, means in points if not any(map(math.isnan, means))]
        symbols = ["circle" if system in fronts[s] else "circle-open" for s, _ in points]
        traces.append(
            curve(
                *(i, c.called(system), [means[0] for _, means in points], [means[1] for _, means in points]),
                text=[c.called(s) for s, _ in points],
                mode="markers",
                marker={"color": hue(i), "size": 11, "symbol": symbols},
            )
        )
    figure = _figure(traces, *(title(metric) for metric in metrics[:2]))
    for axis, metric in zip("xy", metrics, strict=False):
        figure = _wide(figure, axis, metric)
    figure["layout"] |= {"height": 420, "hovermode": "closest"}
    return figure


def _or_gap(number: float) -> float | None:
    return None if math.isnan(number) else number
