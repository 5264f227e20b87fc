"""Processes that die are replaced, and none outlives the iteration or the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chairlift.sim.sweep import local
from chairlift.sim.sweep.local import STRIKES, Local
from kit.at_work import Done, Task, environment, lives, lost, wait_until, worked
from kit.command import replaced
from kit.places import with_tests
from kit.sweeping import SWEEP, started, written


def ended(jobs: int, tasks: list[Task], at_row: Callable[[int], object] = lambda _: None) -> dict[str, Done]:
    """Key → row; ``at_row`` is called with the number of rows so far."""
    executor: Any = Local(jobs)
    found: dict[str, Done] = {}
    for row in executor(worked, tasks, lost):
        assert row.key not in found
        found[row.key] = row
        at_row(len(found))
    return found


def test_tasks_are_spread_over_the_processes_and_each_is_done_once(tmp_path: Path) -> None:
    rows = ended(2, [Task(str(i), tmp_path, 0.05) for i in range(12)])
    pids = {row.pid for row in rows.values()}

    assert sorted(rows, key=int) == [str(i) for i in range(12)]
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert len(list(tmp_path.iterdir())) == 12
    wait_until(lambda: not any(map(lives, pids)), 10)  # for the executor is gone


def test_one_job_and_few_tasks_start_no_more_processes_than_they_need(tmp_path: Path) -> None:
    assert {row.pid for row in ended(1, [Task("a", tmp_path), Task("b", tmp_path)]).values()} == {os.getpid()}
    assert len({row.pid for row in ended(8, [Task("c", tmp_path)]).values()}) == 1
    assert ended(8, []) == {}


def test_a_run_whose_process_dies_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    deaths = {"never": 0, "once": 1, "twice": STRIKES - 1, "always": 99}
    rows = ended(2, [Task(key, tmp_path, 0.0, n) for key, n in deaths.items()] + [Task("long", tmp_path, 1.0)])

    assert {key for key, row in rows.items() if row.error} == {"always"}
    assert "its process died 3 times" in rows["always"].error
    attempts = {key: len(list(tmp_path.glob(f"{key}.*"))) for key in rows}
    assert attempts == {"never": 1, "once": 2, "twice": STRIKES, "always": STRIKES, "long": 1}  # long: undisturbed


def test_processes_that_die_before_they_are_given_a_run_end_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stillborn(local._Worker):
        def __init__(self, jobs: int) -> None:
            super().__init__(jobs)
            self._process.kill()
            self._process.join()

    monkeypatch.setattr(local, "_Worker", Stillborn)
    rows = ended(2, [Task(key, tmp_path) for key in "ab"])

    assert [row.error for row in rows.values()] == ["its process died 3 times (killed, or out of memory)"] * 2


def test_processes_that_are_killed_between_runs_or_in_them_lose_nothing(tmp_path: Path) -> None:
    def kill(rows: int) -> None:
        if rows in (2, 5):
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    rows = ended(2, [Task(str(i), tmp_path, 0.02) for i in range(9)], kill)

    assert len(rows) == 9
    assert not any(row.error for row in rows.values())


def test_an_iteration_that_is_closed_ends_what_runs_at_once(tmp_path: Path) -> None:
    executor: Any = Local(2)
    rows = executor(worked, [Task("short", tmp_path), Task("a", tmp_path, 600), Task("b", tmp_path, 600)], lost)
    assert next(rows).key == "short"
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
    before = time.monotonic()
    rows.close()

    assert time.monotonic() - before < 5
    wait_until(lambda: len(multiprocessing.active_children()) <= 1, 1)  # the one that waits for another call


def test_processes_wait_for_the_next_call(tmp_path: Path) -> None:
    executor: Any = Local(2)
    tasks = [[Task(f"{n}{k}", tmp_path, 0.1) for k in "ab"] for n in range(3)]
    pids = [{row.pid for row in executor(worked, each, lost)} for each in tasks]

    assert len(pids[0]) == 2
    assert pids[0] == pids[1] == pids[2]


def test_what_a_run_raises_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    nowhere = Task("nowhere", tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        ended(2, [Task("a", tmp_path, 600), nowhere])
    wait_until(lambda: not multiprocessing.active_children(), 10)


def test_blas_has_its_share_of_the_cores_and_the_environment_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    executor: Any = Local(max(2, os.cpu_count() or 1))
    [told] = executor(environment, [Task("a", tmp_path)], lost)

    assert told == {"OMP_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "1"}
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
def test_no_process_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom chairlift.sim.sweep.local import Local\nfrom kit.at_work import *\n"
        f"list(Local(2)(worked, [Task(k, Path({str(tmp_path)!r}), 600) for k in 'ab'], lost))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=with_tests())
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    pids = [int(path.suffix[1:]) for path in tmp_path.iterdir()]
    assert all(map(lives, pids))
    parent.kill()
    parent.wait()

    wait_until(lambda: not any(map(lives, pids)), 10)


def test_an_interrupt_while_processes_start_is_said_in_one_line(tmp_path: Path) -> None:
    written(tmp_path, SWEEP.replace("seeds: 3", "seeds: 400"), replaced("requests: 30", "requests: 3000"))
    process = started("sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--jobs", "4")
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "1,600 runs" in first
    wait_until((tmp_path / "out" / "journal.sqlite").exists)
    time.sleep(0.1)  # what is started now has imported little
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("interrupted")  # how many runs are done it says once the journal is read
