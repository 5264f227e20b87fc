"""``chairlift doctor``: what is installed here, and whether it simulates as it should."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.sim.cli.compiled import stale, told
from chairlift.sim.cli.terminal import console
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate

NEEDED = ("numpy", "scipy", "pyarrow", "pydantic", "PyYAML", "simpy", "plotly", "jinja2", "typer", "rich")
EXTRAS = {"gpu": ("torch", "cupy-cuda13x", "safetensors"), "ray": ("ray",)}  # extra → what it brings
CHECKED = {  # a load at which requests queue, so that prompts and decodes meet in steps
    "model": "llama-3.1-8b",
    "gpu": "h100",
    "policy": "vllm",
    "workload": {"name": "azure-conv-2023", "requests": 2000, "rate_per_s": 16},
}

out = console(least=100)


def doctor() -> None:
    """Say what is installed, which GPUs there are, and whether a simulation here comes out right.

    The check takes some seconds: it serves 2,000 requests twice, once with every engine step on its own, and compares
    all times of all requests. Exit status 1 says that they differ.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, found in _installed():
        table.add_row(escape(name), escape(found))
    out.print(table)
    setup = prepare(Document(dict(CHECKED), {}, "chairlift doctor"), Path())
    fast, slow = simulate(setup), simulate(setup, leap=False)
    ours, theirs = fast.requests.columns(), slow.requests.columns()
    wrong = [name for name in ours if (ours[name] != theirs[name]).any()]
    if wrong:
        out.print(f"[red]check failed:[/red] runs of steps and single steps differ in {', '.join(wrong)}")
        raise typer.Exit(1)
    rate = fast.summary["requests_per_wall_s"] or 0.0
    out.print(
        f"check passed: {len(setup.trace):,} requests at {rate:,.0f} a second, the same to the picosecond step by step"
    )


def version_() -> None:
    """Print the version, and whether the core runs compiled."""
    out.print(f"chairlift {_version('chairlift') or 'from a checkout'}, {_core()}")


def _core() -> str:
    changed = ", ".join(path.name for path in stale())
    return f"{told()}; older than {changed}: compile it again, or make clean" if changed else told()


def _installed() -> Iterator[tuple[str, str]]:
    """A name and what there is of it, a row each."""
    yield "chairlift", _version("chairlift") or "not installed: it runs from a checkout"
    yield "core", _core()
    yield "python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    for name in NEEDED:
        yield name, _version(name) or "missing: reinstall chairlift"
    for extra, names in EXTRAS.items():
        for name in names:
            yield name, _version(name) or f"not installed; for more: pip install 'chairlift[{extra}]'"
    yield "GPUs", _gpus()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpus() -> str:
    """The GPUs that NVIDIA's driver lists."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "none seen (no nvidia-smi); only the torch backend needs one"
    asked = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return "; ".join(told.split("\n")).strip("; ") or "none"
