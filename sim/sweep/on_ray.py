"""The runs of a sweep on a Ray cluster that is already there: ``chairlift sweep … --executor ray``.

The nodes need the same version of Chairlift. The files that scenarios name (traces, policies) travel through Ray's
object store, once a node. A task whose worker or node dies is retried by Ray itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep.runs import Row, Run, companions, file_part, files_named, made_by, renamed

RETRIES = 5  # of a task whose worker died, by Ray
AHEAD = 4  # tasks submitted for each CPU of the cluster: enough to keep it busy, few enough to hold in memory


class Cluster:
    """A Ray cluster; ``address`` as ``ray.init`` takes it, None: the one this machine belongs to.

    Raises `BadInput`: Ray is not installed, there is no cluster, or its nodes have another Chairlift.
    """

    def __init__(self, address: str | None = None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else each start warns of a change to come
        try:
            import ray
        except ImportError:
            rule = "Ray is not installed: pip install 'chairlift[ray]'"
            raise BadInput(Problem(rule, file="--executor ray")) from None
        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                said = str(error).partition("\n")[0]
                rule = f"no Ray cluster there ({said}); start one: ray start --head"
                raise BadInput(Problem(rule, file="--address", value=address or "auto")) from None

    def __call__(
        self, function: Callable[[Run], Row], tasks: Sequence[Run], lost: Callable[[Run, str], Row]
    ) -> Iterator[Row]:
        """As `sim.sweep.runs.Executor` says."""
        ray = self._ray
        parcels: dict[frozenset[str], tuple[Any, dict[str, str]]] = {}
        remote = ray.remote(_run_there).options(max_retries=RETRIES, retry_exceptions=False)
        flying: dict[Any, Run] = {}
        waiting = iter(tasks)
        exhausted = False
        try:
            while True:
                room = int(ray.cluster_resources().get("CPU", 1)) * AHEAD - len(flying)
                while room > 0 and not exhausted:
                    task = next(waiting, None)
                    if task is None:
                        exhausted = True
                        break
                    parcel, names = self._parcel(task, parcels)
                    flying[remote.remote(function, _packed(task, names), parcel, made_by())] = task
                    room -= 1
                if not flying:
                    return
                for ref in ray.wait(list(flying), num_returns=1)[0]:
                    task = flying.pop(ref)
                    try:
                        row = ray.get(ref)
                    except ray.exceptions.RayTaskError as error:
                        raise BadInput(Problem(f"a node of the cluster cannot run this: {_cause(error)}")) from None
                    except ray.exceptions.RayError as error:
                        said = str(error).partition("\n")[0]
                        row = lost(task, f"its worker died {RETRIES + 1} times ({type(error).__name__}: {said})")
                    yield row._replace(key=task.key)
        finally:
            for ref in flying:
                ray.cancel(ref, force=True)

    def _parcel(
        self, task: Run, parcels: dict[frozenset[str], tuple[Any, dict[str, str]]]
    ) -> tuple[Any, dict[str, str]]:
        """The files that a run needs, in the object store, and their names there."""
        files = files_named(task.document.data, task.folder)
        needed = frozenset(str(path.resolve()) for path in files.values())
        if needed not in parcels:
            contents: dict[str, bytes] = {}
            names: dict[str, str] = {}
            for path in sorted(needed):
                if Path(path).is_dir():
                    raise BadInput(Problem("a folder does not travel: pack it with tar", path, path="--executor ray"))
                raw = Path(path).read_bytes()
                names[path] = f"{hashlib.sha256(raw).hexdigest()[:12]}/{Path(path).name}"
                contents[names[path]] = raw
                for other in companions(Path(path)):
                    contents[str(Path(names[path]).with_name(other.name))] = other.read_bytes()
            parcels[needed] = self._ray.put(contents), names
        parcel, names = parcels[needed]
        there = {text: names[str(path.resolve())] + text[len(file_part(text)) :] for text, path in files.items()}
        return parcel, there


def _packed(task: Run, names: dict[str, str]) -> Run:
    """``task`` with its files called as they are in the parcel."""
    document = task.document
    moved = Document(renamed(document.data, names), document.lines, document.path, document.overrides)
    return dataclasses.replace(task, document=moved)


def _run_there(function: Callable[[Run], Row], task: Run, files: dict[str, bytes], wanted: str) -> Row:
    """On a node: lay the files out, once, and run."""
    if made_by() != wanted:
        raise RuntimeError(f"it has Chairlift {made_by()}, but {wanted} asks: install the same on all nodes")
    folder = Path(tempfile.gettempdir()) / f"chairlift-files-{os.getuid()}"
    for name, raw in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(raw):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_bytes(raw)
            os.replace(partial, path)
    return function(dataclasses.replace(task, folder=folder))


def _cause(error: Any) -> str:
    return f"{type(error.cause).__name__}: {error.cause}" if getattr(error, "cause", None) else str(error)
