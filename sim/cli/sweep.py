"""``chairlift sweep``: many runs of one scenario, each once."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.shipped import SWEEPS
from chairlift.sim.cli.terminal import console, stopped
from chairlift.sim.sweep import table as sweep_table
from chairlift.sim.sweep.file import Plan, read_sweep, shipped_file
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local
from chairlift.sim.sweep.racing import AFTER, Race
from chairlift.sim.sweep.runs import Executor, Lost, Row, Run, known, results

out = console(soft_wrap=True)
err = console(stderr=True, soft_wrap=True)

LEAST_MOST_JOBS = 64  # processes that any machine may be asked for
EVERY_S = 30  # between two lines of progress where there is no terminal

# options of every command that makes many runs; `check_executor` says which of them go together
JobsOption = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes; default: one a core.")]
ExecutorOption = Annotated[
    Literal["local", "ray"], typer.Option(help="Run on this machine's cores, or on a Ray cluster.")
]
AddressOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of the Ray cluster; default: the one this machine is in.")
]


def sweep(
    sweep: Annotated[str, typer.Argument(help="A sweep file, or the name of a shipped one.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the base scenario, for all runs. Repeatable."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="P", help="Add a policy to the axis policy: a name, or file.py[:Class]. Repeatable."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go; default runs/<sweep>.")
    ] = None,
    jobs: JobsOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    race: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC",
            help="Stop points early that another clearly beats in this metric (twice: in both): --race p99_ttft_ms.",
        ),
    ] = None,
    race_over: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS", help="Axes that compete in the race; default: all but workload.* and case."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run once more what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let policy and router files named in the YAML run their code.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run a scenario at every point of some axes, under several seeds: one row a run in DIR/results.parquet.

    Stop it whenever you like, even by kill -9: the same command goes on where it stopped and runs nothing twice.
    A run that fails is a row with its error. A run whose process dies again and again is named, and the same command
    tries it again. Exit status 1 says that there are such runs, or that no run completed any request.

    [bold]chairlift sweep chat_knee && chairlift compare chat_knee[/bold]
    """
    check_executor(executor, jobs, address)
    plan = read_sweep(shipped_file(sweep, SWEEPS, "sweep"), set_ or [], policy or [], trust)
    folder = out_dir or Path("runs") / plan.name
    contest = _contest(plan, race or [], race_over or [])
    total = sum(map(len, plan.runs))
    if not quiet:
        axes = ", ".join(f"{axis} ({len({str(p.get(axis)) for p in plan.points})})" for axis in plan.axes)
        what = f"{len(plan.points):,} points × {len(plan.seeds)} seeds = {total:,} runs"
        err.print(f"{escape(plan.name)}: {what}; axes: {escape(axes) or 'none'}")
    if dry_run:
        return
    with Journal(folder) as journal:
        rows: dict[int, tuple[Run, Row]] = {}
        before = len(journal)
        started = time.perf_counter()

        interrupted = 0
        lost: dict[str, str] = {}
        try:
            where = executor_for(executor, jobs, address)

            def runner(runs: Iterable[Run]) -> Generator[tuple[Run, Row], None, None]:
                return results(runs, journal, where, retry_failed)

            every = (run for nth in zip(*plan.runs, strict=True) for run in nth)
            found = contest.run(runner) if contest else runner(every)
            with _progress(total, quiet) as advance, closing(found):  # an interrupt ends the runs under way
                failures = 0
                for run, row in found:
                    rows[id(run)] = run, row
                    failures += bool(row.error)
                    advance(len(rows), failures)
        except KeyboardInterrupt as stop:
            interrupted = stopped(stop)
            rows = {id(run): (run, told) for runs in plan.runs for run in runs if (told := known(run, journal))}
        except Lost as gone:
            lost = gone.why
        new = len(journal) - before
        ordered = [rows[id(run)] for runs in plan.runs for run in runs if id(run) in rows]
        if ordered:
            sweep_table.write(folder / "results.parquet", plan.name, plan.axes, ordered)
    if interrupted:
        err.print(f"interrupted: {len(rows)} of {total} runs are in {escape(str(folder))}; the same command goes on")
        raise typer.Exit(interrupted)
    failed = [row.error for _, row in ordered if row.error]
    empty = sum(1 for _, row in ordered if row.metrics.get("completed") == 0)
    if not quiet:
        _conclude(plan, contest, ordered, new, time.perf_counter() - started, folder)
    for why, count in Counter(lost.values()).most_common(5):
        err.print(f"[red]lost:[/red] {count} runs: {escape(why)}; the same command tries them again", soft_wrap=True)
    if empty:
        err.print(f"[yellow]no request was completed[/yellow] in {empty:,} of {len(ordered):,} runs", soft_wrap=True)
    if failed:
        for error, count in Counter(failed).most_common(5):
            err.print(f"[red]failed:[/red] {escape(error)} ({count} runs)", soft_wrap=True)
    if failed or lost or empty == len(ordered):
        raise typer.Exit(1)


