"""Trace files: telling a file's format, and reading it.

A format is one module of this folder, and its name is that of the module. The module has three functions, see
`Format`: ``told`` recognises a file of the format, ``read`` reads it, and ``companions`` names the files that are read
along with it. Nothing else has to be written anywhere: every module here that has ``told`` is a format.

A format may have ``options``, a tuple of keyword arguments that its ``read`` takes besides: of `OPTIONS`. An option
that a format does not have is refused.

Other packages add formats by an entry point of the group ``chairlift.formats``. Its name is the format's, and its value
is a module, or another object, that has the three functions::

    [project.entry-points."chairlift.formats"]
    our_logs = "our_package.our_logs"

Installing such a package means trusting it: its code runs as soon as the format of a file has to be told.

Every reader names the file, line and column of what it refuses. ``.gz`` is read as it is. Times are parsed as decimals
and kept as integer picoseconds, so floats lose nothing. Lines count from 1, the header first.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from codecs import getincrementaldecoder
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, reading
from chairlift.sim.workload import formats
from chairlift.sim.workload.formats import foreign
from chairlift.sim.workload.formats.text_tables import first_line, head
from chairlift.sim.workload.trace import Trace

GROUP = "chairlift.formats"  # the group of entry points

OPTIONS = {  # of a format's ``read``, and what each says
    "time_unit": "s, ms, us or ns: the unit of the file's times",
    "hash_block": "how many tokens a hash id covers",
    "drop_empty": "leave out rows without prompt or output tokens, instead of refusing them",
    "part": "which of the runs in the file, from 1",
}


class Format(Protocol):
    """What a module has that is a format."""

    def told(self, head: bytes) -> bool:
        """Whether a file that begins with ``head`` is of this format.

        ``head`` is the first 4,096 bytes, unpacked if the file is gzipped, and never blank. Of all formats at most
        one should say yes; where several do, the user has to name one.
        """
        ...

    def read(self, path: Path, limit: int | None, times: bool, **options: Any) -> Trace:
        """The trace in the file.

        Args:
            path: a file, possibly gzipped.
            limit: rows, or sessions, to read at most; None: all. What comes later is not looked at.
            times: whether the arrival times of the file are needed. If not, a file without them is read as if all
                requests arrived at time 0.
            options: those of the format's ``options`` that a user gave.

        Raises:
            BadInput: the file cannot be read, or has wrong rows.
        """
        ...

    def companions(self, path: Path) -> list[Path]:
        """The other files that `read` reads for ``path``, as many as there are, always in the same order."""
        ...


def load(
    path: str | Path,
    format: str | None = None,
    limit: int | None = None,
    *,
    times: bool = True,
    options: Mapping[str, object] | None = None,
) -> Trace:
    """The trace in a file, or in the first ``limit`` rows of it.

    Args:
        path: a file, possibly gzipped.
        format: one of `names`; None: the format is told from the file's first bytes.
        limit: rows, or sessions, to read at most; what comes later is not looked at.
        times: False lets a file without arrival times through, as if all requests arrived at time 0.
        options: values of `OPTIONS`; those that are None or False are as if they were not given.

    Raises:
        BadInput: the file cannot be read, is of another format, has wrong rows (twenty are listed), or is of a format
            that does not have one of the options.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise BadInput(Problem("must be at least 1", path="limit", value=limit))
    given = {name: value for name, value in (options or {}).items() if value not in (None, False)}
    found = _format(path, format)
    has = getattr(found, "options", ())
    if wrong := [name for name in given if name not in has]:
        rule = f"the file's format has no such option – allowed: {', '.join(has) or 'none'}"
        raise BadInput([Problem(rule, file=str(path), path=name, value=given[name]) for name in wrong])
    try:
        return found.read(path, limit, times, **given)
    except BadInput as error:
        raise BadInput([*error.problems, *_looks_like_another(path, format)]) from None


def _looks_like_another(path: Path, format: str | None) -> list[Problem]:
    """What to say besides where a file is not read as the ``format`` that was named: which one it looks like."""
    if format is None or not (start := head(path)).strip() or by_name(format).told(start):
        return []
    others = list(_telling(start)[0])
    rule = f"this file looks like {' or '.join(others)}"
    return [Problem(rule, file=str(path), path="format", value=format)] if others else []


def companions(path: Path, format: str | None = None) -> list[Path]:
    """The files that `load` reads besides ``path``; none for a file that `load` refuses."""
    try:
        return _format(path, format).companions(path)
    except BadInput:
        return []


def names() -> list[str]:
    """The names of all formats, those of installed packages included, sorted; no code of a package is run."""
    return sorted({*_shipped(), *_installed()})


