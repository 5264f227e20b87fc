"""Every file that Chairlift reads, with a good one of each kind and the command that reads it.

A `Reader`'s answer is the command's exit status, what it prints, and what it writes. `tried` says what came of a
damaged file: an answer, a refusal in words, or one of the three things that must never be (`WRONG`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from array import array
from base64 import b64encode
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chairlift.backend.calibrated import profile
from chairlift.backend.recorder import folder as recorder
from chairlift.sim.cli import main as cli
from chairlift.sim.conformance.serving import Hangs, patience
from chairlift.sim.sweep.table import TIMES
from kit.command import SCENARIO, Result, chairlift
from kit.damage import STRANGE, Arrays, Columns, Csv, Damage, Entries, Json, Packed, Tensors, Yaml

TRACEBACK, HANG, SILENT, UNSAID = "tracebacks", "hangs", "silent acceptances", "refusals that do not name the file"
WRONG = (TRACEBACK, HANG, SILENT, UNSAID)
HANG_S = 10.0  # of CPU time, and six times that by the clock: machines are shared
SMALL = SCENARIO.replace("requests: 30", "requests: 3")
_FILE = SMALL[: SMALL.index("workload:")] + "workload: {file: FILE}\n"
_WALL = re.compile(r'"(wall_s|requests_per_wall_s|run_s)": [\d.e+-]+')


@dataclass(frozen=True)
class Reader:
    """Something that reads a file."""

    name: str
    file: str  # that is damaged
    how: Damage  # how the file is taken apart
    read: tuple[str, ...] | Callable[[], Result]  # a command, or what stands for one
    answers: tuple[str, ...] = ()  # files that hold its answer
    strict: bool = False  # every key must be known: nonsense is refused even where nothing would come of it
    free: tuple[str, ...] = ()  # beginnings of places that are anybody's text: nothing there is nonsense
    files: dict[str, bytes] = field(default_factory=dict)  # all that it needs

    @property
    def good(self) -> bytes:
        """The file as it should be."""
        return self.files[self.file]


@dataclass(frozen=True)
class Tried:
    """What came of a file."""

    kind: str  # "accepted", "refused", "nothing completed", or one of `WRONG`
    answer: str = ""  # a hash
    told: str = ""  # of a refusal, and of a wrong one: why
    noticed: bool = False  # the answer speaks of what is strange: "columns not used: deqxqlay"


# ---- good files ----

_TRACES: dict[str, tuple[str, Damage, bytes]] = {  # format → its file's name, kind and content
    "vidur": ("t.csv", Csv(), b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,20,5\n0.5,30,1\n1.0,7,9\n"),
    "azure": (
        "t.csv",
        Csv(),
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,20,5\n2023-11-16 18:17:04.03,30,6\n",
    ),
    "burstgpt": (
        "t.csv",
        Csv(),
        b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        b"5.5,a,1,G,9,8,17,Conversation log\n7,b,1,G,19,8,27,API log\n",
    ),
    "chairlift": (
        "t.csv",
        Csv(),
        b"arrival_s,prompt_tokens,output_tokens,max_tokens,priority,tenant,session,prefix_group,prefix_tokens,follows,"
        b"think_s\n0,29,9,9,0,a,1,1,4,-1,0\n0,49,9,9,1,b,2,1,4,0,2.5\n",
    ),
    "chairlift blocks": (
        "t.csv",
        Csv(),
        b"arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block\n0,40,9,1 2 3,16\n1,40,9,1 2 4,16\n",
    ),
    "kv_cache_tester": (
        "t.jsonl",
        Json(lines=True),
        b'{"id": "t", "models": ["m"], "block_size": 64, "hash_id_scope": "local", "requests": [{"t": 0, "type": "n", '
        b'"model": "m", "in": 128, "out": 3, "hash_ids": [1, 2], "api_time": 1.5, "think_time": 0.5}]}\n',
    ),
    "mooncake": (
        "t.jsonl",
        Json(lines=True),
        b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        b'{"timestamp": 9, "input_length": 600, "output_length": 6, "hash_ids": [1, 3]}\n',
    ),
    "bailian": (
        "t.jsonl",
        Json(lines=True),
        b'{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 30, "output_length": 5, '
        b'"type": "text", "turn": 1, "hash_ids": [1, 2]}\n'
        b'{"chat_id": 2, "parent_chat_id": 1, "timestamp": 9, "input_length": 40, "output_length": 5, '
        b'"type": "text", "turn": 2, "hash_ids": [1, 2, 3]}\n',
    ),
    "aiperf": (
        "t.jsonl",
        Json(lines=True),
        b'{"session_id": "a", "timestamp": 0, "input_length": 300, "output_length": 40}\n'
        b'{"session_id": "a", "delay": 5000, "input_length": 500, "output_length": 40}\n',
    ),
    "dynamo": (
        "t.jsonl",
        Json(lines=True),
        b'{"session_id": "a", "created_time": 0, "input_tokens": 300, "output_tokens": 40, "hash_ids": [1]}\n'
        b'{"session_id": "a", "delay_ms": 50, "input_tokens": 500, "output_tokens": 40, "hash_ids": [1]}\n',
    ),
    "aiperf_profile": (
        "t.jsonl",
        Json(lines=True),
        b'{"metadata": {"request_start_ns": 10, "turn_index": 0, "x_correlation_id": "q"}, "error": null, '
        b'"metrics": {"input_sequence_length": {"value": 5}, "output_sequence_length": {"value": 9}}}\n',
    ),
    "ragpulse": (
        "t.jsonl",
        Json(lines=True),
        b'{"timestamp": "5", "input_length": 40, "output_length": 3, "session_id": "s", "hash_ids": {"sys_prompt": [1],'
        b' "passages_ids": [2], "history": [], "web_search": [], "user_input": [3]}}\n',
    ),
    "guidellm": (
        "t.json",
        Json(),
        b'{"benchmarks": [{"requests": {"successful": [{"request_start_time": 1.5, "prompt_tokens": 5, '
        b'"output_tokens": 6}], "errored": [{}]}}]}',
    ),
    "inference_perf": (
        "t.json",
        Json(),
        b'[{"start_time": 7.25, "info": {"input_tokens": 30, "output_tokens": 4}, "error": null}]',
    ),
}
_SCENARIOS: dict[str, bytes] = {
    "scenario": SMALL.encode(),
    "scenario of a cluster": b"""\
