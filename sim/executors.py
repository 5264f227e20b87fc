"""Where the runs of a sweep take place: the cores of this machine, by joblib. `sim.ray_cluster` has the other place."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sim.sweep import Row, Run

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
        """As `sim.sweep.Executor` says."""
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
        from joblib.externals.loky import get_reusable_executor

        if self.jobs == 1:
            yield from map(function, tasks)
            return
        parallel = Parallel(
            n_jobs=self.jobs,
            return_as="generator_unordered",
            batch_size=1,  # a run takes long beside its dispatch, and is written down at once
            pre_dispatch="4*n_jobs",
            initializer=_leave_interrupts_to_the_parent,
        )
        rows = parallel(delayed(_marked)(function, task, marks) for task in tasks)
        ended = False
        try:
            yield from rows
            ended = True
        finally:
            if not ended:  # interrupted: nobody waits for what is half done
                get_reusable_executor().shutdown(wait=False, kill_workers=True)


def _marked(function: Callable[[Run], Row], task: Run, marks: Path) -> Row:
    """Leave a mark while the task runs, so that a death can be laid at its door."""
    mark = marks / task.key
    mark.touch()
    row = function(task)
    mark.unlink(missing_ok=True)
    return row


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
