"""What a study leaves on disk: ``summary.json``, ``comparison.json``, ``requests.parquet``, ``steps.parquet``,
``scenario.yaml``, ``study.json``, ``events.parquet`` if a journal was kept, ``cdf.csv`` if a comparison prints one.

Same scenario, same seed, same bytes: nothing but the ``wall_s`` figures depends on the machine or the day.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from chairlift.sim.atomic import replacing
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.replica.journal import Kind
from chairlift.sim.results import claims
from chairlift.sim.results.metrics import Latencies
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.reader import run_facts, study_facts
from chairlift.sim.results.recording import Recorder
from chairlift.sim.results.records import HANDOVER_COLUMNS, RunRecords, Status
from chairlift.sim.study import Setup, Study
from chairlift.sim.units import PS_PER_MS

KINDS = [kind.name.lower() for kind in Kind]
STATUS = [status.name.lower() for status in Status]


class Writer:
    """Writes a study's folder as its runs finish; what is finished is on disk if the rest never is.

    Raises `BadInput` if the folder cannot be written.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        self._study = study
        self._compares = len(study.setups) > 1
        self._moves = any(setup.link is not None for setup in study.setups)
        self._summaries: list[dict[str, Any]] = []
        self._tables: dict[str, pq.ParquetWriter] = {}
        self._recorders: dict[str, Recorder] = {}
        self._facts = study_facts(study)
        self._columns = [c for c in ("tenant", "session", "priority") if any(_of_trace(s, c) for s in study.setups)]
        text = yaml.safe_dump(_provenance(study), sort_keys=False, allow_unicode=True, width=110)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for made in ("events.parquet", "report.html"):  # of an earlier run; this one may make none
                (folder / made).unlink(missing_ok=True)
            (folder / "scenario.yaml").write_text(text, encoding="utf-8")

    def add(self, outcome: Outcome) -> None:
        """Write one run's rows and bring the summaries up to date."""
        with _writing(self.folder):
            self._add(outcome)

    def _add(self, outcome: Outcome) -> None:
        setup = outcome.setup
        label = {"case": setup.case, "variant": setup.variant} if self._compares else {}
        self._append("requests", request_table(outcome, label, self._moves, self._columns))
        self._append("steps", replica_table(outcome, label, RunRecords.runs))
        if any(each.event_rows for each in outcome.runs):
            self._append("events", replica_table(outcome, label, RunRecords.events))
        if setup.executes:
            name = "_".join(filter(None, label.values())) or self._study.name
            recorder = self._recorders.setdefault(setup.model.name, Recorder(self.folder / "recording"))
            recorder.add(outcome, name)
        summary = {
            **{k: v for k, v in label.items() if v},
            **outcome.summary,
            "assumptions": outcome.assumptions,
        }
        self._summaries.append(summary)
        self._facts["runs"].append(run_facts(outcome))
        _replace(self.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        if self._compares:
            _replace(self.folder / "comparison.json", json.dumps(self._summaries, indent=2, allow_nan=False) + "\n")
        _replace(self.folder / "study.json", json.dumps(self._facts, indent=1, allow_nan=False) + "\n")

    def close(self, outcomes: Sequence[Outcome]) -> None:
        """Finish the tables."""
        with _writing(self.folder):
            for table in self._tables.values():
                table.close()
            self._tables = {}
            if self._study.claims:
                found = claims.checked(self._study.claims, outcomes)
                _replace(self.folder / "claims.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
            if self._compares and "cdf" in self._study.tables:
                self._write_cdf(outcomes)

    def _append(self, name: str, table: pa.Table) -> None:
        if name not in self._tables:
            self._tables[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", table.schema)
        self._tables[name].write_table(table)

    def _write_cdf(self, outcomes: Sequence[Outcome]) -> None:
        with (self.folder / "cdf.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["case", "variant", "share", "ttft_ms", "e2el_ms", "normalized_latency_ms"])
            for outcome in outcomes:
                times = Latencies(outcome.requests)
                n = len(times.ttft)
                columns = (np.sort(times.ttft), np.sort(times.e2el), np.sort(times.normalized))
                for i, values in enumerate(zip(*columns, strict=True)):
                    numbers = [f"{v:.6f}" for v in values]
                    rows.writerow([outcome.setup.case, outcome.setup.variant, f"{(i + 1) / n:.6f}", *numbers])


def _of_trace(setup: Setup, column: str) -> bool:
    return getattr(setup.trace, column) is not None


def request_table(outcome: Outcome, label: dict[str, str], moves: bool = False, also: Sequence[str] = ()) -> pa.Table:
    """A row a request: the trace's columns, times in ps (null where it did not happen), latencies in ms.

    ``moves``: with the columns of a hand-over of KV, also where there was none; ``also``: with these of the trace.
    """
    columns = outcome.requests.columns()
    for name in also:
        given = getattr(outcome.setup.trace, name)
        columns[name] = np.full(len(outcome.requests.status), -1, dtype=np.int64) if given is None else given
    if moves:
        none = np.full(len(outcome.requests.status), -1, dtype=np.int64)
        columns = {**dict.fromkeys(HANDOVER_COLUMNS, none), **columns}
    done = columns["status"] == Status.FINISHED
    arrays: dict[str, Any] = _labels(label, len(done))
    for name, values in columns.items():
        if name == "status":
            arrays[name] = pa.array(STATUS).take(pa.array(values)).dictionary_encode()
        elif name.endswith("_ps") or name == "prefill_replica":
            arrays[name] = pa.array(values, mask=np.asarray(values) < 0)
        else:
            arrays[name] = pa.array(values)
    arrival, first, last = (
        np.asarray(columns[c], dtype=np.int64) for c in ("arrival_ps", "first_token_ps", "finished_ps")
    )
    more = np.asarray(columns["output_tokens"], dtype=np.int64) - 1
    arrays["ttft_ms"] = pa.array((first - arrival) / PS_PER_MS, mask=~done)
    arrays["tpot_ms"] = pa.array((last - first) / PS_PER_MS / np.maximum(more, 1), mask=~(done & (more > 0)))
    arrays["e2el_ms"] = pa.array((last - arrival) / PS_PER_MS, mask=~done)
    return pa.table(arrays)


def replica_table(
    outcome: Outcome, label: dict[str, str], rows: Callable[[RunRecords], dict[str, npt.NDArray[np.int64]]]
) -> pa.Table:
    """The ``rows`` of each replica, one after the other: runs of engine steps, or the events of a journal."""
    tables = []
    for replica, each in enumerate(outcome.runs):
        columns = rows(each)
        n = len(next(iter(columns.values())))
        arrays = _labels(label, n)
        arrays["replica"] = pa.array(np.full(n, replica, dtype=np.int32))
        for name, values in columns.items():
            arrays[name] = (
                pa.array(KINDS).take(pa.array(values)) if name == "kind" else pa.array(np.ascontiguousarray(values))
            )
        tables.append(pa.table(arrays))
    return pa.concat_tables(tables).combine_chunks()


def _labels(label: dict[str, str], n: int) -> dict[str, Any]:
    """Columns that say which run of a comparison a row belongs to."""
    zeros = pa.array(np.zeros(n, dtype=np.int32))
    return {k: pa.DictionaryArray.from_arrays(zeros, pa.array([v])) for k, v in label.items()}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(Problem(f"cannot be written: {error.strerror or error}", file=str(folder))) from None


def _replace(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _provenance(study: Study) -> dict[str, Any]:
    try:
        made_by = f"chairlift {version('chairlift')}"
    except PackageNotFoundError:
        made_by = "chairlift (not installed)"
    traces = {s.case or "workload": "; ".join((s.trace.source, *s.trace.notes)) for s in study.setups}
    pools = {
        " / ".join(filter(None, (s.case, s.variant))) or "kv": "; ".join(g.kv_source for g in s.groups)
        for s in study.setups
    }
    return {**study.resolved, "provenance": {"made_by": made_by, "traces": traces, "kv": pools}}
