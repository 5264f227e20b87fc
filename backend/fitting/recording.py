"""What an engine did, request by request and step by step: a recording folder, read and checked.

A folder holds ``<model>_requests.csv.gz``, ``<model>_steps.csv.gz`` and ``<model>_summary.json`` (or the three without
the prefix), and perhaps ``<model>_itl.npz`` with all inter-token gaps, seconds. Times are seconds from the start of
each experiment. In ``steps`` a row is one engine step; ``done_s`` is when the processing of its output begins.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.checked import a_file, json_of, not_text, reading
from chairlift.backend.cuda_graphs import GPT_OSS_TOKENS
from chairlift.backend.names import hint
from chairlift.backend.parallel import Parallel, labelled

Column = npt.NDArray[Any]
Table = dict[str, Column]

REQUEST_COLUMNS = (
    "index",
    "arrival_s",
    "added_s",
    "prompt_tokens",
    "output_tokens",
    "prefix_group",
    "first_token_s",
    "last_token_s",
)
LIMIT_COLUMNS = ("max_tokens", "ignore_eos")  # of requests of SGLang, whose decisions rest on them
STEP_COLUMNS = (
    "schedule_s",
    "done_s",
    "schedule_cpu_s",
    "update_cpu_s",
    "prefill_requests",
    "prefill_tokens",
    "prefill_pairs",
    "decode_requests",
    "decode_context_tokens",
    "running",
    "waiting",
    "preempted",
)
MOST_DRAFTS = 32  # of a request and step
MOST = 1e12  # of any number in a recording: tokens, or seconds (30,000 years)
LIMITS = ("num_gpu_blocks", "max_num_batched_tokens", "max_num_seqs", "block_size")


class RecordingError(ValueError):
    """A recording that cannot be used; the message is one sentence, with the file."""


@dataclass(frozen=True)
class Experiment:
    """One workload under one set of limits."""

    name: str
    folder: Path  # of the recording
    limits: dict[str, Any]  # of the engine, by vLLM's names; SGLang's settings beside them, by its own
    summary: dict[str, Any]
    requests: Table
    steps: Table
    itl_s: Column | None  # all inter-token gaps; None if they were not recorded
    jumps: bool = False  # whether its clock jumped over silence, as that of our own engine does: its GPU never rested
    whole: bool = False  # whether prompts computed whole went to another kernel, see `backend.whole_prompts`

    @property
    def is_grid(self) -> bool:
        """Whether its requests were made to measure steps, in waves that each waited for the one before."""
        return self.name.startswith("grid_")

    @property
    def repeats(self) -> str:
        """The name of the experiment that it repeats, to show the engine's own noise; "" if it is no repeat."""
        name = self.name
        return name[len("noise_") : -len("_again")] if name.startswith("noise_") and name.endswith("_again") else ""


@dataclass(frozen=True)
class Recording:
    """Experiments of one model on one engine and GPU."""

    folder: Path
    model: str
    engine: dict[str, Any]  # GPU, engine version, the model's own config
    experiments: dict[str, Experiment]

    @property
    def parallel(self) -> Parallel:
        """How the GPUs shared the model, by vLLM's names of its arguments."""
        extra = self.engine.get("extra")
        extra = extra if isinstance(extra, dict) else {}
        tensor = extra.get("tensor_parallel_size", 1)
        if not isinstance(tensor, int) or tensor < 1:
            raise RecordingError(
                f"{self.folder}: engine.extra.tensor_parallel_size must be at least 1 (got {tensor!r})"
            )
        if (stages := extra.get("pipeline_parallel_size", 1)) != 1:
            raise RecordingError(
                f"{self.folder}: engine.extra.pipeline_parallel_size must be 1: of several stages' steps many run at a"
                f" time, none has a time of its own (got {stages!r})"
            )
        return Parallel(tensor=tensor, expert=tensor if extra.get("enable_expert_parallel") else 1)

    @property
    def drafts(self) -> Drafts | None:
        """How it speculated, by vLLM's names of its arguments; None if it did not."""
        extra = self.engine.get("extra")
        told = extra.get("speculative") if isinstance(extra, dict) else None
        if told is None:
            return None
        if not isinstance(told, dict) or not isinstance(told.get("method"), str):
            raise RecordingError(f"{self.folder}: engine.extra.speculative needs a method (got {told!r})")
        tokens = told.get("num_speculative_tokens")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MOST_DRAFTS:
            rule = f"must be a whole number from 1 to {MOST_DRAFTS} (got {tokens!r})"
            raise RecordingError(f"{self.folder}: engine.extra.speculative.num_speculative_tokens {rule}")
        return Drafts(told["method"], tokens)

    @property
    def accepted(self) -> float:
        """Tokens of a request and step on average, as vLLM's synthetic rejection sampler spread them."""
        if self.drafts is None:
            return 1.0
        length, most = self.engine["extra"]["speculative"].get("synthetic_acceptance_length"), 1 + self.drafts.tokens
        if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length <= most:
            rule = f"must be a number from 1 to {most}: how many drafts are kept (got {length!r})"
            raise RecordingError(f"{self.folder}: engine.extra.speculative.synthetic_acceptance_length {rule}")
        return float(length)

    @property
    def shape(self) -> str:
        """The model's own name: that of the files, without what it says of parallelism and drafts."""
        name = self.model if self.drafts is None else self.model.removesuffix(f"-{self.drafts.method}")
        return labelled(name)[0] if self.parallel.gpus > 1 else name

    def select(self, names: list[str] | None) -> list[Experiment]:
        """The experiments called ``names``; all if None. Raises `RecordingError` with the nearest name."""
        if not names:
            return list(self.experiments.values())
        for name in names:
            if name not in self.experiments:
                told = hint(name, self.experiments)
                raise RecordingError(f"{self.folder}: no experiment {name!r} of {self.model} – {told}")
        return [self.experiments[name] for name in dict.fromkeys(names)]


