"""Chairlift beside AISimulate on the same requests: ``python -m chairlift.sim.cli.peers --aisimulate PATH``.

Both replay one file of requests in Mooncake's format, of ``scenarios/million.yaml`` (Azure chat on eight H100s at 85 %
load), at two sizes, in turns. What is compared is the CPU time of the whole command, of all its processes, and from
the two sizes that of a further request, which start-up is not in. CPU time, because machines are shared.

AISimulate (NVIDIA, Rust core; github.com/ai-dynamo/aisimulate) installs beside, in an environment of its own:
``pip install --only-binary :all: aisimulate``. Vidur, BLIS and LLMServingSim are in no package index.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chairlift.sim.cli.bench import SCENARIO
from chairlift.sim.cli.compiled import told
from chairlift.sim.cli.terminal import interruptible, terminable
from chairlift.sim.scenario.load import load
from chairlift.sim.workload.export import TOOLS, export

SIZES = (5_000, 20_000)  # requests
# The same system for both. AISimulate routes requests in turn, and prices steps with its own tables.
OURS = """model: llama-3.1-8b
gpu: h100
policy: {{name: vllm, max_num_batched_tokens: 2048, max_num_seqs: 256}}
replicas: 8
router: round_robin
workload: {{file: {file}}}
"""
THEIRS = """traffic:
  source: {{type: trace, paths: [{file}], format: mooncake, block_size: 512}}
  load: {{type: trace_timestamps}}
engine:
  backend: vllm
  model: meta-llama/Meta-Llama-3.1-8B
  hardware: h100_sxm
  workers:
    aggregated:
      parallelism: {{replicas: 8}}
      scheduler: {{max_batched_tokens: 2048, max_sequences: 256}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Time both and print a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m chairlift.sim.cli.peers", description=__doc__)
    parser.add_argument("--aisimulate", type=Path, required=True, metavar="PATH", help="the command of that name")
    parser.add_argument("--times", type=int, default=3, help="how often each is run (default 3)")
    options = parser.parse_args(arguments)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "Chairlift": [_ours(folder, size) for size in SIZES],
            "AISimulate": [_theirs(folder, size, options.aisimulate.absolute()) for size in SIZES],
        }
        best: dict[tuple[str, int], float] = {}
        for _ in range(options.times):
            for who, each in commands.items():
                for size, command in zip(SIZES, each, strict=True):
                    spent = _cpu_s(command, folder)
                    best[who, size] = min(spent, best.get((who, size), spent))
    columns = ("", *(f"{size:,} requests, CPU s" for size in SIZES), "a further request, µs", "requests/s")
    table = Table(*columns, title=f"Chairlift: {told()}; the least of {options.times}", title_justify="left", box=None)
    small, large = SIZES
    for who in commands:
        each_s = (best[who, large] - best[who, small]) / (large - small)
        figures = [*(f"{best[who, size]:.2f}" for size in SIZES), f"{each_s * 1e6:.0f}", f"{1 / each_s:,.0f}"]
        table.add_row(who, *figures)
    console.print(table)
    return 0


def _ours(folder: Path, size: int) -> list[str]:
    file = folder / f"{size}.yaml"
    file.write_text(OURS.format(file=_requests(folder, size).name))
    return [sys.executable, "-m", "chairlift", "run", str(file), "-q", "--out", str(folder / f"runs-{size}")]


def _theirs(folder: Path, size: int, command: Path) -> list[str]:
    file = folder / f"theirs-{size}.yaml"
    file.write_text(THEIRS.format(file=_requests(folder, size)))
    return [str(command), "predict", "-c", str(file), "--overwrite", "--output-dir", str(folder / f"theirs-{size}")]


def _requests(folder: Path, size: int) -> Path:
    """The first ``size`` requests in Mooncake's format, written once."""
    path = folder / f"{size}.jsonl"
    if not path.exists():
        [setup] = load(SCENARIO, [f"workload.requests={size}"]).setups
        export(setup.trace, path, TOOLS["mooncake"])
    return path


def _cpu_s(command: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command and all its processes. Raises SystemExit with its last words if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {(done.stderr or done.stdout)[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    with interruptible(), terminable():
        raise SystemExit(main())
