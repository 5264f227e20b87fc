"""Folders of earlier versions are read, or refused with one line that says what to do."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kit.command import chairlift
from kit.pages import Page
from kit.places import ROOT

# `chairlift run` of version 0.1.0 wrote this, before `offered_rate` and `slo_missed` stood in summaries: twelve
# requests of two tenants under two policies, with a journal.
OLD = ROOT / "tests" / "data" / "results-0.1.tar.gz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(OLD) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11 has it since 3.11.4
        packed.extractall(tmp_path)
    return tmp_path / "results-0.1"


def test_a_report_shows_the_numbers_of_an_old_folder(old: Path) -> None:
    result = chairlift("report", str(old))
    page = Page(old / "report.html")
    summaries = json.loads((old / "comparison.json").read_text())

    assert (result.status, result.err) == (0, "")
    for i, summary in enumerate(summaries):
        found = {key: attributes["value"] for run, key, attributes, _ in page.data if run == str(i) and key}
        assert {"completed", "request_goodput", "kv_free", "p99_e2el_ms", "wall_s"} <= found.keys()
        assert "offered_rate" not in found
        assert all(float(value) == summary[key] for key, value in found.items() if value)
    assert list(json.loads(page.unpacked("data"))["slots"]) == ["0", "1"]


def test_a_request_of_an_old_folder_is_explained(old: Path) -> None:
    result = chairlift("explain", "--slowest", "1", "--in", str(old), "--variant", "paged")

    assert (result.status, result.err) == (0, "")
    assert (
        "request 11  prompt 140, answer 45 tokens · finished · TTFT 1.93 s · TPOT 20.83 ms · E2E 2.85 s" in result.out
    )
    assert "1.16 s behind requests whose KV did not fit" in result.out


def test_an_old_folder_is_compared_with_a_new_one(old: Path, tmp_path: Path) -> None:
    scenario = str(old / "scenario.yaml")
    Path(scenario).write_text((old / "scenario.yaml").read_text().partition("provenance:")[0])
    assert chairlift("run", scenario, "--out", str(tmp_path / "new"), "-q").status == 0
    result = chairlift("agree", str(old), str(tmp_path / "new"))

    assert result.status == 0, result.err
    assert "mean τ 1.00, worst regret 0.0 %" in result.out


def without_column(folder: Path) -> None:
    path = folder / "requests.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["cached_tokens"]), path)


def without_study(folder: Path) -> None:
    (folder / "study.json").unlink()


def without_a_fact(folder: Path) -> None:
    facts = json.loads((folder / "study.json").read_text())
    del facts["runs"][0]["replicas"][0]["block_size"]
    (folder / "study.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("spoil", [without_column, without_study, without_a_fact])
def test_a_folder_that_lacks_something_is_refused_in_one_line(old: Path, spoil: Callable[[Path], None]) -> None:
    spoil(old)
    result = chairlift("report", str(old))

    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "of another version of Chairlift: run the scenario again" in result.err
