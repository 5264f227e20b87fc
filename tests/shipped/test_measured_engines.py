"""The roofline, which no measurement of the engine was fitted to as a whole, against engines that were measured.

`h200-vllm-0.26`: single steps of grids over batch, context and prompts. `serving_points_h100_h200`: mean TTFT and TPOT
of vLLM servers under closed-loop clients (NVIDIA AIConfigurator's collection, Apache-2.0). The tables of
`backend/README.md` are what these tests find.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.specs import gpu, model
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from kit.places import ROOT, TRUTH

POINTS = TRUTH / "outside" / "serving_points_h100_h200.csv.gz"
GRIDS = TRUTH / "h200-vllm-0.26"
NAMES = {"meta-llama/Llama-3.1-70B": "llama-3.1-70b-fp8"}  # served in FP8
PER_CLIENT = 10  # requests, as InferenceX sends them
# Served by AIConfigurator's own script: constant lengths, and vLLM's prefix caching as it is by default. The script
# does not say how many prompts AIPerf is to make, so it makes 100 (`ConversationDefaults.NUM`) and repeats them.
REPEATED = {"nvidia/Llama-3.1-8B-Instruct-FP8": 100, "Qwen/Qwen3-235B-A22B-FP8": 100}
# vLLM 0.11.1 to 0.12.0 gave experts in FP8 blocks to DeepGEMM at every batch size (vllm-project/vllm #26197, #29346),
# which pads the tokens of each to 128 rows (#39331).
PADDED_BY = {("Qwen/Qwen3-235B-A22B-FP8", "0.12.0"): 128}
BUDGET, SEQUENCES = 8192, 1024  # vLLM's defaults on these GPUs, of each rank

ENGINES = {
    "llama-3.1-8b": ("llama-3.1-8b", ONE),
    "llama-3.1-8b-fp8": ("llama-3.1-8b-fp8", ONE),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", ONE),
    "qwen3-30b-a3b-tp2-ep": ("qwen3-30b-a3b", Parallel(tensor=2, expert=2)),
    "gpt-oss-120b": ("gpt-oss-120b", ONE),
    "llama-3.1-70b-fp8-tp2": ("llama-3.1-70b-fp8", Parallel(tensor=2)),
}


def published(first: str) -> list[list[str]]:
    """Rows of the table in `backend/README.md` whose heading begins with ``first``."""
    text = (ROOT / "backend" / "README.md").read_text(encoding="utf-8")
    lines = text[text.index(f"\n| {first} ") :].strip().splitlines()
    table = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().strip("*`") for cell in line.strip("|").split("|")] for line in table[2:]]


# steps


def grid_steps(engine: str) -> Iterator[tuple[str, Batch, float]]:
    """Kind, batch and seconds of each recorded step of the grids, while the engine was busy; chunks count as alike."""
    before: dict[str, float] = {}
    with gzip.open(GRIDS / f"{engine}_steps.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            name, done = row["experiment"], float(row["done_s"])
            if not name.startswith("grid_"):
                continue
            begun, before[name] = before.get(name), done
            counted = (
                "prefill_requests",
                "prefill_tokens",
                "decode_requests",
                "decode_context_tokens",
                "prefill_pairs",
            )
            prompts, tokens, decodes, context, pairs = (int(row[key]) for key in counted)
            if begun is None or not prompts + decodes:
                continue
            took = done - max(begun, float(row["schedule_s"]))
            chunks = ()
            if prompts:
                length = tokens / prompts
                start = max(0, round(pairs / tokens - (length + 1) / 2))
                chunks = (Chunk(start, max(1, round(length))),) * prompts
            kind = "decode" if not prompts else "mixed" if decodes else "prompts"
            yield kind, Batch(chunks, decodes, context), took


@cache
def step_errors(engine: str) -> dict[str, float]:
    """Median of absolute errors by kind of step, percent. Steps beyond five times the price are left out: compiling."""
    name, parallel = ENGINES[engine]
    backend = Efficiency(by_part=True).build(model(name), gpu("h200"), parallel)
    errors = defaultdict(list)
    for kind, batch, took in grid_steps(engine):
        price = backend.step(batch).first / 1e12
        if took < 5 * max(price, 0.02):
            errors[kind].append(abs(price / took - 1))
    return {kind: 100 * median(found) for kind, found in errors.items()}


@pytest.mark.skipif(not GRIDS.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_the_grids_are_as_near_as_published(engine: str) -> None:
    [row] = [row for row in published("steps of") if row[0] == engine]
    found = step_errors(engine)
    assert row[1:] == [f"{found[kind]:.1f}" for kind in ("decode", "prompts", "mixed")]


# drafts

# A user's report of gpt-oss-120b with an EAGLE3 head on an H200, 64 clients: by number of drafts, tokens of a step and
# the gain of throughput, percent. Prompts and answers are not told.
REPORTED = {1: (1.62, 10), 3: (2.03, 10), 7: (2.10, -7)}


def test_drafts_gain_on_experts_what_a_user_reported() -> None:
    """Within 8 points: verifying several tokens a request reads more experts, and popular ones more than once."""
    base = {
        "model": "gpt-oss-120b",
        "gpu": "h200",
        "policy": {"name": "vllm", "max_num_seqs": 256},
        "backend": {"name": "roofline", "skew": 0.85},
        "workload": {"requests": 128, "clients": {"concurrency": 64}, "prompt_tokens": 1000, "output_tokens": 300},
    }

    def throughput(**more: Any) -> float:
        summary = simulate(prepare(Document({**base, **more}, {}, "reported"), Path())).summary
        return float(summary["output_throughput"])

    none = throughput()
    for tokens, (length, gain) in REPORTED.items():
        speculate = {"method": "eagle3", "tokens": tokens, "acceptance": {"length": length}}
        told = 100 * (throughput(speculate=speculate) / none - 1)
        assert told == pytest.approx(gain, abs=8), tokens
        assert (told > 0) == (gain > 0)


# servers


def points() -> Iterator[dict[str, str]]:
    """The rows of vLLM, each measurement once."""
    seen = set()
    with gzip.open(POINTS, "rt") as file:
        for row in csv.DictReader(file):
            if row["backend"] != "vllm" or row["mode"] != "agg":
                continue
            measured = re.search(r"measured=([^;]+)", row["silicon_data_source"])
            keys = ("model_path", "system", "isl", "osl", "batch_size", "tp_size", "attention_dp_size")
            key = (measured and measured.group(1), *(row[key] for key in keys), row["silicon_tpot_ms"])
            if key not in seen:
                seen.add(key)
                yield row


def scenario(row: dict[str, str]) -> dict[str, Any]:
    """The run that a row describes; but for repeated prompts, lengths are drawn as InferenceX draws them."""
    name = NAMES.get(row["model_path"], row["model_path"])
    if row["gemm_quant_mode"] == "fp8" and "fp8" not in name.lower() and model(name).quantization == "none":
        name += "-fp8"
    tensor, data = int(row["tp_size"]), int(row["attention_dp_size"] or 1)
    expert, width = max(1, int(row["moe_ep_size"] or 1)), max(1, int(row["moe_tp_size"] or 1))
    parallel = {"tensor": tensor}
    if model(name).experts:
        if expert == 16:  # MiniMax-M2.5 on four H100s: to 2 % the figures of rows that say TP 4, EP 4
            data, expert = 1, 4
        data = max(data, expert * width // tensor)
        parallel = {"tensor": tensor, "data": data, "expert": expert}
    told = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    clients = int(told.group(1)) if told else int(row["batch_size"]) * int(row["attention_dp_size"] or 1)
    prompt, output = int(row["isl"]), int(row["osl"])
    prompts = REPEATED.get(row["model_path"])
    least = 1.0 if prompts else 0.8
    return {
        "model": name,
        "gpu": row["system"].split("_")[0],
        "parallel": parallel,
        "max_model_len": prompt + output + 256,
        "policy": {
            "name": "vllm",
            "max_num_batched_tokens": BUDGET,
            "max_num_seqs": SEQUENCES,
            "enable_prefix_caching": prompts is not None,
        },
        "backend": {"name": "roofline", "expert_rows": PADDED_BY.get((row["model_path"], row["backend_version"]), 1)},
        "workload": {
            "requests": max(20, PER_CLIENT * clients),
            "clients": {"concurrency": clients},
            "prompt_tokens": {"uniform": {"low": int(least * prompt), "high": prompt}},
            "output_tokens": {"uniform": {"low": int(least * output), "high": output}},
            "prefix": {"groups": prompts, "tokens": prompt} if prompts else None,
        },
    }


@cache
def point_errors() -> dict[str, list[tuple[float, float]]]:
    """Relative errors of mean TPOT and TTFT by model, and of ``all`` together."""
    found = defaultdict(list)
    for row in points():
        summary = simulate(prepare(Document(scenario(row), {}, POINTS.name), Path())).summary
        error = tuple(summary[f"mean_{each}_ms"] / float(row[f"silicon_{each}_ms"]) - 1 for each in ("tpot", "ttft"))
        for family in (row["model_path"].rpartition("/")[2], "all"):
            found[family].append((error[0], error[1]))
    return dict(found)


@pytest.mark.skipif(not POINTS.is_file(), reason="../shared is not here")
def test_servers_are_as_near_as_published() -> None:
    found = []
    for family, errors in sorted(point_errors().items()):
        cells = [str(len(errors))]
        for each in zip(*errors, strict=True):
            cells += [f"{100 * median(map(abs, each)):.1f}", f"{100 * median(each):+.1f}".replace("-", "−")]
        found.append([family, *cells])
    assert sorted(published("servers of")) == sorted(found), json.dumps(found, ensure_ascii=False)


@pytest.mark.skipif(not POINTS.is_file(), reason="../shared is not here")
def test_half_of_all_servers_are_within_15_percent_of_tpot_and_30_of_ttft() -> None:
    tpot, ttft = zip(*point_errors()["all"], strict=True)
    assert median(map(abs, tpot)) <= 0.15
    assert median(map(abs, ttft)) <= 0.30