def by_name(name: str) -> Format:
    """The format of that name.

    Raises:
        BadInput: there is none (the nearest name is suggested), there are several, or the package that brings it does
            not work.
    """
    points = _installed().get(name, [])
    owners = [*(["Chairlift"] if name in _shipped() else []), *map(_package, points)]
    if not owners:
        raise BadInput(Problem(f"not a trace format{did_you_mean(name, names())}", path="format", value=name))
    if len(owners) > 1:
        rule = f"several trace formats have this name, those of {' and '.join(owners)}: uninstall all but one"
        raise BadInput(Problem(rule, path="format", value=name))
    return _loaded(name, points[0]) if points else _shipped()[name]


def summary(name: str) -> str:
    """The first line of what a format says of itself, and the package that adds it, if one does; or why it fails."""
    try:
        said = (inspect.getdoc(by_name(name)) or "").partition("\n")[0]
    except BadInput as error:
        return error.problems[0].rule
    return " ".join([said, *(f"({_package(point)})" for point in _installed().get(name, []))])


def _format(path: Path, name: str | None) -> Format:
    """The format called ``name``, or that of the file. Raises `BadInput` for a file that cannot be of the format."""
    given = None if name is None else by_name(name)
    start = head(path)
    if not start.strip():
        raise BadInput(Problem("the file is empty", file=str(path)))
    if given is None:
        return _told(path, start)
    if not given.told(start):
        _refuse_unread(path, start)
        if start.startswith(b"PAR1"):
            raise BadInput(Problem(f"a Parquet file holds Chairlift's own format, not {name}", file=str(path)))
    return given


def _told(path: Path, start: bytes) -> Format:
    """The format of a file that begins with ``start``. Raises `BadInput` if none is told, or several are."""
    told, unusable = _telling(start)
    if len(told) == 1:
        return next(iter(told.values()))
    _refuse_unread(path, start)
    with reading(path):
        getincrementaldecoder("utf-8")().decode(start)  # which may end within a character
    if told:
        rule = f"may be of several trace formats ({', '.join(told)}); name it with format, for their units differ"
        raise BadInput(Problem(rule, file=str(path)))
    _refuse_broken(path, first_line(start))
    rule = f"not a trace format Chairlift knows (chairlift list formats): {foreign.described(path, start)}"
    raise BadInput([Problem(rule, file=str(path), line=1, value=first_line(start)), *unusable])


def _telling(start: bytes) -> tuple[dict[str, Format], list[Problem]]:
    """The formats that tell a file that begins with ``start`` as theirs; and what is wrong with those unusable."""
    told: dict[str, Format] = {}
    unusable: list[Problem] = []  # formats that might have told it, if only they worked
    for name in names():
        try:
            if (each := by_name(name)).told(start):
                told[name] = each
        except BadInput as error:
            unusable += error.problems
    return told, unusable


def _refuse_unread(path: Path, start: bytes) -> None:
    if (what := foreign.kind(start)) is not None:
        raise BadInput(Problem(f"this is {what}: not a format Chairlift reads yet", file=str(path)))


def _refuse_broken(path: Path, line: str) -> None:
    """Raise `BadInput` if the first line is meant to be a request in JSON, but is not JSON."""
    if line.startswith("{") and line.rstrip().endswith("}"):
        try:
            json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(Problem(f"not JSON: {error}", file=str(path), line=1, value=line)) from None


@cache
def _shipped() -> Mapping[str, Format]:
    """The formats of this folder, by name."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(formats.__path__):
        whole = f"{formats.__name__}.{module.name}"
        if whole != __name__ and hasattr(each := importlib.import_module(whole), "told"):
            found[module.name] = _checked(each, module.name, whole)
    return found


@cache
def _installed() -> Mapping[str, list[EntryPoint]]:
    """The entry points of formats, by name; their code is not loaded."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


@cache
def _loaded(name: str, point: EntryPoint) -> Format:
    """The format that an entry point brings. Raises `BadInput` if it does not work."""
    try:
        found = point.load()
    except Exception as error:  # whatever the code of the package raises
        rule = f"the trace format of {_package(point)} cannot be loaded: {type(error).__name__}: {error}"
        raise BadInput(Problem(rule, path="format", value=name)) from error
    return _checked(found, name, _package(point))


def _checked(found: Any, name: str, home: str) -> Format:
    """``found`` as a format. Raises `BadInput` if one of the three functions is missing."""
    missing = [part for part in ("told", "read", "companions") if not callable(getattr(found, part, None))]
    if missing:
        rule = f"a trace format must have told, read and companions; that of {home} has no {' and no '.join(missing)}"
        raise BadInput(Problem(rule, path="format", value=name))
    return cast(Format, found)


def _package(point: EntryPoint) -> str:
    """Name and version of the package that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
