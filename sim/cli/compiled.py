"""Which modules may be compiled, and whether they are: the same results, sooner.

`make fast` compiles them where they stand, `make wheel` in a wheel; everywhere else they run as the Python that they
are. Both ways give the same bytes (`tests/house/test_compiled.py`).
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]  # or the checkout, whose folders are the package's

# Of the package. What users subclass, and dataclasses of settings, stay Python: of those mypyc keeps no annotations.
MODULES = (
    "backend.rates",
    "policies.base",
    "policies.sglang_batches",
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
    if not (_PACKAGE / "pyproject.toml").exists():
        return []  # an installation, whose files are as old as the installer makes them
    found = []
    for name in MODULES:
        library, source = _library(name), _source(name)
        if library is not None and source.exists() and source.stat().st_mtime > library.stat().st_mtime:
            found.append(source)
    return found


def _source(name: str) -> Path:
    return _PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def _library(name: str) -> Path | None:
    """The compiled module, which Python takes before the source beside it; None if there is none."""
    source = _source(name)
    found = (source.with_name(source.stem + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((library for library in found if library.exists()), None)


def told() -> str:
    """Which way the core runs, in words."""
    many = len(compiled())
    if not many:
        return "core in Python (make fast compiles it)"
    return "core compiled" if many == len(MODULES) else f"core compiled in part: {many} of {len(MODULES)} modules"
