"""The command ``agree``: a measured study beside a predicted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.sim.calibration.agreement import agreements
from chairlift.sim.cli.terminal import console, must_end_in, run_folder, save

WIDTH = 110  # columns of a table that goes to a file or a pipe


def agree(
    measured: Annotated[
        Path,
        typer.Argument(
            readable=False, help="Results of the run on hardware: a folder or its comparison.json, or a run's name."
        ),
    ],
    predicted: Annotated[Path, typer.Argument(readable=False, help="Results of the same scenario, simulated.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every row.")] = None,
) -> None:
    """Compare a measured study with its prediction: errors, rank correlation, regret of choosing by the simulator.

    [bold]chairlift agree runs/hardware_policies runs/predicted[/bold]
    """
    must_end_in(json_file, ".json")
    out = console(least=WIDTH)
    found = agreements(run_folder(measured), run_folder(predicted))
    if json_file is not None:
        save(json_file, json.dumps([each.json() for each in found], indent=1) + "\n")
    names = list(found[0].measured)
    table = Table(box=None, pad_edge=False, title="predicted against measured, %", title_justify="left")
    for column in ("case", "metric", *names, "τ", "regret"):
        table.add_column(escape(column), justify="left" if column in ("case", "metric") else "right")
    case = ""
    for each in found:
        errors = [f"{100 * each.errors[name]:+.1f}" if name in each.errors else "" for name in names]
        told = escape(each.case) if each.case != case else ""
        table.add_row(told, each.metric, *errors, f"{each.tau:.2f}", f"{100 * each.regret:.1f}")
        case = each.case
    out.print(table)
    taus = [each.tau for each in found]
    out.print(f"mean τ {sum(taus) / len(taus):.2f}, worst regret {100 * max(each.regret for each in found):.1f} %")
