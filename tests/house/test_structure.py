"""The shape of the repository: who imports whom, how large files are, what stands at the top level."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chairlift.sim.scenario import load
from kit.places import IMPORTS, ROOT

PACKAGES = ("sim", "backend", "policies")
LONGEST = 400  # lines a module
GPU_LIBRARIES = {"torch", "cupy", "triton", "flashinfer", "flash_attn"}
GPU_NAMES = ("torch_engine", "model", "weights", "pieces", "paged_attention", "kernels", "bench")
GPU_MODULES = {f"backend.{name}" for name in GPU_NAMES}
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"),
    *("sim", "backend", "policies", "scenarios", "tests"),
}
VAGUE = {"utils", "util", "helpers", "helper", "managers", "manager", "core", "common", "misc"}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Top-level names of what ``path`` imports, also inside functions and under TYPE_CHECKING."""
    package = module_name(path).split(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value).split(".")[0]


def names(paths: list[Path]) -> list[str]:
    return [module_name(path) for path in paths]


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode:
        pytest.skip("git does not answer here")
    return listed.stdout.splitlines()


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_imports_point_the_right_way(path: Path) -> None:
    package = module_name(path).split(".")[0]
    ours = set(imported(path)) & {*PACKAGES, "scenarios", "tests"}

    assert ours - {package} <= ({"backend", "policies"} if package == "sim" else set())


def test_simpy_is_imported_in_one_module_of_sim() -> None:
    assert [module_name(path) for path in MODULES if "simpy" in imported(path)] == ["chairlift.sim.cluster.cluster"]


def test_gpu_libraries_are_imported_in_gpu_modules_only() -> None:
    found = {module_name(path) for path in MODULES if GPU_LIBRARIES & set(imported(path))}

    assert {
        name for name in found if not any(name == gpu or name.startswith(f"{gpu}.") for gpu in GPU_MODULES)
    } == set()


def test_the_command_works_where_gpu_libraries_are_not() -> None:
    script = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(GPU_LIBRARIES)}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
sys.argv = ["chairlift", "list", "policies"]
from chairlift.sim.cli.main import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "vllm" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_name_is_vague() -> None:
    parts = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}

    assert parts & VAGUE == set()


def test_top_level_is_what_the_design_says() -> None:
    found = {file.split("/")[0] for file in tracked()}

    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL
    assert {"pyproject.toml", "sim", "backend", "policies", "scenarios", "tests"} <= found


def test_nothing_made_is_tracked() -> None:
    made = (".pyc", ".parquet", ".partial", ".egg-info", ".DS_Store")

    assert [file for file in tracked() if file.endswith(made) or "__pycache__" in file or ".hypothesis/" in file] == []


def test_wheel_holds_packages_and_scenarios() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    assert sorted(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted([*PACKAGES, "scenarios"])
    assert project["project"]["scripts"] == {"chairlift": "chairlift.sim.cli.main:main"}
    assert project["project"]["requires-python"] == ">=3.11"


def test_nothing_at_run_time_needs_more_than_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {"pyyaml": "yaml", "annotated-types": "annotated_types"}
    declared = set()
    for requirement in project["project"]["dependencies"] + project["project"]["optional-dependencies"]["gpu"]:
        name = requirement.split(">")[0].split("=")[0].strip()
        declared.add(names.get(name, name))
    found = {name for path in MODULES for name in imported(path)} - set(sys.stdlib_module_names) - set(PACKAGES)

    assert found - GPU_LIBRARIES - extras() - declared - {"pydantic_core"} == set()  # pydantic brings its core


def extras() -> set[str]:
    """What only some commands need: declared as extras, imported where it is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    return {each.split(">")[0].strip() for name, needed in optional.items() if name != "dev" for each in needed}


AT_HOME = [path for path in MODULES if not any(module_name(path).startswith(gpu) for gpu in GPU_MODULES)]


@pytest.mark.parametrize("path", AT_HOME, ids=names(AT_HOME))
def test_extras_are_imported_only_where_they_are_used(path: Path) -> None:
    at_import = {
        name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }

    assert {name.split(".")[0] for name in at_import} & extras() == set()


APART = {file for folder in ("sweeps", "plans") for file in (ROOT / "scenarios" / folder).iterdir()}
SHIPPED = sorted(set((ROOT / "scenarios").rglob("*.yaml")) - APART)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenario_loads(path: Path) -> None:
    study = load.load(path)

    assert study.name == path.stem
    assert study.question
    assert study.setups


def test_there_are_shipped_scenarios() -> None:
    assert {"anyscale_23x", "anyscale_latency"} <= {path.stem for path in SHIPPED}
