"""A plug-in of vLLM's statistics that writes a row an iteration: it needs no scheduler class, and tells less.

vLLM finds it by its entry point. It does nothing unless ``CHAIRLIFT_RECORDING`` in the environment names a folder.
Since vLLM 0.26 ``--enable-logging-iteration-details`` adds what each iteration computed and how long it took. Contexts
and launches are not in it, so it makes no recording to fit a profile to; it shows load, queues and step times.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

FOLDER = "CHAIRLIFT_RECORDING"
COLUMNS = (
    *("time_s", "running", "waiting", "kv_usage", "prompt_tokens", "generation_tokens", "preempted"),
    *("prefill_requests", "prefill_tokens", "decode_requests", "decode_tokens", "step_s"),
)


class StepLogger(StatLoggerBase):
    """Writes ``stats-N-E.csv``, N being the number of the process and E that of the engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._rows: Any = None
        if FOLDER not in os.environ:
            return
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"stats-{os.getpid()}-{engine_index}.csv"
        self._file = path.open("w", buffering=1, encoding="utf-8", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_others: Any, **_more: Any) -> None:
        """Write the row of an iteration; what vLLM does not say stays empty."""
        if self._rows is None or scheduler_stats is None:
            return
        load = [scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage]
        names = ("num_prompt_tokens", "num_generation_tokens", "num_preempted_reqs")
        done = ["" if iteration_stats is None else getattr(iteration_stats, name, "") for name in names]
        details = getattr(scheduler_stats, "iteration_details", None)
        kinds = ("num_ctx_requests", "num_ctx_tokens", "num_generation_requests", "num_generation_tokens")
        parts = ["" if details is None else getattr(details, kind, "") for kind in kinds]
        took = "" if details is None else f"{details.elapsed_ms / 1e3:.6f}"
        self._rows.writerow([f"{time.time():.6f}", *load, *done, *parts, took])

    def log_engine_initialized(self) -> None:
        """Nothing is to be said of the engine."""
