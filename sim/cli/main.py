"""The command line: which commands there are, and how bad input ends one. Each command has its file."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.compiled import stale
from chairlift.sim.cli.terminal import Interruptible, console, forgive_encodings, interruptible, terminable

# A command's module, its function (or group of commands) there, and what the list of commands says of it: the first
# sentence of its docstring, written here once more so that `chairlift --help` need not import the whole simulator.
COMMANDS = {
    "run": (
        "run",
        "run",
        "Simulate a scenario: a table here, and summary.json, requests.parquet, steps.parquet in DIR.",
    ),
    "list": (
        "lists",
        "list_",
        "List what scenarios can name: policies, routers, models, gpus, backends, workloads, trace formats and more.",
    ),
    "schema": (
        "schema",
        "schema",
        "Print the JSON Schema of scenario files, for editors that complete and check YAML.",
    ),
    "calibrate": (
        "calibrate",
        "calibrate",
        "Fit a profile of step costs to what an engine was recorded doing, or to what its clients measured.",
    ),
    "validate": (
        "calibrate",
        "validate_",
        "Predict what was measured, and compare: durations, latencies and, of recordings, steps and preemptions.",
    ),
    "sweep": (
        "sweep",
        "sweep",
        "Run a scenario at every point of some axes, under several seeds: one row a run in DIR/results.parquet.",
    ),
    "compare": (
        "compare",
        "compare",
        "Compare policies (or any axis) of a sweep: paired differences with intervals, ranks, Pareto fronts.",
    ),
    "diff-engines": (
        "diff_engines",
        "diff_engines",
        "Say what another engine, or another version of one, changes for your load, and by which rule.",
    ),
    "agree": (
        "agree",
        "agree",
        "Compare a measured study with its prediction: errors, rank correlation, regret of choosing by the simulator.",
    ),
    "check": (
        "check",
        "check",
        "Check what a policy or router promises: exit status 0 if it keeps all, 1 if not, 2 if it cannot be used.",
    ),
    "report": (
        "report",
        "report",
        "Draw a run: one HTML file that works offline, with the slot diagram, distributions and curves over time.",
    ),
    "explain": (
        "report",
        "explain",
        "Tell the life of a request: why it queued, its chunks, who preempted it, how it decoded.",
    ),
    "plan": (
        "plan",
        "plan",
        "What do I buy, and how do I run it, so that this load meets this SLO? With intervals, and what they rest on.",
    ),
    "explain-cost": (
        "costs",
        "explain_cost",
        "Say where the time of one engine step goes, part by part, by the roofline.",
    ),
    "fit-check": (
        "costs",
        "fit_check",
        "Say on which GPUs a model fits and how much KV there is room for, with the sum.",
    ),
    "show": ("shipped", "show", "Print a shipped scenario, sweep or plan, with its comments."),
    "new": (
        "shipped",
        "new",
        "Begin a scenario, sweep or plan of your own with a copy of a shipped one, comments and all.",
    ),
    "version": ("doctor", "version_", "Print the version, and whether the core runs compiled."),
    "doctor": (
        "doctor",
        "doctor",
        "Say what is installed, which GPUs there are, and whether a simulation here comes out right.",
    ),
    "trace": ("trace", "app", "Look at request traces, and write them."),
}

err = console(stderr=True)


class Commands(Interruptible):
    """The commands, each imported when it is used."""

    _listing = False

    def list_commands(self, _ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        """The command of this name; while the help is printed only its name and help."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, says = COMMANDS[cmd_name]
        if self._listing:
            return TyperCommand(cmd_name, help=says)
        made = getattr(import_module(f"chairlift.sim.cli.{module}"), attribute)
        if not isinstance(made, typer.Typer):
            function, made = made, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            made.command(cmd_name)(function)
        command = typer.main.get_command(made)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


app = typer.Typer(
    name="chairlift",
    cls=Commands,
    help="Replay LLM request traces against swappable serving schedulers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        import_module("chairlift.sim.cli.doctor").version_()
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in ("version", "doctor") and (changed := stale()):  # those two tell it
        rule = "was changed after it was compiled: make fast compiles it again, make clean goes back to Python"
        raise BadInput([Problem(rule, file=str(path)) for path in changed])


def main() -> None:
    """The console script: bad input is one message and exit status 2, never a traceback."""
    forgive_encodings()
    try:
        with interruptible(), terminable():
            app(standalone_mode=True)
    except (Exception, SystemExit) as error:
        told = _told(error)
        if not told:
            raise
        # the output itself cannot be written, and Python would flush it once more at its end
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        for each in told:
            err.print(f"[red]error:[/red] {escape(str(each))}", soft_wrap=True)
        raise SystemExit(2) from None


def _told(error: Exception | SystemExit) -> list[object]:
    """What to say of ``error``, line by line; nothing of a defect of Chairlift's own, or an exit that it asks for."""
    if isinstance(error, BadInput):
        return list(error.told())
    if isinstance(error, SystemExit) and "chairlift.sim.scenario.policy_files" not in sys.modules:
        return []  # nobody else's code has run
    from chairlift.backend.base import DeviceError
    from chairlift.backend.specs import BadTable
    from chairlift.policies.base import PolicyError
    from chairlift.sim.scenario.policy_files import blame

    if isinstance(error, PolicyError | DeviceError | BadTable):
        return [error]
    blamed = blame(error) or _of_the_machine(error)
    return [] if blamed is None else [blamed]


def _of_the_machine(error: BaseException) -> Problem | None:
    """What the system refused: a file, the output, memory. None for a defect of Chairlift's own."""
    if isinstance(error, MemoryError):
        return Problem(f"not enough memory{f': {error}' if str(error) else ''}")
    if isinstance(error, OSError):
        return Problem(f"cannot be used: {error.strerror or error}", file=str(error.filename or "standard output"))
    return None


__all__ = ["app", "main"]
