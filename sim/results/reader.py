"""A results folder read back, for `chairlift report`, `explain` and Perfetto traces.

``study.json`` says what the tables do not: the question, what the runs are compared to, and for every run its SLO, the
sizes of its replicas and the limits of their policies. `sim.results.writer` writes the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from chairlift.backend.checked import a_file, once, text_of, wrong
from chairlift.sim.bad_input import NOTHING, BadInput, Problem, did_you_mean, reading
from chairlift.sim.results.catalogue import unsound
from chairlift.sim.results.records import ADDED_COLUMNS, EVENT_COLUMNS, Kind, Status

Columns = dict[str, npt.NDArray[Any]]

ANOTHER_VERSION = "of another version of Chairlift: run the scenario again"
HELD = {  # a file of a folder of results → what that folder is
    "plan.json": "holds a plan: chairlift plan showed it, and its page is {0}/plan.html",
    "results.parquet": "holds a sweep: chairlift compare {0} shows it",
    "journal.sqlite": "holds a sweep or a plan that has not ended: the same command goes on with it",
    "comparison.json": "holds several runs: chairlift report {0} shows them",
    "study.json": "holds one run: chairlift report {0} shows it",
}
CODES = {
    "status": [s.name.lower() for s in Status],
    "kind": [k.name.lower() for k in Kind],
}  # a number's text, by column


_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, defer_build=True)  # a later version may say more
Count = Annotated[int, Field(ge=0, le=10**12)]
AtLeastOne = Annotated[int, Field(ge=1, le=10**15)]


@with_config(_STRICT)
@dataclass(frozen=True)
class Replica:
    """One replica as ``study.json`` describes it."""

    role: str
    gpu: str
    tensor_parallel: AtLeastOne
    policy: str
    kv_blocks: AtLeastOne
    block_size: AtLeastOne  # tokens
    token_limit: AtLeastOne | None  # tokens a step
    sequence_limit: AtLeastOne | None  # requests a step
    batch_synchronous: bool
    asynchronous: bool
    gpus: AtLeastOne | None = None  # None: tensor_parallel
    parallel: str = ""  # the degrees of parallelism, where there are others than tensor_parallel
    kv_tables: AtLeastOne = 1  # groups of layers; a block is of one
    kv_room: AtLeastOne | None = None  # tokens of the longest request; None: what the pool holds
    index: Count = 0  # its place among the replicas of the run

    @property
    def kv_tokens(self) -> int:
        """Tokens that its pool holds."""
        return self.kv_blocks * self.block_size // self.kv_tables


@with_config(_STRICT)
@dataclass(frozen=True)
class _Rows:
    """How many rows of each table are a run's."""

    requests: Count
    steps: Count
    events: Count


@with_config(_STRICT)
@dataclass(frozen=True)
class _Run:
    """One run as ``study.json`` describes it."""

    case: str
    variant: str
    note: str
    published: float | None
    model: str
    rows: _Rows
    slo: dict[str, float]
    tenants: list[str]
    replicas: Annotated[list[Replica], Field(min_length=1)]
    max_model_len: AtLeastOne | None = None


@with_config(_STRICT)
@dataclass(frozen=True)
class _Study:
    """``study.json``."""

    name: str
    question: str
    baseline: list[str]
    waterfall: list[dict[str, str]]
    compares: bool
    runs: list[_Run]
    # The checksum of each table's file; of none in folders of older versions.
    sha256: Mapping[Literal["requests", "steps", "events"], str] = field(default_factory=dict)


_STUDY = TypeAdapter(_Study)
_RUN = TypeAdapter(_Run)
_SUMMARY = TypeAdapter(dict[str, Any])
_SUMMARIES = TypeAdapter(list[dict[str, Any]])
T = TypeVar("T")


