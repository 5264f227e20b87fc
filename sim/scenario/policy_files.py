"""Policies and routers from a user's own file: its code is run here, and blamed here for what it raises."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import chairlift
from chairlift.backend.checked import a_file
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, reading

_OWN = "chairlift_policy_"  # begins the module names of users' own files
_FORMER = ("policies", "backend", "sim")  # top-level packages of Chairlift before it had one import name
_blamed: set[str] = set()  # top-level packages of installed plug-ins that were loaded

Trust = bool | frozenset[Path]  # which files a YAML may name whose code then runs: all, none, or these (resolved)


def file_and_class(name: str) -> tuple[str, str | None] | None:
    """``mine.py:Class`` → ``("mine.py", "Class")``; ``mine.py`` → ``("mine.py", None)``; None for any other name."""
    found = re.fullmatch(r"(.*\.py)(?::(\w+))?", name)
    return None if found is None else (found[1], found[2])


def class_from(path: Path, wanted: str | None, contracts: Mapping[str, type[Any]]) -> type[Any]:
    """Run the file ``path``; its class called ``wanted``, or its only one.

    ``contracts``: which base classes to look for, by the word that messages use: ``{"policy": Scheduler}``. Raises
    `BadInput`: there is no such file, it cannot be imported, or it does not hold one such class.
    """
    module = _run(path)
    found = {each.__name__: each for contract in contracts.values() for each in classes(module, contract)}
    words = " or ".join(contracts)
    if wanted is not None:
        if wanted not in found:
            rule = f"holds no {words} of that name{did_you_mean(wanted, list(found))}"
            raise BadInput(Problem(rule, file=str(path), value=wanted))
        return found[wanted]
    if not found:
        bases = " or ".join(contract.__name__ for contract in contracts.values())
        raise BadInput(Problem(f"holds no {bases} subclass", file=str(path)))
    if len(found) > 1:
        several = " or ".join(_plural(word) for word in contracts)
        rule = f"holds several {several} ({', '.join(found)}): say which, as {path}:Class"
        raise BadInput(Problem(rule, file=str(path)))
    return next(iter(found.values()))


def _plural(word: str) -> str:
    return word[:-1] + "ies" if word.endswith("y") else word + "s"


def _run(path: Path) -> ModuleType:
    with reading(path):
        a_file(path)
    if former := list(_former_imports(path)):
        raise BadInput(former)
    loader = SourceFileLoader(_OWN + path.stem, str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    sys.modules[loader.name] = module  # dataclasses look their module up by name
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(_where_it_broke(error, path)) from error
    return module


def _former_imports(path: Path) -> Iterator[Problem]:
    """Imports of the names that Chairlift's packages had before they were all under ``chairlift``.

    They are found before the file is run: if some other folder called ``policies`` lies on the import path, the old
    line would import that one. A file that is no Python yields nothing here; running it says what is wrong.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.partition(".")[0] in _FORMER:
                lines = _new_lines(node.module, [alias.name for alias in node.names])
                yield Problem(f"Chairlift's packages are under one name now: {lines}", str(path), node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in _FORMER:
                    rule = f"Chairlift's packages are under one name now: write `import chairlift.{alias.name}`"
                    yield Problem(rule, str(path), node.lineno)


def _new_lines(module: str, names: list[str]) -> str:
    """``write `from chairlift import Scheduler` and `from chairlift.policies.base import Positive```."""
    face = sorted(name for name in names if name in chairlift.__all__)
    rest = [name for name in names if name not in chairlift.__all__]
    lines = [f"`from chairlift import {', '.join(face)}`"] if face else []
    if rest:
        lines.append(f"`from chairlift.{module} import {', '.join(rest)}`")
    return "write " + " and ".join(lines)


def classes(module: ModuleType, contract: type[Any]) -> list[type[Any]]:
    """Concrete subclasses of ``contract`` that the module itself defines, in order of definition."""
    return [
        each
        for each in vars(module).values()
        if inspect.isclass(each)
        and issubclass(each, contract)
        and each.__module__ == module.__name__
        and not inspect.isabstract(each)
    ]


def _where_it_broke(error: BaseException, path: Path) -> Problem:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return Problem(f"cannot be imported: SyntaxError: {error.msg}", str(path), error.lineno)
    said = f"cannot be imported: {type(error).__name__}: {error}"
    return (blame(error) or Problem("", file=str(path)))._replace(rule=said)


def also_blame(package: str) -> None:
    """Let `blame` know of ``package``, the top-level package of an installed plug-in."""
    _blamed.add(package)


def blame(error: BaseException) -> Problem | None:
    """The line of a user's own file, or of a plug-in, that ``error`` came from; None if it came from neither."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__"))
        if name.startswith(_OWN) or name.partition(".")[0] in _blamed:
            found = trace
        trace = trace.tb_next
    if found is None:
        return None
    rule = f"raised {type(error).__name__}: {error}"
    return Problem(rule, found.tb_frame.f_code.co_filename, found.tb_lineno)
