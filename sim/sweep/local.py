"""Where the runs of a sweep take place: processes on the cores of this machine. The other place is `sim.sweep.on_ray`.

Each worker process has a pipe of its own to this process, and one run at a time. The end of a pipe therefore tells
which run its process died of, and no other run is disturbed. A `concurrent.futures.ProcessPoolExecutor` cannot tell,
and ends all its processes with one; an executor for every process would need ten open files each.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from chairlift.backend.spawned import SPAWN, spawned
from chairlift.sim.sweep.runs import OF_THE_MACHINE, Row, Run, failure

STRIKES = 3  # deaths of its process after which a run is given up
HEARD_S = 0.5  # longest wait for a row: on Windows an interrupt is heard between two waits only
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # NumPy's BLAS reads them as it is loaded


class Local:
    """All cores, or ``jobs`` processes. With one job the runs take place in this process.

    A process that dies (killed, out of memory) is replaced, and its run is tried again; after `STRIKES` deaths the run
    is given up. An iteration that ends early, by an interrupt above all, ends the runs under way at once. Processes
    wait for the next call and end with this object, or with the process that made it, however that ends.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        self._idle: list[_Worker] = []

    def __call__(
        self, function: Callable[[Run], Row], tasks: Sequence[Run], lost: Callable[[Run, str], Row]
    ) -> Iterator[Row]:
        """As `sim.sweep.runs.Executor` says."""
        if self.jobs == 1:
            for task in tasks:
                try:
                    row = function(task)
                except OF_THE_MACHINE as refusal:
                    row = lost(task, failure(refusal))
                yield row
            return
        waiting = deque(tasks)
        deaths: Counter[str] = Counter()
        busy: dict[Connection, tuple[_Worker, Run]] = {}
        rows: list[Row] = []
        try:
            while waiting or busy:
                while waiting and len(busy) < self.jobs:
                    worker = self._given(function, waiting[0])
                    busy[worker.pipe] = worker, waiting.popleft()
                yield from rows
                rows = []
                for pipe in wait(list(busy), HEARD_S):
                    assert isinstance(pipe, Connection)
                    worker, task = busy[pipe]
                    try:
                        row, error = pipe.recv()
                    except (EOFError, OSError):
                        deaths[task.key] += 1
                        if deaths[task.key] < STRIKES:
                            waiting.append(task)
                        else:
                            rows.append(lost(task, f"its process died {STRIKES} times (killed, or out of memory)"))
                        worker.end()
                        del busy[pipe]
                        continue
                    del busy[pipe]
                    self._idle.append(worker)
                    if isinstance(error, OF_THE_MACHINE):
                        rows.append(lost(task, failure(error)))
                        continue
                    if error is not None:
                        try:
                            raise error
                        finally:
                            del error, worker  # else the traceback refers to itself, and keeps the process
                    rows.append(row)
            yield from rows
        finally:
            for worker, _ in busy.values():
                worker.end()

    def _given(self, function: Callable[[Run], Row], task: Run) -> _Worker:
        """A worker that now has ``task``: one that waits, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.pipe.send((function, task))
            except OSError:  # its process died while it waited: no run is to blame
                worker.end()
            else:
                return worker
        worker = _Worker(self.jobs)
        with suppress(OSError):  # a process that died so early is noticed where its row is awaited
            worker.pipe.send((function, task))
        return worker


class _Worker:
    """A process that does what it is sent, one task after the other."""

    def __init__(self, jobs: int) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        with theirs, _share(jobs):
            self._process = spawned(_work, theirs)

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


@contextmanager
def _share(jobs: int) -> Iterator[None]:
    """Around the start of a process: its BLAS has its share of the cores among ``jobs`` processes.

    Where the user's environment says how many threads BLAS has, that holds.
    """
    unset = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, str(max(1, (os.cpu_count() or 1) // jobs))))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def _work(pipe: Connection) -> None:
    """In a worker: call each function that comes with its task, and send back what it returned or raised."""
    while True:
        try:
            function, task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send((function(task), None))
        except Exception as error:
            pipe.send((None, error))
