"""``chairlift check``: what a policy or a router promises, and whether it keeps it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from chairlift.policies.base import Router
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.cli.terminal import console, status
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.policy_files import file_and_class
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.workload.formats.chairlift import save

if TYPE_CHECKING:
    from chairlift.sim.conformance.cases import Case
    from chairlift.sim.conformance.promises import Broken, Checklist

SHOWN = 12  # requests of a counterexample that are printed


def check(
    subject: Annotated[
        str, typer.Argument(metavar="FILE[:Class]", help="A policy's or a router's file, which is run; or a name.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set budget=16. Repeatable."),
    ] = None,
    case: Annotated[str | None, typer.Option(metavar="NAME", help="Try it in this case only.")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            readable=False, metavar="CSV", help="Serve these requests instead, as a broken promise leaves them."
        ),
    ] = None,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the requests go that show a broken promise.")
    ] = Path("runs/check"),
) -> None:
    """Check what a policy or router promises: exit status 0 if it keeps all, 1 if not, 2 if it cannot be used.

    Each promise is tried on small workloads, and with each choice of the settings that have only a few. Of a broken one
    you see the step, the numbers and the fewest requests that show it. [bold]chairlift check my_policy.py[/bold]
    """
    from chairlift.sim.conformance import cases as known  # here: no other command waits for the suite
    from chairlift.sim.conformance.policy import check_policy
    from chairlift.sim.conformance.router import check_router

    kind = _find(subject)
    settings = _settings(kind, subject, set_ or [])
    routes = issubclass(kind, Router)
    cases: tuple[Case, ...] = known.ROUTER_CASES if routes else known.POLICY_CASES
    if case is not None:
        cases = (_case(case, cases),)
    rows = None if requests is None else known.read_rows(requests)
    out = console()
    with status(False) as told:
        if routes:
            found = check_router(kind, settings, cases, rows, told)
        else:
            try:
                found = check_policy(kind, settings, cases, rows, told=told)
            except ValueError as misfit:
                raise BadInput(Problem(str(misfit), file=subject)) from None
    out.print(f"[bold]{'router' if routes else 'policy'} {kind.__name__}[/bold] of {escape(subject)}", soft_wrap=True)
    again = ["chairlift", "check", subject, *(f"--set={each}" for each in set_ or [])]
    for verdict in found:
        mark = {"kept": "[green]✓[/green]", "broken": "[red]✗[/red]", "unchecked": "–"}[verdict.state]
        why = f": not checked: {verdict.why}" if verdict.state == "unchecked" else ""
        out.print(f"{mark} {verdict.promise.says}{why}", soft_wrap=True)
        if verdict.broken is not None:
            for line in _told(verdict.broken, out_dir / f"{kind.__name__}-{verdict.promise.name}.csv", again):
                out.print(f"    {escape(line)}", soft_wrap=True)
    out.print(_sum(found))
    raise typer.Exit(1 if found.broken else 0)


def _find(name: str) -> type[Any]:
    """The policy or router that ``name`` means. Raises `BadInput`."""
    kinds = (plugins.POLICY, plugins.ROUTER)
    if (file := file_and_class(name)) is not None:
        return plugins.from_file(Path(file[0]), file[1], *kinds)
    for kind in kinds:
        if name in plugins.names(kind):
            return plugins.find(kind, name)
    known = [known for kind in kinds for known in plugins.names(kind)]
    raise BadInput(Problem(f"no such policy or router, and no file.py{did_you_mean(name, known)}", value=name))


def _settings(kind: type[Any], name: str, assignments: list[str]) -> dict[str, Any]:
    """The settings that the user gives, checked. Raises `BadInput`."""
    document = Document({}, {}, name)
    document.set(assignments)
    checked = document.check(plugins.settings(kind)).model_dump()
    return {key: checked[key] for key in document.data}


def _case(name: str, cases: tuple[Case, ...]) -> Case:
    for case in cases:
        if case.name == name:
            return case
    rule = f"no such case{did_you_mean(name, [case.name for case in cases])}"
    raise BadInput(Problem(rule, file="--case", value=name))


def _told(broken: Broken, file: Path, again: list[str]) -> list[str]:
    """A broken promise in lines; its requests are written to ``file``, and the last line runs them again."""
    from chairlift.sim.conformance.cases import trace_of

    lines = [broken.what]
    if broken.case is None:
        return lines
    given = "".join(f", with {key}={value!r}" for key, value in broken.settings.items())
    lines.append(f"case {broken.case.name}: {broken.case.says}{given}")
    file.parent.mkdir(parents=True, exist_ok=True)
    save(trace_of(broken.rows), file)
    rows = file.read_text(encoding="utf-8").splitlines()
    lines.append(f"{len(broken.rows)} request{'s' * (len(broken.rows) != 1)} ({file}):")
    lines += [f"  {row}" for row in rows[: SHOWN + 1]]
    if len(rows) > SHOWN + 1:
        lines.append("  …")
    sets = [f"--set={key}={value}" for key, value in broken.settings.items()]
    lines.append("again: " + shlex.join([*again, *sets, "--case", broken.case.name, "--requests", str(file)]))
    return lines


def _sum(found: Checklist) -> str:
    states: list[str] = [verdict.state for verdict in found]
    told = ", ".join(
        f"{states.count(state)} {words}"
        for state, words in (("kept", "promises kept"), ("broken", "broken"), ("unchecked", "not checked"))
    )
    if found.refused:
        told += f"; it refused {found.refused} requests that each would have had room"
    return told
