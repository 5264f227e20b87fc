"""Policies, routers and backends by name: shipped ones, and those of installed packages.

A package offers its own by entry points; what is installed is trusted::

    [project.entry-points."chairlift.policies"]
    shortest_prompt = "my_package.shortest:ShortestPrompt"      # a Scheduler
    [project.entry-points."chairlift.routers"]
    nearest = "my_package.nearest:Nearest"                      # a Router
    [project.entry-points."chairlift.backends"]
    measured = "my_package.measured:Measured"                   # a dataclass with `build`, see `backend.base.Settings`

The fields of such a dataclass are the settings that a scenario may give; pydantic checks them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from chairlift import policies
from chairlift.backend.automatic import Auto
from chairlift.backend.base import Settings
from chairlift.backend.calibrated.settings import Settings as ProfileSettings
from chairlift.backend.gpu.settings import Torch
from chairlift.backend.roofline import Efficiency
from chairlift.policies.base import Router, Scheduler
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.scenario import policy_files

BACKENDS: dict[str, type[Settings]] = {"auto": Auto, "roofline": Efficiency, "profile": ProfileSettings, "torch": Torch}


class Kind(NamedTuple):
    """Something that a scenario names and that code of others may provide."""

    word: str  # in messages, and the key in a scenario
    group: str  # of entry points
    contract: type[Any]  # what its classes are


POLICY = Kind("policy", "chairlift.policies", Scheduler)
ROUTER = Kind("router", "chairlift.routers", Router)
BACKEND = Kind("backend", "chairlift.backends", Settings)
GROUPS = (POLICY.group, ROUTER.group, BACKEND.group, "chairlift.formats")


class Named(NamedTuple):
    """A class and where it comes from."""

    kind: type[Any]
    origin: str  # "" if it is shipped; else distribution and version: ``fast-policies 1.2``


def snake(name: str) -> str:
    """``RoundRobin`` → ``round_robin``: the name by which a scenario calls a class."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@cache
def shipped(kind: Kind) -> Mapping[str, type[Any]]:
    """Chairlift's own by name. Policies and routers are the concrete classes in files of the ``policies`` package."""
    if kind is BACKEND:
        return BACKENDS
    found: dict[str, type[Any]] = {}
    for module in pkgutil.iter_modules(policies.__path__):
        if module.name != "base":
            for each in policy_files.classes(
                importlib.import_module(f"chairlift.policies.{module.name}"), kind.contract
            ):
                found[snake(each.__name__)] = each
    return dict(sorted(found.items()))


def available(kind: Kind) -> tuple[dict[str, Named], list[Problem]]:
    """Every one that can be named, shipped ones first; and one line for each installed plug-in that cannot be used."""
    found = {name: Named(each, "") for name, each in shipped(kind).items()}
    problems: list[Problem] = []
    for name, entries in _installed(kind).items():
        try:
            found[name] = Named(_load(kind, name, entries), _origin(entries[0]))
        except BadInput as error:
            problems += error.problems
    return found, problems


def find(
    kind: Kind, name: str, trust: policy_files.Trust = False, folder: Path = Path(), others: Sequence[str] = ()
) -> type[Any]:
    """The class of that name; or of ``path/to/file.py`` or ``path/to/file.py:Class``, if ``kind`` is no backend.

    A relative path starts at ``folder``. A file's code runs only if ``trust`` says so; what is installed is trusted.
    Raises `BadInput`, its path empty; the message may suggest ``others``, which may stand there too.
    """
    if kind is not BACKEND and (file := policy_files.file_and_class(name)) is not None:
        path = folder / file[0]
        if not (trust if isinstance(trust, bool) else path.resolve() in trust):
            rule = f"a {kind.word} from a file runs its code: name it with --{kind.word}, or allow it with --trust"
            raise BadInput(Problem(rule, value=name))
        return from_file(path, file[1], kind)
    if name in shipped(kind):
        return shipped(kind)[name]
    installed = _installed(kind)
    if name in installed:
        return _load(kind, name, installed[name])
    raise BadInput(Problem(f"no such {kind.word}{did_you_mean(name, [*names(kind), *others])}", value=name))


def names(kind: Kind) -> list[str]:
    """Every name that `find` knows, usable or not; no plug-in is imported."""
    return [*shipped(kind), *(name for name in _installed(kind) if name not in shipped(kind))]


def from_file(path: Path, wanted: str | None, *kinds: Kind) -> type[Any]:
    """The class ``wanted`` of a user's own file, or its only one of these ``kinds``. Runs the file's code.

    Raises `BadInput`.
    """
    found = policy_files.class_from(path, wanted, {kind.word: kind.contract for kind in kinds})
    if wrong := _unreadable(found):
        raise BadInput(Problem(wrong, file=str(path)))
    return found


