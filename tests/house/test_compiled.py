"""The compiled core gives what the Python gives. It is compiled here, without optimisation: that takes a minute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kit.places import ROOT, TESTS

pytestmark = [
    pytest.mark.skipif(find_spec("mypyc") is None, reason="mypyc, which compiles the core, is not installed"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here"),
]

# The core's own suites: hand-worked times, gaps and pools, swaps, what users' code may do.
SUITES = (
    "replica/test_engine_timing.py",
    "replica/test_gaps.py",
    "replica/test_journal.py",
    "replica/test_swap.py",
    "replica/test_hybrid_pool.py",
    "cluster/test_cluster_by_hand.py",
    "cli/test_edges_users_code.py",
)
OF_PYTHON = "not test_every_field_of_a_request_and_of_a_step_is_tried"  # it looks at how the contract is written

# Each policy, and each kind of pool; windows, drafts, stages, failing replicas and clients that give up.
RUNS = """
import hashlib, json, sys, tempfile
from pathlib import Path
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate

BASE = '''model: {model}
gpu: h100
policy: {policy}
replicas: 2
workload: {{name: azure-conv-2023, requests: 300, rate_per_s: 30, prefix: {{groups: 5, tokens: 300}}}}
kv: {{tokens: 40000}}
{more}
'''
for name, (model, policy, more) in json.load(sys.stdin).items():
    path = Path(tempfile.mkdtemp()) / "s.yaml"
    path.write_text(BASE.format(model=model, policy=policy, more=more))
    digest = hashlib.sha256()
    for setup in load(path).setups:
        outcome = simulate(setup, journal=True)
        for rows in ("requests", "steps", "events"):
            table = outcome.to_arrow(rows)
            for column in table.column_names:
                digest.update(f"{column} {table[column].to_pylist()}".encode())
    print(json.dumps([name, digest.hexdigest()]))
"""
SETUPS = {
    **{
        policy: ("llama-3.1-8b", policy, "")
        for policy in ("vllm", "vllm_v0", "sglang", "orca", "tgi", "sarathi", "mlfq")
    },
    **{policy: ("llama-3.1-8b", policy, "") for policy in ("static", "fair", "sjf", "slo", "deadline", "priority")},
    "synchronous": ("llama-3.1-8b", "{name: vllm, async_scheduling: false, max_num_seqs: 24}", ""),
    "windows": ("gpt-oss-20b", "vllm", ""),
    "drafts": (
        "llama-3.1-8b",
        "{name: vllm, async_scheduling: false}",
        "speculate: {method: ngram, tokens: 3, acceptance: {length: 2.1}}",
    ),
    "stages": ("llama-3.1-8b", "vllm", "parallel: {pipeline: 2}"),
    "drafts in stages": (
        "llama-3.1-8b",
        "vllm",
        "parallel: {pipeline: 2}\nspeculate: {method: mtp, tokens: 3, acceptance: {length: 2.1}}",
    ),
    "outages": ("llama-3.1-8b", "vllm", "failures: {mtbf_s: 5, mttr_s: 1}"),
    "impatient": ("llama-3.1-8b", "vllm", "limits: {timeout_s: 4}"),
}


def child(folder: Path | None, *command: str, given: str | None = None) -> str:
    """What a Python says that imports the package from ``folder``; None: from the checkout."""
    paths = {**os.environ, "PYTHONPATH": str(folder or ROOT / ".package")}
    done = subprocess.run(
        [sys.executable, *command], input=given, env=paths, cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("compiled") / "package"
    child(None, str(ROOT / ".package" / "compile.py"), "--into", str(folder), "--optimise", "0")
    yield folder
    shutil.rmtree(folder)


def test_the_version_says_what_runs(compiled: Path) -> None:
    assert child(compiled, "-m", "chairlift", "version").endswith("core compiled\n")
    assert child(None, "-m", "chairlift", "--version").endswith("core in Python (make fast compiles it)\n")


def test_what_changed_since_it_was_compiled_is_refused(compiled: Path) -> None:
    package = compiled / "chairlift"
    (package / "pyproject.toml").touch()  # as in a checkout
    source = package / "sim" / "replica" / "step.py"
    before = source.stat()
    os.utime(source)  # now: later than the libraries, however old the checkout is
    command = [sys.executable, "-m", "chairlift"]
    paths = {**os.environ, "PYTHONPATH": str(compiled)}
    try:
        ran = subprocess.run([*command, "schema"], env=paths, capture_output=True, text=True, check=False)
        told = child(compiled, "-m", "chairlift", "version")
    finally:
        (package / "pyproject.toml").unlink()
        os.utime(source, (before.st_atime, before.st_mtime))

    assert (ran.returncode, ran.stdout) == (2, "")
    assert "step.py: was changed after it was compiled: make fast compiles it again" in " ".join(ran.stderr.split())
    assert "core compiled; older than step.py" in " ".join(told.split())


def test_settings_and_their_bounds_are_the_same(compiled: Path) -> None:
    assert child(compiled, "-m", "chairlift", "schema") == child(None, "-m", "chairlift", "schema")


def test_runs_are_the_same_to_the_byte(compiled: Path) -> None:
    def digests(folder: Path | None) -> dict[str, Any]:
        return dict(json.loads(line) for line in child(folder, "-c", RUNS, given=json.dumps(SETUPS)).splitlines())

    ours, theirs = digests(compiled), digests(None)

    assert ours.keys() == SETUPS.keys()
    assert ours == theirs


def test_the_cores_own_suites_pass(compiled: Path) -> None:
    told = child(compiled, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", OF_PYTHON, *SUITES)

    assert " passed" in told.splitlines()[-1]
