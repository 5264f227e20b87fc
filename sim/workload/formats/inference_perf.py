"""inference-perf's result files: the requests that a run sent.

github.com/kubernetes-sigs/inference-perf, ``per_request_lifecycle_metrics.json``; read from its
``reportgen/base.py`` and ``apis/base.py``. The file is one JSON list. A request has ``start_time`` (s), ``info`` with
``input_tokens`` (also at ``request_metrics.text.input_tokens``) and ``output_tokens`` (since version 0.4 at
``response_metrics.output_tokens``), and ``error``, null where it succeeded.
"""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.formats.result_rows import ABSENT, Measured, first, value
from chairlift.sim.workload.formats.text_tables import read_json_document
from chairlift.sim.workload.trace import Trace

options = ("drop_empty",)


def told(head: bytes) -> bool:
    """The document is a list whose first request has a start time."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"[") and b'"start_time"' in start


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool, drop_empty: bool = False) -> Trace:
    """The trace. Raises `BadInput` with the number of a wrong request."""
    requests = read_json_document(path)
    if not isinstance(requests, list):
        raise BadInput(Problem("must be a list of requests", str(path)))
    names = ("start_time", "info.input_tokens", "info.output_tokens")
    measured = Measured(path, "inference_perf", "s", names)
    for number, request in enumerate(requests, 1):
        if not isinstance(request, dict):
            measured.refuse("must be a mapping of keys to values", number)
            continue
        if value(request, "error") not in (ABSENT, None):
            measured.lose()
            continue
        prompt = first(
            value(request, "info", "input_tokens"), value(request, "info", "request_metrics", "text", "input_tokens")
        )
        output = first(
            value(request, "info", "output_tokens"), value(request, "info", "response_metrics", "output_tokens")
        )
        measured.add(number, first(value(request, "start_time")), prompt, output)
    return measured.trace(limit, drop_empty)
