"""``chairlift plan``: what to buy, and how to run it, so that a load is served as promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chairlift.sim.bad_input import BadInput, Problem, saving
from chairlift.sim.cli.shipped import PLANS
from chairlift.sim.cli.sweep import AddressOption, ExecutorOption, JobsOption, check_executor, executor_for
from chairlift.sim.cli.terminal import console, status, stopped
from chairlift.sim.plan import page as plan_page
from chairlift.sim.plan import tables as plan_tables
from chairlift.sim.plan.answer import Answer, answers
from chairlift.sim.plan.bounds import Bounds
from chairlift.sim.plan.emit import Target, emitted
from chairlift.sim.plan.file import BuyingPlan, read_plan
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.sweep.file import shipped_file
from chairlift.sim.sweep.journal import Journal

WIDTH = 120  # columns of tables in a pipe
EVERY_S = 10.0  # between lines about progress where there is no terminal

out = console(least=WIDTH)
err = console(stderr=True)


def plan(
    plan: Annotated[str, typer.Argument(help="A plan file, or the name of a shipped one.")],
    rate: Annotated[
        list[float] | None,
        typer.Option("--rate", metavar="R", min=1e-9, help="Requests/s to buy for, instead of the file's. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the base scenario. Repeatable."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go; default runs/<plan>.")
    ] = None,
    jobs: JobsOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what bounds exclude, and stop.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let policy and router files named in the YAML run their code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead.")] = False,
    emit: Annotated[
        Target | None,
        typer.Option("--emit", help="Print only how the answer is started: for a shell, Docker or Kubernetes."),
    ] = None,
    what_would_change: Annotated[
        bool,
        typer.Option(
            "--what-would-change", help="Also the smallest change of load, price or promise at which the answer flips."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """What do I buy, and how do I run it, so that this load meets this SLO? With intervals, and what they rest on.

    A plan is a base scenario, promises (slo), axes of systems one could buy (gpu, tensor_parallel, replicas,
    policy.…), prices, and a rate_per_s to buy for; or a deployment (today) whose capacity and headroom are asked.

    DIR gets plan.json, plan.parquet (a row for each system and rate looked at) and plan.html, one page with plots.
    Stop it whenever you like: the same command goes on where it stopped. Exit status 1: nothing in the space will do.

    [bold]chairlift plan chat_8b[/bold]
    """
    check_executor(executor, jobs, address)
    if as_json and emit is not None:
        raise BadInput(Problem("must not be given beside --json: each says what is printed", file="--emit", value=emit))
    if dry_run:
        asked = {"--json": as_json, "--emit": emit, "--what-would-change": what_would_change}
        if given := [option for option, value in asked.items() if value]:
            raise BadInput(Problem("must not be given with --dry-run, which simulates nothing", file=given[0]))
    found = read_plan(shipped_file(plan, PLANS, "plan"), set_ or [], rate or [], trust)
    folder = out_dir or Path("runs") / found.name
    if dry_run:
        _say_bounds(found)
        return
    answer: Answer | None = None
    with Journal(folder) as journal:
        spec = found.spec
        runs = Simulations(journal, executor_for(executor, jobs, address), tuple(spec.slo), spec.search.seed)
        try:
            with status(quiet, EVERY_S) as told:
                for answer in answers(found, runs, told, what_would_change):
                    plan_tables.write(answer, folder)
        except KeyboardInterrupt as stop:
            err.print(f"interrupted: what was found is in {escape(str(folder))}; the same command goes on")
            raise typer.Exit(stopped(stop)) from None
        assert answer is not None
        with saving(folder):
            plan_page.write(answer, folder / "plan.html")
    if emit is not None:
        if answer.failed or answer.chosen is None or answer.chosen.setup is None:
            err.print("nothing in the space will do: there is nothing to start")
            raise typer.Exit(1)
        sys.stdout.write(emitted(emit, found.name, answer.launches, answer.beside))
    elif as_json:
        sys.stdout.write(json.dumps(plan_tables.as_json(answer, folder), indent=2, allow_nan=False, default=str) + "\n")
    elif not quiet:
        plan_tables.show(out, answer)
        out.print(f"\nresults in {escape(str(folder))}: plan.html, plan.json, plan.parquet", style="dim")
    if answer.failed:
        raise typer.Exit(1)


def _say_bounds(plan: BuyingPlan) -> None:
    """Print what each system can do at most, and why the others cannot be."""
    bounds = Bounds(plan.spec.slo)
    for candidate in sorted(plan.candidates, key=lambda c: c.usd_per_hour):
        if candidate.setup is None:
            out.print(f"{escape(candidate.name)}: [red]{escape(candidate.misfit)}[/red]")
            continue
        limit = bounds(candidate)
        said = limit.impossible or f"at most {limit.rate_per_s:,.4g}/s, however scheduled"
        head = f"{candidate.name}: ${candidate.usd_per_hour:,.2f}/h, {candidate.backend}"
        out.print(f"{escape(head)}; {escape(said)}")
