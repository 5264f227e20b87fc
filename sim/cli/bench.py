"""How fast the simulator is: ``make bench``, or ``python -m chairlift.sim.cli.bench [--quick] [--out bench.json]``.

Runs ``scenarios/million.yaml`` at several sizes, each in a process of its own, beside as many bare SimPy timeouts as
the largest has requests, timed in the same minute: machines differ and are noisy, the ratio less so. Results are
hashed; leaping and stepping must give the same hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from chairlift.backend.spawned import SPAWN, spawned
from chairlift.sim.atomic import write_text
from chairlift.sim.cli.compiled import told
from chairlift.sim.cli.terminal import interruptible, terminable
from chairlift.sim.cluster.clock import time_bare_timeouts
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "million.yaml"
TIMEOUTS = 1_000_000
RATE_PER_REPLICA = 20.4  # requests/s, 85 % of what a replica of million.yaml serves
SHARED = {"workload.prefix": "{groups: 200, tokens: 512}"}  # for the cases with a prefix cache that matters

# name, requests, replicas, keys to change, leap
Case = tuple[str, int, int, dict[str, str], bool]
CASES: list[Case] = [
    ("10^4", 10_000, 8, {}, True),
    ("10^4, no leap", 10_000, 8, {}, False),
    ("10^5", 100_000, 8, {}, True),
    ("10^6", 1_000_000, 8, {}, True),
    ("10^5, 1 replica", 100_000, 1, {}, True),
    ("10^5, 64 replicas", 100_000, 64, {}, True),
    ("10^5, synchronous", 100_000, 8, {"policy.async_scheduling": "false"}, True),
    ("10^5, shared prefixes, no cache", 100_000, 8, {**SHARED, "policy.enable_prefix_caching": "false"}, True),
    ("10^5, shared prefixes, cache", 100_000, 8, SHARED, True),
    (
        "10^5, prefill and decode apart",
        100_000,
        8,
        {"replicas": "[{count: 4, role: prefill}, {count: 4, role: decode}]", "link": "{gb_per_s: 50}"},
        True,
    ),
    ("10^5, 1,000 replicas", 100_000, 1_000, {}, True),
    ("10^5, sglang", 100_000, 8, {"policy": "sglang"}, True),
    ("10^5, experts", 100_000, 8, {"model": "qwen3-30b-a3b"}, True),
    ("10^5, experts and windows", 100_000, 8, {"model": "gpt-oss-20b"}, True),
]
QUICK = ("10^4", "10^4, no leap", "10^5")
SAME = [("10^4", "10^4, no leap")]  # must agree


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print a table; 1 if results that must agree do not."""
    parser = argparse.ArgumentParser(prog="python -m chairlift.sim.cli.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smaller cases only")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="where the figures go (default bench.json)"
    )
    parser.add_argument(
        "--exercise", action="store_true", help="run each case once, small and without figures (to train a compiler)"
    )
    options = parser.parse_args(arguments)
    if options.exercise:
        for case in CASES:
            exercise(case)
        return 0
    console = Console(width=120)
    table = Table(title=f"seconds are of one core; {told()}", title_justify="left", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for label in ("seconds", "requests/s", "steps", "mean leap", "peak MiB", "× bare timeouts", "results"):
        table.add_column(label, justify="right")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if options.quick and case[0] not in QUICK:
            continue
        console.print(f"{case[0]} …", style="dim")
        row = _apart(case)
        rows.append(row)
        table.add_row(
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['requests_per_s']:,.0f}",
            f"{row['steps']:,}",
            f"{row['mean_leap']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['ratio_to_simpy']:.1f}",
            row["hash"][:12],
        )
    console.print(table)
    write_text(options.out, json.dumps(rows, indent=2) + "\n")
    found = {row["name"]: row["hash"] for row in rows}
    differ = [pair for pair in SAME if len({found.get(name) for name in pair}) > 1]
    for pair in differ:
        console.print(f"[red]results differ:[/red] {' and '.join(pair)}")
    return 1 if differ else 0


def _apart(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own, so that its peak memory is its own. Raises SystemExit if that dies."""
    ours, theirs = SPAWN.Pipe(duplex=False)
    with ours:
        with theirs:
            process = spawned(_measure, theirs, case)
        try:
            return dict(ours.recv())
        except EOFError:
            process.join()
            raise SystemExit(f"{case[0]}: its process has died (exit code {process.exitcode})") from None
        finally:
            process.kill()
            process.join()


def _measure(end: Connection, case: Case) -> None:
    end.send(measure(case))


def exercise(case: Case, requests: int = 3_000, replicas: int = 8) -> None:
    """Simulate ``case`` with no more requests and replicas than these, so that all of its code has run."""
    _, many, wide, keys, leap = case
    simulate(_setup(min(many, requests), min(wide, replicas), keys), leap)


def measure(case: Case) -> dict[str, Any]:
    """The figures of one case. ``ratio_to_simpy``: seconds per million requests over seconds of a million timeouts."""
    name, requests, replicas, keys, leap = case
    setup = _setup(requests, replicas, keys)
    before = [time_bare_timeouts(TIMEOUTS) for _ in range(2)]
    outcome = simulate(setup, leap)
    bare = median([*before, *(time_bare_timeouts(TIMEOUTS) for _ in range(3))])
    summary = outcome.summary
    return {
        "name": name,
        "requests": requests,
        "replicas": replicas,
        "seconds": summary["wall_s"],
        "requests_per_s": summary["requests_per_wall_s"],
        "ratio_to_simpy": summary["wall_s"] / requests * TIMEOUTS / bare,
        "steps": summary["steps"],
        "mean_leap": summary["mean_leap"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "hash": fingerprint(outcome),
    }


def _setup(requests: int, replicas: int, keys: dict[str, str]) -> Setup:
    sets = {
        "workload.requests": str(requests),
        "workload.rate_per_s": str(RATE_PER_REPLICA * replicas),
        "replicas": str(replicas),
        **keys,
    }
    [setup] = load(SCENARIO, [f"{key}={value}" for key, value in sets.items()]).setups
    return setup


def fingerprint(outcome: Outcome) -> str:
    """SHA-256 of all that happened to the requests."""
    digest = hashlib.sha256()
    for name, values in outcome.requests.columns().items():
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    with interruptible(), terminable():
        sys.exit(main())
