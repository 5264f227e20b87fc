"""Files that no format reads: what they look like, and how to import them.

A file with a row a request can be imported by naming its columns, see `mapped`.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

from chairlift.sim.workload.formats.text_tables import first_line

# Beginnings of files, and what each is; the first that fits says it. First those that are no table at all.
_NO_TABLES = (
    (rb".{257}ustar", "a tar archive; ServeGen's client tables are no requests: name them with servegen"),
    (rb"PK\x03\x04", "a zip archive, as Excel's files are: unpack it, or save the sheet as CSV"),
    (rb"\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "a compressed file: unpack it, or compress it with gzip"),
    (rb"SQLite format 3", "an SQLite database: write its rows as CSV"),
    (rb"ARROW1|\x89HDF|%PDF|\x89PNG", "a binary file without rows of requests"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: git lfs pull brings that"),
    (rb"\s*<(!DOCTYPE|html|\?xml)", "an HTML or XML page, not the file that a link on it leads to"),
    (rb"# (HELP|TYPE) ", "Prometheus' text: counters and histograms of an engine, without a row a request"),
    (rb"[\d.]+,[\d.]+,[\d.]*,(Gamma|Weibull)?,", "a ServeGen client table: name its folder with servegen"),
)
_TABLES = (
    (rb'\{"(sys_prompt|passage|history|user_input|web_search)_id"', "a RAGPulse component map"),
    (rb'\{(?!"id":)[^{]*"input": *"', "a trace of texts without token counts (LMCache's agent traces)"),
    (rb'.*"conversations": *\[', "ShareGPT's conversations: texts without token counts"),
    (
        rb'.*"(messages|prompt)": *["\[]',
        "texts without token counts (requests of OpenAI's API): count their tokens first",
    ),
    (rb"request_id,request_type,application_id", "a splitwise-sim trace"),
)
_RESULT = rb'\s*\{.*"(input_lens|ttfts|request_throughput|num_prompts)"'

# Names that columns of logs have; the first that a file has is suggested.
_LIKELY = {
    "--arrival": (
        *("arrival", "arrival_time", "arrival_s", "arrived_at", "ts", "timestamp", "time", "start_time", "start_times"),
        *("request_time", "created_at", "created", "startTime", "date", "datetime", "@timestamp"),
    ),
    "--prompt": (
        *("prompt_tokens", "input_tokens", "usage.prompt_tokens", "usage.input_tokens", "input_length", "prompt_len"),
        *("input_len", "input_lens", "prompt_length", "num_prompt_tokens", "promptTokens", "tokens_in", "prompt"),
    ),
    "--output": (
        *("completion_tokens", "output_tokens", "usage.completion_tokens", "usage.output_tokens", "output_length"),
        *("output_len", "output_lens", "generated_tokens", "completion_length", "num_output_tokens", "tokens_out"),
        *("completionTokens", "response_tokens", "output"),
    ),
}


def kind(start: bytes, tables: bool = True) -> str | None:
    """What a file that begins with ``start`` is, in words, if it is known; with ``tables``, also where it has rows."""
    kinds = (*_NO_TABLES, *_TABLES) if tables else _NO_TABLES
    return next((what for pattern, what in kinds if re.match(pattern, start, re.DOTALL)), None)


def delimiter(start: bytes) -> str:
    """What stands between the cells of a table that begins with ``start``: a comma, a tab or a semicolon."""
    head = first_line(start)
    return max(",\t;", key=head.count)


def columns(start: bytes) -> list[str]:
    """The columns, or the keys of the first row, of a table that begins with ``start``; nested keys with dots."""
    line = first_line(start)
    if line.startswith(("{", "[")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return re.findall(r'"([\w.@-]+)" *:', line)
        return list(flat(row)) if isinstance(row, dict) else []
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter(start)), [])]
    except csv.Error:
        return []


def flat(row: dict[str, object], above: str = "") -> dict[str, object]:
    """``row`` with the keys of mappings within it as ``outer.inner``."""
    found: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def suggestion(path: Path, names: list[str]) -> str:
    """The command that imports a file with the columns ``names``; where none fits an option, ``COLUMN`` stands."""
    folded = {name.casefold(): name for name in reversed(names)}
    words = ["chairlift", "trace", "import", str(path)]
    for option, likely in _LIKELY.items():
        words += [option, next((folded[name.casefold()] for name in likely if name.casefold() in folded), "COLUMN")]
    return shlex.join(words)


def described(path: Path, start: bytes) -> str:
    """What a file that no format reads looks like, and what to do with it."""
    if re.match(_RESULT, start, re.DOTALL):
        what = "a result of a serving benchmark (vllm bench serve, SGLang's bench_serving)"
        lists = ["start_times", "input_lens", "output_lens"]
        return f"this looks like {what}; if it has a list of each request's lengths: {suggestion(path, lists)}"
    names = columns(start)
    if len(names) < 2:
        return "this looks like no table with a row a request"
    form = "JSON lines" if first_line(start).startswith("{") else "CSV"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"this looks like {form} with {shown}; say which are which: {suggestion(path, names)}"