model: llama-3.1-8b
gpu: h100
max_model_len: 4096
policy: {name: vllm, max_num_seqs: 8}
replicas: 2
router: least_outstanding
router_stale_ms: 20
failures: {schedule: [{replica: 0, at_s: 1, for_s: 2}]}
start_up_s: 1
limits: {queue: 20, timeout_s: 5}
autoscale: {max: 3, schedule: [{at_s: 1, replicas: 2}]}
slo: {ttft_ms: 300, tpot_ms: 50}
workload:
  requests: 5
  arrivals: {poisson: {rate_per_s: 2}}
  prompt_tokens: {normal: {mean: 20, std: 5, min: 3, max: 90}}
  output_tokens: 4
  tenants: {a: 1, b: 2}
""",
    "scenario that compares": b"""\
model: opt-13b
gpu: {name: a100-40gb, memory_gib: 41}
kv: {blocks: 300}
max_model_len: 500
policy: sarathi
workload:
  duration_s: 3
  arrivals: {stages: [{rate: 1, to: 3, duration: 2}]}
  prompt_tokens: {values: [3, 4]}
  output_tokens: {exponential: {mean: 9, cap: 20}}
compare: [{name: a}, {name: b, policy: {name: orca, reserve: max}}]
cases: [{name: c, set: {seed: 3}}, {name: d, set: {workload.duration_s: 4}}]
claims: [{says: z, published: [1, 2], of: a}]
baseline: [a]
""",
    "scenario of sessions and drafts": b"""\
