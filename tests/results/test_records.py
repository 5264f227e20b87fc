"""Rows of records: packed or not they say the same, and what is made of them is the same."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.sim.cluster import cluster
from chairlift.sim.results import records, run_tables, weighted
from chairlift.sim.results.catalogue import PERCENTILES, STATISTICS
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.reader import read
from chairlift.sim.results.records import Rows, RunRecords
from chairlift.sim.results.run_tables import replica_table, replica_tables
from chairlift.sim.results.weighted import at_ranks, weighted_statistics
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate

EDGES = st.sampled_from([edge + more for bits in (7, 15, 31) for edge in (-(2**bits), 2**bits) for more in (-1, 0, 1)])
NUMBERS = st.one_of(st.integers(-3, 3), EDGES, st.integers(-(2**63), 2**63 - 1))


@given(st.lists(st.one_of(st.just("pack"), st.tuples(NUMBERS, NUMBERS)), max_size=30))
def test_packed_rows_are_the_rows(deeds: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PACKED_ROWS", 3)
        patch.setattr(records, "PART_ROWS", 5)
        rows, plain = Rows(("a", "b")), Rows(("a", "b"))
        added: list[tuple[int, int]] = []
        for deed in deeds:
            if deed == "pack":
                rows.pack()
                continue
            added.append(deed)
            rows.frombytes(array("q", deed).tobytes())
            plain.extend(deed)

    assert len(rows) == len(added)
    assert [list(pair) for pair in zip(rows.column("a"), rows.column("b"), strict=True)] == [list(x) for x in added]
    parts = [list(zip(part["a"].tolist(), part["b"].tolist(), strict=True)) for part in rows.parts()]
    assert list(itertools.chain.from_iterable(parts)) == added
    assert all(values.dtype == np.int64 for part in rows.parts() for values in part.values())
    assert rows == plain
    plain.extend((0, 0))
    assert rows != plain


def test_rows_that_differ_in_one_number_are_not_equal() -> None:
    one, other = Rows(("a", "b")), Rows(("a", "b"))
    one.extend((1, 2))
    other.extend((1, 3))

    assert one != other
    assert one != [1, 2]


STUDY = """
model: llama-3.1-8b
gpu: h100
replicas: 2
kv: {blocks: 200}
max_model_len: 2000
policy: vllm
limits: {timeout_s: 2}
workload:
  requests: 300
  arrivals: {poisson: {rate_per_s: 60}}
  prompt_tokens: {uniform: {low: 50, high: 400}}
  output_tokens: {uniform: {low: 1, high: 200}}
"""


def run_in(folder: Path, journal: bool) -> Outcome:
    (folder / "s.yaml").write_text(STUDY)
    study = load(folder / "s.yaml")
    outcome = simulate(study.setups[0], journal=journal)
    with Writer(folder / "out", study) as writer:
        writer.add(outcome)
    return outcome


@pytest.mark.parametrize("journal", [False, True])
def test_a_run_that_packs_is_the_run_that_does_not(
    journal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    one = run_in(plain, journal)
    monkeypatch.setattr(records, "PACKED_ROWS", 50)
    monkeypatch.setattr(cluster, "REPORT", 1)
    monkeypatch.setattr(weighted, "AT_ONCE", 256)
    other = run_in(packed, journal)

    assert one.summary["timed_out"] > 0
    assert one.summary["preemptions"] > 0
    assert all(len(each.rows._packed) > 1 for each in other.runs)
    assert all((len(each.event_rows._packed) > 1) == journal for each in other.runs)
    for tables in ("requests", "steps", *["events"] * journal):
        assert one.to_arrow(tables) == other.to_arrow(tables)
        assert (plain / f"out/{tables}.parquet").read_bytes() == (packed / f"out/{tables}.parquet").read_bytes()
    told = [{k: v for k, v in each.summary.items() if not k.endswith("wall_s")} for each in (one, other)]
    assert told[0] == pytest.approx(told[1])


def test_tables_are_written_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_in(tmp_path, journal=True)
    whole = outcome.to_arrow("steps")
    for rows in (1, 7, len(whole) // 2, len(whole), len(whole) + 1):
        monkeypatch.setattr(run_tables, "ROW_GROUP", rows)
        tables = list(replica_tables(outcome.runs, {}, RunRecords.run_parts))
        assert all(len(table) == rows for table in tables[:-1])
        assert 1 <= len(tables[-1]) <= rows
        assert pa.concat_tables(tables).combine_chunks() == whole
    monkeypatch.setattr(run_tables, "ROW_GROUP", 100)
    run_in(tmp_path, journal=True)

    assert pq.read_metadata(tmp_path / "out/steps.parquet").num_row_groups == -(-len(whole) // 100)
    [run] = read(tmp_path / "out").runs
    started = np.concatenate([columns["start_ps"] for columns in run.steps("start_ps")])
    assert started.tolist() == whole["start_ps"].to_pylist()


def test_no_rows_are_one_table_without_rows() -> None:
    tables = list(replica_tables([RunRecords(), RunRecords()], {"variant": "x"}, RunRecords.run_parts))

    assert [len(table) for table in tables] == [0]
    assert replica_table([RunRecords()], {}, RunRecords.event_parts).column_names[0] == "replica"


def test_columns_of_requests_show_the_records_and_cannot_be_written(tmp_path: Path) -> None:
    outcome = run_in(tmp_path, journal=False)
    finished = outcome.requests.columns()["finished_ps"]

    with pytest.raises(ValueError, match="read-only"):
        finished[0] = 0
    outcome.requests.finished[0] += 5
    assert finished[0] == outcome.requests.finished[0]


# ---- statistics of many values ----

WEIGHTED = st.lists(st.tuples(st.integers(0, 2**50), st.integers(1, 9)), min_size=1, max_size=60)


@given(WEIGHTED, st.sampled_from([1, 2, 8]), st.data())
def test_a_rank_is_that_of_the_list_written_out(
    pairs: list[tuple[int, int]], at_once: int, data: st.DataObject
) -> None:
    values, often = (np.array(column) for column in zip(*pairs, strict=True))
    written = np.sort(np.repeat(values, often))
    ranks = np.array(data.draw(st.lists(st.integers(0, len(written) - 1), min_size=1, max_size=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighted, "AT_ONCE", at_once)
        assert at_ranks(values, often, ranks).tolist() == written[ranks].tolist()


def test_one_outlier_and_many_equal_values() -> None:
    """The bins of a wide range hold nearly all values in one, which is looked into again."""
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.integers(10**10, 10**10 + 50, 3000), [10**18], np.full(500, 10**10 + 7)])
    often = rng.integers(1, 300, len(values)).astype(np.int32)
    written = np.sort(np.repeat(values, often))
    ranks = np.linspace(0, len(written) - 1, 99).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighted, "AT_ONCE", 100)
        assert at_ranks(values, often, ranks).tolist() == written[ranks].tolist()
        found = weighted_statistics(values, often, 1000)

    said = dict(zip(STATISTICS, found, strict=True))
    assert (said["mean"], said["std"]) == pytest.approx((written.mean() / 1000, written.std() / 1000))
    assert [said[name] for name in PERCENTILES] == pytest.approx(
        (np.percentile(written, list(PERCENTILES.values())) / 1000).tolist()
    )
