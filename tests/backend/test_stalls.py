"""Stalls of a recorded engine: found, and taken out of the clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chairlift.backend.fitting import fit as calibrate
from chairlift.backend.fitting.recording import Experiment, read
from chairlift.backend.fitting.steps import stalls, steps_of, without_stalls
from kit.places import TESTS
from kit.synthetic import Log, Planted, record, write

MODEL = "llama-3.1-8b"
STALLS = {700: 3.0, 1100: 1.5}  # steps of the recording, and by how many seconds they take longer
TIMES = ("arrival_s", "added_s", "first_token_s", "last_token_s")


@pytest.fixture(scope="module")
def log() -> Log:
    return record(Planted())


def told(folder: Path, log: Log) -> Experiment:
    [experiment] = read(write(folder, [log]), MODEL).select(None)
    return experiment


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory, log: Log) -> Experiment:
    return told(tmp_path_factory.mktemp("smooth"), log)


def stalled(log: Log) -> Log:
    """`log`, in which the steps `STALLS` take so much longer, and all that follows is later."""
    ends = sorted((log.steps[i][1], seconds) for i, seconds in STALLS.items())

    def late(at: float) -> float:
        return at + sum(seconds for end, seconds in ends if at >= end)

    steps = [[late(row[0]), late(row[1]), *row[2:]] for row in log.steps]
    requests = [[*row[:6], late(row[6]), late(row[7]), *row[8:]] for row in log.requests]
    return Log("made", steps, requests)


def test_a_smooth_recording_has_none(smooth: Experiment) -> None:
    assert len(stalls(smooth)[0]) == 0
    assert without_stalls(smooth) is smooth


def test_stalls_are_found_where_and_as_long_as_they_were(log: Log, tmp_path: Path) -> None:
    ends, lengths = stalls(told(tmp_path, stalled(log)))

    assert lengths.tolist() == pytest.approx(list(STALLS.values()), abs=0.06)  # steps like it differ by so much
    first, second = (log.steps[i][1] for i in STALLS)
    assert ends.tolist() == pytest.approx([first + 3.0, second + 4.5], abs=1e-6)


def test_without_its_stalls_a_recording_is_the_smooth_one(log: Log, smooth: Experiment, tmp_path: Path) -> None:
    found = without_stalls(told(tmp_path, stalled(log)))

    for name in TIMES:
        np.testing.assert_allclose(found.requests[name], smooth.requests[name], atol=0.12)
    for name in ("schedule_s", "done_s"):
        np.testing.assert_allclose(found.steps[name], smooth.steps[name], atol=0.12)
    assert (np.diff(found.steps["done_s"]) >= 0).all()
    assert found.itl_s is None  # nothing says which gaps held a stall


def test_who_comes_within_a_stall_comes_when_it_ends(log: Log, tmp_path: Path) -> None:
    late = stalled(log)
    end = log.steps[700][1]  # without the stall
    late.requests[0][1] = late.requests[0][2] = end + 2.0  # it lasts until end + 3
    late.requests[0][6] = end + 3.5

    found = without_stalls(told(tmp_path, late)).requests

    assert found["arrival_s"][0] == pytest.approx(end, abs=0.06)
    assert found["first_token_s"][0] - found["arrival_s"][0] == pytest.approx(0.5, abs=0.06)


def test_a_stall_among_the_last_few_steps_of_a_burst_is_found() -> None:
    """vLLM 0.23, 1,000 requests at once: of the last three steps, of 3, 1 and 1 decodes, one took 395 ms, not 10."""
    [burst] = read(TESTS / "recordings" / "burst", "opt-13b").select(None)

    ends, lengths = stalls(burst)

    assert burst.steps["decode_requests"][-3:].tolist() == [3, 1, 1]
    assert ends.tolist() == [burst.steps["done_s"][-3]]
    assert lengths.tolist() == pytest.approx([0.385], abs=0.005)


def test_a_bad_day_of_the_host_is_not_the_usual_one(tmp_path: Path) -> None:
    """Launches of three runs take 15 ms, of a fourth 40 ms: GPU times and launches stay as planted."""
    logs = [record(Planted(), seed, name=f"run_{seed}") for seed in (1, 2, 3)]
    logs.append(record(Planted(eager=0.040), 4, name="bad"))

    found = calibrate.fit(steps_of(read(write(tmp_path, logs), MODEL).select(None)))

    assert found.host.eager_s == pytest.approx(0.015, rel=0.05)
    tokens = np.array([1024.0, 4096.0])
    assert found.gpu.chunk_matmuls(tokens).tolist() == pytest.approx((21e-6 * tokens).tolist(), rel=0.05)
