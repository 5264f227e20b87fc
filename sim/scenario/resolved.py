"""A scenario as it ran: what the command line changed is in it, so that running it again gives the same bytes.

`resolved` makes it, a scenario file like any other: ``chairlift run runs/mine/scenario.yaml`` runs it. `relocated`
names its files as they are named from the folder where it is to lie.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.files import files_read
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.policy_files import file_and_class
from chairlift.sim.scenario.yaml_document import Document


def named_systems(policies: Sequence[str], routers: Sequence[str]) -> list[dict[str, str]]:
    """Variants that the command line makes: each policy with each router; keys are those that differ.

    Example: one policy with two routers makes ``[{name: vllm round_robin, router: round_robin}, …]``.
    """
    several = [key for key, names in (("policy", policies), ("router", routers)) if len(names) > 1]
    found = []
    for policy, router in itertools.product(policies or (None,), routers or (None,)):
        chosen = {key: name for key, name in (("policy", policy), ("router", router)) if name is not None}
        found.append({"name": " ".join(chosen.values()), **{key: chosen[key] for key in several}})
    return found


def resolved(
    document: Document,
    path: Path,
    assignments: Sequence[str],
    policies: Sequence[str],
    routers: Sequence[str],
    backend: str | None,
) -> dict[str, Any]:
    """The scenario that ran, files named absolutely.

    A case's ``set`` overrides the file, and the command line overrides both. Where it is enough to write the command
    line's changes into the file itself, that is all that is done. Otherwise each case says them after its own::

        cases: [{name: a, set: {policy: orca}}]     run with --set policy=tgi
        cases: [{name: a, set: {policy: tgi}}]      is what ran

    Args:
        document: the file, with ``--set cases…`` applied.
        path: the file; its folder is where relative paths start.
        assignments: all other ``--set`` options.
        policies: those of ``--policy``, relative to the current folder.
        routers: those of ``--router``.
        backend: that of ``--backend``.
    """
    document = Document(document.data, {}, document.path)  # lines are of no use here, and copying them takes long
    changes = _changes(policies, routers, backend)
    changes = {key: value for key, value in changes.items() if value != [] or document.data.get(key)}
    ran = [_at_case(document, i, assignments, changes) for i in _cases(document)]
    short = _changed(document, assignments, changes)
    made = short
    if not _same(short, ran):
        made = document.copy()
        for i in _cases(document):
            own = made.data["cases"][i].get("set") or {}
            for key, value in (*changes.items(), *_parsed(document, i, assignments)):
                own.pop(key, None)  # the last word stands last
                own[key] = value
            made.data["cases"][i]["set"] = own
    found = _with_files(made, path.parent, lambda file: file)
    return found if found.get("name") else {"name": path.stem, **found}


def each_case(document: Document) -> list[Document]:
    """The document as it is in each of its cases; one, as it stands, where it has none."""
    return [_at_case(document, i, (), {}) for i in _cases(document)]


def _same(short: Document, ran: Sequence[Document]) -> bool:
    """Whether the cases of ``short`` are those that ``ran``."""
    try:
        return [_at_case(short, i, (), {}).data for i in _cases(short)] == [one.data for one in ran]
    except BadInput:  # a case sets what the command line has put away
        return False


def relocated(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``data``, which names its files absolutely, with paths relative to ``folder``, where it is to lie."""
    document = Document(copy.deepcopy(dict(data)), {}, "")
    return _with_files(document, Path(), lambda file: _seen_from(folder, file))


def _seen_from(folder: Path, file: Path) -> Path:
    try:
        return Path(os.path.relpath(file, folder.resolve()))
    except ValueError:  # another drive
        return file


def _changes(policies: Sequence[str], routers: Sequence[str], backend: str | None) -> dict[str, Any]:
    """Top-level key → value, of the options that are no ``--set``."""
    changes: dict[str, Any] = {} if backend is None else {"backend": backend}
    if not policies and not routers:
        return changes
    systems = [
        {key: _absolute(name) if key != "name" else name for key, name in each.items()}
        for each in named_systems(policies, routers)
    ]
    one = {key: _absolute(names[0]) for key, names in (("policy", policies), ("router", routers)) if len(names) == 1}
    nothing: dict[str, Any] = {"waterfall": [], "baseline": [], "claims": []}
    return {**changes, **nothing, "compare": systems if len(systems) > 1 else [], **one}


def _absolute(name: str) -> str:
    """A policy's or router's file by its absolute path; any other name as it is."""
    found = file_and_class(name)
    return name if found is None else str(Path(found[0]).resolve()) + name[len(found[0]) :]


def _cases(document: Document) -> range:
    cases = document.data.get("cases")
    return range(len(cases)) if isinstance(cases, list) and cases else range(1)


def _changed(document: Document, assignments: Sequence[str], changes: Mapping[str, Any]) -> Document:
    """``document`` with ``changes`` of its top-level keys and then the assignments, as `load` applies them."""
    one = document.copy()
    one.data |= copy.deepcopy(dict(changes))
    one.set(assignments)
    return one


def _at_case(document: Document, case: int, assignments: Sequence[str], changes: Mapping[str, Any]) -> Document:
    """What runs in one case: the file, the case's ``set``, options, ``--set``, in this order; without ``cases``."""
    one = document.copy(without="cases")
    if cases := document.data.get("cases"):
        one.set([f"{key}={json.dumps(value)}" for key, value in (cases[case].get("set") or {}).items()])
    return _changed(one, assignments, changes)


def _parsed(document: Document, case: int, assignments: Sequence[str]) -> list[tuple[str, Any]]:
    """Key and value of each assignment."""
    found = []
    for text in assignments:
        key = text.partition("=")[0].strip()
        one = _at_case(document, case, assignments[: assignments.index(text) + 1], {})
        value: Any = one.data
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        found.append((key, value))
    return found


def _with_files(document: Document, folder: Path, name: Any) -> dict[str, Any]:
    """The document's data with every file that it names called ``name(absolute path)``.

    Weights keep their name: a relative one starts at the current folder, wherever the scenario lies.
    """
    data: dict[str, Any] = copy.deepcopy(document.data)
    _rename(data, files_read(document.copy(without="cases"), folder), (), (), name)
    cases = data.get("cases") or []
    for i in range(len(cases)):
        found = files_read(_at_case(document, i, (), {}), folder)
        own = cases[i].get("set") or {}
        for key in own:
            under = tuple(int(part) if part.isdigit() else part for part in key.split("."))
            _rename(own, found, under, (key,), name)
    return data


def _rename(data: dict[str, Any], found: Mapping[KeyPath, Any], under: KeyPath, into: KeyPath, name: Any) -> None:
    """Rename in ``data`` each file of ``found`` that stands at or below ``under``; that place is ``into`` in data."""
    for at, file in found.items():
        if at[: len(under)] != under or at[-1] == "weights":
            continue
        place = (*into, *at[len(under) :])
        here: Any = data
        try:
            for key in place[:-1]:
                here = here[key]
            if isinstance(here[place[-1]], str):
                here[place[-1]] = name(file.path).as_posix() + file.rest
        except (KeyError, IndexError, TypeError):
            continue  # a case put it there
