"""The runs of a sweep on a Ray cluster that is already there: ``chairlift sweep … --executor ray``.

All nodes need the same version of Chairlift. The files that scenarios name (traces, policies) travel through Ray's
object store, once to each node; folders of weights do not travel. Ray itself retries a task whose worker or node dies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.atomic import replacing
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario.files import Named, files_read
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep.runs import OF_THE_MACHINE, Row, Run, failure, made_by, with_texts

RETRIES = 5  # of a task whose worker died, by Ray
AHEAD = 4  # tasks submitted at once for each CPU of the cluster: enough to keep it busy, few enough for the memory


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
        parcels: dict[frozenset[Named], tuple[Any, dict[Named, str]]] = {}
        remote = ray.remote(_run_there).options(max_retries=RETRIES, retry_exceptions=False)
        flying: dict[Any, Run] = {}
        waiting = iter(tasks)
        exhausted = False
        try:
            while True:
                room = max(1, int(ray.cluster_resources().get("CPU", 1))) * AHEAD - len(flying)
                while room > 0 and not exhausted:
                    task = next(waiting, None)
                    if task is None:
                        exhausted = True
                        break
                    parcel, texts = self._parcel(task, parcels)
                    flying[remote.remote(function, _packed(task, texts), parcel, made_by())] = task
                    room -= 1
                if not flying:
                    return
                for ref in ray.wait(list(flying), num_returns=1)[0]:
                    task = flying.pop(ref)
                    try:
                        row = ray.get(ref)
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(cause := getattr(error, "cause", None), OF_THE_MACHINE):
                            yield lost(task, failure(cause))
                            continue
                        raise BadInput(Problem(f"a node of the cluster cannot run this: {_cause(error)}")) from None
                    except ray.exceptions.RayError as error:
                        said = str(error).partition("\n")[0]
                        row = lost(task, f"its worker died {RETRIES + 1} times ({type(error).__name__}: {said})")
                    yield row._replace(key=task.key)
        finally:
            for ref in flying:
                ray.cancel(ref, force=True)

    def _parcel(
        self, task: Run, parcels: dict[frozenset[Named], tuple[Any, dict[Named, str]]]
    ) -> tuple[Any, dict[KeyPath, str]]:
        """The files that a run reads, in the object store, and the text for each place that names one.

        ``parcels`` has those that are in the store already. Each file or folder has a folder of its own in the parcel,
        called after its content, so that two files of one name do not meet.
        """
        read = files_read(task.document, task.folder)
        read = {place: named for place, named in read.items() if place[-1] != "weights"}  # each node has its own
        needed = frozenset(read.values())
        if needed not in parcels:
            contents: dict[str, bytes] = {}
            texts: dict[Named, str] = {}
            for named in needed:
                raw = {path.relative_to(named.base): path.read_bytes() for path in named.files if path.is_file()}
                digests = {str(name): hashlib.sha256(content).hexdigest() for name, content in raw.items()}
                folder = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
                contents |= {f"{folder}/{name.as_posix()}": content for name, content in raw.items()}
                texts[named] = f"{folder}/{named.path.relative_to(named.base).as_posix()}{named.rest}"
            parcels[needed] = self._ray.put(contents), texts
        parcel, texts = parcels[needed]
        return parcel, {place: texts[named] for place, named in read.items()}


def _packed(task: Run, texts: dict[KeyPath, str]) -> Run:
    """``task`` with the names that its files have in the parcel."""
    document = task.document
    moved = Document(with_texts(document.data, texts), document.lines, document.path, document.overrides)
    return dataclasses.replace(task, document=moved)


def _run_there(function: Callable[[Run], Row], task: Run, files: dict[str, bytes], wanted: str) -> Row:
    """On a node: write the files that are not there yet, and call ``function``.

    Raises RuntimeError where the node's `made_by` is not ``wanted``.
    """
    if made_by() != wanted:
        raise RuntimeError(f"it has Chairlift {made_by()}, but {wanted} asks: install the same on all nodes")
    folder = Path(tempfile.gettempdir()) / f"chairlift-files-{os.getuid()}"
    for name, raw in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != len(raw):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(path) as partial:  # several workers of a node may come at once
                partial.write_bytes(raw)
    return function(dataclasses.replace(task, folder=folder))


def _cause(error: Any) -> str:
    return f"{type(error.cause).__name__}: {error.cause}" if getattr(error, "cause", None) else str(error)
