"""Where the runs of a sweep take place: the cores of this machine, by joblib; the other place is `sim.sweep.on_ray`."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chairlift.sim.sweep.runs import Row, Run

STRIKES = 3  # deaths of its process after which a run is given up


class Local:
    """All cores, or ``jobs`` processes. With one job the runs take place in this process.

    joblib's loky workers. Where a worker dies (killed, out of memory), the pool is made anew; a run in whose company
    that happened `STRIKES` times is given up, and the others go on.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or os.cpu_count() or 1

    def __call__(
        self, function: Callable[[Run], Row], tasks: Sequence[Run], lost: Callable[[Run, str], Row]
    ) -> Iterator[Row]:
        """As `sim.sweep.runs.Executor` says."""
        from joblib.externals.loky.process_executor import TerminatedWorkerError  # here: costs a tenth of a second

        left = {task.key: task for task in tasks}
        strikes: dict[str, int] = {}
        while left:
            with tempfile.TemporaryDirectory(prefix="chairlift-") as name:
                marks = Path(name)
                try:
                    for row in self._run(function, list(left.values()), marks):
                        del left[row.key]
                        yield row
                except TerminatedWorkerError:
                    suspects = [path.name for path in marks.iterdir() if path.name in left]
                    for key in suspects:
                        strikes[key] = strikes.get(key, 0) + 1
                        if strikes[key] == STRIKES:
                            yield lost(left.pop(key), f"its process died {STRIKES} times (killed, or out of memory)")
                    # One suspect first, the others last: they do not meet again.
                    order = [*suspects[:1], *(key for key in left if key not in suspects), *suspects[1:]]
                    left = {key: left[key] for key in order if key in left}

    def _run(self, function: Callable[[Run], Row], tasks: list[Run], marks: Path) -> Iterator[Row]:
        from joblib import Parallel, delayed

        if self.jobs == 1:
            yield from map(function, tasks)
            return
        parallel = Parallel(
            n_jobs=self.jobs,
            return_as="generator_unordered",
            batch_size=1,  # a run takes long beside its dispatch, and is written down at once
            pre_dispatch="4*n_jobs",
            initializer=_live_with_the_parent,
            initargs=(os.getpid(),),
        )
        rows = parallel(delayed(_marked)(function, task, marks) for task in tasks)
        before = threading.excepthook
        threading.excepthook = _deaf_to_loky
        try:
            yield from rows
        except BaseException:
            rows.close()  # nobody waits for what is half done
            raise
        threading.excepthook = before  # not where it was interrupted: the thread may still come to grief


def _deaf_to_loky(args: threading.ExceptHookArgs) -> None:
    """An interrupt withdraws tasks, over which loky's own thread that hands them out may trip: its end, and no news."""
    if not type(args.thread).__module__.startswith("joblib.externals.loky"):
        threading.__excepthook__(args)


def _marked(function: Callable[[Run], Row], task: Run, marks: Path) -> Row:
    """Leave a mark while the task runs, so that a death can be laid at its door."""
    mark = marks / task.key
    mark.touch()
    row = function(task)
    mark.unlink(missing_ok=True)
    return row


def _live_with_the_parent(parent: int) -> None:
    """In a new worker: an interrupt is the parent's business, and nothing outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # loky collects garbage once a second: not among all that was imported
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
