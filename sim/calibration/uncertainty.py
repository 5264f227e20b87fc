"""How sure a prediction is: the same study many times, with other seeds and other draws of its profile's errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from chairlift.sim.atomic import write_text
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup, Study

LEVELS = (5, 50, 95)  # percentiles of what a further draw comes to: nine in ten lie between the first and the last
METRICS = (
    "duration",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    *(f"{q}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for q in ("mean", "median", "p90", "p99")),
    "preemptions",
)
SHOWN = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")

Runs = list[dict[str, Any]]  # one a draw: metric → value


def drawn(setup: Setup, draw: int) -> Setup:
    """``setup`` with the ``draw``-th draw of its profiles' errors. Raises `BadInput` if a replica has no profile."""
    groups = []
    for group in setup.groups:
        if "draw" not in {f.name for f in fields(group.backend)}:  # type: ignore[arg-type]  # settings are dataclasses
            raise BadInput(
                Problem("needs a calibrated profile as the backend: others know no errors", file="--uncertainty")
            )
        groups.append(replace(group, backend=replace(group.backend, draw=draw)))  # type: ignore[type-var]
    return replace(setup, groups=groups)


def check(study: Study) -> None:
    """Do nothing if every run of ``study`` can be drawn. Raises `BadInput` else."""
    for setup in study.setups:
        drawn(setup, 1)


def repeat(
    study: Study, again: Callable[[int], Study], count: int, folder: Path, progress: Callable[[str], None]
) -> list[tuple[Setup, Runs]]:
    """Every run of ``study``, ``count`` times over: draw i is of ``again(i)``, the study with another seed.

    After each draw ``folder/uncertainty.json`` holds the intervals so far, so that Ctrl-C keeps them.
    """
    check(study)
    found: list[tuple[Setup, Runs]] = [(setup, []) for setup in study.setups]
    for i in range(1, count + 1):
        for (_, runs), setup in zip(found, again(i).setups, strict=True):
            progress(f"draw {i} of {count}")
            outcome = simulate(drawn(setup, i))
            runs.append({key: outcome.summary[key] for key in METRICS})
        _write(found, folder)
    return found


def intervals(runs: Runs) -> dict[str, dict[str, float]]:
    """Metric → its percentiles `LEVELS`, as the draws tell them.

    The k-th of n draws, by size, has the share k / (n + 1) of all others below it (E. J. Gumbel, Statistics of
    Extremes, 1958). So of 19 draws the smallest and the largest hold nine in ten; fewer hold less (`within`).
    """
    result = {}
    for metric in METRICS:
        values = [run[metric] for run in runs if run[metric] is not None]
        if values:
            levels = np.percentile(np.array(values, dtype=np.float64), LEVELS, method="weibull")
            result[metric] = {f"p{level}": float(v) for level, v in zip(LEVELS, levels, strict=True)}
    return result


def within(count: int) -> float:
    """The share of all runs that lie within `intervals` of ``count`` draws."""
    return min((LEVELS[-1] - LEVELS[0]) / 100, (count - 1) / (count + 1))


def table(found: Sequence[tuple[Setup, Runs]]) -> Table:
    """The intervals of the metrics that people look at first, a line each."""
    count = len(found[0][1])
    title = f"{100 * within(count):.0f} % of runs lie within, by {count} draws of seeds and of the profile's errors"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("")
    for label in ("5 %", "50 %", "95 %"):
        result.add_column(label, justify="right")
    for row in _rows(found):
        result.add_row(*row)
    return result


def _rows(found: Sequence[tuple[Setup, Runs]]) -> Iterator[tuple[str, ...]]:
    for setup, runs in found:
        known = intervals(runs)
        label = " ".join(filter(None, (setup.case, setup.variant)))
        for metric in SHOWN:
            if metric in known:
                yield (escape(f"{label} {metric}".strip()), *(f"{known[metric][f'p{level}']:,.2f}" for level in LEVELS))


def _write(found: Sequence[tuple[Setup, Runs]], folder: Path) -> None:
    rows = [
        {"case": setup.case, "variant": setup.variant, "draws": len(runs), "intervals": intervals(runs)}
        for setup, runs in found
    ]
    write_text(folder / "uncertainty.json", json.dumps(rows, indent=2, allow_nan=False) + "\n")
