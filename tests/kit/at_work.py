"""What worker processes do in tests of executors. It lies here because a spawned process must be able to import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """A stand-in for a run: executors hand on what they get, by its key."""

    key: str
    folder: Path
    seconds: float = 0.0
    deaths: int = 0  # how often it kills its process before it goes well


@dataclass(frozen=True)
class Done:
    """Its row."""

    key: str
    pid: int
    error: str = ""


def worked(task: Task) -> Done:
    """Sleep, or die. Each attempt leaves a file ``key.pid``."""
    attempts = len(list(task.folder.glob(f"{task.key}.*")))
    (task.folder / f"{task.key}.{os.getpid()}").touch()
    if attempts < task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(task.seconds)
    return Done(task.key, os.getpid())


def asleep(folder: Path, seconds: float) -> None:
    """Sleep; a file in ``folder`` says that it has begun."""
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


def environment(task: Task) -> dict[str, str]:
    """What BLAS would read in this process."""
    return {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name in os.environ}


def lost(task: Task, why: str) -> Done:
    """The row of a task that was given up."""
    return Done(task.key, 0, why)


def stuck(_ranks: object, _device: object) -> None:
    """In place of a GPU's runner: never ready."""
    time.sleep(600)


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    """Look again and again whether it is ``true``; fails if it is not within ``seconds``."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
