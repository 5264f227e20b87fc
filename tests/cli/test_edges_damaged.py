"""Damaged files that are read back: one line with the file and the field, exit status 2, and never a traceback."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from chairlift.backend.calibrated import profile
from kit.command import SCENARIO, chairlift, replaced
from kit.places import ROOT

EDGES = ROOT.parent / "shared" / "cases" / "edges"
SHIPPED = "h200-opt-13b-vllm-0.23"
PROFILED = replaced("gpu: a100-40gb", "gpu: h200\nbackend: p.json")
SWEEP = "base: s.yaml\nseeds: 2\naxes: {policy: [vllm]}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    Path("w.yaml").write_text(SWEEP)


def refused(*arguments: str, names: str, says: str = "") -> None:
    """One line that names the file, and says so."""
    result = chairlift(*arguments)
    assert (result.status, result.err.count("\n")) == (2, 1), result
    assert result.err.startswith("error: ")
    assert names in result.err
    assert says in result.err


def damaged(data: Any, at: tuple[str | int, ...], value: Any) -> Any:
    """A copy of ``data`` in which ``value`` stands at ``at``; with ``...`` nothing does."""
    made = json.loads(json.dumps(data))
    here = made
    for part in at[:-1]:
        here = here[part]
    if value is ...:
        del here[at[-1]]
    else:
        here[at[-1]] = value
    return made


def places(data: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where something stands in ``data``."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for part, below in items:
        yield (*at, part)
        yield from places(below, (*at, part))


def good() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((profile.SHIPPED / f"{SHIPPED}.json").read_text())
    return found


NONSENSE = [
    (("gpu_time", "sharpness"), 0, "gpu_time.sharpness must be greater than or equal to 1 (got 0)"),
    (("gpu_time", "weights_s"), 0, "gpu_time.weights_s must be greater than or equal to"),
    (("gpu_time", "token_s"), 1e300, "gpu_time.token_s must be less than or equal to 100"),
    (("gpu_time", "kv_s"), True, "gpu_time.kv_s must be a valid number (got True)"),
    (("gpu_time", "kv_s"), float("nan"), "gpu_time.kv_s must be"),
    (("gpu_time", "kv_s"), "1e-9", "gpu_time.kv_s must be a valid number (got '1e-9')"),
    (("gpu_time", "decode_residual"), [], "gpu_time.decode_residual"),
    (("gpu_time", "decode_residual"), [[1, 1e200]], "gpu_time.decode_residual.0.1 must be less than"),
    (("gpu_time", "decode_residual"), [[1, -1.0]], "gpu_time.decode_residual.0.1 must be greater than"),
    (("gpu_time", "decode_residual"), [[8, 1.0], [4, 1.0]], "gpu_time.decode_residual must list its tokens in rising"),
    (("gpu_time", "size_factors"), [[448, 1.3], [432, 1.1]], "gpu_time.size_factors must list its tokens in rising"),
    (("gpu_time", "size_factors"), [[448, 0.0]], "gpu_time.size_factors.0.1 must be greater than or equal to"),
    (("host", "graph_s"), ..., "host.graph_s is required"),
    (("gpu",), None, "gpu must be a valid string (got None)"),
    (("graph_tokens",), "x", "graph_tokens must be a valid integer (got 'x')"),
    (("errors",), "x", "errors must be an object"),
    (("errors", "steps", "mixed", "median"), "bad", "errors.steps.mixed.median must be a valid number (got 'bad')"),
    (("spread", "mixed", 0, "steps"), ["a"], "spread.mixed.0.steps"),
    (("spread", "mixed", 0, "steps"), [0.1] * 22 + [-0.1], "spread.mixed.0.steps must be quantiles, in rising order"),
    (("spread", "mixed", 0, "upto_s"), None, "spread.mixed must list steps by length, the shortest first"),
    (("format",), 2, "format must be 1"),
    (("speed",), 1, "speed is unknown"),
]


@pytest.mark.parametrize(("at", "value", "says"), NONSENSE)
def test_a_profile_that_says_nonsense_is_refused(at: tuple[str | int, ...], value: Any, says: str) -> None:
    Path("p.json").write_text(json.dumps(damaged(good(), at, value)))
    Path("s.yaml").write_text(PROFILED)
    refused("run", "s.yaml", "-q", names="p.json", says=says)
    refused("run", "s.yaml", "-q", "--uncertainty", "2", names="p.json", says=says)
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", "\0", '{"format": 1}'])
def test_a_file_that_is_no_profile_is_refused(text: str) -> None:
    Path("p.json").write_text(text)
    Path("s.yaml").write_text(PROFILED)
    refused("run", "s.yaml", "-q", names="p.json", says="not a profile")


def test_errors_are_only_shown_of_the_numbers_that_they_were_measured_for() -> None:
    Path("s.yaml").write_text(PROFILED)
    Path("p.json").write_text(json.dumps(good()))
    assert "held-out error" in chairlift("run", "s.yaml").out
    assert chairlift("run", "s.yaml", "-q", "--uncertainty", "2").status == 0

    Path("p.json").write_text(json.dumps(damaged(good(), ("gpu_time", "weights_s"), 0.001)))
    told = chairlift("run", "s.yaml").out
    assert "held-out error" not in told
    assert "the errors in its file are not of these numbers" in " ".join(told.split())
    refused("run", "s.yaml", "-q", "--uncertainty", "2", names="backend", says="carries no errors")


def test_a_scaled_profile_is_not_scaled_again() -> None:
    Path("p.json").write_text(json.dumps(damaged(good(), ("scaled",), "a100-40gb → h200: compute × 3")))
    Path("s.yaml").write_text(replaced("gpu: h200", "gpu: h100", PROFILED))
    refused("run", "s.yaml", "-q", names="s.yaml", says="is itself carried, and must not be carried again")


def test_no_damage_to_a_results_folder_is_a_traceback() -> None:
    """Every value in ``study.json`` and ``summary.json`` replaced by values of other kinds, or taken away."""
    assert chairlift("run", "s.yaml", "--out", "o", "-q").status == 0
    study = json.loads(Path("o/study.json").read_text())
    told = 0
    for at in places(study):
        for value in (None, "x", -1, 1.5, [], {}, ..., 10**18):
            Path("o/study.json").write_text(json.dumps(damaged(study, at, value)))
            result = chairlift("explain", "0", "--in", "o")
            assert result.status in (0, 2)
            if result.status == 2:
                assert result.err.count("\n") == 1
                assert "o/" in result.err
                told += 1
    assert told > 150
    for text in ("", "[]", "{", "null", "[" * 100_000, "\0", '{"runs": NaN}'):
        Path("o/study.json").write_text(text)
        refused("explain", "0", "--in", "o", names="o/study.json")
    Path("o/study.json").write_text(json.dumps(study))
    for text in ("", "[]", "{", "null"):
        Path("o/summary.json").write_text(text)
        refused("report", "o", names="o/summary.json")


@pytest.mark.parametrize("name", ["requests", "steps", "events"])
def test_a_damaged_table_is_one_line(name: str) -> None:
    assert chairlift("run", "s.yaml", "--out", "o", "-q").status == 0
    file = Path(f"o/{name}.parquet")
    whole = file.read_bytes()
    for raw in (b"", b"PAR1", whole[:100], whole[:-4], whole[: len(whole) // 2] + whole[-1000:]):
        file.write_bytes(raw)
        refused("report", "o", names=str(file))
    file.unlink()
    refused("report", "o", names=str(file))
    pq.write_table(pa.table({"a": [1]}), file)
    refused("report", "o", names=str(file))


def test_a_table_that_is_not_the_runs_own_is_refused() -> None:
    assert chairlift("run", "s.yaml", "--out", "o", "-q").status == 0
    file = Path("o/requests.parquet")
    table = pq.read_table(file)
    said = json.loads(Path("o/study.json").read_text())["sha256"]
    assert said["requests"] == hashlib.sha256(file.read_bytes()).hexdigest()

    longer = pa.compute.add(table["prompt_tokens"], 1)
    pq.write_table(table.set_column(table.column_names.index("prompt_tokens"), "prompt_tokens", longer), file)
    refused("explain", "0", "--in", "o", names="o/requests.parquet", says="study.json has another checksum")


@pytest.mark.parametrize(
    ("name", "column", "values", "says"),
    [
        ("events", "kind", "odd", "it must have arrive"),
        ("events", "value", "1.5", "it must have whole numbers"),
        ("requests", "arrival_ps", "x", "it must have numbers"),
    ],
)
def test_a_table_of_a_folder_without_checksums_is_checked_by_kind(
    name: str, column: str, values: str, says: str
) -> None:
    assert chairlift("run", "s.yaml", "--out", "o", "-q").status == 0
    study = json.loads(Path("o/study.json").read_text())
    Path("o/study.json").write_text(json.dumps(damaged(study, ("sha256",), ...)))
    table = pq.read_table(f"o/{name}.parquet")
    other = pa.array([values] * len(table) if values != "1.5" else [1.5] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, other), f"o/{name}.parquet")
    refused("explain", "0", "--in", "o", names=f"o/{name}.parquet: {column}", says=says)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [("seed", "x", "seed cannot be of type string"), ("error", 1, "error cannot be of type int64")],
)
def test_a_column_of_a_sweep_that_cannot_be_is_one_line(column: str, value: object, says: str) -> None:
    assert chairlift("sweep", "w.yaml", "--out", "o", "-q", "-j", "1").status == 0
    table = pq.read_table("o/results.parquet")
    other = table.set_column(table.column_names.index(column), column, pa.array([value] * len(table)))
    pq.write_table(other.replace_schema_metadata(table.schema.metadata), "o/results.parquet")
    refused("compare", "o", "--metric", "mean_ttft_ms", names="o/results.parquet", says=says)


def test_a_damaged_sweep_is_one_line() -> None:
    assert chairlift("sweep", "w.yaml", "--out", "o", "-q", "-j", "1").status == 0
    shutil.copytree("o", "whole")
    for text in ("[]", "{", "{}", '{"error": 1}', "null", "[" * 100_000):
        shutil.rmtree("o")
        shutil.copytree("whole", "o")
        with sqlite3.connect("o/journal.sqlite") as rows:
            rows.execute("UPDATE results SET entry = ?", (text,))
        rows.close()
        refused("sweep", "w.yaml", "--out", "o", "-q", "-j", "1", names="o/journal.sqlite", says="damaged")
    table = pq.read_table("whole/results.parquet")
    for meta in (b"", b"[]", b"{", b'{"sweep": 1, "axes": []}', b'{"sweep": "a", "axes": ["b"]}', b"\xff"):
        pq.write_table(table.replace_schema_metadata({b"chairlift": meta}), "whole/results.parquet")
        refused("compare", "whole", "--metric", "mean_ttft_ms", names="whole/results.parquet", says="damaged")


@pytest.mark.skipif(not EDGES.is_dir(), reason="the cases are beside the project")
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("rc_req_header", "requests.csv.gz: holds no rows"),
        ("rc_steps_header", "steps.csv.gz: holds no rows"),
        ("rc_steps_1e300", "must be at most 1e+12"),
        ("rc_steps_dup", "is scheduled and done when the one before is"),
        ("rc_sum_limneg", "engine.num_gpu_blocks: must be at least 2 (got -5)"),
    ],
)
def test_a_damaged_recording_is_one_line(case: str, says: str) -> None:
    folder = str(EDGES / "16" / case / "r")
    given = ("--recording", folder, "--model", "llama-3.1-8b")
    refused("calibrate", *given, "--out", "fitted.json", names=folder, says=says)
    refused("validate", *given, "--leave-one-out", names=folder, says=says)
    assert not Path("fitted.json").exists()
