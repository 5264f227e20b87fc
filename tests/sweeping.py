"""What the tests of sweeps share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from command import ROOT, SCENARIO

from sim.sweep_table import TIMES

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


def started(*arguments: str) -> subprocess.Popen[str]:
    """``chairlift ARGUMENTS`` as a process of its own, which hears interrupts even where the tests do not."""
    return subprocess.Popen(
        [sys.executable, "-m", "sim", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what is started with & ignores it
    )
