"""``make kills``: commands that are killed at random moments, by SIGINT, SIGTERM and SIGKILL.

``python tests/kills.py 200 1`` kills so many times with that seed; words behind the numbers choose of run, sweep, plan,
report and calibrate. After one to four kills the same command is let finish. Nothing may be lost, nothing mixed, no
process left, nothing said but one line, and the results must be those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kit.kills import SIGNALS, Victim, finished, killed, reset, victims

WEIGHTS = {"run": 8, "sweep": 6, "plan": 2, "report": 4, "calibrate": 1}  # how often each is killed


def kills(times: int, seed: int, chosen: list[Victim], tell: Callable[[str], object]) -> Counter[str]:
    """Kill so many times, in the working directory, where ``chosen`` were made; how often each and by what.

    ``tell`` hears of what is wrong.
    """
    draw, counts = random.Random(seed), Counter[str]()
    while (left := times - sum(counts.values())) > 0:
        victim = draw.choices(chosen, [WEIGHTS[each.name] for each in chosen])[0]
        for _ in range(min(left, draw.randint(1, 4))):
            number = draw.choice(SIGNALS)
            counts[f"{victim.name} {number.name}"] += 1
            if wrong := killed(victim, number, draw):
                tell(wrong)
        if wrong := finished(victim):
            tell(wrong)
        reset(victim)
    return counts


def main(arguments: list[str]) -> int:
    """The exit status: whether anything is wrong."""
    times, seed, *names = arguments
    told: list[str] = []

    def tell(what: str) -> None:
        told.append(what)
        sys.stdout.write(f"{what}\n")
        sys.stdout.flush()

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            counts = kills(int(times), int(seed), victims(tuple(names) or tuple(WEIGHTS)), tell)
        finally:
            os.chdir(home)
    said = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    sys.stdout.write(f"{sum(counts.values())} kills: {said}; wrong: {len(told)}\n")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
