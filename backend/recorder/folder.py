"""``chairlift-record DIR``: what recording engines wrote into a folder, as a recording to fit a profile to.

::

    CHAIRLIFT_RECORDING=DIR vllm serve … --scheduler-cls chairlift.backend.recorder.vllm.RecordingScheduler
    # … traffic, or a benchmark; then stop the server
    chairlift-record DIR --model llama-3.1-8b
    chairlift calibrate --recording DIR --model llama-3.1-8b --gpu h200

Each process of an engine becomes an experiment. Times count from its first request's arrival.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.backend.checked import json_of, reading, text_of
from chairlift.backend.fitting.recording import (
    LIMIT_COLUMNS,
    MOST,
    REQUEST_COLUMNS,
    RecordingError,
    check_engine,
    check_limits,
    read,
)
from chairlift.backend.recorder.journal import STEP_COLUMNS

Floats = npt.NDArray[np.float64]
_COUNTS = [i for i, name in enumerate(STEP_COLUMNS) if not name.endswith("_s")]


def convert(folder: Path, model: str, name: str = "served") -> list[str]:
    """Write ``<model>_requests.csv.gz``, ``_steps``, ``_summary.json`` and ``_itl.npz``; the names of the experiments.

    Args:
        folder: where the engines wrote, and where the recording goes.
        model: as Chairlift calls the model.
        name: of the experiment; with several processes their numbers are added.

    Raises:
        RecordingError: nothing was recorded, several engines differ, or a file is damaged.
    """
    if not folder.is_dir():
        raise RecordingError(f"{folder}: no such folder")
    stems = sorted(path.with_suffix("") for path in folder.glob("raw-*.json"))
    served = [(stem, rows) for stem in stems if (rows := list(_requests(Path(f"{stem}.requests.jsonl"))))]
    if not served:
        raise RecordingError(
            f"{folder}: no engine recorded a request that ended: is its --scheduler-cls the recorder's?"
        )
    engines = [_engine(Path(f"{stem}.json")) for stem, _ in served]
    facts = {key: value for key, value in engines[0].items() if key != "limits"}
    for other in engines[1:]:
        if {key: value for key, value in other.items() if key != "limits"} != facts:
            raise RecordingError(f"{folder}: engines of several kinds wrote here; give each a folder of its own")
    requests, steps, experiments = [], [], []
    gaps: dict[str, Floats] = {}
    for (stem, rows), engine in zip(served, engines, strict=True):
        label = name if len(served) == 1 else f"{name}_{stem.name.removeprefix('raw-')}"
        start = min(row.arrival for row in rows)
        rows.sort(key=lambda row: row.arrival)
        gaps[label] = np.concatenate([np.diff(row.times) for row in rows])
        for i, row in enumerate(rows):
            ends = (f"{row.times[0] - start:.6f}", f"{row.times[-1] - start:.6f}")
            at = (f"{max(0.0, row.arrival - start):.6f}", f"{max(0.0, row.added - start):.6f}")
            requests.append((label, i, *at, row.prompt, len(row.times), -1, *ends, *row.limits))
        own = list(_steps(Path(f"{stem}.steps.csv"), start))
        if not own:
            raise RecordingError(f"{stem}.steps.csv: holds no step after the first request's arrival")
        steps += [(label, *row) for row in own]
        experiments.append({"name": label, "steps": len(own), "requests": len(rows), "engine": engine["limits"]})
    columns = ("experiment", *REQUEST_COLUMNS, *LIMIT_COLUMNS)
    if len({len(row) for row in requests}) > 1:
        raise RecordingError(f"{folder}: some requests say their limits, some do not")
    (folder / f"{model}_summary.json").unlink(missing_ok=True)  # without one it is no recording, whatever ends this
    _write(folder / f"{model}_requests.csv.gz", columns[: len(requests[0])], requests)
    _write(folder / f"{model}_steps.csv.gz", ("experiment", *STEP_COLUMNS), steps)
    np.savez_compressed(folder / f"{model}_itl.npz", **gaps)  # type: ignore[arg-type]
    summary = json.dumps({"engine": facts, "experiments": experiments}, indent=1) + "\n"
    (folder / f"{model}_summary.json").write_text(summary, encoding="utf-8")
    return list(read(folder, model).experiments)


class _Request(NamedTuple):
    """A request that ended: seconds of the machine's clock, tokens, and the time of each token."""

    arrival: float
    added: float
    prompt: int
    times: Floats
    limits: tuple[int, ...]  # `LIMIT_COLUMNS`, of engines that tell them


