"""``chairlift compare``: what a sweep says of its systems."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.terminal import console, must_end_in, run_folder
from chairlift.sim.results.catalogue import FIELDS, sign
from chairlift.sim.results.catalogue import title as heading
from chairlift.sim.sweep.compare import Comparison, Difference, Setting, System
from chairlift.sim.sweep.table import read

out = console(least=120)

_WIDE = 6  # systems that have a column each
_MANY = 400  # percent; larger differences are shown as factors
_STYLES = {"better": "green", "worse": "red", "same": "dim", "unknown": "dim"}


def compare(
    results: Annotated[
        Path,
        typer.Argument(
            readable=False, help="A sweep's folder, its results.parquet, or the name of a sweep run from here."
        ),
    ],
    over: Annotated[
        list[str] | None, typer.Option(metavar="AXIS", help="Compare values of this axis (default policy). Repeatable.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="SYSTEM", help="Compare with this one; default: first.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="Compare this; repeatable. Default: five usual ones.")
    ] = None,
    pareto: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="Show the Pareto front of these; give at least two.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write plots to one self-contained HTML.")] = None,
    x: Annotated[str | None, typer.Option(metavar="AXIS", help="Axis along which to draw plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare policies (or any axis) of a sweep: paired differences with intervals, ranks, Pareto fronts.

    Differences are paired by seed: all systems met the same requests, so that small ones show.
    An interval that holds 0 is dim: these seeds cannot tell the two apart.

    [bold]chairlift compare chat_knee --metric p99_ttft_ms --pareto p99_ttft_ms --pareto request_goodput[/bold]
    """
    if not 0.5 <= confidence < 1:
        raise BadInput(Problem("must be from 0.5 to below 1", file="--confidence", value=confidence))
    fronts = pareto or []
    if len(fronts) == 1:
        raise BadInput(Problem("needs at least two metrics: give it twice", file="--pareto", value=fronts[0]))
    if x is not None and html is None:
        raise BadInput(Problem("must not be given without --html", file="--x", value=x))
    must_end_in(html, ".html")
    table = read(run_folder(results))
    comparison = Comparison(table, over or [], metric or [], baseline, confidence)
    found = comparison.fronts(fronts) if fronts else {}
    if html is not None:
        from chairlift.sim.sweep.plots import write  # here: only a page needs templates

        write(html, comparison, fronts, x)
    if as_json:
        sys.stdout.write(json.dumps(comparison.as_json(fronts), indent=2, allow_nan=False) + "\n")
        return
    differences = comparison.differences()
    if len(comparison.systems) > _WIDE:
        out.print(_long_table(comparison, differences, found))
    else:
        for each in comparison.metrics:
            out.print(_metric_table(comparison, each, [d for d in differences if d.metric == each]))
        out.print(_rank_table(comparison))
    for setting, front in found.items() if len(comparison.systems) <= _WIDE else ():
        where = f" at {comparison.called(setting)}" if setting else ""
        names = ", ".join(comparison.called(system) for system in front)
        out.print(f"Pareto front of {' and '.join(fronts)}{escape(where)}: [bold]{escape(names)}[/bold]")
    out.print(f"{confidence:.0%} intervals, each for its pair alone (Student's t over seeds).", style="dim")
    if len(comparison.loops) == 1:
        out.print(f"All ran the {comparison.loops[0]} engine loop.", style="dim")
    if comparison.warning:
        out.print(f"warning: {escape(comparison.warning)}", style="yellow")
    if comparison.failed:
        out.print(f"{comparison.failed} runs failed and are left out.", style="yellow")
    if html is not None:
        out.print(f"plots in {escape(str(html))}")


def _metric_table(c: Comparison, metric: str, differences: list[Difference]) -> Table:
    """Rows: settings. Columns: the baseline's mean, and every other system's difference in percent."""
    title = f"[bold]{escape(heading(metric))}[/bold] [dim]{escape(metric)}[/dim]"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for axis in c.aside:
        table.add_column(escape(axis), justify="right", overflow="fold")
    others = [system for system in c.systems if system != c.baseline]
    table.add_column(escape(c.called(c.baseline)), justify="right", overflow="fold")
    for system in others:
        table.add_column(escape(c.called(system)), justify="right", overflow="fold")
    found = {(d.setting, d.system): d for d in differences}
    for setting in c.settings:
        own = c.mean(setting, c.baseline, metric)
        cells = [_number(own.mean) + ("" if math.isnan(own.high) else f" ±{_number(own.high - own.mean)}")]
        cells += [_cell(found.get((setting, system))) for system in others]
        table.add_row(*(escape(c.called((value,))) for value in setting), *cells)
    return table


def _long_table(c: Comparison, differences: list[Difference], fronts: dict[Setting, list[System]]) -> Table:
    """Rows: systems in each setting, the best in the first metric on top. Columns: means, and ranks over settings."""
    title = f"means, and whether better or worse than {c.called(c.baseline)}" + (
        "; ★ on the Pareto front" if fronts else ""
    )
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for axis in (*c.aside, *c.over, *map(heading, c.metrics), "mean rank"):
        table.add_column(escape(axis), justify="right", overflow="fold")
    verdicts = {(d.setting, d.system, d.metric): d.verdict for d in differences}
    ranks = c.ranks()
    first = c.metrics[0]
    for setting in c.settings:
        means = {system: c.mean(setting, system, first).mean for system in c.systems}
        for system in sorted(c.systems, key=lambda s: (math.isnan(means[s]), -sign(first) * means[s])):
            cells = []
            for metric in c.metrics:
                style = _STYLES[verdicts.get((setting, system, metric), "unknown")]
                cells.append(f"[{style}]{_number(c.mean(setting, system, metric).mean)}[/]")
            star = " ★" if system in fronts.get(setting, []) else ""
            names = (escape(c.called((value,))) for value in (*setting, *system))
            table.add_row(*names, *cells, f"{ranks[system][first]:.1f}{star}")
    return table


def _cell(d: Difference | None) -> str:
    if d is None:
        return "–"
    percent = d.percent()
    if math.isnan(percent.mean):  # the baseline is 0
        return f"{_number(d.own.mean)}"
    if abs(percent.mean) < _MANY:
        text, low, high = f"{percent.mean:+.1f} %", f"{percent.low:+.1f}", f"{percent.high:+.1f}"
    else:
        text, low, high = (f"×{_number(1 + p / 100)}" for p in percent[:3])
    if not math.isnan(percent.low):
        text += f" \\[{low}, {high}]"
    return f"[{_STYLES[d.verdict]}]{text}[/]"


def _rank_table(c: Comparison) -> Table:
    table = Table(title="[bold]mean rank over settings[/bold] (1 is best)", title_justify="left", box=None)
    table.pad_edge = False
    table.add_column("system")
    for metric in c.metrics:
        table.add_column(FIELDS[metric].label if metric in FIELDS else metric, justify="right")
    for system, ranks in c.ranks().items():
        table.add_row(escape(c.called(system)), *(f"{rank:.2f}" for rank in ranks.values()))
    return table


def _number(number: float) -> str:
    if math.isnan(number):
        return "–"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
