"""``chairlift trace describe`` and ``chairlift trace write``: what a trace is like, and workloads as trace files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.terminal import console
from chairlift.sim.scenario.yaml_document import read
from chairlift.sim.workload.describe import describe as facts
from chairlift.sim.workload.describe import table
from chairlift.sim.workload.formats import chairlift
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.workload import build

WIDTH = 100  # columns of a table that goes to a file or a pipe

app = typer.Typer(help="Look at request traces, and write them.", no_args_is_help=True)
out = console(least=WIDTH)


@app.command("describe")
def describe(
    file: Annotated[Path, typer.Argument(help="A trace file (.gz is read as is).")],
    format_: Annotated[
        str | None,
        typer.Option("--format", help="One of `chairlift list formats`; default: told from the file."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    time_unit: Annotated[
        Literal["s", "ms", "us", "ns"] | None, typer.Option(help="Of the file's times; default: the format's.")
    ] = None,
    hash_block: Annotated[int | None, typer.Option(min=1, help="Tokens a hash id; default: the format's.")] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out rows of 0 tokens.")] = False,
    part: Annotated[int | None, typer.Option(min=1, help="Which run of a result file, from 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print counts, length percentiles, burstiness and prefix reuse of a trace."""
    options = {"time_unit": time_unit, "hash_block": hash_block, "drop_empty": drop_empty, "part": part}
    trace = formats.load(file, format_, limit, options=options)
    if as_json:
        sys.stdout.write(json.dumps(facts(trace), indent=2) + "\n")
    else:
        out.print(table(trace, file.name))


@app.command("write")
def write(
    scenario: Annotated[Path, typer.Argument(help="A scenario file, of which the workload and the seed are read.")],
    file: Annotated[Path, typer.Argument(help="Where to: .csv, .csv.gz or .parquet.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set seed=3. Repeatable.")
    ] = None,
) -> None:
    """Write the requests of a scenario's workload as a trace that workload.file can name.

    The same scenario and seed give the same file. Of a workload with think times the file has what each request waits
    for and how long.
    """
    if not str(file).endswith((".csv", ".csv.gz", ".parquet")):
        raise BadInput(Problem("must end in .csv, .csv.gz or .parquet", file=str(file)))
    document = read(scenario)
    document.set(set_ or [])
    if "workload" not in document.data:
        raise BadInput(document.problem(("workload",), "is required"))
    workload: Workload = document.check(Workload, at=("workload",))
    seed = document.data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise BadInput(document.problem(("seed",), "must be a whole number of at least 0", seed))
    trace = build(workload, seed, scenario.parent)
    chairlift.save(trace, file)
    out.print(f"{len(trace):,} requests in {escape(str(file))}", style="dim")