def check_executor(name: str, jobs: int | None, address: str | None) -> None:
    """Raise `BadInput` where options do not go together, before anything is written."""
    if name == "local" and address is not None:
        raise BadInput(Problem("must not be given without --executor ray", file="--address", value=address))
    if name == "ray" and jobs is not None:
        raise BadInput(Problem("must not be given with --executor ray, which uses the whole cluster", file="--jobs"))
    most = max(LEAST_MOST_JOBS, 4 * (os.cpu_count() or 1))
    if jobs is not None and jobs > most:
        rule = f"must be at most {most}: a process takes a core and some 60 MB"
        raise BadInput(Problem(rule, file="--jobs", value=jobs))


def executor_for(name: str, jobs: int | None, address: str | None) -> Executor:
    """The executor that ``executor`` names. Raises `BadInput` where there is no Ray cluster to join."""
    if name == "local":
        return Local(jobs)
    from chairlift.sim.sweep.on_ray import Cluster  # here: Ray is an extra

    return Cluster(address)


def _contest(plan: Plan, metrics: list[str], over: list[str]) -> Race | None:
    if not metrics:
        if over:
            raise BadInput(Problem("must not be given without --race", file="--race-over", value=over[0]))
        return None
    if len(plan.seeds) <= AFTER:
        rule = f"needs more than {AFTER} seeds: points are judged once they have {AFTER}"
        raise BadInput(Problem(rule, file="--race", value=len(plan.seeds)))
    over = over or [axis for axis in plan.axes if axis != "case" and not axis.startswith("workload.")]
    if not over:
        raise BadInput(Problem("no axis competes: name one with --race-over", file="--race"))
    return Race(plan.runs, plan.points, metrics, over)


def _conclude(
    plan: Plan, contest: Race | None, ordered: list[tuple[Run, Row]], new: int, seconds: float, folder: Path
) -> None:
    simulated = sum(row.wall_s for _, row in ordered)
    overhead = sum(row.run_s - row.wall_s for _, row in ordered) / max(1, len(ordered))
    failed = sum(1 for _, row in ordered if row.error)
    out.print(
        f"{len(ordered):,} runs: {new:,} new, {len(ordered) - new:,} known before, {failed:,} failed; "
        f"{seconds:.1f} s here; {simulated:.1f} s of simulation, {overhead * 1e3:.1f} ms a run beside it"
    )
    if contest is not None and contest.out:
        spared = sum(map(len, plan.runs)) - len(ordered)
        out.print(f"race: {len(contest.out)} of {len(plan.points)} points out, {spared} runs spared")
        for i, why in list(contest.out.items())[:10]:
            point = ", ".join(f"{axis} {value}" for axis, value in plan.points[i].items())
            out.print(f"  {escape(point)}: {escape(why)}", style="dim")
    out.print(f"results in {escape(str(folder / 'results.parquet'))}; next: chairlift compare {escape(str(folder))}")


@contextmanager
def _progress(total: int, silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal; a line now and then in a pipe or a log."""
    if silent:
        yield lambda _done, _failed: None
        return
    if not err.is_terminal:
        yield _lines(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task("runs", total=total)
        yield lambda done, failed: bar.update(
            task, completed=done, description=f"runs ({failed} failed)" if failed else "runs"
        )


def _lines(total: int) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def advance(done: int, failed: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now
            left = (now - started) / done * (total - done)
            err.print(f"{done:,} of {total:,} runs, {failed:,} failed, about {left:,.0f} s left")

    return advance