def read(folder: Path, model: str) -> Recording:
    """The recording of ``model`` in ``folder``. Raises `RecordingError`."""
    if not folder.is_dir():
        raise RecordingError(f"{folder}: no such folder")
    prefix = f"{model}_" if os.path.lexists(folder / f"{model}_summary.json") else ""
    summary_path = folder / f"{prefix}summary.json"
    if not os.path.lexists(summary_path):
        known = sorted(p.name.removesuffix("_summary.json") for p in folder.glob("*_summary.json"))
        hint = f"it has {', '.join(known)}" if known else "it has no *_summary.json"
        raise RecordingError(f"{folder}: no recording of {model!r}: {hint}")
    summary = _summary(summary_path)
    requests = _table(folder / f"{prefix}requests.csv.gz", REQUEST_COLUMNS, ends="last_token_s")
    steps = _table(folder / f"{prefix}steps.csv.gz", STEP_COLUMNS)
    gaps = _gaps(folder / f"{prefix}itl.npz")
    recording = Recording(folder, model, summary["engine"], {})
    _add_drafts(steps, recording)
    for i, facts in enumerate(summary["experiments"]):
        at = f"{summary_path}: experiments.{i}"
        if not isinstance(facts, dict) or not isinstance(facts.get("name"), str):
            raise RecordingError(f"{at}: an experiment needs a name")
        name = facts["name"]
        limits = facts.get("engine")
        limits = dict(limits) if isinstance(limits, dict) else {}
        check_limits(limits, f"{at}.engine", name)
        if _is_gpt_oss(summary["engine"]):
            limits.setdefault("graph_tokens", min(GPT_OSS_TOKENS, limits["max_num_batched_tokens"]))
        if name in recording.experiments:
            raise RecordingError(f"{at}: a second experiment {name!r}")
        own = [
            {c: column[table["experiment"] == name] for c, column in table.items() if c != "experiment"}
            for table in (requests, steps)
        ]
        _check(name, own[0], own[1], folder)
        jumps = "chairlift" in summary["engine"]
        whole = jumps and "attention" not in summary["engine"]  # older than the kernel that attends to all prompts
        parts = (own[0], own[1], gaps.get(name), jumps, whole)
        recording.experiments[name] = Experiment(name, folder, limits, facts, *parts)
    for file, names in (
        ("requests.csv.gz", set(requests["experiment"].tolist())),
        ("steps.csv.gz", set(steps["experiment"].tolist())),
        ("itl.npz", gaps.keys()),
    ):
        if others := sorted(map(str, names - recording.experiments.keys())):
            rule = f"holds rows of {others[0]!r}, an experiment that {summary_path.name} does not list"
            raise RecordingError(f"{folder / (prefix + file)}: {rule}")
    return recording


