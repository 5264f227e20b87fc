"""vLLM's benchmark results: the requests that ``vllm bench serve`` sent, and how it was answered.

``vllm bench serve --save-result --save-detailed`` writes one JSON document of lists with a value a request, in the
order of the dataset. ``start_times`` are seconds of the client's monotonic clock; ``ttfts`` and ``itls`` are seconds
too; ``output_lens`` is 0 for a request that failed. Read from ``vllm/benchmarks/serve.py`` of vLLM 0.23 and 0.26.

What such a file says is checked against itself: its ``duration`` tells times in other units and times of several
clocks, its ``completed`` tells rows that are missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chairlift.backend.checked import once, wrong
from chairlift.sim.bad_input import NOTHING, BadInput, Problem, reading
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.text_tables import read_document
from chairlift.sim.workload.trace import Trace

Floats = npt.NDArray[np.float64]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Tokens = Annotated[int, Field(ge=0, le=2**31 - 1)]

LISTS = ("start_times", "input_lens", "output_lens", "ttfts", "itls")
DETAILED = "run vllm bench serve with --save-result --save-detailed"
SLACK_S = 1.0  # by which the client's own work may lengthen a run: it counts from before it sends to after it reads

options = ()


class _File(BaseModel):
    """The keys that are read; others are vLLM's own sums over the lists, and texts."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    duration: Seconds
    completed: Tokens | None = None
    max_concurrency: Tokens | None = None
    model_id: str | None = None
    start_times: list[Seconds]
    input_lens: list[Tokens]
    output_lens: list[Tokens]
    ttfts: list[Seconds]
    itls: list[list[Seconds]]
    errors: list[str] = []


@dataclass(frozen=True)
class Result:
    """The requests of a run that were answered, in order of sending. Columns have shape ``(n,)``."""

    path: Path
    trace: Trace  # lengths, and when each was sent: the first at 0
    rows: npt.NDArray[np.int64]  # the place of each among all that the file lists, from 0
    sent: int  # requests in the file, the failed ones included
    ttft_s: Floats
    latency_s: Floats  # from sending to the last token
    itl_s: Floats  # all gaps between pieces of answers, request by request. Shape: ``(gaps,)``
    max_concurrency: int | None  # of the client, which held requests back to keep it
    model_id: str | None  # as the server calls it

    @property
    def failed(self) -> int:
        """Requests that were not answered."""
        return self.sent - len(self.trace)


def told(head: bytes) -> bool:
    """The document begins with what was benchmarked, as ``vllm bench serve`` says it."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"{") and all(key in start for key in (b'"tokenizer_id"', b'"num_prompts"'))


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool, **_options: Any) -> Trace:
    """The trace of the requests that were answered. Raises `BadInput`."""
    trace = result(path).trace
    return trace if limit is None else trace.head(limit)


def result(path: Path) -> Result:
    """The requests of a run and their latencies.

    Raises:
        BadInput: one line: the file cannot be read, is cut short, lacks a list, has lists of different lengths, times
            that are not seconds of one clock, an answer without the gaps between its tokens, or no answer at all.
    """
    found = _parsed(path)
    counts = {name: len(getattr(found, name)) for name in LISTS}
    if found.errors:
        counts["errors"] = len(found.errors)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BadInput(Problem(f"is cut short or put together: these lists must be of one length ({told})", str(path)))
    errors = found.errors or [""] * len(found.ttfts)
    answered = np.array([not error and length > 0 for error, length in zip(errors, found.output_lens, strict=True)])
    gaps = [np.array(each) for each in found.itls]
    latency = np.array(found.ttfts) + [each.sum() for each in gaps]
    _refuse(path, found, answered, latency)
    start = np.array(found.start_times)
    order = np.argsort(start, kind="stable")
    rows = order[answered[order]]
    failed = len(start) - len(rows)
    trace = Trace(
        arrival_ps=np.rint((start[rows] - start[rows[0]]) * PS_PER_S).astype(np.int64),
        prompt_tokens=np.array(found.input_lens)[rows],
        output_tokens=np.array(found.output_lens)[rows],
        source=f"{path.name} (vllm_bench format)",
        notes=("time 0 is the first request", *[f"{failed:,} requests that failed left out"] * (failed > 0)),
    )
    itl = np.concatenate([gaps[row] for row in rows])
    times = (np.array(found.ttfts)[rows], latency[rows], itl)
    return Result(path, trace, rows, len(start), *times, found.max_concurrency, found.model_id)


def _refuse(path: Path, found: _File, answered: npt.NDArray[np.bool_], latency: Floats) -> None:
    """Raise `BadInput` for the first thing that cannot be. Shapes of ``answered`` and ``latency``: ``(requests,)``."""

    def wrong_if(bad: Any, rule: str, key: str = "", value: object = NOTHING) -> None:
        if bad:
            raise BadInput(Problem(rule, str(path), None, key, value))

    count, duration = int(answered.sum()), found.duration
    wrong_if(not count, f"none of its {len(answered):,} requests was answered")
    rule = f"must be the {count:,} requests that the lists show as answered"
    wrong_if(found.completed not in (None, count), rule, "completed", found.completed)
    empty = answered & (np.array(found.input_lens) == 0)
    wrong_if(empty.any(), "must be at least 1", f"input_lens.{int(np.argmax(empty))}", 0)
    outputs = np.array(found.output_lens)
    bare = answered & (outputs > 1) & np.array([not each for each in found.itls])
    row = int(np.argmax(bare))
    rule = f"must have the gaps between the {outputs[row]} tokens of an answer: {DETAILED}, answers streamed"
    wrong_if(bare.any(), rule, f"itls.{row}", [])
    ttft = np.array(found.ttfts)
    row = int(np.argmax(answered & (ttft == 0)))
    rule = f"must be more than 0, of an answer: {DETAILED}, answers streamed"
    wrong_if((answered & (ttft == 0)).any(), rule, f"ttfts.{row}", 0)
    row = int(np.argmax(np.where(answered, latency, 0)))
    rule = f"must be seconds: an answer took {latency[row]:,.6g}, more than the run's duration, {duration:,.6g}"
    wrong_if(latency[row] > duration + SLACK_S, rule, f"ttfts.{row}, itls.{row}")
    start = np.array(found.start_times)
    span = float((start + latency)[answered].max() - start[answered].min())
    rule = f"must be seconds of one clock: from first to last they span {span:,.6g}, and duration is {duration:,.6g}"
    wrong_if(span > duration + SLACK_S or span < duration / 2 - SLACK_S, rule, "start_times")


def _parsed(path: Path) -> _File:
    text = read_document(path)
    try:
        found = _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = wrong(error)
        if first["type"] == "missing":
            rule = f"has no {first['loc'][0]}: {DETAILED}"
        elif first["type"] == "json_invalid":
            said = first["ctx"]["error"]
            why = "is cut short" if said.startswith("EOF") else "is not one JSON document"
            if said.startswith("trailing"):
                why = "holds several results (--append-result): give a file of one"
            rule = f"{why}: {said}"
        raise BadInput(Problem(rule, file=str(path))) from None
    with reading(path):
        json.loads(text, object_pairs_hook=once)
    return found
