"""Command lines of engines, as a plan prints them, read back."""

from __future__ import annotations

import shlex

from chairlift.sim.plan.emit import shell
from chairlift.sim.plan.launch import beside, launches
from chairlift.sim.study import Setup


def commands(setup: Setup) -> list[str]:
    """What starts a setup whose ``kv`` nobody gave, a line each."""
    return shell(launches(setup), beside(setup))


def serve_line(setup: Setup) -> str:
    """The only command among those lines."""
    [line] = [command for command in commands(setup) if not command.startswith("#")]
    return line


def flags(line: str) -> dict[str, str | bool]:
    """Flag → its value, of ``vllm serve MODEL --flag value --no-other …``; underscores for hyphens."""
    words = shlex.split(line, comments=True)
    found: dict[str, str | bool] = {}
    i = 0
    while i < len(words):
        if not words[i].startswith("--"):
            i += 1
            continue
        name = words[i][2:].replace("-", "_")
        assert name.removeprefix("no_") not in found, line
        if i + 1 < len(words) and not words[i + 1].startswith("--"):
            found[name] = words[i + 1]
            i += 2
            continue
        found[name.removeprefix("no_")] = not name.startswith("no_")
        i += 1
    return found
