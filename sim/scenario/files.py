"""Which files a run reads because its scenario names them. Each kind of file is declared by the code that reads it.

A sweep knows its runs by the content of these files, and sends them along to another machine. A file that the code of
a user's own policy opens by itself is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.policy_files import file_and_class
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.workload.acceptance import named_curve
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.workload import files_of


class Named(NamedTuple):
    """What is read because of one text of a scenario. All paths are absolute."""

    path: Path  # the file or folder that the text names
    files: tuple[Path, ...]  # those read: the file with its companions, or files of the folder; any may be missing
    base: Path  # the folder from which on their names matter, and not only their content
    rest: str = ""  # of the text, behind the path: ``:Class``


def files_read(document: Document, folder: Path) -> dict[KeyPath, Named]:
    """The files that a scenario names, by the place of the text that names them: ``("workload", "file")``.

    Args:
        document: a scenario, which need not be right: a part that is wrong names no file.
        folder: where its relative paths start.
    """
    data = document.data
    systems: list[tuple[KeyPath, Any]] = [((), data)]
    for key in ("replicas", "compare"):
        if isinstance(parts := data.get(key), list):
            systems += [((key, i), part) for i, part in enumerate(parts)]
    found: dict[KeyPath, Named] = {}
    for at, system in systems:
        if isinstance(system, Mapping):
            found.update(_of_system(system, at, folder))
    if "workload" in data:
        try:
            workload = document.check(Workload, at=("workload",))
        except BadInput:
            return found
        for keys, files in files_of(workload, folder).items():
            place = ("workload", *keys)
            found[place] = _named(folder / str(document.value(place)), files)
    return found


def _of_system(system: Mapping[str, Any], at: KeyPath, folder: Path) -> Iterator[tuple[KeyPath, Named]]:
    """Files of policy, router, models and backend; ``system`` stands at ``at``."""
    for key in ("policy", "router"):
        choice, place = system.get(key), (*at, key)
        if isinstance(choice, Mapping):
            choice, place = choice.get("name"), (*place, "name")
        if isinstance(choice, str) and (own := file_and_class(choice)) is not None:
            yield place, _named(folder / own[0], rest=choice[len(own[0]) :])
    speculate = system.get("speculate")
    models = {(*at, "model"): system.get("model")}
    if isinstance(speculate, Mapping):
        models[*at, "speculate", "draft"] = speculate.get("draft")
        acceptance = speculate.get("acceptance")
        if isinstance(acceptance, Mapping) and isinstance(told := acceptance.get("file"), str):
            name, _ = named_curve(told)
            yield (*at, "speculate", "acceptance", "file"), _named(folder / name, rest=told[len(name) :])
    for place, model in models.items():
        if isinstance(model, Mapping):
            model, place = model.get("name"), (*place, "name")
        if isinstance(model, str) and model.endswith(".json"):
            yield place, _named(folder / model, names=2)  # a model is called as the folder of its file
    backend, place = system.get("backend"), (*at, "backend")
    settings = backend if isinstance(backend, Mapping) else {}
    profiles = {place: backend, (*place, "profile"): settings.get("profile")}
    for place_of_it, profile in profiles.items():
        if isinstance(profile, str) and profile.endswith(".json"):
            beside = folder / profile
            yield place_of_it, _named(beside if beside.is_file() else Path(profile))
    if isinstance(weights := settings.get("weights"), str):
        path = Path(weights)
        yield (*place, "weights"), _named(path, [path / "config.json", *sorted(path.glob("*.safetensors"))])


def _named(path: Path, files: Sequence[Path] = (), names: int = 1, rest: str = "") -> Named:
    """``files``: none: the path is the file. ``names``: how many last parts of the path matter."""
    whole = Path(os.path.abspath(path))
    return Named(whole, tuple(Path(os.path.abspath(each)) for each in files or [path]), whole.parents[names - 1], rest)
