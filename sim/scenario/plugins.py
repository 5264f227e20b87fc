"""Finding policies and routers by name or by file, and their dataclass fields as settings that pydantic checks."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model
from pydantic.fields import FieldInfo

from chairlift import policies
from chairlift.policies.base import Router, Scheduler
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean

_OWN = "chairlift_policy_"  # begins the module names of users' own policy files


def snake(name: str) -> str:
    """``RoundRobin`` → ``round_robin``: the name by which a scenario calls a class."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@cache
def _shipped(kind: type[Any]) -> dict[str, type[Any]]:
    found: dict[str, type[Any]] = {}
    for module in pkgutil.iter_modules(policies.__path__):
        if module.name != "base":
            for each in _classes(importlib.import_module(f"chairlift.policies.{module.name}"), kind):
                found[snake(each.__name__)] = each
    return dict(sorted(found.items()))


def schedulers() -> Mapping[str, type[Scheduler]]:
    """The shipped policies by name: every `Scheduler` in a file of the ``policies`` package."""
    return _shipped(Scheduler)


def routers() -> Mapping[str, type[Router]]:
    """The shipped routers by name."""
    return _shipped(Router)


def scheduler(name: str, trust: bool, folder: Path = Path()) -> type[Scheduler]:
    """The policy of that name, or that of ``path/to/file.py`` or ``path/to/file.py:Class``.

    A relative path starts at ``folder``. A file's code runs only with ``trust``. Raises `BadInput`, its path empty.
    """
    file = re.fullmatch(r"(.*\.py)(?::(\w+))?", name)
    if file is None:
        return _by_name(name, schedulers(), "policy")
    if not trust:
        rule = "a policy from a file runs its code: name it with --policy, or allow it with --trust"
        raise BadInput(Problem(rule, value=name))
    return _from_file(folder / file[1], file[2])


def router(name: str) -> type[Router]:
    """The router of that name; raises `BadInput`, its path empty."""
    return _by_name(name, routers(), "router")


def _by_name(name: str, known: Mapping[str, type[Any]], kind: str) -> type[Any]:
    if name not in known:
        raise BadInput(Problem(f"no such {kind}{did_you_mean(name, list(known))}", value=name))
    return known[name]


def _from_file(path: Path, wanted: str | None) -> type[Scheduler]:
    if not path.is_file():
        raise BadInput(Problem("no such file", file=str(path)))
    loader = SourceFileLoader(_OWN + path.stem, str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    sys.modules[loader.name] = module  # dataclasses look their module up by name
    try:
        loader.exec_module(module)
    except Exception as error:
        raise BadInput(_where_it_broke(error, path)) from error
    found = {each.__name__: each for each in _classes(module, Scheduler)}
    if wanted:
        if wanted not in found:
            rule = f"holds no policy of that name{did_you_mean(wanted, list(found))}"
            raise BadInput(Problem(rule, file=str(path), value=wanted))
        return _with_settings(found[wanted], path)
    if len(found) != 1:
        what = (
            f"several policies ({', '.join(found)}): say which, as {path}:Class" if found else "no Scheduler subclass"
        )
        raise BadInput(Problem(f"holds {what}", file=str(path)))
    return _with_settings(next(iter(found.values())), path)


def _with_settings(kind: type[Scheduler], path: Path) -> type[Scheduler]:
    try:
        settings(kind)
    except Exception as error:  # whatever its annotations raise
        rule = f"the settings of {kind.__name__} cannot be read: {type(error).__name__}: {error}"
        raise BadInput(Problem(rule, file=str(path))) from error
    return kind


def _where_it_broke(error: Exception, path: Path) -> Problem:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return Problem(f"cannot be imported: SyntaxError: {error.msg}", str(path), error.lineno)
    said = f"cannot be imported: {type(error).__name__}: {error}"
    return (blame(error) or Problem("", file=str(path)))._replace(rule=said)


def blame(error: BaseException) -> Problem | None:
    """Where in a policy file of the user's ``error`` came from; None if from no such file."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith(_OWN):
            found = trace
        trace = trace.tb_next
    if found is None:
        return None
    rule = f"raised {type(error).__name__}: {error}"
    return Problem(rule, found.tb_frame.f_code.co_filename, found.tb_lineno)


def _classes(module: ModuleType, kind: type[Any]) -> list[type[Any]]:
    """Concrete subclasses of ``kind`` that the module itself defines, in order of definition."""
    return [
        each
        for each in vars(module).values()
        if inspect.isclass(each)
        and issubclass(each, kind)
        and each.__module__ == module.__name__
        and not inspect.isabstract(each)
    ]


@cache
def settings(kind: type[Any]) -> type[BaseModel]:
    """A dataclass's fields as a pydantic model that refuses unknown keys; fields with ``init=False`` are left out."""
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {}
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            default: Any = ...
            if field.default is not dataclasses.MISSING:
                default = field.default
            elif field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            fields[field.name] = (hints[field.name], default)
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def summary(kind: type[Any]) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def type_name(info: FieldInfo) -> str:
    """A setting's type as a person writes it: ``int``, ``float | None``, ``'fcfs' | 'priority'``."""
    return _type_name(info.annotation)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    if inspect.isclass(annotation):
        return annotation.__name__
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type_name(arguments[0])
    if get_origin(annotation) is list:
        return f"list of {_type_name(arguments[0])}"
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, arguments))
    return " | ".join(map(_type_name, arguments)) or str(annotation)
