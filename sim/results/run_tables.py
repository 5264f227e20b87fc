"""What one run leaves as tables and facts: for a results folder (`writer`), and for a notebook (`Outcome.to_arrow`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from chairlift.sim.results.metrics import limits, request_latencies
from chairlift.sim.results.reader import CODES
from chairlift.sim.results.records import DRAFT_COLUMNS, HANDOVER_COLUMNS, RequestRecords, RunRecords
from chairlift.sim.study import ReplicaGroup, Setup

Parts = Callable[[RunRecords], Iterable[Mapping[str, npt.NDArray[np.int64]]]]
ROW_GROUP = 1 << 20  # rows of steps or events that are written at a time; also PyArrow's own
NO_MORE: Mapping[str, int] = {}
LABELS = ("tenant", "session", "priority")  # columns of a trace that say who sends a request; a trace may lack them


def labels_of(setup: Setup) -> list[str]:
    """Which of `LABELS` the trace of ``setup`` has."""
    return [name for name in LABELS if getattr(setup.trace, name) is not None]


def extra_of(setups: Iterable[Setup]) -> dict[str, int]:
    """Columns of requests that only some of ``setups`` have, and what the others have there; -1 stands for none."""
    found: dict[str, int] = {}
    for setup in setups:
        found |= dict.fromkeys(HANDOVER_COLUMNS if setup.link is not None else (), -1)
        found |= dict.fromkeys(("rank",) if any(group.parallel.data > 1 for group in setup.groups) else (), -1)
        found |= dict.fromkeys(DRAFT_COLUMNS if setup.speculate is not None else (), 0)
    return found


def request_table(
    requests: RequestRecords, label: dict[str, str], extra: Mapping[str, int] = NO_MORE, also: Sequence[str] = ()
) -> pa.Table:
    """A row a request: lengths, times in ps (null where the event did not happen), latencies in ms.

    ``label`` says which run of a comparison the rows belong to. ``extra``: see `extra_of`. ``also`` names those
    of `LABELS` to add.
    """
    columns = requests.columns()
    for name in also:
        given = getattr(requests.trace, name)
        columns[name] = np.full(len(requests.status), -1, dtype=np.int64) if given is None else given
    lacking = {
        n: np.full(len(requests.status), value, np.int64 if value < 0 else np.int32) for n, value in extra.items()
    }
    columns = {**lacking, **columns}
    arrays: dict[str, Any] = _labels(label, len(columns["status"]))
    for name, values in columns.items():
        if name == "status":
            arrays[name] = _encoded(CODES[name], values)
        elif name.endswith("_ps") or name in ("prefill_replica", "rank"):
            numbers = np.asarray(values, dtype=np.int64)
            arrays[name] = _column(numbers, numbers < 0)
        else:
            arrays[name] = _column(values)
    for name, values in request_latencies(requests).items():
        if name != "normalized_latency":  # E2E ÷ output tokens, which stand in the same row
            arrays[f"{name}_ms"] = _column(values, np.isnan(values))
    return pa.table(arrays)


def replica_table(runs: Sequence[RunRecords], label: dict[str, str], parts: Parts) -> pa.Table:
    """The rows of each replica, one after the other: runs of engine steps, or the events of a journal.

    ``parts`` gives the columns of a replica's rows, some of its rows at a time.
    """
    return pa.concat_tables(replica_tables(runs, label, parts)).combine_chunks()


def replica_tables(runs: Sequence[RunRecords], label: dict[str, str], parts: Parts) -> Iterator[pa.Table]:
    """As `replica_table`, `ROW_GROUP` rows at a time; one table without rows where there are none."""
    held: list[dict[str, npt.NDArray[Any]]] = []  # parts that are in no table yet
    whole = 0  # tables
    for replica, each in enumerate(runs):
        for columns in parts(each):
            part: dict[str, npt.NDArray[Any]] = {"replica": np.full(_rows(columns), replica, np.int32), **columns}
            lack = ROW_GROUP - sum(map(_rows, held))
            while _rows(part) >= lack:
                held.append({name: values[:lack] for name, values in part.items()})
                part = {name: values[lack:] for name, values in part.items()}
                yield _joined(held, label)
                held, lack, whole = [], ROW_GROUP, whole + 1
            held.append(part)
    if not whole or any(map(_rows, held)):
        yield _joined(held, label)


def _rows(columns: Mapping[str, npt.NDArray[Any]]) -> int:
    return len(next(iter(columns.values())))


def _joined(parts: list[dict[str, npt.NDArray[Any]]], label: dict[str, str]) -> pa.Table:
    """One table of ``parts``, which are emptied on the way, so that no column is in memory twice for long."""
    arrays = _labels(label, sum(map(_rows, parts)))
    for name in list(parts[0]):
        made = np.concatenate([part.pop(name) for part in parts])
        arrays[name] = _texts([CODES[name][code] for code in made.tolist()]) if name in CODES else _column(made)
    return pa.table(arrays)


def run_facts(setup: Setup, runs: Sequence[RunRecords]) -> dict[str, Any]:
    """What ``study.json`` says of one run, whose records are ``runs``, those of a replica each."""
    return {
        "case": setup.case,
        "variant": setup.variant,
        "note": setup.note,
        "published": setup.published,
        "model": setup.model.name,
        "seed": setup.seed,
        "rows": {
            "requests": len(setup.trace),
            "steps": sum(len(each.rows) for each in runs),
            "events": sum(len(each.event_rows) for each in runs),
        },
        "slo": {f"{name}_ms": limit for name, limit in limits(setup.slo).items()},
        "tenants": list(setup.trace.tenants),
        "max_model_len": setup.max_model_len,
        "replicas": [replica for group in setup.groups for replica in _replicas(setup, group)],
    }


def _replicas(setup: Setup, group: ReplicaGroup) -> list[dict[str, Any]]:
    policy = group.make_scheduler()
    facts = {
        "role": group.role,
        "gpu": group.gpu.name,
        "tensor_parallel": group.parallel.tensor,
        "policy": type(policy).__name__,
        "kv_blocks": group.blocks,
        "block_size": group.block_size,
        "token_limit": policy.token_limit and policy.token_limit * group.parallel.data,
        "sequence_limit": policy.sequence_limit and policy.sequence_limit * group.parallel.data,
        "batch_synchronous": policy.batch_synchronous,
        "asynchronous": policy.asynchronous,
    }
    if group.tables > 1:
        facts |= {"kv_tables": group.tables, "kv_room": group.room(setup.max_model_len)}
    if not group.parallel.only_tensor:
        facts |= {"gpus": group.parallel.gpus, "parallel": str(group.parallel)}
    return [facts] * setup.most(group)


def _labels(label: dict[str, str], n: int) -> dict[str, Any]:
    """Columns that say which run of a comparison a row belongs to."""
    zeros = _column(np.zeros(n, dtype=np.int32))
    return {k: pa.DictionaryArray.from_arrays(zeros, _texts([v])) for k, v in label.items()}


# `pyarrow.array` and `take` import pandas, where it is installed, and `pyarrow.compute`: half of a short run's time.


def _column(values: npt.NDArray[Any], lacking: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Numbers, null where they are ``lacking``."""
    there = None
    if lacking is not None and lacking.any():
        there = pa.py_buffer(np.packbits(~lacking, bitorder="little"))
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [there, pa.py_buffer(values)])


def _encoded(texts: Sequence[str], codes: npt.NDArray[Any]) -> pa.Array:
    """The text of each code, as numbers into those that occur, which stand in the order in which they first do."""
    found, first, numbers = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    indices = np.argsort(order).astype(np.int32)[numbers]
    return pa.DictionaryArray.from_arrays(_column(indices), _texts([texts[code] for code in found[order].tolist()]))


def _texts(texts: Sequence[str]) -> pa.Array:
    data = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(ends), pa.py_buffer(b"".join(data)))