def _add_drafts(steps: Table, recording: Recording) -> None:
    """``proposes``, the drafts that each sequence gets after a step, and ``decode_tokens``, those verified among them.

    A row that does not say the latter is taken to verify all.

    Raises `RecordingError` where that is no number, or fewer than the decodes.
    """
    drafts, decodes = recording.drafts, steps["decode_requests"]
    every = decodes * (1 if drafts is None else 1 + drafts.tokens)
    told = steps.get("decode_tokens", every)
    if told.dtype.kind not in "iuf":
        raise RecordingError(f"{recording.folder}: decode_tokens of a step must be a number")
    tokens = np.where(np.isnan(told.astype(float)), every, told)  # rows that were merged from two may lack it
    wrong = ~((tokens >= decodes) & (tokens <= MOST))
    if drafts is None and (tokens > decodes).any():
        raise RecordingError(
            f"{recording.folder}: steps verify drafts, but engine.extra.speculative does not say which"
        )
    if wrong.any():
        bad, at = tokens[wrong][0], int(np.argmax(wrong)) + 1
        rule = f"must be at least decode_requests, {decodes[wrong][0]:g} (got {bad:g})"
        raise RecordingError(f"{recording.folder}: decode_tokens of step {at} {rule}")
    steps["decode_tokens"] = tokens
    steps["proposes"] = np.full(len(decodes), 0 if drafts is None else drafts.tokens)


def check_limits(limits: dict[str, Any], at: str, name: str) -> None:
    """Raise `RecordingError` unless the limits of the engine of experiment ``name``, which stand ``at``, are sound."""
    missing = [key for key in LIMITS if not isinstance(limits.get(key), int)]
    if missing:
        raise RecordingError(f"{at}: {name} lacks {', '.join(missing)}")
    for key in LIMITS:
        least = 2 if key == "num_gpu_blocks" else 1  # vLLM counts its null block among them
        if isinstance(limits[key], bool) or not least <= limits[key] <= MOST:
            rule = f"must be at most {MOST:g}" if limits[key] > MOST else f"must be at least {least}"
            raise RecordingError(f"{at}.{key}: {rule} (got {limits[key]!r})")


def check_engine(engine: dict[str, Any], at: str) -> None:
    """Raise `RecordingError` unless what is read of an engine's facts, which stand ``at``, is sound."""
    for key in ("gpu", "vllm", "sglang"):
        if not isinstance(engine.get(key, ""), str):
            raise RecordingError(f"{at}.{key}: must be text (got {engine[key]!r})")
    for key, example in (("vllm", "0.26.0"), ("sglang", "0.5.23")):
        if not re.match(r"\d+\.\d+", engine.get(key, "0.0")):
            raise RecordingError(f"{at}.{key}: must be a version, such as {example} (got {engine[key]!r})")


def _is_gpt_oss(engine: dict[str, Any]) -> bool:
    """Whether the recorded engine is vLLM with gpt-oss, of which it captures larger graphs."""
    model = engine.get("model")
    return "vllm" in engine and isinstance(model, dict) and model.get("architectures") == ["GptOssForCausalLM"]


def _summary(path: Path) -> dict[str, Any]:
    with reading(path, RecordingError):
        data = json_of(path)
    if not isinstance(data, dict) or not isinstance(data.get("engine"), dict):
        raise RecordingError(f"{path}: needs an object `engine`, what was recorded on what")
    check_engine(data["engine"], f"{path}: engine")
    if not isinstance(data.get("experiments"), list) or not data["experiments"]:
        raise RecordingError(f"{path}: needs a list `experiments`")
    return data