class Tables:
    """The Parquet tables of a folder. Where a file keeps what is read once, the rows of a run when asked for."""

    def __init__(self, folder: Path, sha256: Mapping[Any, str], totals: Mapping[str, int]) -> None:
        self._folder = folder
        self._sha256 = sha256
        self._totals = totals  # rows of all runs together, by table
        self._known: dict[str, pq.FileMetaData] = {}

    def columns(self, name: str) -> list[str]:
        """The columns of table ``name``. Raises `BadInput` if the file cannot be read."""
        with reading(self._path(name), pa.ArrowException):
            names: list[str] = self._metadata(name).schema.names
            return names

    def rows(self, name: str, first: int, count: int, columns: Sequence[str]) -> pa.Table:
        """The ``count`` rows of table ``name`` from row ``first`` on, which begins a row group.

        Raises `BadInput` if the file cannot be read, lacks a column, or ends before.
        """
        path = self._path(name)
        if absent := [column for column in columns if column not in self.columns(name)]:
            raise BadInput(Problem(f"is {ANOTHER_VERSION} (it has no column {absent[0]})", file=str(path)))
        with reading(path, pa.ArrowException):
            metadata = self._metadata(name)
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            begins = np.cumsum([0, *sizes])[:-1]
            wanted = np.flatnonzero((begins >= first) & (begins < first + count)).tolist()
            with pq.ParquetFile(path, metadata=metadata) as file:
                table = file.read_row_groups(wanted, list(dict.fromkeys(columns)))
        if len(table) != count:
            raise BadInput(Problem(f"holds {len(table):,} of the {count:,} rows of this run", file=str(path)))
        for column in table.column_names:
            if rule := _unsound(column, table[column], whole=name != "requests"):
                raise BadInput(Problem(f"is damaged, or {ANOTHER_VERSION}: {rule}", file=str(path), path=column))
        return table

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"

    def _metadata(self, name: str) -> pq.FileMetaData:
        if name not in self._known:
            path = a_file(self._path(name))
            if name in self._sha256 and sha256_of(path) != self._sha256[name]:
                rule = "is damaged, or not of this run: study.json has another checksum; run the scenario again"
                raise BadInput(Problem(rule, file=str(path)))
            self._known[name] = pq.read_metadata(path)
            rows, told = self._known[name].num_rows, self._totals[name]
            if name in self._sha256 and rows != told:
                rule = f"is damaged: it tells of {told:,} rows, and {path.name} holds {rows:,}: run the scenario again"
                raise BadInput(Problem(rule, file=str(self._folder / "study.json"), path=f"runs.rows.{name}"))
        return self._known[name]


class InMemory:
    """The tables of one run that is not in a folder, as `Tables` would read them."""

    def __init__(self, tables: dict[str, pa.Table]) -> None:
        self._tables = tables

    def columns(self, name: str) -> list[str]:
        """The columns of table ``name``."""
        names: list[str] = self._tables[name].column_names
        return names

    def rows(self, name: str, first: int, count: int, columns: Sequence[str]) -> pa.Table:
        """The ``count`` rows of table ``name`` from row ``first`` on."""
        return self._tables[name].select(list(dict.fromkeys(columns))).slice(first, count)


