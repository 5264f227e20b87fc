"""Shipped scenarios, sweeps and plans by name; ``chairlift show`` prints one, ``chairlift new`` copies one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, saving
from chairlift.sim.cli.terminal import console
from chairlift.sim.scenario.files import files_read
from chairlift.sim.scenario.resolved import each_case
from chairlift.sim.scenario.yaml_document import read

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
PLANS, SWEEPS = SCENARIOS / "plans", SCENARIOS / "sweeps"

out = console()


def show(
    name: Annotated[str, typer.Argument(help="A shipped scenario, sweep or plan.", autocompletion=complete)],
) -> None:
    """Print a shipped scenario, sweep or plan, with its comments.

    [bold]chairlift show policy_zoo[/bold]
    """
    sys.stdout.write(_any(name).read_text(encoding="utf-8"))


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not be there yet.")],
    from_: Annotated[str, typer.Option("--from", metavar="NAME", help="What to begin with: a shipped file's name.")],
) -> None:
    """Begin a scenario, sweep or plan of your own with a copy of a shipped one, comments and all.

    The copy has no name of its own: its results lie in runs/ under the file's, beside those of the original.

    [bold]chairlift new my.yaml --from routing && chairlift run my.yaml[/bold]
    """
    source = _any(from_)
    if file.suffix not in (".yaml", ".yml"):
        raise BadInput(Problem("must end in .yaml", file="FILE", value=str(file)))
    text = re.sub("^name:.*\n", "", source.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    for said, path in _files(source).items():
        text = text.replace(said, Path(os.path.relpath(path, file.parent.resolve())).as_posix())
    with saving(file):
        try:
            with file.open("x", encoding="utf-8") as written:
                written.write(text)
        except FileExistsError:
            raise BadInput(Problem("is there already: choose another name", file=str(file))) from None
    verb = {SWEEPS: "sweep", PLANS: "plan"}.get(source.parent, "run")
    out.print(f"{escape(str(file))} is yours to change; next: chairlift {verb} {escape(str(file))}", soft_wrap=True)


def complete(begun: str) -> list[str]:
    """Shipped scenarios, sweeps and plans whose name begins so, with or without their folder; for shells."""
    known = _by_name(sorted(SCENARIOS.rglob("*.yaml")))
    names = dict.fromkeys(name for full in known for name in (full, full.rpartition("/")[2]))
    return [name for name in names if name.startswith(begun)]


def find_scenario(name: str) -> Path:
    """The file that ``name`` means: a path, or a shipped scenario with or without its folder. Raises `BadInput`."""
    path = Path(name)
    known = shipped()
    if os.path.exists(path) or path.suffix in (".yaml", ".yml", ".json"):
        return path
    if (found := _named(name, known)) is not None:
        return found
    if len(path.parts) > 1 and path.parts[0] not in {full.partition("/")[0] for full in known}:
        return path
    raise BadInput(Problem(f"no such file, and no scenario of that name{_nearest(name, known)}", value=name))


def shipped() -> dict[str, Path]:
    """The file of each shipped scenario by name. Names in folders, such as ``research/policy_zoo``, come last."""
    files = sorted(set(SCENARIOS.rglob("*.yaml")) - set(SWEEPS.rglob("*")) - set(PLANS.rglob("*")))
    return _by_name(files)


def _any(name: str) -> Path:
    """The shipped scenario, sweep or plan of that name. Raises `BadInput`."""
    known = _by_name(sorted(SCENARIOS.rglob("*.yaml")))
    if (found := _named(name, known)) is None:
        raise BadInput(Problem(f"no shipped scenario, sweep or plan of that name{_nearest(name, known)}", value=name))
    return found


def _by_name(files: list[Path]) -> dict[str, Path]:
    files = sorted(files, key=lambda file: (len(file.parts), file))
    return {file.relative_to(SCENARIOS).with_suffix("").as_posix(): file for file in files}


def _named(name: str, known: dict[str, Path]) -> Path | None:
    """That of ``known`` called ``name``, with or without its folder."""
    return known.get(name) or next((file for full, file in known.items() if full.rpartition("/")[2] == name), None)


def _nearest(name: str, known: dict[str, Path]) -> str:
    return did_you_mean(name, sorted({*known, *(full.rpartition("/")[2] for full in known)}))


def _files(source: Path) -> dict[str, Path]:
    """Text in the shipped file ``source`` that names another file → that file."""
    document = read(source)
    found: dict[str, Path] = {}
    base = document.data.get("base")
    if isinstance(base, str) and (source.parent / base).is_file():
        found[base] = (source.parent / base).resolve()
    for case in each_case(document) if "base" not in document.data else ():
        for at, named in files_read(case, source.parent).items():
            found[str(case.value(at))] = named.path
    return found
