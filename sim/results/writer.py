"""What a study leaves on disk: ``summary.json``, ``comparison.json``, ``requests.parquet``, ``steps.parquet``,
``scenario.yaml``, ``study.json``, ``events.parquet`` if a journal was kept, ``cdf.csv`` if a comparison prints one.

Same scenario, same seed, same bytes: nothing but the ``wall_s`` figures depends on the machine or the day.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from chairlift.sim.atomic import NewFolder, write_text
from chairlift.sim.bad_input import saving
from chairlift.sim.results import claims
from chairlift.sim.results.metrics import Latencies
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.reader import sha256_of
from chairlift.sim.results.recording import Recorder, recorded_as
from chairlift.sim.results.records import RunRecords
from chairlift.sim.results.run_tables import LABELS, extra_of, labels_of, replica_tables, request_table, run_facts
from chairlift.sim.study import Study

CDFS = ("ttft", "e2el", "normalized_latency")  # latencies that every finished request has


_TABLES = tuple(f"{name}.parquet" for name in ("requests", "steps", "events"))
_SAID = ("summary.json", "comparison.json", "study.json", "scenario.yaml", "claims.json", "cdf.csv", "uncertainty.json")
MADE = frozenset((*_TABLES, *_SAID, "report.html", "trace.json", "recording"))  # the rest is somebody's own
OF_MANY = ("journal.sqlite", "plan.json")  # what a folder of a sweep or a plan has


class Writer:
    """Writes the folder of a study, run by run, and puts it in place at the end: whole, or not at all.

    Leaving the ``with`` block by an exception puts the runs in place that were finished; if there are none, or if they
    could not be written, the folder stays as it was. Until then `folder` is where to write, a hidden folder beside.

    Raises `BadInput` if the folder cannot be written, if another process writes it, or if it is a sweep's or a plan's.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        self._name = folder
        self._outcomes: list[Outcome] = []
        self._study = study
        self._compares = len(study.setups) > 1
        self._extra = extra_of(study.setups)
        self._summaries: list[dict[str, Any]] = []
        self._tables: dict[str, pq.ParquetWriter] = {}
        self._recorders: dict[str, Recorder] = {}
        self._facts = _study_facts(study)
        self._columns = [c for c in LABELS if any(c in labels_of(setup) for setup in study.setups)]
        text = yaml.safe_dump(_provenance(study), sort_keys=False, allow_unicode=True, width=110)
        self._whole = True
        with saving(folder):
            for name in OF_MANY:
                if (folder / name).exists():
                    raise OSError(f"it holds {name}, of a sweep or a plan")
            self._new = NewFolder(folder, MADE)
            self.folder = self._new.path
            try:
                (self.folder / "scenario.yaml").write_text(text, encoding="utf-8")
            except BaseException:
                self._new.abandon()
                raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or (self._outcomes and self._whole):
            self.close()
        else:
            self._new.abandon()

    def add(self, outcome: Outcome) -> None:
        """Write one run's rows, and keep what the summaries say of it."""
        self._whole = False
        with saving(self._name):
            self._add(outcome)
        self._outcomes.append(outcome)
        self._whole = True

    def _add(self, outcome: Outcome) -> None:
        setup = outcome.setup
        label = {"case": setup.case, "variant": setup.variant} if self._compares else {}
        self._append("requests", [request_table(outcome.requests, label, self._extra, self._columns)])
        self._append("steps", replica_tables(outcome.runs, label, RunRecords.run_parts))
        if any(each.event_rows for each in outcome.runs):
            self._append("events", replica_tables(outcome.runs, label, RunRecords.event_parts))
        if setup.executes:
            name = "_".join(filter(None, label.values())) or self._study.name
            recorder = self._recorders.setdefault(recorded_as(setup), Recorder(self.folder / "recording"))
            recorder.add(outcome, name)
        summary = {
            **{k: v for k, v in label.items() if v},
            **outcome.summary,
            "assumptions": outcome.assumptions,
        }
        self._summaries.append(summary)
        self._facts["runs"].append(run_facts(outcome.setup, outcome.runs))

    def close(self) -> None:
        """Finish the tables and put the folder in place."""
        with saving(self._name):
            try:
                self._finish()
                self._new.commit()
            finally:
                self._new.abandon()

    def _finish(self) -> None:
        for table in self._tables.values():
            table.close()
        self._facts["sha256"] = {name: sha256_of(self.folder / f"{name}.parquet") for name in self._tables}
        self._tables = {}
        documents: list[tuple[str, Any, int]] = [("study.json", self._facts, 1)]
        if self._summaries:
            documents.append(("summary.json", self._summaries[-1], 2))
        if self._summaries and self._compares:
            documents.append(("comparison.json", self._summaries, 2))
        for name, said, indent in documents:
            text = json.dumps(said, indent=indent, allow_nan=False)
            (self.folder / name).write_text(f"{text}\n", encoding="utf-8")
        if self._study.claims:
            found = claims.checked(self._study.claims, self._outcomes)
            write_text(self.folder / "claims.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
        if self._compares and "cdf" in self._study.tables:
            self._write_cdf(self._outcomes)

    def _append(self, name: str, tables: Iterable[pa.Table]) -> None:
        for table in tables:
            if name not in self._tables:
                self._tables[name] = pq.ParquetWriter(self.folder / f"{name}.parquet", table.schema)
            self._tables[name].write_table(table)
            del table  # before the next is made: each may have a million rows

    def _write_cdf(self, outcomes: Sequence[Outcome]) -> None:
        with (self.folder / "cdf.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["case", "variant", "share", *(f"{name}_ms" for name in CDFS)])
            for outcome in outcomes:
                times = Latencies(outcome.requests)
                columns = (np.sort(times.of(name)) for name in CDFS)
                for i, values in enumerate(zip(*columns, strict=True)):
                    numbers = [f"{v:.6f}" for v in values]
                    share = f"{(i + 1) / len(times):.6f}"
                    rows.writerow([outcome.setup.case, outcome.setup.variant, share, *numbers])


def _study_facts(study: Study) -> dict[str, Any]:
    """The head of ``study.json``; ``runs`` is filled as runs finish."""
    return {
        "name": study.name,
        "question": study.question.strip(),
        "baseline": study.baseline,
        "waterfall": [{"variant": rung.variant, "because": rung.because} for rung in study.waterfall],
        "compares": len(study.setups) > 1,
        "runs": [],
    }


def made_by() -> str:
    """Chairlift and its version."""
    try:
        return f"chairlift {version('chairlift')}"
    except PackageNotFoundError:
        return "chairlift (not installed)"


def _provenance(study: Study) -> dict[str, Any]:
    traces = {s.case or "workload": "; ".join((s.trace.source, *s.trace.notes)) for s in study.setups}
    pools = {
        " / ".join(filter(None, (s.case, s.variant))) or "kv": "; ".join(g.kv_source for g in s.groups)
        for s in study.setups
    }
    return {**study.resolved, "provenance": {"made_by": made_by(), "traces": traces, "kv": pools}}
