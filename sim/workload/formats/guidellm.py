"""GuideLLM's result files: the requests that one of its benchmarks sent.

github.com/vllm-project/guidellm, ``benchmarks.json``; read from ``src/guidellm/schemas`` (``GenerativeRequestStats``,
``RequestInfo``) and ``benchmark/objects.py`` of versions 0.3 to 0.8. The file is one JSON document with a list
``benchmarks``. Each has ``requests`` with the lists ``successful``, ``incomplete`` and ``errored``. A request has
``prompt_tokens``, ``output_tokens`` and its start, a Unix time in seconds: ``request_start_time``, in older files
``start_time``, or else ``info.timings.request_start``. A sweep has several benchmarks: ``part`` names one, from 1.
"""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.formats.result_rows import Measured, first, value
from chairlift.sim.workload.formats.text_tables import read_json_document
from chairlift.sim.workload.trace import Trace

options = ("part", "drop_empty")


def told(head: bytes) -> bool:
    """The document names GuideLLM, or begins with a list of benchmarks."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return start.startswith(b"{") and any(
        word in start for word in (b'"benchmarks"', b"guidellm", b"generative_benchmark")
    )


def companions(path: Path) -> list[Path]:
    """No other file is read."""
    return []


def read(path: Path, limit: int | None, times: bool, part: int | None = None, drop_empty: bool = False) -> Trace:
    """The trace; ``part`` says which of several benchmarks. Raises `BadInput` with the number of a wrong request."""
    benchmarks = value(read_json_document(path), "benchmarks")
    if not isinstance(benchmarks, list) or not benchmarks:
        raise BadInput(Problem("must have a list of benchmarks", str(path), path="benchmarks"))
    if part is None and len(benchmarks) > 1:
        rule = f"the file has {len(benchmarks)} benchmarks: part must say which, from 1 to {len(benchmarks)}"
        raise BadInput(Problem(rule, str(path)))
    if part is not None and part > len(benchmarks):
        raise BadInput(
            Problem(f"must be at most {len(benchmarks)}, the benchmarks of the file", str(path), None, "part", part)
        )
    requests = value(benchmarks[(part or 1) - 1], "requests")
    done = value(requests, "successful")
    if not isinstance(done, list):
        raise BadInput(Problem("must have a list requests.successful", str(path), path="benchmarks"))
    measured = Measured(path, "guidellm", "s", ("request_start_time", "prompt_tokens", "output_tokens"))
    several = _has_turns(done)
    for number, request in enumerate(done, 1):
        start = first(
            value(request, "request_start_time"),
            value(request, "info", "timings", "request_start"),
            value(request, "start_time"),
        )
        session = value(request, "info", "conversation_id") if several else None
        prompt, output = first(value(request, "prompt_tokens")), first(value(request, "output_tokens"))
        measured.add(number, start, prompt, output, session if isinstance(session, str) else None)
    for kind in ("incomplete", "errored"):
        if isinstance(others := value(requests, kind), list):
            measured.lose(len(others))
    notes = [f"benchmark {part} of {len(benchmarks)}"] if part is not None else []
    return measured.trace(limit, drop_empty, notes)


def _has_turns(requests: list[object]) -> bool:
    """Whether any request is a later turn of its conversation."""
    return any(isinstance(turn := value(each, "info", "turn_index"), int) and turn > 0 for each in requests)
