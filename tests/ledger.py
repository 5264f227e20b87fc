"""Replay step ledgers of real schedulers through ours: ``python tests/ledger.py [--engine vllm-0.33.0] FILE [FILE …]``.

FILE is JSON lines, plain or gzip, one case a line: settings, requests and the engine's own ledger. Which engine and
version it was, the case itself says (``"sglang": "0.5.23"``), or else the file's name (``vllm-0.33.0.jsonl.gz``), or
else ``--engine``, which overrides both. Prints the first difference of each failing case (step, request, theirs,
ours), then ``N of M cases identical``; exit status 1 unless all are, 2 if a file cannot be read.

An engine is a row of `ENGINES`; the file in ``kit/`` that it names makes our rows of a case.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kit import sglang_ledger, vllm_replay


class Engine(NamedTuple):
    """How ledgers of an engine are replayed."""

    columns: tuple[str, ...]  # that are compared, in order
    pairs: Mapping[str, str]  # of those, the ones with pairs of a request and a number → what the number counts
    rows: Callable[[dict[str, Any], str], Iterator[dict[str, Any]]]  # our rows of a case, for a version


ENGINES = {
    "sglang": Engine(sglang_ledger.COLUMNS, sglang_ledger.PAIRS, sglang_ledger.rows),
    "vllm": Engine(vllm_replay.COLUMNS, vllm_replay.PAIRS, vllm_replay.rows),
}
NAMED = re.compile(rf"({'|'.join(ENGINES)})-(\d+(?:\.\d+)+)")


def engine_of(case: dict[str, Any], path: Path, said: str = "") -> tuple[str, str]:
    """The engine and the version whose ledger a case has. Raises ValueError where nothing says it."""
    if not said:
        for engine in ENGINES:
            if engine in case:
                return engine, str(case[engine])
    found = NAMED.match(said or path.name)
    if found is None:
        told = f"{said} is none of {', '.join(ENGINES)}, dash, version" if said else "name it with --engine"
        raise ValueError(f"whose ledger is this? {told}")
    return found[1], found[2]


def difference(case: dict[str, Any], engine: str, version: str) -> str | None:
    """The first difference between the engine's ledger and ours, in words; None if there is none.

    Raises ValueError or KeyError for settings that ours cannot have, such as a version that it does not know.
    """
    columns, pairs, rows = ENGINES[engine]
    replayed = rows(case, version)
    theirs = case["ledger"]
    step = -1
    try:
        for i, ours in enumerate(replayed):
            step = ours["step"]
            if i >= len(theirs):
                return f"step {step}: theirs has ended, ours goes on: {ours}"
            if theirs[i]["step"] != step:
                return f"step: theirs {theirs[i]['step']}, ours {step}"
            their, our = theirs[i].get, ours.get
            for column in columns:
                if their(column) != our(column):
                    return f"step {step}: {_compare(column, pairs.get(column), their(column), our(column))}"
    except Exception as error:
        return f"after step {step}: {type(error).__name__}: {error}"
    return None if i + 1 == len(theirs) else f"ours ends after step {step}, theirs at step {theirs[-1]['step']}"


def _compare(column: str, unit: str | None, theirs: Any, ours: Any) -> str:
    if unit is not None and isinstance(theirs, list) and isinstance(ours, list):
        for a, b in zip([*theirs, None], [*ours, None], strict=False):
            if a != b:
                request = (a or b)[0]
                said = [f"request {x[0]} {x[1]} {unit}" if x else "nothing" for x in (a, b)]
                return f"request {request}: {column}: theirs {said[0]}, ours {said[1]}"
    return f"{column}: theirs {theirs}, ours {ours}"


def cases(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a ledger file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def differences(path: Path, but: Iterable[dict[str, Any]]) -> dict[int, str]:
    """How ours differs in the cases of a file, by their seeds, but for those that are the same as one of ``but``."""
    known = {case["seed"]: case for case in but}
    others = (case for case in cases(path) if known.get(case["seed"]) != case)
    told = ((case["seed"], difference(case, *engine_of(case, path))) for case in others)
    return {seed: found for seed, found in told if found}


def main(arguments: list[str]) -> int:
    """Replay all cases of the files named; the exit status."""
    parser = argparse.ArgumentParser(prog="ledger.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines, plain or gzip")
    parser.add_argument("--engine", default="", help="whose ledger it is, such as vllm-0.33.0")
    options = parser.parse_args(arguments)
    total = same = 0
    for path in options.files:
        try:
            for case in cases(path):
                total += 1
                found = difference(case, *engine_of(case, path, options.engine))
                same += found is None
                if found is not None:
                    sys.stdout.write(f"case {case.get('seed', total)}: {found}\n")
        except (OSError, ValueError, KeyError, EOFError) as error:
            sys.stderr.write(f"error: {path}: {type(error).__name__}: {error}\n")
            return 2
    sys.stdout.write(f"{same} of {total} cases identical\n")
    return 0 if same == total else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
