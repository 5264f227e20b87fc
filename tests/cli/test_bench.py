"""Each case of ``make bench`` has a process of its own, which ends with the command, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.at_work import lives, wait_until
from kit.sweeping import started

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for children")


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if lives(int(child))]


def measures(pid: int) -> bool:
    """Whether the process ``pid`` has begun to do what it was spawned for: only then is NumPy there."""
    return "numpy" in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture
def at_its_first_case(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The command, and the processes that it has: the first case's, and the one that Python has for all of them."""
    bench = started("--out", str(tmp_path / "bench.json"), module="chairlift.sim.cli.bench")
    wait_until(lambda: bench.poll() is not None or any(map(measures, children(bench.pid))))
    yield bench, children(bench.pid)
    if bench.poll() is None:
        os.killpg(bench.pid, signal.SIGKILL)
    bench.communicate()


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "interrupted\n"), (signal.SIGKILL, -9, None)],
)
def test_a_signal_ends_all_in_one_line(
    at_its_first_case: tuple[subprocess.Popen[str], list[int]],
    number: signal.Signals,
    status: int,
    said: str | None,
    tmp_path: Path,
) -> None:
    bench, pids = at_its_first_case
    assert pids
    if number == signal.SIGINT:
        os.killpg(bench.pid, number)  # as a terminal does
    else:
        bench.send_signal(number)
    out, err = bench.communicate(timeout=30)

    assert (bench.returncode, out) == (status, "10^4 …\n")
    assert said is None or err == said  # a process that just starts finds nobody behind its pipe, and Python says so
    wait_until(lambda: not any(map(lives, pids)), 10)
    assert list(tmp_path.iterdir()) == []


def test_a_case_whose_process_dies_says_which(at_its_first_case: tuple[subprocess.Popen[str], list[int]]) -> None:
    bench, pids = at_its_first_case
    for pid in filter(measures, pids):
        os.kill(pid, signal.SIGKILL)
    _, err = bench.communicate(timeout=30)

    assert (bench.returncode, err) == (1, "10^4: its process has died (exit code -9)\n")