model: llama-3.1-8b
gpu: h200
max_model_len: 8192
policy: vllm
speculate: {method: eagle3, tokens: 3, acceptance: {length: 2.4}, draft: {vocab: 32000}}
workload:
  requests: 6
  arrivals: {poisson: {rate_per_s: 2}}
  prefix: {groups: 2, tokens: 64}
  sessions:
    first_prompt_tokens: {uniform: {low: 100, high: 200}}
    turns: {uniform: {low: 1, high: 3}}
    think_s: {exponential: {mean_s: 2}}
    max_context_tokens: 4000
  prompt_tokens: 15
  output_tokens: {quantiles: {levels_pct: [0, 50, 100], tokens: [1, 9, 20]}}
""",
    "scenario of groups": b"""\
model: llama-3.1-8b
gpu: h100
policy: vllm
replicas: [{count: 1, role: prefill}, {count: 1, role: decode, gpu: h200}]
link: {gb_per_s: 50, latency_us: 10}
max_model_len: 4096
workload:
  mix:
    chat: {name: azure-conv-2023, requests: 3, rate_per_s: 6}
    batch: {requests: 2, arrivals: {constant: {rate_per_s: 5}}, prompt_tokens: 20, output_tokens: 3}
""",
}
_NAMES = ("workload.tenants.", "workload.mix.chat is", "workload.mix.batch is")  # are whatever one likes
_SWEEP = b"""\
base: s.yaml
set: {workload.requests: 4}
seeds: 2
axes:
  policy: [vllm, {name: orca, reserve: max}]
  workload.arrivals.poisson.rate_per_s: {log: {low: 2, high: 4, points: 2}}
zip: [{gpu: [h100, h200], kv.memory_utilization: [0.9, 0.92]}]
random: {points: 2, keys: {kv.tokens: {log_uniform: {low: 4000, high: 8000, whole: true}}}}
"""
_SMALL_SWEEP = b"base: s.yaml\nseeds: 2\naxes: {policy: [vllm, orca]}\n"
_PLAN = b"""\
base: q.yaml
slo: [{percentile: 99, ttft_ms: 500}, {share: 0.95, ttft_ms: 1000, tpot_ms: 50}]
rate_per_s: [1]
set: {policy: vllm}
axes: {gpu: [a100-40gb, h100], replicas: [1, 2]}
prices: prices.yaml
search: {requests: 200, most_requests: 800, precision: 0.5, seed: 3, draws: 0}
"""
_SMALL_PLAN = b"""\
base: q.yaml
slo: [{percentile: 99, ttft_ms: 500}]
rate_per_s: [1]
set: {policy: vllm}
axes: {replicas: [1]}
search: {requests: 200, most_requests: 800, precision: 0.5, seed: 3, draws: 0}
"""
_ASKING = b"""\
base: q.yaml
slo: [{percentile: 99, ttft_ms: 500}]
rate_per_s: 1
today: {gpu: h100, replicas: 2}
headroom: {growth: [1.5], failed_replicas: 1, burst_cvs: [2]}
axes: {gpu: [a100-40gb, h100], replicas: [2]}
prices: {a100-40gb: {usd_per_gpu_hour: 1.5, date: 2026-11-01}, h100: 2.5}
ask: {api: {usd_per_million_in: 0.1, usd_per_million_out: 0.4}, growth: {percent_a_month: 8, months: 12}, spares: 1}
"""
_PRICES = b"a100-40gb: {usd_per_gpu_hour: 1.5, date: 2026-11-01}\nh100: 2.5\n"
_Q = SMALL.replace("seed: 7\n", "").replace("{uniform: {low: 1, high: 50}}", "2").encode()
_COMPARED = SMALL.encode() + b"compare: [{name: a}, {name: b, policy: orca}]\n"
_BENCHED = b"""\
model: opt-13b
gpu: h200
backend: h200-opt-13b-vllm-0.23
policy: {name: vllm, version: 0.23}
workload: {file: bench.json}
"""
_CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}
_WINDOWS = b"0,0,0,,0,0\n600,2,1,Gamma,1.0,0.5\n1200,8,3,Gamma,0.25,0.5\n1800,4,0.5,Weibull,2.0,0.28\n"
_LENGTHS = {
    "0": {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{5: 1.0}"},
    "1200": {"input_tokens": "{30: 1.0}", "output_tokens": "{7: 0.5, 9: 0.5}"},
}
_STEPS = (
    ",".join(recorder.STEP_COLUMNS).encode()
    + b"""
