"""``chairlift report`` and ``chairlift explain``: look at what a run has left."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, saving
from chairlift.sim.cli import terminal as progress
from chairlift.sim.cli.terminal import must_end_in, run_folder
from chairlift.sim.results.reader import Results, RunResults, read
from chairlift.sim.units import PS_PER_S

Folder = Annotated[
    Path,
    typer.Argument(
        readable=False, metavar="DIR", help="A run's folder, or the name of a run from here.", show_default=False
    ),
]
Case = Annotated[str | None, typer.Option("--case", help="Which case, of a study with several; default: the last.")]
Variant = Annotated[str | None, typer.Option("--variant", help="Which variant of a comparison.")]
MB = 1e6
HERE = Path()
WIDTH = 120  # columns of what goes to a file or a pipe


def report(
    folder: Folder,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where it goes; default DIR/report.html, or DIR/trace.json."),
    ] = None,
    perfetto: Annotated[
        bool, typer.Option("--perfetto", help="Write a trace for ui.perfetto.dev instead (.gz in FILE compresses it).")
    ] = False,
    begin: Annotated[
        float | None, typer.Option("--from", metavar="SECONDS", min=0, help="Show steps from this simulated time on,")
    ] = None,
    end: Annotated[float | None, typer.Option("--to", metavar="SECONDS", min=0, help="and up to this one.")] = None,
    case: Case = None,
    variant: Variant = None,
) -> None:
    """Draw a run: one HTML file that works offline, with the slot diagram, distributions and curves over time.

    [bold]chairlift run anyscale_23x --report[/bold]

    does both in one go. Runs of more than 20,000 requests need --events for their slot diagram. Where a page has
    room for all steps it shows all, whatever --from and --to. With --perfetto the steps, slots and requests become a
    trace instead; --case and --variant choose the runs in it.
    """
    if perfetto:
        must_end_in(out_file, ".json", ".json.gz", hint=", for it is a trace; a page is written without --perfetto")
    else:
        must_end_in(
            out_file, ".html", hint=", for it is a page; with --perfetto a trace is written, as .json or .json.gz"
        )
    folder = run_folder(folder)
    results = read(folder)
    span = _span(results, begin, end)
    if perfetto:
        _perfetto(results, out_file or folder / "trace.json", span, case, variant)
    else:
        if case is not None or variant is not None:
            raise BadInput(Problem("goes with --perfetto; a page shows all runs", file="--case, --variant"))
        say(draw(results, out_file or folder / "report.html", span))


def draw(results: Results, path: Path, span_s: tuple[float, float] | None = None) -> str:
    """Write the HTML report to ``path``; one line that says so. Raises `BadInput` if it cannot be written."""
    from chairlift.sim.report import page

    with saving(path):
        size = page.write(results, path, span_s)
    return f"{escape(str(path))} ({size / MB:.1f} MB): open it in a browser"


def explain(
    request: Annotated[
        int | None, typer.Argument(metavar="[REQUEST_ID]", help="Row of the trace, from 0.", show_default=False)
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--in",
            metavar="DIR",
            help="A run's folder, or the name of a run from here; default: this folder.",
            show_default=False,
        ),
    ] = HERE,
    slowest: Annotated[
        int | None, typer.Option("--slowest", metavar="N", min=1, help="Explain the N slowest requests instead.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="LATENCY", help="What slow means: e2el (the default), ttft or tpot.")
    ] = None,
    case: Case = None,
    variant: Variant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the life of a request: why it queued, its chunks, who preempted it, how it decoded.

    [bold]chairlift explain 17 --in runs/failures --variant "no failure"[/bold]

    [bold]chairlift explain --slowest 5 --by ttft --in runs/failures --variant "no failure"[/bold]
    """
    from chairlift.sim.report import explain as lives
    from chairlift.sim.report.timeline import TIMES

    if by is not None and by not in TIMES:
        raise BadInput(Problem(f"no such order{did_you_mean(by, list(TIMES))}", file="--by", value=by))
    if (request is None) == (slowest is None):
        raise BadInput(Problem("give a request's number, or --slowest N", file="explain"))
    if by is not None and slowest is None:
        raise BadInput(Problem("must not be given without --slowest", file="--by", value=by))
    if folder == HERE and not (HERE / "study.json").exists():
        raise BadInput(Problem("say which run, by --in DIR: this folder holds none", file="explain"))
    run = read(run_folder(folder)).pick(case, variant)
    chosen = lives.slowest(run, slowest, by or "e2el") if slowest is not None else [request or 0]
    told = lives.explain(run, chosen)
    if as_json:
        found = [
            {
                "request": life.request,
                **_jsonable(life.facts),
                "moments": [{"time_s": m.time_ps / 1e12, "what": m.words} for m in life.moments],
            }
            for life in told
        ]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    console = progress.console(least=WIDTH)
    for k, life in enumerate(told):
        console.print(("\n" if k else "") + f"[bold]request {life.request}[/bold]  {escape(life.headline)}")
        lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        lines.add_column(justify="right", no_wrap=True)
        lines.add_column(overflow="fold")
        for moment in life.moments:
            lines.add_row(f"{moment.time_ps / 1e12:,.3f} s", escape(moment.words))
        console.print(lines)


def _perfetto(
    results: Results, path: Path, span: tuple[float, float] | None, case: str | None, variant: str | None
) -> None:
    from chairlift.sim.report import perfetto

    runs = [results.pick(case, variant)] if variant is not None or not results.compares else _of_case(results, case)
    with saving(path):
        count = perfetto.write(results, runs, path, span)
    bare = [run.label or results.name for run in runs if not run.has_events]
    if bare:
        say(f"no slots of {escape(', '.join(bare))}: run again with --events for those")
    say(f"{escape(str(path))} ({path.stat().st_size / MB:.1f} MB, {count:,} events): open it in ui.perfetto.dev")


def _of_case(results: Results, case: str | None) -> list[RunResults]:
    wanted = results.cases[-1] if case is None else case
    if wanted not in results.cases:
        raise BadInput(
            Problem(f"there is no such run{did_you_mean(wanted, results.cases)}", file="--case", value=wanted)
        )
    return [run for run in results.runs if run.case == wanted]


def _span(results: Results, begin: float | None, end: float | None) -> tuple[float, float] | None:
    """The seconds that the user asks for. Raises `BadInput`: there are none, or no step is in them."""
    if begin is None and end is None:
        return None
    span = (begin or 0.0, float("inf") if end is None else end)
    if span[1] <= span[0]:
        raise BadInput(Problem(f"must be after --from ({span[0]:g})", file="--to", value=span[1]))
    starts = [steps["start_ps"] for run in results.runs for steps in run.steps("start_ps") if len(steps["start_ps"])]
    first = min((int(each[0]) for each in starts), default=0) / PS_PER_S
    last = max((int(each[-1]) for each in starts), default=0) / PS_PER_S
    if starts and span[0] > last:
        raise BadInput(Problem(f"must be at most {last:,.3f} s, when the last step begins", file="--from", value=begin))
    if starts and span[1] < first:
        raise BadInput(Problem(f"must be at least {first:,.3f} s, when the first step begins", file="--to", value=end))
    return span


def _jsonable(facts: dict[str, Any]) -> dict[str, Any]:
    from chairlift.sim.results.records import Status

    named = {name: None if value != value else value for name, value in facts.items()}  # NaN is not JSON
    return {**named, "status": Status(facts["status"]).name.lower()}


def say(line: str) -> None:
    """Print one line."""
    progress.console(least=WIDTH).print(line, soft_wrap=True)
