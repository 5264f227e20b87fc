"""Which modules may be compiled, and whether they are: the same results, sooner.

`make fast` compiles them where they stand, `make wheel` in a wheel; everywhere else they run as the Python that they
are. Both ways give the same bytes (`tests/house/test_compiled.py`).
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

# Of the package. What users subclass, and dataclasses of settings, stay Python: of those mypyc keeps no annotations.
MODULES = (
    "backend.rates",
    "policies.base",
    "policies.vllm_turn",
    "sim.cluster.cluster",
    "sim.cluster.replica",
    "sim.cluster.replica_pool",
    "sim.cluster.requests",
    "sim.replica.counting_pool",
    "sim.replica.decode_group",
    "sim.replica.engine",
    "sim.replica.host_memory",
    "sim.replica.hybrid_pool",
    "sim.replica.journal",
    "sim.replica.pipeline",
    "sim.replica.planner",
    "sim.replica.prefix_pool",
    "sim.replica.radix_pool",
    "sim.replica.request",
    "sim.replica.step",
    "sim.replica.step_plan",
    "sim.results.records",
)


def compiled() -> list[str]:
    """Those of `MODULES` that run compiled."""
    return [name for name in MODULES if _library(name) is not None]


def stale() -> list[Path]:
    """Sources of a checkout that have changed since they were compiled: what runs is not what they say."""
    if not (Path(__file__).resolve().parents[2] / "pyproject.toml").exists():
        return []  # an installation, whose files are as old as the installer makes them
    found = []
    for name in MODULES:
        library = _library(name)
        if library is not None:
            source = library.with_name(f"{name.rpartition('.')[2]}.py")
            if source.exists() and source.stat().st_mtime > library.stat().st_mtime:
                found.append(source)
    return found


def _library(name: str) -> Path | None:
    """The compiled module; None if it runs as Python."""
    spec = find_spec(f"chairlift.{name}")
    if spec is None or spec.origin is None or not spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return None
    return Path(spec.origin)


def told() -> str:
    """Which way the core runs, in words."""
    many = len(compiled())
    if not many:
        return "core in Python (make fast compiles it)"
    return "core compiled" if many == len(MODULES) else f"core compiled in part: {many} of {len(MODULES)} modules"
