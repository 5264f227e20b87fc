"""``results.parquet`` of a sweep: one row for each run with its point, its seed and all metrics; written and read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from chairlift.backend.checked import a_file, wrong
from chairlift.sim.atomic import replacing
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean, reading, saving
from chairlift.sim.results.catalogue import MOST
from chairlift.sim.results.loops import LOOPS
from chairlift.sim.results.reader import held
from chairlift.sim.sweep.axes import Scalar
from chairlift.sim.sweep.runs import Row, Run, made_by

TIMES = ("wall_s", "run_s")  # the only columns that differ between two sweeps of the same file


class _About(TypedDict):
    sweep: str
    axes: list[str]


_ABOUT = TypeAdapter(_About)
_META = b"chairlift"
_TEXTS = ("loop", "key", "version")
_LAST = (*_TEXTS, *TIMES)


def write(path: Path, name: str, axes: Sequence[str], rows: Sequence[tuple[Run, Row]]) -> None:
    """Write ``rows`` in their order. Equal runs give equal columns, except for those of `TIMES`.

    Columns: the axes, ``seed``, ``error`` ("" where all went well), the metrics of ``summary.json`` (null where a run
    has none), ``loop`` that the engines ran, ``key`` (the run's content address), ``version`` of Chairlift, and
    ``wall_s`` of simulation in ``run_s`` of all. Raises `BadInput` if the file cannot be written.
    """
    columns: dict[str, Any] = {axis: _labels([run.labels.get(axis) for run, _ in rows]) for axis in axes}
    columns["seed"] = pa.array([run.seed for run, _ in rows], pa.int64())
    columns["error"] = pa.array([row.error for _, row in rows], pa.string())
    for metric in dict.fromkeys(metric for _, row in rows for metric in row.metrics):
        columns[metric] = _numbers([row.metrics.get(metric) for _, row in rows])
    columns["loop"] = pa.array([row.loop for _, row in rows], pa.string())
    columns["key"] = pa.array([row.key for _, row in rows], pa.string())
    columns["version"] = pa.array([made_by()] * len(rows), pa.string())
    columns["wall_s"] = pa.array([row.wall_s for _, row in rows], pa.float64())
    columns["run_s"] = pa.array([row.run_s for _, row in rows], pa.float64())
    said = json.dumps({"sweep": name, "axes": list(axes)})
    table = pa.table(columns).replace_schema_metadata({_META: said.encode()})
    with saving(path), replacing(path) as partial:
        pq.write_table(table, partial)


@dataclass
class Results:
    """The table of a sweep, read from its file."""

    file: str  # for messages
    name: str  # of the sweep
    axes: list[str]
    metrics: list[str]
    rows: list[dict[str, Any]]  # column → value, one mapping for each run

    def known(self, word: str, allowed: Sequence[str], what: str) -> str:
        """``word``, if it is one of ``allowed``; raises `BadInput` with the nearest one otherwise."""
        if word not in allowed:
            raise BadInput(Problem(f"no such {what}{did_you_mean(word, allowed)}", self.file, value=word))
        return word


def read(path: Path) -> Results:
    """The results in ``path``: a Parquet file, or a sweep's folder. Raises `BadInput` if it is neither."""
    file = path / "results.parquet" if path.is_dir() else path
    if not os.path.lexists(file):
        rule = held(path) or "no results of a sweep here: run chairlift sweep first"
        raise BadInput(Problem(rule, file=str(path)))
    with reading(file, pa.ArrowException):
        table = pq.read_table(a_file(file))
        _ = table.column_names  # which are bytes until then
    about_it = (table.schema.metadata or {}).get(_META)
    if about_it is None:
        raise BadInput(Problem("holds no results of chairlift sweep", file=str(file)))
    try:
        about = _ABOUT.validate_json(about_it)
    except ValidationError as error:
        raise BadInput(Problem(f"is damaged: {wrong(error)}", file=str(file))) from None
    axes = about["axes"]
    if absent := [name for name in (*axes, "seed", "error", *_LAST) if name not in table.column_names]:
        raise BadInput(Problem(f"is damaged: it lacks the column {absent[0]}", file=str(file)))
    metrics = [name for name in table.column_names if name not in (*axes, "seed", "error", *_LAST)]
    kinds = {"seed": pa.types.is_integer, "error": pa.types.is_string} | dict.fromkeys(_TEXTS, pa.types.is_string)
    kinds |= dict.fromkeys((*metrics, *TIMES), _is_number) | dict.fromkeys(axes, _is_label)
    for name, kind in kinds.items():
        if table[name].type != pa.null() and not kind(table[name].type):
            raise BadInput(Problem(f"is damaged: {name} cannot be of type {table[name].type}", file=str(file)))
        if name != "seed" and _is_number(table[name].type):
            values = table[name].drop_null().to_numpy()
            if (found := np.flatnonzero(~(np.abs(values.astype(float)) <= MOST))).size:
                rule = f"is damaged: {name} must be numbers of at most {MOST:g} (got {values[found[0]]})"
                raise BadInput(Problem(rule, file=str(file)))
    if table["seed"].null_count or table["error"].null_count:
        raise BadInput(Problem("is damaged: a row has no seed or no error", file=str(file)))
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        raise BadInput(Problem(f"is damaged: text that is not UTF-8: {error.reason}", file=str(file))) from None
    if strange := [row["loop"] for row in rows if row["loop"] not in (None, "", *LOOPS)]:
        rule = f"is damaged: loop must be {', '.join(LOOPS)} or nothing (got {strange[0]!r})"
        raise BadInput(Problem(rule, file=str(file)))
    return Results(str(file), about["sweep"], axes, metrics, rows)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_label(kind: pa.DataType) -> bool:
    return _is_number(kind) or bool(pa.types.is_string(kind) or pa.types.is_boolean(kind))


def _labels(values: list[Scalar]) -> Any:
    """A column of labels: of numbers if all are numbers, of truth values if all are, otherwise of text."""
    given = [v for v in values if v is not None]
    if given and all(type(v) is bool for v in given):
        return pa.array(values, pa.bool_())
    if given and all(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
        return _numbers(values)
    return pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values], pa.string())


def _numbers(values: list[Any]) -> Any:
    whole = all(v is None or type(v) is int for v in values)
    return pa.array(values, pa.int64() if whole else pa.float64())
