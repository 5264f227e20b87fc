"""``make fuzz``: damaged files of every kind that Chairlift reads, each read to an answer or to one message.

``python tests/fuzz.py scripted`` does everything that `kit.damage` knows of to every place of a good file of each
reader (`kit.readers`); ``python tests/fuzz.py 20000 7`` draws so many mutations with that seed. Four counts must be 0:
tracebacks, hangs, refusals that do not name the file, and silent acceptances: nonsense that is not refused, changes the
answer, and of which the answer does not speak. A word behind the numbers keeps to the readers whose names hold it.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.damage import Damaged, mutated, scripted
from kit.readers import SILENT, WRONG, Reader, Tried, table, tried

Counts = Counter[tuple[str, str]]  # (reader, what came of it) → how often
MEMORY = 6 << 30  # bytes of data that one process may have


def judged(reader: Reader, damaged: Damaged, good: Tried) -> Tried:
    """What came of ``damaged``, where the good file comes to ``good``."""
    found = tried(reader, damaged.data)
    free = damaged.what.startswith(reader.free) if reader.free else False
    if found.kind == "accepted" and damaged.nonsense and not free:
        if reader.strict:
            return Tried(SILENT, told="nonsense is accepted")
        if found.answer != good.answer and not found.noticed:
            return Tried(SILENT, told="nonsense is accepted, and changes the answer")
    return found


def fuzz(
    readers: Iterable[Reader], damage: Callable[[Reader], Iterator[Damaged]], tell: Callable[[str], object]
) -> Counts:
    """Try all ``damage`` of each reader; ``tell`` hears of each that is wrong."""
    counts = Counts()
    with in_a_folder():
        for reader in readers:
            good = tried(reader, reader.good)
            assert good.kind == "accepted", (reader.name, good)
            assert tried(reader, reader.good) == good, f"{reader.name} gives another answer the second time"
            for damaged in damage(reader):
                found = judged(reader, damaged, good)
                counts[reader.name, found.kind] += 1
                if found.kind in WRONG:
                    tell(f"{reader.name}: {damaged.what}: {found.kind}: {found.told}")
    return counts


def drawn(times: int, seed: int) -> Callable[[Reader], Iterator[Damaged]]:
    """So many mutations of each reader's file, of random numbers that are its own."""

    def damage(reader: Reader) -> Iterator[Damaged]:
        draw = random.Random(f"{seed} {reader.name}")
        for _ in range(times):
            yield mutated(reader.good, reader.how, draw)

    return damage


def every(reader: Reader, start: int = 0, step: int = 1) -> Iterator[Damaged]:
    """All scripted damage of a reader's file, or some (`scripted`)."""
    return scripted(reader.good, reader.how, start, step)


@contextmanager
def in_a_folder() -> Iterator[None]:
    """Work in a folder that is thrown away."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)


def summed(counts: Counts) -> tuple[str, int]:
    """A line a reader and one of all; and how many are wrong."""
    lines = []
    for name in dict.fromkeys(name for name, _ in counts):
        told = ", ".join(f"{kind} {n:,}" for (each, kind), n in sorted(counts.items()) if each == name)
        lines.append(f"{name}: {told}")
    kinds = Counter[str]()
    for (_, kind), n in counts.items():
        kinds[kind] += n
    wrong = sum(kinds[kind] for kind in WRONG)
    told = ", ".join(f"{kind} {n:,}" for kind, n in sorted(kinds.items()))
    return "\n".join([*lines, f"{sum(kinds.values()):,} in all: {told}; wrong: {wrong}"]), wrong


def main(arguments: list[str]) -> int:
    """The exit status: whether anything is wrong."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    times, *rest = arguments
    seed, word = (1, "".join(rest)) if times == "scripted" else (int(rest[0]), "".join(rest[1:]))
    readers = table(word)
    damage = every if times == "scripted" else drawn(-(-int(times) // len(readers)), seed)
    told, wrong = summed(fuzz(readers, damage, lambda line: print(line, flush=True)))  # noqa: T201
    sys.stdout.write(told + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
