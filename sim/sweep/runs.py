"""Many runs: each has a key made of all that its row depends on, is run once, and is written down as it ends.

`results` takes any number of runs and yields each with its `Row`. A run whose key is in the journal is not run again:
the same command therefore goes on where an earlier one was stopped. An `Executor` says where runs take place: on the
cores of this machine (`sim.sweep.local`) or on a Ray cluster (`sim.sweep.on_ray`).
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

from pydantic import TypeAdapter, ValidationError

from chairlift.backend.base import DeviceError
from chairlift.backend.checked import a_file, wrong
from chairlift.policies.base import PolicyError
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.files import Named, files_read
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.loops import synchronous
from chairlift.sim.scenario.policy_files import Trust, blame
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.axes import Scalar
from chairlift.sim.sweep.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
ROWS = 1  # raised when the meaning of a row's figures changes
_PACKAGES = ("backend", "policies", "sim")
# Folders and files whose code shows rows, fits profiles or is evidence: no run loads it, so no row depends on it.
_SHAPES_NO_ROW = (
    *("sim/cli/", "sim/report/", "sim/calibration/", "sim/conformance/", "sim/sweep/compare.py", "sim/sweep/plots.py"),
    "backend/gpu/measured/",
)
OF_THE_MACHINE = (MemoryError, DeviceError)  # raised by a run that may go well elsewhere, or later: no row tells of it
_WALL_CLOCK = ("wall_s", "requests_per_wall_s")  # figures of a summary that tell of this machine, not of the run


class Row(NamedTuple):
    """What came out of one run."""

    key: str  # `Run.key`
    error: str  # one line; "" if the run went well
    metrics: dict[str, float | int | None]  # the numbers of `summary.json`, wall-clock times left out
    wall_s: float  # wall-clock time of the simulation
    run_s: float  # of all: reading the scenario, making the workload, simulating, summing up
    loop: str = ""  # that its engines ran, see `Setup.loop`; "" where the run failed before


_ROW = TypeAdapter(Row)


class Lost(Exception):
    """Runs without a row: their processes died, or their machine could not go on. Nothing is written down of them.

    ``why``: key of a run → what became of it, one line.
    """

    def __init__(self, why: dict[str, str]) -> None:
        super().__init__(f"{len(why)} runs were lost")
        self.why = why


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep."""

    document: Document  # a scenario that compares nothing
    folder: Path  # where its relative paths start
    labels: dict[str, Scalar] = field(default_factory=dict)  # axis → value, of the point that the run belongs to
    seed: int = 0
    trust: Trust = False  # policy files may run their code
    synchronous: bool = field(default=False, kw_only=True)  # compared with policies that are (`sim.scenario.loops`)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the scenario, of the files that the run reads, of its loop if that is set, and of `made_by`.

        Each text that names a file is replaced by the file's name and the digest of its content: with
        ``policy: lab/mine.py:Fair``, the key is made of ``policy: mine.py 5feceb…:Fair``. So the folder may move, and
        a change of the file changes the key.
        """
        contents = {place: _content(named) for place, named in files_read(self.document, self.folder).items()}
        text = json.dumps(with_texts(self.document.data, contents), sort_keys=True)
        loop = " synchronous" if self.synchronous else ""
        return hashlib.sha256(f"{ROWS} {made_by()} {text}{loop}".encode()).hexdigest()


class Executor(Protocol):
    """Calls ``function`` on every task and yields what the calls return, in the order in which they end.

    An executor tries a task again when its process has died. For a task whose processes die again and again, or that
    raises one of `OF_THE_MACHINE`, it yields ``lost(task, why)``.
    """

    def __call__(
        self, function: Callable[[Run], Row], tasks: Sequence[Run], lost: Callable[[Run, str], Row]
    ) -> Iterator[Row]:
        """The rows. Closing the iterator ends the runs under way."""
        ...


def results(
    runs: Iterable[Run], journal: Journal, executor: Executor, retry: bool = False
) -> Generator[tuple[Run, Row], None, None]:
    """Every run with its row: first the runs that the journal knows, then the others as they end.

    A row is in the journal before it is yielded. Runs with the same key are run once. A run that fails gives a row
    with its error, and the other runs go on. Raises `Lost`, after all others, where runs were lost: the next call
    tries those again.

    Args:
        runs: in the order in which they start.
        journal: where rows are looked up and written down.
        executor: where runs take place.
        retry: run again those of which the journal has an error.
    """
    waiting: dict[str, list[Run]] = {}
    for run in runs:
        row = known(run, journal)
        if row is not None and not (retry and row.error):
            yield run, row
        else:
            waiting.setdefault(run.key, []).append(run)
    gone: dict[str, str] = {}

    def lost(run: Run, why: str) -> Row:
        gone[run.key] = why
        return Row(run.key, why, {}, 0.0, 0.0)

    for row in executor(run_one, [same[0] for same in waiting.values()], lost) if waiting else ():
        if row.key in gone:
            continue
        journal.add(row.key, row._asdict())
        for run in waiting[row.key]:
            yield run, row
    if gone:
        raise Lost(gone)


def known(run: Run, journal: Journal) -> Row | None:
    """The row of ``run`` if the journal has it."""
    entry = journal.get(run.key)
    if entry is None:
        return None
    try:
        return _ROW.validate_python(entry)
    except ValidationError as error:
        rule = f"is damaged: {wrong(error)}; move the file away to start anew"
        raise BadInput(Problem(rule, file=str(journal.path))) from None


def run_one(run: Run) -> Row:
    """Simulate ``run``. An exception becomes the row's error, but for those of `OF_THE_MACHINE`, which are raised."""
    started = time.perf_counter()
    wall, error, loop = 0.0, "", ""
    metrics: dict[str, float | int | None] = {}
    try:
        setup = prepare(run.document, run.folder, run.trust)
        if run.synchronous:
            synchronous(setup)
        loop = setup.loop
        summary = simulate(setup).summary
        wall = summary["wall_s"]
        metrics = {name: value for name, value in _numbers(summary) if name not in _WALL_CLOCK}
    except OF_THE_MACHINE:
        raise
    except (Exception, SystemExit) as wrong:
        if isinstance(wrong, SystemExit) and blame(wrong) is None:
            raise
        error = failure(wrong)
    return Row(run.key, error, metrics, wall, time.perf_counter() - started, loop)


