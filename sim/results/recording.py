"""What an executed run measured, as a recording: the files that `chairlift calibrate` and `validate` read.

The recording of a model ``m`` is ``m_requests.csv.gz`` (a row a request), ``m_steps.csv.gz`` (a row a step) and
``m_summary.json``; where two GPUs share it, ``m-tp2_…``, and ``m-tp2-ep_…`` if its experts too. Each run of a study is
one experiment of it; times are seconds from the start of the experiment. Recordings of vLLM have the same format.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.records import Status
from chairlift.sim.study import Setup, Speculate
from chairlift.sim.units import PS_PER_S

REQUESTS = (
    *("experiment", "index", "arrival_s", "added_s", "prompt_tokens", "output_tokens", "prefix_group"),
    *("first_token_s", "last_token_s", "tokens_seen"),
)
STEPS = (
    *("experiment", "schedule_s", "done_s", "schedule_cpu_s", "update_cpu_s", "prefill_requests", "prefill_tokens"),
    *("prefill_pairs", "decode_requests", "decode_context_tokens", "running", "waiting", "free_blocks", "preempted"),
    *("launch_s", "gpu_s"),  # beside what vLLM's recordings have
)


class Recorder:
    """Collects the executed runs of one model on so many GPUs and writes them to ``folder`` after each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._requests: list[tuple[Any, ...]] = []
        self._steps: list[tuple[Any, ...]] = []
        self._experiments: list[dict[str, Any]] = []

    def add(self, outcome: Outcome, name: str) -> None:
        """Add one run as experiment ``name``. Raises OSError if the folder cannot be written."""
        setup, summary = outcome.setup, outcome.summary
        self._requests += _request_rows(outcome, name)
        self._steps += _step_rows(outcome, name)
        settings = {k: v for k, v in setup.groups[0].scheduler_settings.items() if isinstance(v, int | bool | str)}
        graphs = {key: int(text) for key, text in outcome.engine.items() if key == "graph_tokens"}
        self._experiments.append(
            {
                **{"name": name, "n": len(setup.trace), "done": summary["completed"], "wall_s": summary["duration"]},
                **{key: summary[key] for key in ("total_input_tokens", "total_output_tokens", "steps", "preemptions")},
                "engine": {
                    "policy": setup.groups[0].scheduler.__name__,
                    **settings,
                    "num_gpu_blocks": setup.groups[0].blocks + 1,  # as vLLM counts them, its null block included
                    "block_size": setup.groups[0].block_size,
                    **graphs,
                },
            }
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        parallel = setup.groups[0].parallel
        start = self._folder / recorded_as(setup)
        _write(start.with_name(f"{start.name}_requests.csv.gz"), REQUESTS, self._requests)
        steps = STEPS if setup.speculate is None else (*STEPS, "decode_tokens")
        _write(start.with_name(f"{start.name}_steps.csv.gz"), steps, self._steps)
        engine: dict[str, Any] = {**outcome.engine, "model": setup.model.name, **outcome.assumptions}
        extra: dict[str, Any] = {}  # by vLLM's names
        if parallel.gpus > 1:
            extra |= {"tensor_parallel_size": parallel.tensor, "enable_expert_parallel": parallel.expert > 1}
            extra["pipeline_parallel_size"] = parallel.pipeline
        if setup.speculate is not None:
            extra["speculative"] = _speculative(setup.speculate)
        if extra:
            engine["extra"] = extra
        text = json.dumps({"engine": engine, "experiments": self._experiments}, indent=1)
        start.with_name(f"{start.name}_summary.json").write_text(text + "\n", encoding="utf-8")


def recorded_as(setup: Setup) -> str:
    """What a recording of these runs is called: the model, how GPUs share it, and what drafts."""
    drafts = "" if setup.speculate is None else f"-{setup.speculate.method}"
    return setup.model.name + setup.groups[0].parallel.label + drafts


def _speculative(speculate: Speculate) -> dict[str, Any]:
    """The drafts, and how many tokens a step keeps on average, as a recording of vLLM says both."""
    kept = 1 + sum(speculate.acceptance.of(speculate.tokens))
    drafts = {"method": speculate.method, "num_speculative_tokens": speculate.tokens}
    return {**drafts, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": round(kept, 6)}


def _request_rows(outcome: Outcome, name: str) -> list[tuple[Any, ...]]:
    columns = outcome.requests.columns()
    n = len(columns["id"])
    groups = outcome.setup.trace.prefix_group
    arrival, first, last = (np.asarray(columns[c]) / PS_PER_S for c in ("arrival_ps", "first_token_ps", "finished_ps"))
    done = columns["status"] == Status.FINISHED
    return list(
        zip(
            *([name] * n, range(n), _seconds(arrival), _seconds(arrival), columns["prompt_tokens"].tolist()),
            *(columns["output_tokens"].tolist(), [-1] * n if groups is None else groups.tolist()),
            *(_seconds(np.where(done, first, np.nan)), _seconds(np.where(done, last, np.nan))),
            columns["emitted_tokens"].tolist(),
            strict=True,
        )
    )


def _step_rows(outcome: Outcome, name: str) -> list[tuple[Any, ...]]:
    runs = outcome.runs[0].runs()
    n = len(runs["steps"])
    total = outcome.setup.groups[0].blocks
    seconds = {key: values / PS_PER_S for key, values in runs.items() if key.endswith("_ps")}
    more = [] if outcome.setup.speculate is None else [(runs["decodes"] + runs["drafts"]).tolist()]
    return list(
        zip(
            *([name] * n, _seconds(seconds["asked_ps"]), _seconds(seconds["start_ps"] + seconds["first_ps"])),
            *(_seconds(seconds["planning_ps"]), _seconds(seconds["update_ps"])),
            *(runs[key].tolist() for key in ("chunks", "prefill_tokens", "prefill_pairs", "decodes", "context")),
            *(runs[key].tolist() for key in ("running", "waiting")),
            *((total - runs["held_blocks"]).tolist(), runs["preempted"].tolist()),
            *(_seconds(seconds["launch_ps"]), _seconds(seconds["gpu_ps"]), *more),
            strict=True,
        )
    )


def _seconds(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[str]:
    """Text to the microsecond; empty where the value is NaN."""
    return ["" if np.isnan(v) else f"{v:.6f}" for v in values.tolist()]


def _write(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with gzip.GzipFile(path, "wb", mtime=0) as packed, io.TextIOWrapper(packed, encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