0.00,0.02,0.001,0.001,0.001,0.001,2,25,210,0,0,2,1,90,0,0
0.02,0.03,0.001,0.001,0.001,0.001,0,0,0,2,27,2,1,90,0,2
0.03,0.05,0.001,0.001,0.001,0.001,1,7,28,1,22,2,0,90,0,1
0.05,0.06,0.001,0.001,0.001,0.001,0,0,0,1,8,1,0,90,0,1
"""
)


def _bench() -> bytes:
    from kit.benched import result_of

    rows = {
        "arrival_s": [0.0, 0.5, 1.0],
        "first_token_s": [0.1, 0.6, 1.1],
        "last_token_s": [0.2, 0.7, 1.3],
        "prompt_tokens": [20, 30, 7],
        "output_tokens": [5, 2, 9],
    }
    return json.dumps(result_of({name: np.array(values) for name, values in rows.items()})).encode()


def _raw() -> dict[str, bytes]:
    """What a recorder left of three requests and four steps."""
    rows = [
        (0.0, 0.001, 20, [0.02, 0.03, 0.05]),
        (0.0, 0.001, 5, [0.02, 0.03]),
        (0.01, 0.011, 7, [0.05, 0.06]),
    ]
    packed = [[a, b, prompt, b64encode(array("d", times)).decode()] for a, b, prompt, times in rows]
    limits = {"num_gpu_blocks": 90, "max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": 16}
    return {
        "r/raw-1.json": json.dumps({"vllm": "0.26.0", "gpu": "NVIDIA H200", "limits": limits}).encode(),
        "r/raw-1.requests.jsonl": "".join(json.dumps(row) + "\n" for row in packed).encode(),
        "r/raw-1.steps.csv": _STEPS,
    }


def _parquet() -> bytes:
    out = io.BytesIO()
    columns = {"arrival_s": [0.0, 0.5], "prompt_tokens": [20, 30], "output_tokens": [5, 6], "tenant": ["a", "b"]}
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


# ---- readers that are no command ----


def _as_result(what: Callable[[], str], *refusals: type[Exception]) -> Result:
    try:
        return Result(0, what(), "")
    except refusals as error:
        return Result(2, "", "".join(f"error: {line}\n" for line in str(error).splitlines()))


def _recorded() -> Result:
    """``chairlift-record r --model opt-13b``."""
    out, err = io.StringIO(), io.StringIO()
    words = mock.patch.object(sys, "argv", ["chairlift-record", "r", "--model", "opt-13b"])
    with words, redirect_stdout(out), redirect_stderr(err):
        try:
            recorder.main()
        except SystemExit as stop:
            return Result(int(stop.code or 0), out.getvalue(), err.getvalue())
    return Result(0, out.getvalue(), err.getvalue())


def _weights() -> Result:
    """The weights of a tiny model, name by name as its engine asks for them."""
    import torch

    from chairlift.backend.gpu.weights import described, saved_weights
    from kit.tiny import LONGEST, weights

    def read() -> str:
        shape, arithmetic = described(Path("weights"), "tiny", LONGEST)
        weight = saved_weights(Path("weights"), torch.float32, torch.device("cpu"))
        sums = [float(weight(name, *known.shape).double().sum()) for name, known in weights().items()]
        return f"{shape} {arithmetic} {sums}"

    return _as_result(read, ValueError)


# ---- the table ----


def table(*words: str) -> list[Reader]:
    """The readers whose names hold one of ``words``, their files made in a folder that is thrown away."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return [reader for reader in _made(words) if any(word in reader.name for word in words)]
        finally:
            os.chdir(home)


