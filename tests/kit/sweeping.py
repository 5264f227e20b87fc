"""What the tests of sweeps share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chairlift.sim.sweep.journal import NAME
from chairlift.sim.sweep.table import TIMES
from kit.command import SCENARIO
from kit.places import IMPORTS

SWEEP = """\
base: base.yaml
seeds: 3
axes:
  policy: [vllm, {name: orca, reserve: max}]
  workload.arrivals.poisson.rate_per_s: [1, 4]
"""


def written(folder: Path, sweep: str = SWEEP, base: str = SCENARIO) -> Path:
    """A sweep file and its base in ``folder``."""
    (folder / "base.yaml").write_text(base)
    (folder / "sweep.yaml").write_text(sweep)
    return folder / "sweep.yaml"


def table(folder: Path) -> pa.Table:
    """The results in ``folder``, without the columns that tell how long things took."""
    return pq.read_table(folder / "results.parquet").drop_columns(list(TIMES))


def written_down(folder: Path) -> dict[str, dict[str, Any]]:
    """Key → entry of the journal in ``folder``, also while another process writes there: a copy is read."""
    with tempfile.TemporaryDirectory() as copy:
        for path in sorted(folder.glob(f"{NAME}*")):  # the log after the file that it adds to
            try:
                shutil.copy(path, copy)
            except FileNotFoundError:  # SQLite's own file of a change that ended meanwhile: the copies do not fit
                return written_down(folder)
        with closing(sqlite3.connect(Path(copy) / NAME)) as rows:
            if rows.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                return {}
            return {key: json.loads(entry) for key, entry in rows.execute("SELECT key, entry FROM results")}


def stopped(process: subprocess.Popen[str], folder: Path, how: signal.Signals) -> tuple[str, str]:
    """Stop ``process`` once five results are written in ``folder``; its output. An interrupt is to end it in peace."""
    try:
        while len(written_down(folder)) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
    except BaseException:  # a process that outlives its test is reported as the fault of another
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    out, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130, out + err
        assert "interrupted" in err
        assert "Traceback" not in err
    return out, err


def started(*arguments: str, module: str = "chairlift") -> subprocess.Popen[str]:
    """``chairlift ARGUMENTS`` as a process of its own, which hears interrupts even where the tests do not."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(IMPORTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what is started with & ignores it
    )
