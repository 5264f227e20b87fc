"""A measured study beside its prediction: errors, Kendall's τ and regret, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.calibration.agreement import agreements
from kit.command import chairlift
from kit.places import ROOT

METRICS = ["total_token_throughput", "p99_ttft_ms"]
MEASURED = {"a": (100, 10), "b": (200, 20), "c": (300, 5)}
PREDICTED = {"a": (110, 10), "b": (400, 18), "c": (300, 12)}


def folder(path: Path, rows: dict[str, tuple[int, int]], case: str = "") -> Path:
    path.mkdir()
    listed = [
        {"case": case, "variant": name, **dict(zip(METRICS, values, strict=True))} for name, values in rows.items()
    ]
    (path / "comparison.json").write_text(json.dumps(listed))
    return path


def test_by_hand(tmp_path: Path) -> None:
    throughput, ttft = agreements(folder(tmp_path / "m", MEASURED), folder(tmp_path / "p", PREDICTED), METRICS)

    assert throughput.errors == pytest.approx({"a": 0.1, "b": 1.0, "c": 0.0})
    assert throughput.tau == pytest.approx(1 / 3)  # of three pairs only b and c change places
    assert throughput.regret == pytest.approx(1 / 3)  # b is chosen, c was best
    assert ttft.tau == pytest.approx(1 / 3)  # c, a, b measured; a, c, b predicted
    assert ttft.regret == pytest.approx(1.0)  # a's 10 ms instead of c's 5


def test_the_same_agrees(tmp_path: Path) -> None:
    for each in agreements(folder(tmp_path / "m", MEASURED), folder(tmp_path / "p", MEASURED), METRICS):
        assert (each.tau, each.regret) == (1, 0)


def test_ties_are_in_no_order(tmp_path: Path) -> None:
    tied = {"a": (100, 10), "b": (100, 20)}
    (throughput, _) = agreements(folder(tmp_path / "m", tied), folder(tmp_path / "p", tied), METRICS)

    assert throughput.tau == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [({"a": (1, 1)}, "the two folders hold different runs: b, c"), ({}, "must be the comparison.json of a run")],
)
def test_folders_that_do_not_match(tmp_path: Path, other: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        agreements(folder(tmp_path / "m", MEASURED), folder(tmp_path / "p", other), METRICS)


def test_the_command(tmp_path: Path) -> None:
    measured = ROOT / "backend" / "gpu" / "measured" / "hardware_policies.json"
    shown = chairlift("agree", str(measured), str(measured), "--json", str(tmp_path / "a.json"))

    assert "mean τ" in shown.out
    assert {row["case"] for row in json.loads((tmp_path / "a.json").read_text())} == {"10/s", "20/s", "40/s"}
    refused = chairlift("agree", "none", str(measured))
    assert refused.status == 2
    assert refused.err == "error: none/comparison.json: no such file\n"
