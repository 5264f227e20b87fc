"""Processes that are killed or lack memory: their runs are named and tried again, and no row tells of them."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from chairlift.sim.bad_input import BadInput, Problem
from kit.command import POLICY, SCENARIO, chairlift, replaced
from kit.sweeping import table, written_down

HEAD = "    def schedule(self, step: Step) -> int:\n"
SWEEP = "base: s.yaml\nseeds: 2\naxes: {policy.budget: [2000, 2001]}\n"
DEATH = "            import os, signal\n            os.kill(os.getpid(), signal.SIGKILL)\n"
MEMORY = "            raise MemoryError('an array of 1 EiB')\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(replaced("policy: {name: vllm}", "policy: {name: 'p.py:Mine'}"))
    Path("w.yaml").write_text(SWEEP)


def ailing(what: str) -> None:
    """A policy that does ``what`` for as long as there is a file ``ill``; what it reads there is no part of its key."""
    Path("ill").touch()
    ill = f"        if self.budget == 2001 and __import__('os').path.exists({str(Path('ill').resolve())!r}):\n"
    Path("p.py").write_text(POLICY.replace(HEAD, HEAD + ill + what))


@pytest.mark.parametrize(
    ("what", "jobs", "why"),
    [
        (DEATH, "2", "its process died 3 times (killed, or out of memory)"),
        (MEMORY, "2", "not enough memory: an array of 1 EiB"),
        (MEMORY, "1", "not enough memory: an array of 1 EiB"),
    ],
)
def test_a_lost_run_is_named_and_tried_again(what: str, jobs: str, why: str) -> None:
    ailing(what)
    command = ("sweep", "w.yaml", "--trust", "-q", "--out", "o", "-j", jobs)
    result = chairlift(*command)
    assert (result.status, result.out) == (1, "")
    assert result.err == f"lost: 2 runs: {why}; the same command tries them again\n"
    assert table(Path("o"))["policy.budget"].to_pylist() == [2000, 2000]
    assert len(written_down(Path("o"))) == 2

    Path("ill").unlink()
    assert chairlift(*command).status == 0
    assert table(Path("o"))["policy.budget"].to_pylist() == [2000, 2000, 2001, 2001]
    assert not any(table(Path("o"))["error"].to_pylist())


def test_a_run_that_wants_too_much_memory_is_one_line() -> None:
    ailing(MEMORY)
    result = chairlift("run", "s.yaml", "--trust", "-q", "--set", "policy.budget=2001")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "an array of 1 EiB" in result.err
    assert list(Path("runs").rglob("*")) == []


def test_no_more_processes_than_a_machine_can_hold() -> None:
    Path("s.yaml").write_text(SCENARIO)
    for command in ("sweep", "plan"):
        result = chairlift(command, "w.yaml", "-j", "100000")
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("error: --jobs: must be at most ")


def test_bad_input_stays_what_it_is_on_its_way_from_another_process() -> None:
    problems = [Problem("must be at least 1", "a.yaml", 3, "seed", 0), Problem("is missing", "b.yaml")]
    told = BadInput(problems)

    with ProcessPoolExecutor(1) as pool:
        back = pool.submit(raised, told).exception()

    assert isinstance(back, BadInput)
    assert back.problems == problems
    assert str(back) == "a.yaml:3: seed: must be at least 1 (got 0)\nb.yaml: is missing"


def raised(error: BadInput) -> None:
    raise error