def sha256_of(path: Path) -> str:
    """The checksum of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunResults:
    """One run of a folder, or `of_run`. Its rows are read when asked for, and not kept."""

    def __init__(
        self, tables: Tables | InMemory, facts: _Run, summary: dict[str, Any], rows: dict[str, tuple[int, int]]
    ) -> None:
        self.summary = summary
        self.max_model_len = facts.max_model_len  # None in folders of older versions
        self.case = facts.case
        self.variant = facts.variant
        self.note = facts.note
        self.published = facts.published
        self.model = facts.model
        self.slo = facts.slo
        self.tenants = facts.tenants
        self.replicas = [replace(each, index=i) for i, each in enumerate(facts.replicas)]
        self._tables = tables
        self.rows = {name: count for name, (_, count) in rows.items()}
        self._rows = rows  # of each table: its first row there, and how many

    @property
    def label(self) -> str:
        """Case and variant in one; empty in a run of its own."""
        return " / ".join(filter(None, (self.case, self.variant)))

    def requests(self, *columns: str) -> Columns:
        """Columns of ``requests.parquet``, one value a request; -1 or NaN where there is none, `Status` as number."""
        return _columns(self._table("requests", columns))

    def has_column(self, name: str) -> bool:
        """Whether ``requests.parquet`` has a column of that name."""
        return name in self._tables.columns("requests")

    def steps(self, *columns: str) -> Iterator[Columns]:
        """Columns of ``steps.parquet``, replica by replica; those that older versions did not write are 0 there."""
        there = self._tables.columns("steps")
        absent = [name for name in columns if name in ADDED_COLUMNS and name not in there]
        for found in self._by_replica("steps", tuple(name for name in columns if name not in absent)):
            rows = len(next(iter(found.values())))
            yield found | {name: np.zeros(rows, np.int64) for name in absent}

    @property
    def has_events(self) -> bool:
        """Whether it was run with a journal."""
        return self.rows["events"] > 0

    def events(self) -> Iterator[Columns]:
        """All columns of ``events.parquet``, replica by replica; nothing at all if there is no journal."""
        if not self.has_events:
            return iter(())
        return self._by_replica("events", EVENT_COLUMNS)

    def _by_replica(self, name: str, columns: tuple[str, ...]) -> Iterator[Columns]:
        table = self._table(name, ("replica", *columns))
        edges = np.searchsorted(table["replica"].to_numpy(), np.arange(len(self.replicas) + 1))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield _columns(table.slice(low, high - low).select(columns))

    def _table(self, name: str, columns: tuple[str, ...]) -> pa.Table:
        return self._tables.rows(name, *self._rows[name], columns)


@dataclass
class Results:
    """All runs of a folder."""

    folder: Path
    name: str
    question: str
    baseline: list[str]
    waterfall: list[dict[str, str]]
    runs: list[RunResults]

    @property
    def compares(self) -> bool:
        """Whether there are several runs."""
        return len(self.runs) > 1

    @property
    def cases(self) -> list[str]:
        """The cases, in order."""
        return list(dict.fromkeys(run.case for run in self.runs))

    def pick(self, case: str | None, variant: str | None) -> RunResults:
        """The run of that case and variant; the only one fits without either. Raises `BadInput`."""
        found = self.runs
        for label, wanted in (("case", case), ("variant", variant)):
            have = list(dict.fromkeys(getattr(run, label) for run in found))
            if wanted is None and len(have) > 1:
                if label == "case":
                    found = [run for run in found if run.case == have[-1]]
                    continue
                told = ", ".join(map(repr, have))
                raise BadInput(Problem(f"there are several runs here, say which: {told}", file=f"--{label}"))
            if wanted is not None:
                if wanted not in have:
                    raise BadInput(
                        Problem(f"there is no such run{did_you_mean(wanted, have)}", file=f"--{label}", value=wanted)
                    )
                found = [run for run in found if getattr(run, label) == wanted]
        return found[0]


def read(folder: Path) -> Results:
    """The results in ``folder``. Raises `BadInput` if there are none, or only part of them."""
    facts = _json(folder, "study.json", _STUDY)
    if facts.compares:
        summaries = _json(folder, "comparison.json", _SUMMARIES)
    else:
        summaries = [_json(folder, "summary.json", _SUMMARY)]
    for summary in summaries:
        name, why = unsound(summary)
        if name:
            file = folder / ("comparison.json" if facts.compares else "summary.json")
            value = summary.get(name, NOTHING)
            raise BadInput(Problem(f"is damaged, or {ANOTHER_VERSION}: {why}", file=str(file), path=name, value=value))
    for run, summary in zip(facts.runs, summaries, strict=False):
        if facts.compares and (summary.get("case", ""), summary.get("variant", "")) != (run.case, run.variant):
            rule = (
                f"is damaged: a summary is of {summary.get('case')}, {summary.get('variant')}; study.json has another"
            )
            raise BadInput(Problem(rule, file=str(folder / "comparison.json"), path="variant"))
    if len(summaries) != len(facts.runs):
        rule = f"tells of {len(facts.runs)} runs, but the summaries of {len(summaries)}: run the scenario again"
        raise BadInput(Problem(rule, file=str(folder / "study.json"), path="runs"))
    totals = {name: sum(getattr(run.rows, name) for run in facts.runs) for name in ("requests", "steps", "events")}
    tables = Tables(folder, facts.sha256, totals)
    places: list[dict[str, tuple[int, int]]] = []
    for each in facts.runs:
        past = places[-1] if places else {}
        places.append({name: (sum(past.get(name, (0, 0))), count) for name, count in vars(each.rows).items()})
    for name in facts.sha256:
        if not totals[name]:
            tables.columns(name)  # nobody reads it: is it empty indeed?
    return Results(
        folder=folder,
        name=facts.name,
        question=facts.question,
        baseline=facts.baseline,
        waterfall=facts.waterfall,
        runs=[RunResults(tables, *parts) for parts in zip(facts.runs, summaries, places, strict=True)],
    )


def held(folder: Path, but: Sequence[str] = ()) -> str:
    """What results a folder holds, and which command shows them; "" where it holds none.

    For whoever gives a command the results of another one; the files ``but`` are those of that command's own.
    """
    for name, rule in HELD.items():
        if name not in but and (folder / name).exists():
            return rule.format(folder)
    return ""


def of_run(tables: dict[str, pa.Table], facts: dict[str, Any], summary: dict[str, Any]) -> RunResults:
    """A run whose ``tables`` ("requests", "steps", "events") are at hand; ``facts`` are those of ``study.json``."""
    rows = {name: (0, count) for name, count in facts["rows"].items()}
    return RunResults(InMemory(tables), _RUN.validate_python(facts, strict=False), summary, rows)


def _json(folder: Path, name: str, kind: TypeAdapter[T]) -> T:
    path = folder / name
    with reading(path):
        try:
            text = text_of(path)
        except FileNotFoundError:
            if not folder.is_dir():
                rule = "no such folder"
            elif (folder / "summary.json").exists():
                rule = f"has no {name}: it is {ANOTHER_VERSION}"
            else:
                rule = held(folder, but=("comparison.json", "study.json")) or f"has no {name}: not a results folder"
            raise BadInput(Problem(rule, file=str(folder))) from None
        except NotADirectoryError:
            raise BadInput(Problem("is a file, not a results folder", file=str(folder))) from None
        json.loads(text, object_pairs_hook=once)
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        raise BadInput(Problem(f"is damaged, or {ANOTHER_VERSION}: {wrong(error)}", file=str(path))) from None


def _unsound(name: str, column: pa.ChunkedArray, whole: bool) -> str:
    """What is wrong with a column: a name that nobody knows, or what is no number. ``whole``: it has whole numbers."""
    import pyarrow.compute as pc

    if name in CODES:
        text = pa.types.is_string(getattr(column.type, "value_type", column.type))
        known = text and pc.all(pc.is_in(column.cast(pa.string()), pa.array(CODES[name]))).as_py()
        return f"it must have {', '.join(CODES[name])}" if known is False else ""
    if whole:
        return "" if pa.types.is_integer(column.type) and not column.null_count else "it must have whole numbers"
    if name == "tenant":
        return ""  # its name, or its number
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
    return "" if number else "it must have numbers"


def _columns(table: pa.Table) -> Columns:
    import pyarrow.compute as pc  # here: a tenth of a second that a run without a report need not wait

    found: Columns = {}
    for name in table.column_names:
        column = table[name]
        if name in CODES:
            found[name] = pc.index_in(column.cast(pa.string()), pa.array(CODES[name])).to_numpy()
        elif column.null_count and pa.types.is_integer(column.type):
            found[name] = pc.fill_null(column, -1).to_numpy()
        else:
            found[name] = column.to_numpy()
    return found
