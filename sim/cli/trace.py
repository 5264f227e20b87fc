"""``chairlift trace``: what a trace is like, workloads as trace files, and anybody's log as one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from chairlift.backend import specs
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.cli.terminal import console, must_end_in
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.workload import export as exporting
from chairlift.sim.workload.describe import describe as facts
from chairlift.sim.workload.describe import table
from chairlift.sim.workload.export import TOOLS
from chairlift.sim.workload.formats import chairlift, foreign, mapped
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.formats.text_tables import head
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build

WIDTH = 100  # columns of a table that goes to a file or a pipe

ScenarioArgument = Annotated[
    Path, typer.Argument(readable=False, help="A scenario file, of which the workload and the seed are read.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key: --set seed=3. Repeatable.")
]

app = typer.Typer(help="Look at request traces, and write them.", no_args_is_help=True, add_completion=False)
out = console(least=WIDTH)


@app.command("describe")
def describe(
    file: Annotated[Path, typer.Argument(readable=False, help="A trace file (.gz is read as is).")],
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


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(readable=False, help="CSV, JSON lines or a JSON document of lists (.gz is read as is).")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="COLUMN", help="Prompt tokens.")] = None,
    output: Annotated[str | None, typer.Option(metavar="COLUMN", help="Output tokens.")] = None,
    arrival: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="When a request came: 2023-11-16T18:17:03Z, or a number; else: unknown."),
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(metavar="COLUMN", help="The cap on outputs.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="COLUMN", help="Who sent it: any name.")] = None,
    session: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its conversation: any name.")] = None,
    priority: Annotated[str | None, typer.Option(metavar="COLUMN", help="A whole number.")] = None,
    time_unit: Annotated[
        Literal["s", "ms", "us", "ns"] | None, typer.Option(help="Of times that are numbers; default: as Unix times.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out rows without tokens (failed).")] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to: .csv, .csv.gz or .parquet; default: NAME.trace.csv.")
    ] = None,
) -> None:
    """Make a trace of a log, whose columns you name; keys within keys of JSON with dots.

    [bold]chairlift trace import log.jsonl --arrival ts --prompt prompt_tokens --output completion_tokens[/bold]
    """
    target = Path(f"{file.name.partition('.')[0]}.trace.csv") if to is None else to
    _writable(target)
    given = {
        **{"arrival_ps": arrival, "prompt_tokens": prompt, "output_tokens": output, "max_tokens": max_tokens},
        **{"tenant": tenant, "session": session, "priority": priority},
    }
    named = {name: column for name, column in given.items() if column is not None}
    if prompt is None or output is None:
        lacking = " and ".join(option for option, column in (("--prompt", prompt), ("--output", output)) if not column)
        start = head(file)
        rule = f"must be given; {foreign.described(file, start)}"
        raise BadInput(Problem(rule, file=lacking))
    if prompt == output:
        raise BadInput(Problem("must be another column than --prompt's", file="--output", value=output))
    if time_unit is not None and arrival is None:
        raise BadInput(Problem("must not be given without --arrival", file="--time-unit", value=time_unit))
    trace = mapped.read(file, named, time_unit, limit, drop_empty)
    if target.exists() and target.samefile(file):
        raise BadInput(Problem("is the file that is read: name another", file="--to", value=str(target)))
    chairlift.save(trace, target)
    out.print(table(trace, file.name))
    out.print(
        f"{len(trace):,} requests in {escape(str(target))}; in a scenario: workload: {{file: {escape(str(target))}}}"
    )


def _writable(file: Path) -> None:
    """Raise `BadInput` if ``file`` has no name of a trace file."""
    must_end_in(file, ".csv", ".csv.gz", ".parquet")


@app.command("write")
def write(
    scenario: ScenarioArgument,
    file: Annotated[Path, typer.Argument(help="Where to: .csv, .csv.gz or .parquet.")],
    set_: SetOption = None,
) -> None:
    """Write the requests of a scenario's workload as a trace that workload.file can name.

    The same scenario and seed give the same file. Of a workload with think times the file has what each request waits
    for and how long.
    """
    _writable(file)
    trace = _workload_of(_document(scenario, set_), scenario.parent)
    chairlift.save(trace, file)
    out.print(f"{len(trace):,} requests in {escape(str(file))}", style="dim")


@app.command("export")
def export(
    scenario: ScenarioArgument,
    file: Annotated[Path, typer.Argument(help="Where to: .jsonl.")],
    to: Annotated[str, typer.Option("--to", metavar="TOOL", help=f"The benchmark that reads it: {' | '.join(TOOLS)}.")],
    set_: SetOption = None,
) -> None:
    """Write the requests of a scenario's workload for a benchmark, and print the command that sends them to a server.

    [bold]chairlift trace export my.yaml my.jsonl --to vllm-bench[/bold]
    """
    if to not in TOOLS:
        rule = f"no such tool{did_you_mean(to, list(TOOLS))}"
        raise BadInput(Problem(rule, file="--to", value=to))
    must_end_in(file, ".jsonl")
    document = _document(scenario, set_)
    trace = _workload_of(document, scenario.parent)
    lost = exporting.export(trace, file, TOOLS[to])
    out.print(f"{len(trace):,} requests in {escape(str(file))}", style="dim")
    for each in lost:
        out.print(f"note: {escape(each)}", soft_wrap=True)
    out.print(escape(exporting.command(TOOLS[to], _repository(document), file, len(trace))), soft_wrap=True)


def _document(scenario: Path, set_: list[str] | None) -> Document:
    document = read(scenario)
    document.set(set_ or [])
    return document


def _workload_of(document: Document, folder: Path) -> Trace:
    """The requests of a scenario's workload, by its seed. Raises `BadInput`."""
    if "workload" not in document.data:
        raise BadInput(document.problem(("workload",), "is required"))
    workload: Workload = document.check(Workload, at=("workload",))
    seed = document.data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise BadInput(document.problem(("seed",), "must be a whole number of at least 0", seed))
    return build(workload, seed, folder)


def _repository(document: Document) -> str:
    """The checkpoint of a scenario's model as Hugging Face names it; MODEL where no published one is known."""
    try:
        return specs.model(str(document.data.get("model"))).repository or "MODEL"
    except LookupError:
        return "MODEL"