def _requests(path: Path) -> Iterator[_Request]:
    for line, text in enumerate(_text(path).splitlines(), 1):
        try:
            arrival, added, prompt, packed, *limits = json.loads(text)
            times = np.array(array("d", base64.b64decode(packed, validate=True)))
            if isinstance(arrival, bool) or isinstance(added, bool):
                raise ValueError("its times must be numbers")
            facts = np.array([arrival, added, *times], np.float64)
            if type(prompt) is not int or not 1 <= prompt <= MOST:
                raise ValueError(f"its prompt has {prompt!r} tokens")
            if not len(times) or not (np.abs(facts) <= MOST).all() or (np.diff(times) < 0).any():
                raise ValueError("its times must be numbers of seconds, those of its tokens in order")
            if limits:
                most, ignores = limits
                if type(most) is not int or not len(times) <= most <= MOST or ignores not in (0, 1):
                    raise ValueError(f"it has {len(times)} tokens, and its limits are {most!r} and {ignores!r}")
                limits = [most, int(ignores and most == len(times))]  # else something ended it all the same
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordingError(f"{path}:{line}: not a request of the recorder's: {error}") from None
        yield _Request(arrival, added, prompt, times, tuple(limits))


def _engine(path: Path) -> dict[str, Any]:
    """What the engine is, and its ``limits``."""
    with reading(path, RecordingError):
        found = json_of(path)
    if not isinstance(found, dict) or not isinstance(found.get("limits"), dict):
        raise RecordingError(f"{path}: needs an object `limits`")
    check_limits(found["limits"], f"{path}: limits", path.stem)
    check_engine(found, str(path))
    return found


def _text(path: Path) -> str:
    with reading(path, RecordingError):
        return text_of(path)


def _steps(path: Path, start: float) -> Iterator[list[str]]:
    """The steps from ``start`` on, their times counted from there, in the order in which they were done."""
    try:
        rows = list(csv.reader(io.StringIO(_text(path), newline="")))
    except csv.Error as error:
        raise RecordingError(f"{path}: not readable as CSV: {error}") from None
    if not rows or tuple(rows[0]) != STEP_COLUMNS:
        raise RecordingError(f"{path}:1: must name the columns {', '.join(STEP_COLUMNS)}")
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(STEP_COLUMNS):
            if line == len(rows):
                break  # the engine was killed while it wrote
            raise RecordingError(f"{path}:{line}: must have {len(STEP_COLUMNS)} columns (got {len(row)})")
        try:
            if not all(abs(float(cell)) <= MOST for cell in row) or min(map(float, row[2:])) < 0:
                raise ValueError(f"must be numbers of at least 0 and at most {MOST:g}")
            if not all(float(row[i]).is_integer() for i in _COUNTS):
                raise ValueError(f"must be whole numbers: {', '.join(STEP_COLUMNS[i] for i in _COUNTS)}")
        except ValueError as error:
            raise RecordingError(f"{path}:{line}: {error}") from None
        scheduled, done = float(row[0]) - start, float(row[1]) - start
        if done < scheduled:
            raise RecordingError(f"{path}:{line}: is done before it is scheduled")
        if scheduled >= 0:
            yield [f"{scheduled:.6f}", f"{done:.6f}", *row[2:]]


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with gzip.GzipFile(path, "wb", mtime=0) as packed, io.TextIOWrapper(packed, encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def parser() -> argparse.ArgumentParser:
    """Of the command's arguments."""
    made = argparse.ArgumentParser(prog="chairlift-record", description="Make a recording of what engines wrote.")
    made.add_argument("folder", type=Path, metavar="DIR", help="what CHAIRLIFT_RECORDING named")
    made.add_argument("--model", required=True, help="the model in Chairlift's words: llama-3.1-8b")
    made.add_argument("--name", default="served", help="of the experiment")
    return made


def main() -> None:
    """The command ``chairlift-record``."""
    given = parser().parse_args()
    try:
        names = convert(given.folder, given.model, given.name)
    except (RecordingError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command begins again\n")
        raise SystemExit(130) from None
    after = f"chairlift calibrate --recording {given.folder} --model {given.model}"
    sys.stdout.write(f"{', '.join(names)} in {given.folder}; next: {after}\n")