def _made(wanted: tuple[str, ...]) -> list[Reader]:
    base: dict[str, bytes] = {"s.yaml": SMALL.encode(), "q.yaml": _Q, "w.yaml": _SMALL_SWEEP, "p.yaml": _PLAN}
    base |= {
        "o.yaml": _SMALL_PLAN,
        "prices.yaml": _PRICES,
        "c.yaml": _COMPARED,
        "bench.json": _bench(),
        "b.yaml": _BENCHED,
        **_raw(),
    }
    laid(base)
    plans = any(word in name for word in wanted for name in ("plan: journal", "plan: plan.json"))  # half a minute
    for words in (
        "run s.yaml -q --events",
        "run c.yaml -q --events",
        "sweep w.yaml -q -j 1",
        *(("plan o.yaml -q -j 1",) if plans else ()),
    ):
        done = chairlift(*words.split())
        assert done.status == 0, done.err
    assert _recorded().status == 0
    made = {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file() and p.suffix not in (".html", ".lock")}

    def of(*beginnings: str) -> dict[str, bytes]:
        return {name: data for name, data in made.items() if name.startswith(beginnings)}

    run = ("runs/s/requests.parquet", "runs/s/steps.parquet")
    readers = [
        Reader(name, "s.yaml", Yaml(), ("run", "s.yaml", "-q", "--out", "runs/s"), run, True,
               ("name", "question", "claims.0.says", *_NAMES), {"s.yaml": text})
        for name, text in _SCENARIOS.items()
    ]  # fmt: skip
    sweep = {"s.yaml": SMALL.encode(), "w.yaml": _SWEEP}
    plan = {"q.yaml": _Q, "p.yaml": _PLAN, "prices.yaml": _PRICES, "a.yaml": _ASKING}
    readers += [
        Reader("sweep", "w.yaml", Yaml(), ("sweep", "w.yaml", "--dry-run"), (), True, ("name",), sweep),
        Reader("plan", "p.yaml", Yaml(), ("plan", "p.yaml", "--dry-run"), (), True, ("name",), plan),
        Reader("plan with questions", "a.yaml", Yaml(), ("plan", "a.yaml", "--dry-run"), (), True, ("name",), plan),
        Reader("prices", "prices.yaml", Yaml(), ("plan", "p.yaml", "--dry-run"), (), True, (), plan),
    ]
    for name, (file, how, data) in _TRACES.items():
        files = {"s.yaml": _FILE.replace("FILE", file).encode(), file: data}
        read = ("run", "s.yaml", "-q", "--out", "runs/s")
        readers.append(Reader(f"trace: {name}", file, how, read, run, files=files))
        if name in ("vidur", "mooncake"):
            packed = files | {f"{file}.gz": gzip.compress(data), "s.yaml": _FILE.replace("FILE", f"{file}.gz").encode()}
            readers.append(Reader(f"trace: {name}, packed", f"{file}.gz", Packed(how), read, run, files=packed))
    files = {"s.yaml": _FILE.replace("FILE", "t.parquet").encode(), "t.parquet": _parquet()}
    read = ("run", "s.yaml", "-q", "--out", "runs/s")
    readers.append(Reader("trace: Parquet", "t.parquet", Columns(), read, run, free=("columns.tenant",), files=files))
    logs = {
        "log.csv": (Csv(), b"ts,p,o,who\n2023-11-16T18:17:03Z,20,5,a\n2023-11-16T18:17:04Z,30,6,b\n"),
        "log.jsonl": (Json(lines=True), b'{"ts": 1.5, "u": {"p": 20}, "o": 5, "who": "a"}\n' * 2),
        "log.json": (Json(), b'{"ts": [1.5, 2.5], "p": [20, 30], "o": [5, 6], "who": ["a", "b"]}'),
    }
    for file, (how, data) in logs.items():
        prompt, names = ("u.p" if file.endswith("l") else "p"), (("0.who", "1.who") if file.endswith("csv") else ())
        command = ("trace", "import", file, "--arrival", "ts", "--prompt", prompt, "--output", "o", "--tenant", "who")
        command += () if file.endswith("csv") else ("--time-unit", "s")
        readers.append(
            Reader(
                f"log: {file}", file, how, (*command, "--to", "out.csv"), ("out.csv",), free=names, files={file: data}
            )
        )
    clients = {"m/chunk-0-trace.csv": _WINDOWS, "m/chunk-0-dataset.json": json.dumps(_LENGTHS).encode()}
    served = SMALL[: SMALL.index("workload:")] + "workload: {servegen: {file: m}, requests: 9}\n"
    for file, how in (("m/chunk-0-trace.csv", Csv(header=False)), ("m/chunk-0-dataset.json", Json())):
        readers.append(
            Reader(f"ServeGen: {file[10:]}", file, how, read, run, files={"s.yaml": served.encode(), **clients})
        )
    readers.append(
        Reader("config.json", "config.json", Json(), ("explain-cost", "config.json", "--gpu", "h200"),
               files={"config.json": json.dumps(_CONFIG).encode()})
    )  # fmt: skip
    shipped = (profile.SHIPPED / "h200-opt-13b-vllm-0.23.json").read_bytes()
    priced = SMALL.replace("gpu: a100-40gb", "gpu: h200\nbackend: p.json").encode()
    free = ("name", "engine", "provenance", "notes", "scaled", "errors.runs", "errors_of")
    readers.append(
        Reader("profile", "p.json", Json(), ("run", "s.yaml", "-q", "--out", "runs/s"), run, True, free,
               {"s.yaml": priced, "p.json": shipped})
    )  # fmt: skip
    cells = ("cells.json",)
    bench = {name: base[name] for name in ("b.yaml", "bench.json")}
    read = ("validate", "b.yaml", "--bench", "bench.json", "-q", "--json", "cells.json")
    readers.append(Reader("benchmark", "bench.json", Json(), read, cells, files=bench))
    raw = {name: data for name, data in base.items() if name.startswith("r/")}
    made_of_raw = ("r/opt-13b_requests.csv.gz", "r/opt-13b_steps.csv.gz", "r/opt-13b_summary.json", "r/opt-13b_itl.npz")
    for file, how in zip(raw, (Json(), Json(lines=True), Csv()), strict=True):
        readers.append(Reader(f"recorder: {file.partition('.')[2]}", file, how, _recorded, made_of_raw[:2], files=raw))
    read = ("validate", "--recording", "r", "--model", "opt-13b", "--profile", "h200-opt-13b-vllm-0.23", "-q")
    recording = {name: made[name] for name in made_of_raw}
    for file, how in zip(made_of_raw, (Packed(Csv()), Packed(Csv()), Json(), Arrays()), strict=True):
        command = (*read, "--json", "cells.json")
        readers.append(Reader(f"recording: {file[10:]}", file, how, command, cells, files=recording))
    explain = ("explain", "--slowest", "1", "--in", "runs/s")
    kinds: dict[str, Damage] = {"study.json": Json(), "summary.json": Json()}
    kinds |= {f"{name}.parquet": Columns() for name in ("requests", "steps", "events")}
    for name, how in kinds.items():
        readers.append(Reader(f"results: {name}", f"runs/s/{name}", how, explain, files=of("runs/s/")))
    again = ("run", "runs/s/scenario.yaml", "-q", "--out", "again")
    answers = ("again/requests.parquet",)
    readers.append(
        Reader("results: scenario.yaml", "runs/s/scenario.yaml", Yaml(), again, answers, True,
               ("name", "question", "provenance"), of("runs/s/"))
    )  # fmt: skip
    drawn = ("report", "runs/s", "--perfetto", "--out", "t.json")
    readers.append(
        Reader("results: events, drawn", "runs/s/events.parquet", Columns(), drawn, ("t.json",), files=of("runs/s/"))
    )
    page = ("report", "runs/c", "--out", "page.html")
    for name in ("comparison.json", "steps.parquet"):
        how = Json() if name.endswith("json") else Columns()
        files = of("runs/c/")
        free = ("0.assumptions.", "1.assumptions.")  # texts of any names
        readers.append(Reader(f"page: {name}", f"runs/c/{name}", how, page, ("page.html",), free=free, files=files))
    agree = ("agree", "runs/c", "runs/c", "--json", "rows.json")
    readers.append(
        Reader("agree", "runs/c/comparison.json", Json(), agree, ("rows.json",), files=of("runs/c/comparison.json"))
    )
    journal = "runs/w/journal.sqlite"
    again = ("sweep", "w.yaml", "-q", "-j", "1")
    known = {"s.yaml": SMALL.encode(), "w.yaml": _SMALL_SWEEP, **of("runs/w/")}
    readers.append(
        Reader("sweep: journal", journal, Entries(made[journal]), again, ("runs/w/results.parquet",), files=known)
    )
    compare = ("compare", "runs/w", "--metric", "mean_ttft_ms", "--json")
    readers.append(
        Reader(
            "sweep: results",
            "runs/w/results.parquet",
            Columns(),
            compare,
            (),
            free=("columns.error", "columns.policy"),
            files=of("runs/w/results"),
        )
    )
    if any(word in ("", "weights") for word in wanted):  # imports torch
        readers += _of_weights()
    if not plans:
        return readers
    journal = "runs/o/journal.sqlite"
    again = ("plan", "o.yaml", "-q", "-j", "1")
    known = {name: base[name] for name in ("q.yaml", "o.yaml")} | of("runs/o/")
    readers.append(Reader("plan: journal", journal, Entries(made[journal]), again, ("runs/o/plan.json",), files=known))
    again = ("run", "runs/o/plan.json", "--system", "1", "-q", "--out", "again")
    readers.append(Reader("plan: plan.json", "runs/o/plan.json", Json(), again, answers, files=of("runs/o/plan.json")))
    return readers


