"""``make fuzz``: mutated scenarios, sweeps, traces and results, each read to an answer or to one message.

A mutation changes one text of a good file: a key is misspelt, a number becomes another kind of number, bytes are cut,
doubled or changed. Three counts must be 0: tracebacks, commands that take longer than `patience` allows, and commands
that accept a misspelt key. ``python tests/fuzz.py 20000 7`` tries so many with that seed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chairlift.sim.conformance.serving import Hangs, hanging, patience
from kit.command import SCENARIO, chairlift

NUMBERS = ("0", "-1", "1e30", ".inf", ".nan", "1.5", "''", "null", "true", "[1]", "{a: 1}", "10000000000000000000000")
SMALL = SCENARIO.replace("requests: 30", "requests: 3")
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,20,5\n0.5,30,1\n1.0,7,9\n"
FILES = {
    "s.yaml": SMALL,
    "w.yaml": "base: s.yaml\naxes: {seed: [1, 2]}\n",
    "t.csv": TRACE,
    "f.yaml": SMALL[: SMALL.index("workload:")] + "workload: {file: t.csv}\n",
}
COMMANDS: dict[str, tuple[str, ...]] = {  # file that is mutated → what reads it
    "s.yaml": ("run", "s.yaml", "-q"),
    "w.yaml": ("sweep", "w.yaml", "-q", "-j", "1"),
    "t.csv": ("run", "f.yaml", "-q"),
    "f.yaml": ("run", "f.yaml", "-q"),
    "runs/s/summary.json": ("report", "runs/s"),
    "runs/s/study.json": ("report", "runs/s"),
    "runs/s/scenario.yaml": ("run", "runs/s/scenario.yaml", "-q"),
    "runs/s/requests.parquet": ("explain", "--slowest", "1", "--in", "runs/s"),
    "runs/s/steps.parquet": ("report", "runs/s"),
}
KEY = re.compile(rb"(?m)^ *([a-z][a-z_]{3,}):")


def misspelt(data: bytes, draw: random.Random) -> bytes:
    """``data`` with letters in one of its keys that make it no other key; what a file says of its making is text."""
    keys = list(KEY.finditer(data.partition(b"provenance:")[0]))
    if not keys:
        return data
    at = draw.choice(keys).start(1)
    return data[: at + 2] + b"qxq" + data[at + 2 :]


def renumbered(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one of its numbers made another."""
    found = list(re.finditer(rb"\d+(\.\d+)?", data))
    if not found:
        return data
    place = draw.choice(found)
    return data[: place.start()] + draw.choice(NUMBERS).encode() + data[place.end() :]


def cut(data: bytes, draw: random.Random) -> bytes:
    """``data`` without its end."""
    return data[: draw.randrange(len(data) + 1)]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one byte made another."""
    if not data:
        return data
    at = draw.randrange(len(data))
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """``data`` with a piece of it twice."""
    low, high = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:high] + data[low:high] + data[high:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (misspelt, renumbered, cut, flipped, doubled)


def fuzz(times: int, seed: int, tell: Callable[[str], object]) -> Counter[str]:
    """Try so many mutations in a folder of their own; how often each kind of answer came."""
    draw, counts, home = random.Random(seed), Counter[str](), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, text in FILES.items():
                Path(name).write_text(text)
            assert chairlift("run", "s.yaml", "-q").status == 0
            shutil.copytree("runs", "whole")
            for number in range(times):
                name, mutate = draw.choice(list(COMMANDS)), draw.choice(MUTATIONS)
                good = Path(name).read_bytes()
                bad = mutate(good, draw)
                Path(name).write_bytes(bad)
                counts[_tried(COMMANDS[name], mutate is misspelt and bad != good, f"{number} {name}", tell)] += 1
                shutil.rmtree("runs")
                shutil.copytree("whole", "runs")
                Path(name).write_bytes(good)
        finally:
            os.chdir(home)
    return counts


def _tried(command: tuple[str, ...], must_fail: bool, what: str, tell: Callable[[str], object]) -> str:
    try:
        with patience():
            result = chairlift(*command)
    except Hangs:
        tell(f"{what}: {hanging()}")
        return "hangs"
    except Exception:
        tell(f"{what}: {traceback.format_exc()}")
        return "tracebacks"
    if result.status == 0 and must_fail:
        tell(f"{what}: a misspelt key is accepted")
        return "silent acceptances"
    return "accepted" if result.status == 0 else "refused"


if __name__ == "__main__":
    found = fuzz(int(sys.argv[1]), int(sys.argv[2]), lambda line: sys.stdout.write(f"{line}\n"))
    wrong = sum(found[kind] for kind in ("tracebacks", "hangs", "silent acceptances"))
    sys.stdout.write(", ".join(f"{kind}: {count:,}" for kind, count in sorted(found.items())) + f" - wrong: {wrong}\n")
    sys.exit(wrong > 0)