def _table(path: Path, columns: tuple[str, ...], ends: str = "") -> Table:
    """The columns of a CSV file, gzipped or not; those named ``columns`` are checked numbers.

    Rows of grids that lack ``ends`` are left out: a grid may be cut off, and its steps before then still tell what they
    tell. So are steps that were scheduled before their experiment began, for they are of what ran before it: of a
    request that ended in the step before, an engine that plans ahead computes one more.
    """
    with reading(path, RecordingError, pa.ArrowException):
        table = csv.read_csv(a_file(path))
        names = table.column_names  # which are bytes until then
    for name in names:
        if pa.types.is_binary(table.schema.field(name).type):
            for line, cell in enumerate(table[name].to_pylist(), 2):
                try:
                    cell.decode()
                except UnicodeDecodeError as error:
                    raise RecordingError(f"{path}:{line}: {name} {not_text(error)}") from None
    if len(set(table.column_names)) < len(table.column_names):
        raise RecordingError(f"{path}: names a column twice")
    missing = [name for name in ("experiment", *columns) if name not in table.column_names]
    if missing:
        raise RecordingError(f"{path}: lacks the columns {', '.join(missing)}")
    if ends:
        grid = pc.starts_with(table["experiment"].cast(pa.string()), "grid_")
        table = table.filter(pc.invert(pc.and_(grid, pc.is_null(table[ends]))))
    elif pa.types.is_floating(table["schedule_s"].type):
        table = table.filter(pc.invert(pc.fill_null(pc.less(table["schedule_s"], 0.0), False)))
    if not len(table):
        raise RecordingError(f"{path}: holds no rows, only the names of its columns")
    found: Table = {}
    for name in table.column_names:
        column = table[name].to_numpy()
        if name in columns:
            if column.dtype.kind not in "iuf" or not np.isfinite(column.astype(float)).all():
                bad = next(i for i, v in enumerate(table[name].to_pylist()) if not _is_number(v))
                raise RecordingError(f"{path}:{bad + 2}: {name} must be a number (got {table[name][bad].as_py()!r})")
            if np.abs(column.astype(float)).max() > MOST:
                bad = int(np.argmax(np.abs(column.astype(float))))
                raise RecordingError(f"{path}:{bad + 2}: {name} must be at most {MOST:g} (got {column[bad]:g})")
            if not name.endswith("_s") and (column != np.floor(column)).any():
                bad = int(np.argmax(column != np.floor(column)))
                raise RecordingError(f"{path}:{bad + 2}: {name} must be a whole number (got {column[bad]:g})")
            if name != "prefix_group" and column.size and column.min() < 0:
                bad = int(np.argmin(column))
                raise RecordingError(f"{path}:{bad + 2}: {name} must be at least 0 (got {column[bad]:g})")
        found[name] = column
    return found


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(str(value)))
    except ValueError:
        return False


def _gaps(path: Path) -> Table:
    if not os.path.lexists(path):
        return {}
    refused = reading(path, RecordingError, TypeError, zipfile.BadZipFile, NotImplementedError)
    with refused, a_file(path).open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
        gaps = {name: arrays[name].astype(np.float64) for name in arrays.files}
    for name, seconds in gaps.items():
        if seconds.ndim != 1 or not ((seconds >= 0) & (seconds <= MOST)).all():
            raise RecordingError(f"{path}: {name} must be a list of seconds, each at least 0")
    return gaps


def _check(name: str, requests: Table, steps: Table, folder: Path) -> None:
    """Raise `RecordingError` unless the rows of the experiment ``name`` make sense together."""
    at = f"{folder}: {name}"
    if not len(requests["index"]) or not len(steps["done_s"]):
        raise RecordingError(f"{at}: has no requests or no steps")
    if (np.diff(steps["done_s"]) < 0).any():
        raise RecordingError(f"{at}: done_s runs back at step {int(np.argmin(np.diff(steps['done_s']))) + 1}")
    again = (np.diff(steps["done_s"]) == 0) & (np.diff(steps["schedule_s"]) == 0)
    if again.any():
        raise RecordingError(f"{at}: step {int(np.argmax(again)) + 1} is scheduled and done when the one before is")
    if (steps["schedule_s"] > steps["done_s"]).any():
        raise RecordingError(f"{at}: a step is done before it is scheduled")
    if (requests["prompt_tokens"] < 1).any() or (requests["output_tokens"] < 1).any():
        raise RecordingError(f"{at}: every request needs a prompt and an output token")
    if "max_tokens" in requests:
        columns = [requests[name] for name in LIMIT_COLUMNS if name in requests]
        if [column.dtype.kind for column in columns] != ["i", "i"]:
            raise RecordingError(f"{at}: {' and '.join(LIMIT_COLUMNS)} must be whole numbers of each request")
        most, ignores = columns
        if (most < requests["output_tokens"]).any() or not np.isin(ignores, (0, 1)).all() or (most > MOST).any():
            raise RecordingError(f"{at}: a request's max_tokens are less than its output, or ignore_eos is not 0 or 1")
        if (ignores[most != requests["output_tokens"]] == 1).any():
            raise RecordingError(f"{at}: a request that ignores EOS must have max_tokens tokens")
    if (requests["last_token_s"] < requests["first_token_s"]).any():
        raise RecordingError(f"{at}: a request's last token comes before its first")
    empty = (steps["prefill_tokens"] + steps["decode_requests"]) == 0
    if empty.any():
        raise RecordingError(f"{at}: step {int(np.argmax(empty))} computes nothing")
