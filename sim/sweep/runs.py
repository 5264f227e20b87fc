"""Many runs: each known by what it is made of, run once, and written down as it ends.

`results` takes any number of runs and yields a `Row` for each as it comes. A run that the journal knows already is not
run again, so whatever was interrupted goes on where it stopped. Where runs take place is the executor's business
(`sim.sweep.local`): this process's cores, or a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from chairlift.policies.base import PolicyError
from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.axes import Scalar
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.workload.formats import ragpulse

ROOT = Path(__file__).resolve().parents[2]
ROWS = 1  # raised when the meaning of a row's figures changes
_SHOWS = ("sim/cli/", "sim/report/")  # folders whose code shapes no row
_UNTIMED = ("wall_s", "requests_per_wall_s")  # of a summary: how long it took here, not what came out


class Row(NamedTuple):
    """What became of one run."""

    key: str  # of the run, see `Run.key`
    error: str  # "" if it went well
    metrics: dict[str, float | int | None]  # the numbers of `summary.json`, but for wall-clock times
    wall_s: float  # simulating
    run_s: float  # all of it: reading the scenario, making the workload, simulating, summing up


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep."""

    document: Document  # a scenario that compares nothing
    folder: Path  # where its relative paths start
    labels: dict[str, Scalar] = field(default_factory=dict)  # the point it belongs to, by axis
    seed: int = 0
    trust: bool = False  # policy files may run their code

    @cached_property
    def key(self) -> str:
        """The run's content address: SHA-256 of its scenario, of the files it names, and of Chairlift's own code.

        A file counts by its content, wherever it lies.
        """
        files = files_named(self.document.data, self.folder)
        digests = {name: _digest(path) for name, path in files.items()}
        text = json.dumps(renamed(self.document.data, digests), sort_keys=True)
        return hashlib.sha256(f"{ROWS} {made_by()} {text}".encode()).hexdigest()


class Executor(Protocol):
    """Calls ``function`` on every task, somewhere, and yields what it returns, in any order.

    A task whose process dies again and again, whatever the executor does about it, gives ``lost(task, why)`` instead.
    """

    def __call__(
        self, function: Callable[[Run], Row], tasks: Sequence[Run], lost: Callable[[Run, str], Row]
    ) -> Iterator[Row]:
        """The rows, as they come."""
        ...


def results(
    runs: Iterable[Run], journal: Journal, executor: Executor, retry: bool = False
) -> Generator[tuple[Run, Row], None, None]:
    """Every run with its row: what the journal knows first, then the others as they end.

    A row is in the journal before it is yielded. ``retry``: run once more what failed. Runs that come to the same
    scenario are run once. A run that fails gives a row with its error; nothing else stops.
    """
    waiting: dict[str, list[Run]] = {}
    for run in runs:
        row = known(run, journal)
        if row is not None and not (retry and row.error):
            yield run, row
        else:
            waiting.setdefault(run.key, []).append(run)
    for row in executor(run_one, [same[0] for same in waiting.values()], _lost) if waiting else ():
        journal.add(row.key, row._asdict())
        for run in waiting[row.key]:
            yield run, row


def known(run: Run, journal: Journal) -> Row | None:
    """The row of ``run`` if the journal has it."""
    entry = journal.get(run.key)
    return None if entry is None else Row(**entry)


def run_one(run: Run) -> Row:
    """Simulate ``run``. Whatever goes wrong is in the row, not raised."""
    started = time.perf_counter()
    wall, error = 0.0, ""
    metrics: dict[str, float | int | None] = {}
    try:
        summary = simulate(prepare(run.document, run.folder, run.trust)).summary
        wall = summary["wall_s"]
        metrics = {name: value for name, value in _numbers(summary) if name not in _UNTIMED}
    except (BadInput, PolicyError) as wrong:
        error = str(wrong)
    except Exception as wrong:
        last = traceback.extract_tb(wrong.__traceback__)[-1]
        error = f"{type(wrong).__name__}: {wrong} ({Path(last.filename).name}:{last.lineno})"
    return Row(run.key, error, metrics, wall, time.perf_counter() - started)


def _numbers(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | int | None]]:
    """The numbers of a summary; those in a mapping below it under ``outer.inner``."""
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, int | float):
            yield prefix + name, value


def _lost(run: Run, why: str) -> Row:
    return Row(run.key, why, {}, 0.0, 0.0)


@cache
def made_by() -> str:
    """Chairlift's version and the first digits of a digest of its code: rows of two versions are never mixed.

    Code that only shows what came out does not count.
    """
    try:
        number = version("chairlift")
    except PackageNotFoundError:
        number = "0"
    digest = hashlib.sha256()
    for package in ("backend", "policies", "sim"):
        for path in sorted((ROOT / package).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".json") and not name.startswith(_SHOWS):
                digest.update(f"{name}\n".encode())
                digest.update(path.read_bytes())
    return f"{number}+{digest.hexdigest()[:12]}"


def files_named(data: Any, folder: Path) -> dict[str, Path]:
    """Every text in ``data`` that names a file as a scenario may (``trace.csv``, ``mine.py:Class``), and the file.

    Or a folder of ServeGen's, which counts by all that is in it.
    """
    found: dict[str, Path] = {}
    below = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else [data]
    for value in below:
        if isinstance(value, dict | list):
            found |= files_named(value, folder)
        elif isinstance(value, str) and value:
            path = folder / file_part(value)
            client_tables = os.path.isdir(path) and any(path.glob("chunk-*-trace.csv"))  # os: false for any odd name
            if client_tables or ("." in value and os.path.isfile(path)):
                found[value] = path
    return found


def companions(path: Path) -> list[Path]:
    """Files that are read along with ``path``, from the same folder: RAGPulse's maps."""
    return ragpulse.companions(path)


def file_part(text: str) -> str:
    """``mine.py`` of ``mine.py:Class``; any other text as it is."""
    before, colon, _ = text.rpartition(".py:")
    return f"{before}.py" if colon else text


def renamed(data: Any, names: dict[str, str]) -> Any:
    """``data`` with each text of ``names`` replaced."""
    if isinstance(data, dict):
        return {key: renamed(value, names) for key, value in data.items()}
    if isinstance(data, list):
        return [renamed(value, names) for value in data]
    return names.get(data, data) if isinstance(data, str) else data


def _digest(path: Path) -> str:
    parts = sorted(path.glob("chunk-*")) if path.is_dir() else [path, *companions(path)]
    stats = [(each, each.stat()) for each in parts]
    return " ".join(_digested(each, stat.st_mtime_ns, stat.st_size) for each, stat in stats)


@cache
def _digested(path: Path, _mtime_ns: int, _size: int) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
