"""Many runs: each known by what it is made of, run once, and written down as it ends.

`results` takes any number of runs and yields a `Row` for each as it comes. A run that the journal knows already is not
run again, so whatever was interrupted goes on where it stopped. Where runs take place is the executor's business
(`sim.sweep.local`): this process's cores, or a Ray cluster.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from chairlift.policies.base import PolicyError
from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.files import Named, files_read
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.axes import Scalar
from chairlift.sim.sweep.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
ROWS = 1  # raised when the meaning of a row's figures changes
_PACKAGES = ("backend", "policies", "sim")
_SHAPES_NO_ROW = (  # folders and files of these: what is done before a run, or with its row
    *("sim/cli/", "sim/report/", "sim/calibration/", "sim/sweep/compare.py", "sim/sweep/plots.py"),
    "backend/gpu/measured/",
)
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
        """The run's content address: SHA-256 of its scenario, of the files it reads, and of Chairlift's own code.

        A file counts by its content, wherever it lies.
        """
        contents = {place: _content(named) for place, named in files_read(self.document, self.folder).items()}
        text = json.dumps(with_texts(self.document.data, contents), sort_keys=True)
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
    except Exception as wrong:
        error = failure(wrong)
    return Row(run.key, error, metrics, wall, time.perf_counter() - started)


def failure(wrong: Exception) -> str:
    """What stands in a row for an exception of its run: one that is no message for users with where it was raised."""
    if isinstance(wrong, BadInput | PolicyError):
        return str(wrong)
    last = traceback.extract_tb(wrong.__traceback__)[-1]
    return f"{type(wrong).__name__}: {wrong} ({Path(last.filename).name}:{last.lineno})"


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
    """Chairlift's version and the first digits of a digest of its code and of installed plug-ins'.

    Rows of two of them are never mixed. Code that shapes no row does not count.
    """
    try:
        number = version("chairlift")
    except PackageNotFoundError:
        number = "0"
    digest = code_digest(ROOT)
    if installed := plugins.versions():
        digest = hashlib.sha256(json.dumps([digest, installed], sort_keys=True).encode()).hexdigest()
    return f"{number}+{digest[:12]}"


def code_digest(root: Path) -> str:
    """Of the files below ``root`` that a row may depend on: Chairlift's code, kernels, profiles, tables of data."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and path.suffix not in (".pyc", ".md") and not name.startswith(_SHAPES_NO_ROW):
                digest.update(f"{name}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def with_texts(data: Any, texts: Mapping[tuple[str | int, ...], str]) -> Any:
    """A copy of ``data``, in which each place of ``texts`` has the text given for it."""
    changed = pickle.loads(pickle.dumps(data)) if texts else data
    for place, text in texts.items():
        here = changed
        for key in place[:-1]:
            here = here[key]
        here[place[-1]] = text
    return changed


def _content(named: Named) -> str:
    """Names and SHA-256 of the files, wherever they lie."""
    told = []
    for path in named.files:
        name = path.relative_to(named.base).as_posix()
        try:
            stat = path.stat()
            told.append(f"{name} {_digested(path, stat.st_mtime_ns, stat.st_size)}")
        except OSError:
            told.append(f"{name} cannot be read")
    return " ".join(told) + named.rest


@cache
def _digested(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
