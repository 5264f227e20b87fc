"""``chairlift run``: simulate a scenario, print its tables and write its results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli import completion, effort
from chairlift.sim.cli.shipped import complete, find_scenario
from chairlift.sim.cli.terminal import console, progress, status, stopped
from chairlift.sim.report import tables
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario.load import load
from chairlift.sim.scenario.resolved import relocated
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Study
from chairlift.sim.units import PS_PER_S

if TYPE_CHECKING:
    from chairlift.sim.plan.replay import Replay

FEW = 20_000  # requests up to which a run keeps a journal unasked; a journal costs a fifth of the time, 200 B a request
ENDS = ("rejected", "timed_out", "failed")  # of requests that are not completed
WIDTH = 100  # columns of a table that goes to a file or a pipe

out = console(least=WIDTH)
err = console(stderr=True)


def run(
    scenario: Annotated[
        str, typer.Argument(help="A scenario file, or the name of a shipped one.", autocompletion=complete)
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key: --set compare.0.policy.batch=8. Repeatable.",
            autocompletion=completion.keys,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P",
            help="Run this policy instead of the file's: a name, or file.py[:Class]. Twice: compare.",
            autocompletion=completion.policies,
        ),
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(
            metavar="R",
            help="Route by this router instead of the file's: a name, or file.py[:Class]. Twice: compare.",
            autocompletion=completion.routers,
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="B", help="Price steps with this backend.", autocompletion=completion.backends)
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go; default runs/<scenario>.")
    ] = None,
    no_leap: Annotated[
        bool, typer.Option("--no-leap", help="Take every engine step on its own: the same results, slowly.")
    ] = False,
    draws: Annotated[
        int, typer.Option("--uncertainty", metavar="N", min=0, help="N more runs with other seeds and profile errors.")
    ] = 0,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let policy and router files named in the YAML run their code.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json (or comparison.json) instead.")] = False,
    events: Annotated[
        bool | None,
        typer.Option(
            "--events/--no-events",
            help="Keep what happens to each request, for report and explain; default: up to 20,000 requests a run.",
        ),
    ] = None,
    report_: Annotated[bool, typer.Option("--report", help="Write report.html too: pictures of the run.")] = False,
    system: Annotated[
        int | None, typer.Option("--system", metavar="N", min=1, help="Of a plan.json: run this system of the plan.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="R", min=1e-9, help="With --system: at this load, requests/s.")
    ] = None,
) -> None:
    """Simulate a scenario: a table here, and summary.json, requests.parquet, steps.parquet in DIR.

    [bold]chairlift run anyscale_23x[/bold] replays the continuous-batching post.
    """
    path = find_scenario(scenario)
    of_plan = system is not None
    if path.suffix == ".json":
        from chairlift.sim.plan.replay import is_plan

        of_plan = of_plan or is_plan(path)
    again_of_plan: Replay | None = None
    if of_plan:
        from chairlift.sim.plan.replay import replayed  # here: half a second that other runs need not wait

        options = {"--set": set_, "--policy": policy, "--router": router, "--backend": backend, "--uncertainty": draws}
        if given := [option for option, value in options.items() if value]:
            raise BadInput(Problem("must not be given with a plan.json, whose system runs as it is", file=given[0]))
        if system is None:
            raise BadInput(Problem("is the result of a plan: say which of its systems, --system N", file=str(path)))
        again_of_plan = replayed(path, system, rate, trust)
        study = again_of_plan.study
    elif rate is not None:
        raise BadInput(Problem("must not be given without --system and a plan.json", file="--rate"))
    else:
        study = load(path, set_ or [], policy or [], backend, trust, router or [])

    def again(draw: int) -> Study:
        seed = study.setups[0].seed + draw
        return load(path, [*(set_ or []), f"seed={seed}"], policy or [], backend, trust, router or [])

    if draws:
        from chairlift.sim.calibration import uncertainty

        uncertainty.check(study)
    folder = out_dir or Path("runs") / study.name
    study.resolved = relocated(study.resolved, folder)
    if not quiet and (long := effort.said(study.setups, 1 + draws)):
        err.print(f"{long}; Ctrl-C keeps the runs that are finished", soft_wrap=True)
    outcomes: list[Outcome] = []
    try:
        journal = True if report_ and events is None else events
        with Writer(folder, study) as writer:
            for outcome in _simulated(study, not no_leap, quiet or as_json, journal):
                writer.add(outcome)
                outcomes.append(outcome)
            if draws:
                with status(quiet or as_json) as told:
                    spread = uncertainty.repeat(study, again, draws, writer.folder, told)
    except KeyboardInterrupt as stop:
        kept = f"{len(outcomes)} of {len(study.setups)} runs are in" if outcomes else "nothing is written to"
        err.print(f"interrupted: {kept} {escape(str(folder))}")
        raise typer.Exit(stopped(stop)) from None
    drawn = ""
    if report_:
        from chairlift.sim.cli.report import draw
        from chairlift.sim.results.reader import read

        drawn = draw(read(folder), folder / "report.html")
    if as_json:
        name = "comparison.json" if len(study.setups) > 1 else "summary.json"
        sys.stdout.write((folder / name).read_text(encoding="utf-8"))
    elif not quiet:
        tables.show(out, study, outcomes)
        wall = sum(o.summary["wall_s"] for o in outcomes)
        count = sum(len(o.requests.status) for o in outcomes)
        if draws:
            out.print(uncertainty.table(spread))
        out.print(f"\n{count:,} requests simulated in {wall:.2f} s; results in {escape(str(folder))}", style="dim")
        if drawn:
            out.print(drawn, soft_wrap=True)
        if again_of_plan is not None:
            _compare(again_of_plan, outcomes[0])
    if nothing := [o for o in outcomes if not o.summary["completed"]]:
        for outcome in nothing:
            counts = {key.replace("_", " "): outcome.summary[key] for key in ENDS}
            ends = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
            label = " ".join(filter(None, (outcome.setup.case, outcome.setup.variant))) or study.name
            if why := outcome.assumptions.get("refused"):
                ends += f" ({why})"
            err.print(escape(f"{label}: no request was completed: {ends}"), soft_wrap=True)
        raise typer.Exit(1)


def _compare(replay: Replay, outcome: Outcome) -> None:
    """Print the figures of a plan's first replication beside those of its run."""
    from chairlift.sim.plan.tables import latency_name

    found = replay.compared(outcome)
    if not found:
        out.print(f"the plan did not simulate {escape(replay.system)} at {replay.rate_per_s:g}/s")
        return
    other = [(name, there, here) for name, there, here in found if there != here]
    told = ", ".join(f"{latency_name(name)} {here:,.4g} ms" for name, _, here in found)
    out.print(f"{told}: {'as in the plan, its first replication' if not other else 'not as in the plan'}")
    for name, there, here in other:
        out.print(f"  {latency_name(name)}: {there!r} ms there, {here!r} ms here")


def _simulated(study: Study, leap: bool, silent: bool, journal: bool | None) -> Iterator[Outcome]:
    done = 0
    with progress(study, err, silent) as advance:
        for setup in study.setups:
            label = " ".join(filter(None, (setup.case, setup.variant))) or study.name
            times = (
                setup.trace.arrival_ps if setup.trace.follows is None else None
            )  # a request that follows another comes later
            advance(done, label, None)

            def arrived(count: int, before: int = done, label: str = label, times: Any = times) -> None:
                advance(before + count, label, None if times is None else float(times[count - 1]) / PS_PER_S)

            yield simulate(setup, leap, arrived, len(setup.trace) <= FEW if journal is None else journal)
            done += len(setup.trace)
