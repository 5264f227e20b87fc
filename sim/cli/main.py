"""The command line: ``chairlift run``, ``list`` and ``schema``; each other command has its file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.backend import specs
from chairlift.backend.base import DeviceError
from chairlift.policies.base import PolicyError
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.calibration import uncertainty
from chairlift.sim.cli import agree, calibrate, check, compare, completion, costs, plan, report, sweep, trace
from chairlift.sim.cli.diff_engines import diff_engines
from chairlift.sim.cli.doctor import doctor
from chairlift.sim.cli.shipped import SCENARIOS, complete, find_scenario, new, shipped, show
from chairlift.sim.cli.terminal import (
    Interruptible,
    console,
    forgive_encodings,
    progress,
    status,
    stopped,
    terminable,
)
from chairlift.sim.plan import tables as plan_tables
from chairlift.sim.plan.replay import Replay, is_plan, replayed
from chairlift.sim.report import tables
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.reader import read
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.load import load
from chairlift.sim.scenario.policy_files import blame
from chairlift.sim.scenario.resolved import relocated
from chairlift.sim.scenario.yaml_document import read as read_document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Study
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload import named
from chairlift.sim.workload.formats import read as formats

app = typer.Typer(
    name="chairlift",
    cls=Interruptible,
    help="Replay LLM request traces against swappable serving schedulers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(trace.app, name="trace")

SCENARIO_KINDS = (
    *("policies", "models", "gpus", "scenarios", "backends", "workloads", "formats", "routers", "sweeps", "plans"),
)

FEW = 20_000  # requests up to which a run keeps a journal unasked; a journal costs a fifth of the time, 200 B a request
ENDS = ("rejected", "timed_out", "failed")  # of requests that are not completed
WIDTH = 100  # columns of a table that goes to a file or a pipe

out = console(least=WIDTH)
err = console(stderr=True)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"chairlift {version('chairlift')}")
        raise typer.Exit


@app.callback()
def _options(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
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
    again_of_plan: Replay | None = None
    if system is not None or is_plan(path):
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
        uncertainty.check(study)
    folder = out_dir or Path("runs") / study.name
    study.resolved = relocated(study.resolved, folder)
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
    drawn = report.draw(read(folder), folder / "report.html") if report_ else ""
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
    found = replay.compared(outcome)
    if not found:
        out.print(f"the plan did not simulate {escape(replay.system)} at {replay.rate_per_s:g}/s")
        return
    other = [(name, there, here) for name, there, here in found if there != here]
    told = ", ".join(f"{plan_tables.latency_name(name)} {here:,.4g} ms" for name, _, here in found)
    out.print(f"{told}: {'as in the plan, its first replication' if not other else 'not as in the plan'}")
    for name, there, here in other:
        out.print(f"  {plan_tables.latency_name(name)}: {there!r} ms there, {here!r} ms here")


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help=" | ".join(SCENARIO_KINDS))],
) -> None:
    """List what scenarios can name: policies, routers, models, gpus, backends, workloads, trace formats and more."""
    if kind not in SCENARIO_KINDS:
        raise BadInput(Problem(f"no such list{did_you_mean(kind, SCENARIO_KINDS)}", value=kind))
    table = Table(show_header=kind in ("models", "gpus"), box=None, pad_edge=False)
    for row in _rows(kind, table):
        table.add_row(*map(escape, row))
    out.print(table)


@app.command()
def schema(
    sweep: Annotated[bool, typer.Option("--sweep", help="Of sweep files instead.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Of plan files instead.")] = False,
) -> None:
    """Print the JSON Schema of scenario files, for editors that complete and check YAML."""
    from chairlift.sim.cli.schema import plan_schema, scenario_schema, sweep_schema

    if sweep and plan:
        raise BadInput(Problem("must not be given beside --sweep", file="--plan"))
    found = plan_schema() if plan else sweep_schema() if sweep else scenario_schema()
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


app.command()(calibrate.calibrate)
app.command("validate")(calibrate.validate_)


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


def _rows(kind: str, table: Table) -> Iterator[tuple[str, ...]]:
    kinds = {"policies": plugins.POLICY, "routers": plugins.ROUTER, "backends": plugins.BACKEND}
    if kind in kinds:
        for name, (each, origin) in _named(kinds[kind]):
            yield name, plugins.summary(each) + (f" ({origin})" if origin else "")
            for field, (kind_of, default) in plugins.fields(each).items():
                given = "" if default is ... else f" = {default!r}"
                yield "", f"  {field}: {plugins.type_name(kind_of)}{given}"
    elif kind == "models":
        for label in (
            "model",
            "layers",
            "hidden",
            "heads",
            "KV heads",
            "params, B",
            "a token's",
            "KV B/token",
            "max length",
        ):
            table.add_column(label, justify="left" if label == "model" else "right")
        for name, m in specs.MODELS.items():
            numbers = (
                m.layers,
                m.hidden,
                m.heads,
                m.kv_heads,
                f"{m.parameters / 1e9:.2f}",
                f"{m.active_parameters / 1e9:.2f}",
                m.kv_bytes_per_token,
            )
            yield (name, *map(str, numbers), str(m.max_model_len))
    elif kind == "gpus":
        for label in ("gpu", "TFLOP/s", "GB/s", "GiB", "links GB/s", "$/h", "seen"):
            table.add_column(label, justify="left" if label in ("gpu", "seen") else "right")
        for name, g in specs.GPUS.items():
            peaks = (g.bf16_tflops, g.hbm_gb_per_s, g.memory_gib, g.nvlink_gb_per_s, g.usd_per_gpu_hour)
            yield (
                name,
                *("–" if n is None else f"{n:g}" for n in peaks),
                f"{g.price_date}: {g.price_source}" if g.price_date else "",
            )
    elif kind == "scenarios":
        for name, path in shipped().items():
            yield name, _question(path)
    elif kind in ("sweeps", "plans"):
        for path in sorted((SCENARIOS / kind).glob("*.yaml")):
            yield path.stem, _question(path)
    elif kind == "formats":
        for name in formats.names():
            yield name, formats.summary(name)
    else:
        for name in named.names():
            yield name, named.get(name).text


def _named(kind: plugins.Kind) -> Iterable[tuple[str, plugins.Named]]:
    """Every policy, router or backend there is. A plug-in that cannot be used is told of on standard error."""
    found, problems = plugins.available(kind)
    for problem in problems:
        err.print(f"[yellow]left out:[/yellow] {escape(str(problem))}", soft_wrap=True)
    return found.items()


def _question(path: Path) -> str:
    question, mark, _ = str(read_document(path).data.get("question", "")).strip().partition("?")
    return question + mark


app.command("sweep")(sweep.sweep)
app.command("compare")(compare.compare)
app.command("diff-engines")(diff_engines)
app.command("agree")(agree.agree)
app.command("check")(check.check)
app.command()(report.report)
app.command()(report.explain)
app.command("plan")(plan.plan)
app.command("explain-cost")(costs.explain_cost)
app.command("fit-check")(costs.fit_check)
app.command()(show)
app.command()(new)
app.command()(doctor)


def main() -> None:
    """The console script: bad input is one message and exit status 2, never a traceback."""
    forgive_encodings()
    try:
        with terminable():
            app(standalone_mode=True)
    except BadInput as error:
        for problem in error.told():
            err.print(f"[red]error:[/red] {escape(str(problem))}", soft_wrap=True)
        raise SystemExit(2) from None
    except (PolicyError, DeviceError, specs.BadTable) as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except Exception as error:
        blamed = blame(error) or _of_the_machine(error)
        if blamed is None:
            raise
        # the output itself cannot be written, and Python would flush it once more at its end
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        err.print(f"[red]error:[/red] {escape(str(blamed))}", soft_wrap=True)
        raise SystemExit(2) from None


def _of_the_machine(error: Exception) -> Problem | None:
    """What the system refused: a file, the output, memory. None for a defect of Chairlift's own."""
    if isinstance(error, MemoryError):
        return Problem(f"not enough memory{f': {error}' if str(error) else ''}")
    if isinstance(error, OSError):
        return Problem(f"cannot be used: {error.strerror or error}", file=str(error.filename or "output"))
    return None


__all__ = ["app", "main"]