def failure(wrong: BaseException) -> str:
    """What to say of a run that raised ``wrong``: its message, and for a defect the place in the code."""
    if isinstance(wrong, MemoryError):
        return f"not enough memory: {wrong}".removesuffix(": ")
    if isinstance(wrong, BadInput | PolicyError | DeviceError):
        return str(wrong)
    last = traceback.extract_tb(wrong.__traceback__)[-1]
    return f"{type(wrong).__name__}: {wrong} ({Path(last.filename).name}:{last.lineno})"


def _numbers(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | int | None]]:
    """The numbers of a summary by name; ``{"served": {"a": 1}}`` gives ``served.a``."""
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, int | float):
            yield prefix + name, value


@cache
def made_by() -> str:
    """Chairlift's version, and the first digits of a digest of its code and of installed plug-ins.

    Runs of two such values have different keys, so their rows are never mixed.
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
    """SHA-256 over the files below ``root`` that a row may depend on: code, kernels, profiles and tables of data.

    ``root`` holds the folders ``sim``, ``backend`` and ``policies``.
    """
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
    """Name and SHA-256 of every file, and what stands behind the path in the text."""
    told = []
    for path in named.files:
        name = path.relative_to(named.base).as_posix()
        try:
            stat = a_file(path).stat()
            told.append(f"{name} {_digested(path, stat.st_mtime_ns, stat.st_size)}")
        except OSError:
            told.append(f"{name} cannot be read")
    return " ".join(told) + named.rest


@cache
def _digested(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
