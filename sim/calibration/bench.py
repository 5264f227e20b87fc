"""Predictions beside the results of ``vllm bench serve``: the same requests, sent when the benchmark sent them.

A benchmark measures from the client, so what its latencies have beside the engine's (HTTP, tokenising) is in the
recorded figures and not in the predicted ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from chairlift.backend import specs
from chairlift.backend.shapes import Model
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.calibration.validate import Observed, rates
from chairlift.sim.results.metrics import per_output_token
from chairlift.sim.study import Setup
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.formats.vllm_bench import Result
from chairlift.sim.workload.trace import COLUMNS, Trace

SAME = "must be the workload that was benchmarked"
ALIKE = 0.02  # by how much a server may count a prompt's tokens otherwise than the workload, or 8 tokens


def recorded(result: Result) -> Observed:
    """The figures of what the benchmark measured, under the names of ``summary.json``."""
    outputs = result.trace.output_tokens.astype(np.int64)
    series = {
        "ttft": result.ttft_s * 1e3,
        "tpot": per_output_token((result.latency_s - result.ttft_s) * 1e3, outputs)[outputs > 1],
        "e2el": result.latency_s * 1e3,
        "itl": result.itl_s * 1e3,
    }
    ends = result.trace.arrival_ps / PS_PER_S + result.latency_s
    return Observed(rates(float(ends.max()), len(outputs), int(outputs.sum())), series)


def replayed(setup: Setup, result: Result) -> Setup:
    """``setup`` with the requests of ``result`` that were answered, as its workload has them, at the times of sending.

    The workload says what a result does not: what prompts share, sessions, priorities, caps. It must be the one that
    was benchmarked.

    Raises:
        BadInput: the workload has other requests than the result, or the result is of another model.
    """
    _same_model(setup.model, result)
    trace = setup.trace
    rows = result.rows if len(trace) == result.sent else np.arange(len(trace))
    if len(rows) != len(result.trace):
        rule = f"{SAME}: it has {len(trace):,} requests, {result.path} {result.sent:,}"
        raise BadInput(Problem(rule, path="workload"))
    prompts, outputs = trace.prompt_tokens[rows], trace.output_tokens[rows]
    off = np.abs(prompts - result.trace.prompt_tokens) > np.maximum(8, ALIKE * result.trace.prompt_tokens)
    off |= outputs != result.trace.output_tokens
    if off.any():
        row = int(np.argmax(off))
        theirs = f"{result.trace.prompt_tokens[row]} and {result.trace.output_tokens[row]}"
        rule = f"{SAME}: request {result.rows[row]} of {result.path} has {theirs} tokens"
        raise BadInput(Problem(rule, path="workload", value=f"{prompts[row]} and {outputs[row]}"))
    kept = {name: getattr(trace, name) for name in COLUMNS if getattr(trace, name) is not None}
    columns = {name: column[rows] for name, column in kept.items() if name not in ("follows", "think_ps")}
    columns["arrival_ps"] = result.trace.arrival_ps
    ids = None if trace.hash_ids is None else trace.hash_ids.taken(rows)
    made = Trace(
        **columns, hash_ids=ids, hash_block=trace.hash_block, tenants=trace.tenants, source=result.trace.source
    )
    return replace(setup, trace=made)


def _same_model(model: Model, result: Result) -> None:
    """Refuse a result whose server names a known model of another shape. It may go by any name of its own."""
    try:
        served = specs.model(result.model_id or "")
    except LookupError:
        return
    if any(getattr(served, name) != getattr(model, name) for name in ("layers", "hidden", "ffn", "experts")):
        rule = f"must be of the model that was benchmarked: {served.name} is not {model.name}"
        raise BadInput(Problem(rule, str(result.path), None, "model_id", result.model_id))


def notes(setup: Setup, result: Result) -> Iterator[str]:
    """What a reader of the comparison has to know, a sentence each."""
    if result.failed:
        yield f"{result.failed:,} of {result.sent:,} requests failed: they are left out, whatever work they made"
    if result.max_concurrency:
        yield f"the client held requests back (max_concurrency {result.max_concurrency}): replayed when it sent them"
    trace = setup.trace
    if trace.hash_ids is None and trace.prefix_group is None and trace.session is None:
        yield "prompts are taken to share nothing: a result does not say, a scenario's workload may"
