"""Processes start whole, whenever signals come, and hear no interrupt."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chairlift.backend.spawned import spawned
from kit.at_work import asleep, lives, wait_until
from kit.places import with_tests


class Heard(Exception):
    """What the handlers of these tests raise."""


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT and SIGTERM raise, and afterwards do what they did before."""

    def raised(number: int, _frame: object) -> None:
        raise Heard(signal.Signals(number).name)

    before = {number: signal.signal(number, raised) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def half_started(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> list[int]:
    """Call ``then`` when a process is there and has nothing of what it is to do; its id is added to the list."""
    multiprocessing.resource_tracker.ensure_running()  # else it is the first to be started
    start = multiprocessing.util.spawnv_passfds
    found: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        pid = start(*arguments)
        found.append(pid)
        then()
        time.sleep(0.05)  # here a handler that is not held back raises
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", interrupted)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("elsewhere", [True, False], ids=["in another thread", "in this thread"])
@pytest.mark.usefixtures("heard")
def test_a_signal_while_a_process_starts_ends_it_afterwards_and_silently(
    number: signal.Signals,
    elsewhere: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait, daemon=True)
    other.start()
    assert other.ident is not None
    thread = other.ident if elsewhere else threading.get_ident()
    pids = half_started(monkeypatch, lambda: signal.pthread_kill(thread, number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Heard, match=number.name):
        spawned(asleep, tmp_path, 600)
    stop.set()
    other.join()

    assert len(pids) == 1
    wait_until(lambda: not multiprocessing.active_children() and not lives(pids[0]))
    assert capfd.readouterr().err == ""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def alone(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a Python of its own, which has started no process before."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=with_tests(), capture_output=True, text=True, timeout=60)


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from chairlift.backend.spawned import spawned
from kit.at_work import asleep

for turn in range(2):  # with the first one another process starts, which Python has for all of them
    folder = Path(sys.argv[1]) / str(turn)
    folder.mkdir()
    process = spawned(asleep, folder, 0.2)
    while not list(folder.iterdir()) and process.is_alive():  # it imports, and then it sleeps
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.002)
    process.join(20)
    print(process.exitcode)
"""


def test_a_process_hears_no_interrupt_from_its_first_instruction_on(tmp_path: Path) -> None:
    done = alone(INTERRUPTED, tmp_path)

    assert (done.stdout, done.stderr) == ("0\n0\n", "")


def test_signals_that_do_what_the_system_does_are_left_to_it(tmp_path: Path) -> None:
    """SIGTERM ends a process that does not handle it, also while another starts."""
    script = (
        "import os, signal\nfrom pathlib import Path\nimport multiprocessing.util as util\n"
        "from chairlift.backend.spawned import spawned\nfrom kit.at_work import asleep\n"
        "from multiprocessing import resource_tracker\nresource_tracker.ensure_running()\n"
        "util.spawnv_passfds = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"spawned(asleep, Path({str(tmp_path)!r}), 1)\n"
    )
    done = alone(script)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


@pytest.mark.usefixtures("heard")
def test_processes_start_from_other_threads_too(tmp_path: Path) -> None:
    """Where Python lets nobody say what a signal does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(spawned(asleep, tmp_path, 600)))
    thread.start()
    thread.join(20)
    wait_until(lambda: list(tmp_path.iterdir()))
    [process] = found
    assert lives(process.pid)
    process.kill()
    process.join()