def _installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """What installed packages register for ``kind``, by name."""
    return _registered(kind.group, tuple(sys.path))


@cache
def _registered(group: str, _import_path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, _origin(entry))):
        found.setdefault(entry.name, []).append(entry)
    return found


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"


def _load(kind: Kind, name: str, entries: list[EntryPoint]) -> type[Any]:
    """The class that a plug-in registers as ``name``. Raises `BadInput` with one line."""
    entry = entries[0]
    plug_in = f"the {kind.word} plug-in of {_origin(entry)}"
    if name in shipped(kind):
        raise BadInput(Problem(f"{plug_in} takes the name of a shipped {kind.word}", value=name))
    if len(entries) > 1:
        others = " and ".join(_origin(each) for each in entries)
        raise BadInput(Problem(f"several packages have a {kind.word} of this name: {others}", value=name))
    policy_files.also_blame(entry.module.partition(".")[0])
    try:
        found = entry.load()
    except Exception as error:
        said = " ".join(str(error).split())
        rule = f"{plug_in} cannot be imported: {type(error).__name__}: {said}"
        raise BadInput(Problem(rule, value=name)) from error
    if not inspect.isclass(found) or inspect.isabstract(found) or not _keeps(kind, found):
        needed = "dataclass with a method `build`" if kind is BACKEND else f"{kind.contract.__name__} subclass"
        raise BadInput(Problem(f"{plug_in} is no {needed}: {entry.value}", value=name))
    if wrong := _unreadable(found):
        raise BadInput(Problem(f"{plug_in}: {wrong}", value=name))
    return found


def _keeps(kind: Kind, found: type[Any]) -> bool:
    if kind is BACKEND:  # `Settings` is a protocol
        return dataclasses.is_dataclass(found) and callable(getattr(found, "build", None))
    return issubclass(found, kind.contract)


def _unreadable(kind: type[Any]) -> str:
    """Why the fields of ``kind`` cannot be read as settings; "" if they can."""
    try:
        settings(kind)
    except Exception as error:  # whatever its annotations raise
        return f"the settings of {kind.__name__} cannot be read: {type(error).__name__}: {error}"
    return ""


def versions() -> dict[str, str]:
    """Distribution → version and digest of its code, of every installed package that plugs in, formats included.

    The digest is there for a package that is installed in place and changes under the same version. Imports none of
    their code. Results that were made with other plug-ins, or with others of their versions, are other results.
    """
    return dict(_versions(tuple(sys.path)))


@cache
def _versions(import_path: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    modules: dict[str, set[str]] = {}
    for group in GROUPS:
        for entries in _registered(group, import_path).values():
            for entry in entries:
                if entry.dist is not None:
                    found[entry.dist.name] = entry.dist.version
                    modules.setdefault(entry.dist.name, set()).add(entry.module)
    return {name: f"{found[name]}+{_digest(modules[name])}" for name in sorted(found)}


def _digest(modules: set[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for module in modules for path in _files(module)}):
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(module: str) -> list[Path]:
    """The code of the package (or the single file) that ``module`` is in; of a namespace package, of its part."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        try:
            spec = find_spec(".".join(parts[:depth]))
        except (ImportError, ValueError):
            return []
        if spec is not None and spec.has_location and spec.origin is not None:
            origin = Path(spec.origin)
            if spec.submodule_search_locations is None:
                return [origin]
            return [path for path in origin.parent.rglob("*") if path.suffix in (".py", ".json")]
    return []


def settings(kind: type[Any]) -> type[BaseModel]:
    """A dataclass's fields as a pydantic model that refuses unknown keys; fields with ``init=False`` are left out."""
    return _settings(kind)  # type: ignore[arg-type]  # a class is hashable


@cache
def _settings(kind: type[Any]) -> type[BaseModel]:
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", strict=True), **fields(kind))  # type: ignore[call-overload,no-any-return]


def fields(kind: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Name → type and default (``...``: it has none) of a dataclass's fields, but for those with ``init=False``."""
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if not field.init:
            continue
        default: Any = ...
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = (hints[field.name], default)
    return found


def summary(kind: type[Any]) -> str:
    """The first line of a class's docstring, which lists and schemas show."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def type_name(annotation: Any) -> str:
    """A setting's type as a person writes it: ``int``, ``float | None``, ``'fcfs' | 'priority'``."""
    if annotation is type(None):
        return "None"
    if inspect.isclass(annotation):
        return annotation.__name__
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_name(arguments[0])
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, arguments))
    return " | ".join(map(type_name, arguments)) or str(annotation)