def _of_weights() -> list[Reader]:
    try:
        from kit.tiny import save
    except BaseException:  # pytest's skip is none of Exception
        return []
    Path("weights").mkdir()
    save(Path("weights"))
    files = {f"weights/{name}": (Path("weights") / name).read_bytes() for name in ("config.json", "model.safetensors")}
    tensors = files["weights/model.safetensors"]
    return [
        Reader("weights: header", "weights/model.safetensors", Tensors(tensors), _weights, files=files),
        Reader("weights: config.json", "weights/config.json", Json(), _weights, files=files),
    ]


# ---- reading ----


def laid(files: dict[str, bytes]) -> None:
    """The working directory holds these files from now on, and nothing else."""
    for path in Path().iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name, data in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _without_clock(results: Path) -> bytes:
    """A sweep's table without what the clock says: of a journal that is empty all is run once more."""
    return repr(pq.read_table(results).drop_columns(list(TIMES)).to_pydict()).encode()


_built: dict[str, Any] = {}  # commands, which take half of a trial to build
_build = cli.Commands.get_command


def _known(commands: cli.Commands, context: Any, name: str) -> Any:
    """The command of this name, built once."""
    if name not in _built:
        _built[name] = _build(commands, context, name)
    return _built[name]


def tried(reader: Reader, data: bytes) -> Tried:
    """What comes of ``data`` as the reader's file, in the working directory, which is emptied first."""
    laid(reader.files)
    Path(reader.file).write_bytes(data)
    try:
        with patience(HANG_S), warnings.catch_warnings(), mock.patch.object(cli.Commands, "get_command", _known):
            warnings.simplefilter("error")
            result = chairlift(*reader.read) if isinstance(reader.read, tuple) else reader.read()
    except Hangs:
        return Tried(HANG, told=f"no answer in {HANG_S:g} s of CPU time")
    except Exception:
        return Tried(TRACEBACK, told=traceback.format_exc())
    if result.status == 2:
        lines = result.err.splitlines()
        said = lines and all(line.startswith("error: ") for line in lines) and len(result.err) < 20_000
        places = {Path(name).name for name in reader.files} | {f"error: {Path(reader.file).parent}: "}
        named = said and any(place in result.err for place in places)
        return Tried("refused" if named else UNSAID, told=result.err[:2000] or "nothing is said")
    if result.status not in (0, 1):
        return Tried(TRACEBACK, told=f"exit status {result.status}: {result.err[:2000]}")
    answer = hashlib.sha256(_WALL.sub("", result.out).encode())
    for name in reader.answers:
        if Path(name).is_file():
            content = _without_clock(Path(name)) if name.endswith("results.parquet") else Path(name).read_bytes()
            answer.update(_WALL.sub("", content.decode()).encode() if name.endswith(".json") else content)
    notes = Path("runs/s/summary.json")
    said = result.out + result.err + (notes.read_text() if "runs/s/requests.parquet" in reader.answers else "")
    kind = "accepted" if result.status == 0 else "nothing completed"
    return Tried(kind, answer.hexdigest(), noticed=STRANGE in said)
