"""A trace as a workload of a serving benchmark, and the one command that runs it against a real server.

All three tools read JSON lines with the keys of `formats.timed_rows`. They differ in the unit of times and in the
tokens that a hash id covers. Each tool makes up a prompt's text from the hash ids, so every block of every prompt has
an id here, the last and partial one too: without ids, vLLM's benchmark sends empty prompts.

Read from, and checked with, the parsers of vLLM 0.26 (``TimedTrace``), AIPerf 0.13 (``MooncakeTrace``, with 512 tokens
an id) and GuideLLM 0.8 (``MooncakeTraceFormat``, whose times are seconds). The printed commands are accepted by the
argument parsers of vLLM 0.33, which ignores EOS with timed traces, AIPerf 0.13 and GuideLLM 0.8.1.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chairlift.sim.atomic import writing
from chairlift.sim.bad_input import BadInput, Problem, saving
from chairlift.sim.units import PS_PER_MS, PS_PER_S
from chairlift.sim.workload.trace import IntArray, Trace, named_tokens, streams

NOT_SAID = ("priority", "tenant")  # columns that no file of these tools has
MOST_ID = 2**31 - 1  # GuideLLM's ids have 32 bits
URL = "http://localhost:8000"


@dataclass(frozen=True)
class Tool:
    """A benchmark that replays traces."""

    unit_ps: int  # of a timestamp
    block: int  # tokens that a hash id covers
    command: Callable[[str, str, int], list[str]]  # of the model's repository, the file and its number of requests


def _vllm(model: str, path: str, requests: int) -> list[str]:
    told = ["vllm", "bench", "serve", "--base-url", URL, "--model", model, "--dataset-name", "timed_trace"]
    told += ["--dataset-path", path, "--num-prompts", str(requests), "--save-result", "--save-detailed"]
    return [*told, "--result-filename", str(Path(path).with_suffix(".results.json"))]


def _aiperf(model: str, path: str, requests: int) -> list[str]:
    told = ["aiperf", "profile", "--url", URL, "--model", model, "--endpoint-type", "completions", "--streaming"]
    told += ["--input-file", path, "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
    return [*told, "--extra-inputs", "ignore_eos:true"]


def _guidellm(model: str, path: str, requests: int) -> list[str]:
    source = {"kind": "json_file", "path": path}
    data = {"kind": "mooncake", "source": source, "hash_id_block_size": TOOLS["guidellm"].block}
    backend = {"kind": "openai_http", "target": URL, "model": model, "request_format": "/v1/completions"}
    return ["guidellm", "run", "--backend", json.dumps(backend), "--data", json.dumps(data), "--profile", "kind=replay"]


TOOLS = {
    "vllm-bench": Tool(PS_PER_S, 16, _vllm),
    "mooncake": Tool(PS_PER_MS, 512, _aiperf),
    "guidellm": Tool(PS_PER_S, 16, _guidellm),
}


def export(trace: Trace, path: Path, tool: Tool) -> list[str]:
    """Write ``trace`` to ``path`` as ``tool`` reads it, time 0 being the first request. Returns what the file lacks.

    Raises:
        BadInput: requests wait for others, so that their times are not known before they are served; there would be
            more than `MOST_ID` ids; or the file cannot be written.
    """
    if trace.follows is not None and (trace.follows >= 0).any():
        rule = "requests that wait for others (clients, think times) have no times before they are served, and this"
        raise BadInput(Problem(f"{rule} tool replays times", path="workload"))
    blocks = int((-(-trace.prompt_tokens.astype(np.int64) // tool.block)).sum())
    if blocks > MOST_ID:
        raise BadInput(
            Problem(f"its prompts must have at most {MOST_ID:,} blocks of {tool.block} tokens", value=blocks)
        )
    times = (trace.arrival_ps - trace.arrival_ps[0]).tolist()
    columns = (times, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), block_ids(trace, tool.block))
    digits = len(str(tool.unit_ps)) - 1  # of a fraction: down to a picosecond
    with saving(path), writing(path) as file:
        for time, prompt, output, ids in zip(*columns, strict=True):
            fraction = f"{time % tool.unit_ps:0{digits}d}".rstrip("0") or "0"
            file.write(f'{{"timestamp": {time // tool.unit_ps}.{fraction}, "input_length": {prompt}, ')
            file.write(f'"output_length": {output}, "hash_ids": {json.dumps(ids)}}}\n')
    return list(_lost(trace, tool.block))


def command(tool: Tool, model: str, path: Path, requests: int) -> str:
    """The command that sends the ``requests`` of the file ``path`` to a server of ``model`` at `URL`, for a shell."""
    return shlex.join(tool.command(model, str(path), requests))


def block_ids(trace: Trace, block: int) -> Iterator[list[int]]:
    """For each prompt an id for every ``block`` tokens, the last part included; numbered from 0 as they appear.

    Two prompts have the same id where all their tokens up to the block's end are the same. So a block of which only the
    beginning is shared has an id of its own, and all blocks of an id have equally many tokens.

    Example: two prompts of 40 and 50 tokens share a prefix of 32. In blocks of 16 their ids are 0 1 2 and 0 1 3 4.
    """
    known: dict[tuple[object, ...], int] = {}
    named, shared = named_tokens(trace), _shared(trace)
    turns, groups = streams(trace), trace.prefix_group
    for row, prompt in enumerate(trace.prompt_tokens.tolist()):
        theirs = [] if trace.hash_ids is None else trace.hash_ids.row(row).tolist()
        last = theirs[-1] if theirs else None
        if turns is not None and turns[row] >= 0:
            common: tuple[object, ...] = ("session", turns[row], last)
        else:
            common = ("group", None if groups is None else int(groups[row]), last)
        ids = []
        for end in (min(end, prompt) for end in range(block, prompt + block, block)):
            if end <= named[row]:
                key: tuple[object, ...] = ("id", theirs[(end - 1) // trace.hash_block])
            else:
                key = common if end <= shared[row] else ("own", row)
            ids.append(known.setdefault((*key, end), len(known)))
        yield ids


def _shared(trace: Trace) -> IntArray:
    """Of each prompt, the leading tokens of its session (all of them) or of its group. Shape: ``(n,)``."""
    found = np.zeros(len(trace), np.int64)
    if trace.prefix_group is not None and trace.prefix_tokens is not None:
        found = np.where(trace.prefix_group >= 0, trace.prefix_tokens, 0).astype(np.int64)
    turns = streams(trace)
    return found if turns is None else np.where(np.array(turns) >= 0, trace.prompt_tokens, found)


def _lost(trace: Trace, block: int) -> Iterator[str]:
    """What a file with blocks of ``block`` tokens does not say of ``trace``, a sentence each."""
    whole = np.maximum(named_tokens(trace), _shared(trace))
    if beyond := int(np.where(whole < trace.prompt_tokens, whole % block, 0).sum()):
        yield f"{beyond:,} shared prompt tokens lie beyond whole blocks of {block} tokens, so they are not shared there"
    turns = streams(trace)
    if turns is not None and (again := len(trace) - len(set(turns)) - turns.count(-1) + (-1 in turns)):
        yield f"{again:,} later turns of sessions share their session's prompts, but not its answers: a server's differ"
    if trace.max_tokens is not None and (trace.max_tokens != trace.output_tokens).any():
        yield "caps on outputs (max_tokens) are left out: each request asks for its output tokens"
    for name in NOT_SAID:
        if getattr(trace, name) is not None:
            yield f"{name} is left out: the tool's requests have none"
