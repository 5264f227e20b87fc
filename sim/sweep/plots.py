"""Plots of a comparison as one HTML file that needs no network: figures, differences, the Pareto plane."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.sweep.compare import Comparison, Setting

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c564b", "#7f7f7f", "#000000")
MOST_GROUPS = 12  # of settings, each with figures of its own


def write(path: Path, comparison: Comparison, pareto: Sequence[str], x: str | None = None) -> None:
    """Write the plots to ``path``.

    ``x`` is the axis along which figures are drawn; None: the one aside with the most numbers. Raises `BadInput`:
    no such axis, or the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # here: it takes long to import

    x = _x_axis(comparison, x)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(comparison.results.name)}</title>",
        "<style>body{font:15px system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}</style>",
        f"<script>{get_plotlyjs()}</script><h1>{html.escape(comparison.results.name)}</h1>",
        f"<p>{html.escape(_said(comparison))}</p>",
    ]
    groups = _groups(comparison, x)
    for rest, settings in groups[:MOST_GROUPS]:
        if rest:
            parts.append(f"<h2>{html.escape(rest)}</h2>")
        for metric in comparison.metrics:
            parts += [_html(figure) for figure in _over_x(comparison, metric, settings, x)]
        if len(pareto) > 1:
            parts.append(_html(_plane(comparison, pareto, settings)))
    if len(groups) > MOST_GROUPS:
        parts.append(f"<p>{len(groups) - MOST_GROUPS} more groups of settings are not drawn; see --json.</p>")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise BadInput(Problem(f"cannot be written: {error.strerror or error}", file=str(path))) from None


def _said(c: Comparison) -> str:
    seeds = len({row["seed"] for row in c.results.rows})
    return (
        f"{len(c.systems)} systems ({', '.join(c.over)}) in {len(c.settings)} settings, {seeds} seeds; baseline "
        f"{c.called(c.baseline)}. Bars and bands: {c.confidence:.0%} intervals (Student's t over seeds); differences "
        "are paired by seed, for all systems meet the same random numbers."
    )


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


def _over_x(c: Comparison, metric: str, settings: list[Setting], x: str | None) -> list[Any]:
    """The figure itself, and its difference to the baseline."""
    import plotly.graph_objects as go

    place = c.aside.index(x) if x is not None else None
    names = [setting[place] if place is not None else "all" for setting in settings]
    absolute, relative = go.Figure(), go.Figure()
    found = {(d.setting, d.system): d.percent() for d in c.differences() if d.metric == metric}
    for i, system in enumerate(c.systems):
        colour = _COLOURS[i % len(_COLOURS)]
        line = {"name": c.called(system), "marker_color": colour, "mode": "lines+markers", "legendgroup": str(i)}
        means = [c.mean(setting, system, metric) for setting in settings]
        absolute.add_scatter(x=names, y=[_or_gap(m.mean) for m in means], error_y=_bars(means), **line)
        if system != c.baseline:
            gains = [found.get((setting, system)) for setting in settings]
            kept = [(name, g) for name, g in zip(names, gains, strict=True) if g is not None]
            relative.add_scatter(
                x=[n for n, _ in kept],
                y=[_or_gap(g.mean) for _, g in kept],
                error_y=_bars([g for _, g in kept]),
                **line,
            )
    relative.add_hline(y=0, line_width=1, line_dash="dot")
    for figure, title in ((absolute, metric), (relative, f"{metric}: % of {c.called(c.baseline)}, paired")):
        figure.update_layout(title=title, xaxis_title=x or "", template="plotly_white", height=380)
        figure.update_layout(margin={"t": 50, "b": 45}, hovermode="x unified")
    return [absolute, relative]


def _plane(c: Comparison, metrics: Sequence[str], settings: list[Setting]) -> Any:
    """Every system in the plane of the first two metrics; those on the front are filled."""
    import plotly.graph_objects as go

    figure = go.Figure()
    fronts = c.fronts(metrics)
    for i, system in enumerate(c.systems):
        points = [(s, [c.mean(s, system, m).mean for m in metrics[:2]]) for s in settings]
        points = [(s, means) for s, means in points if not any(map(math.isnan, means))]
        figure.add_scatter(
            x=[means[0] for _, means in points],
            y=[means[1] for _, means in points],
            text=[c.called(s) for s, _ in points],
            name=c.called(system),
            mode="markers",
            marker={
                "color": _COLOURS[i % len(_COLOURS)],
                "size": 11,
                "symbol": ["circle" if system in fronts[s] else "circle-open" for s, _ in points],
            },
        )
    title = f"Pareto front of {' and '.join(metrics)} (filled), setting by setting"
    figure.update_layout(title=title, xaxis_title=metrics[0], yaxis_title=metrics[1], template="plotly_white")
    return figure


def _bars(means: Sequence[Any]) -> dict[str, Any]:
    return {"type": "data", "array": [_or_gap(m.high - m.mean) for m in means], "thickness": 1}


def _or_gap(number: float) -> float | None:
    return None if math.isnan(number) else number


def _html(figure: Any) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False))
