"""The shape of the repository: who imports whom, what lies where, what stands at the top level and in the wheel."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from chairlift.sim.scenario import load
from kit.places import IMPORTS, ROOT

HERE = Path(__file__)
PACKAGES = ("sim", "backend", "policies")
GPU_LIBRARIES = {"torch", "cupy", "triton", "flashinfer", "flash_attn"}
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"),
    *("sim", "backend", "policies", "scenarios", "tests"),
}
VAGUE = {"utils", "util", "helpers", "helper", "managers", "manager", "core", "common", "misc"}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

ALL = ("",)  # any module of that package
SPINE = ("bad_input", "units", "atomic")
# Who may import whom: a folder or module of sim → prefixes of modules of sim, backend and policies, itself included.
# The first line whose name is a module's name, or a folder above it, is the one that holds.
MAY_IMPORT: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "bad_input": ((), ("checked",), ()),
    "units": ((), (), ()),
    "atomic": ((), (), ()),
    "workload": (("workload", *SPINE), ("checked",), ()),
    "study": (("workload", *SPINE), ("base", "parallel", "specs", "shapes"), ("base",)),
    "results": (("results", "study", "workload", *SPINE), ("base", "cuda_graphs", "checked"), ("base",)),
    "scenario": (("scenario", "study", "workload", "results.catalogue", *SPINE), ALL, ALL),
    "replica": (("replica", "results.records", "workload.trace"), ("base",), ("base",)),
    "cluster": (("cluster", "replica", "results", "study", "workload", *SPINE), ("base", "machine"), ("base",)),
    "simulate": (("cluster", "replica", "results", "study", *SPINE), ("base",), ()),
    "conformance": (
        ("conformance", "cluster", "simulate", "replica", "results", "study", "workload", *SPINE),
        ("base", "parallel", "shapes"),
        ("base", "routers", "vllm"),
    ),
    "report": (("report", "results", "study", "workload.trace", *SPINE), (), ()),
    "sweep": (
        ("sweep", "simulate", "scenario", "report.html", "results", "workload", *SPINE),
        ("base", "checked", "machine", "spawned"),
        ("base",),
    ),
    "calibration": (
        ("calibration", "simulate", "results", "study", "workload", *SPINE),
        ALL,
        ("base", "vllm", "vllm_versions", "sglang", "routers"),
    ),
    "plan": (
        (
            *("plan", "sweep", "simulate", "scenario", "replica.prefix_identity", "report.html", "results", "study"),
            *("workload", *SPINE),
        ),
        ("base", "checked", "memory", "slowed", "specs", "shapes", "calibrated.profile"),
        ("base", "routers", "sglang", "vllm"),
    ),
    "cli": (ALL, ALL, ALL),
}


def module_name(path: Path) -> str:
    """Of a file, without the `chairlift` in front: ``sim.replica.engine``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


@cache
def modules_imported(path: Path) -> list[str]:
    """Full names of what ``path`` imports, also inside functions; our own without the `chairlift` in front."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                ours = whole.removeprefix("chairlift.")
                found.append(whole if ours in NAMES or node.module == "chairlift" else str(node.module))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append(str(node.args[0].value))
    return [name.removeprefix("chairlift.") for name in found]


def imported(path: Path) -> Iterator[str]:
    """Top-level names of what ``path`` imports; of our own, the folder."""
    yield from (name.split(".")[0] for name in modules_imported(path))


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


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


IN_SIM = [path for path in MODULES if module_name(path).startswith("sim.")]


@pytest.mark.parametrize("path", IN_SIM, ids=names(IN_SIM))
def test_inside_sim_nobody_imports_upwards(path: Path) -> None:
    name = module_name(path).removeprefix("sim.")
    rule = next(rule for folder, rule in MAY_IMPORT.items() if within(name, (folder,)))
    wrong = [
        other
        for other in modules_imported(path)
        for package, allowed in zip(PACKAGES, rule, strict=True)
        if other.startswith(f"{package}.") and not within(other.removeprefix(f"{package}."), allowed)
    ]

    assert wrong == []


def test_there_is_no_circle_of_files() -> None:
    arrows = {module_name(path): set(modules_imported(path)) & NAMES - {module_name(path)} for path in MODULES}
    while arrows:  # take those away that import nobody who is left
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_sim_itself_holds_few_files() -> None:
    assert len(list((ROOT / "sim").glob("*.py"))) <= 8


def test_simpy_is_imported_in_one_module_of_sim() -> None:
    assert len([path for path in MODULES if "simpy" in imported(path)]) == 1


def test_gpu_libraries_are_imported_in_one_folder() -> None:
    found = {module_name(path) for path in MODULES if GPU_LIBRARIES & set(imported(path))}

    assert {name for name in found if not name.startswith("backend.gpu.")} == set()


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

    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [".package/chairlift"]
    scripts = {"chairlift": "chairlift.__main__:main", "chairlift-record": "chairlift.backend.recorder.folder:main"}
    assert project["project"]["scripts"] == scripts
    assert project["project"]["requires-python"] == ">=3.11"


def test_nothing_at_run_time_needs_more_than_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {"pyyaml": "yaml", "annotated-types": "annotated_types", "mypy-extensions": "mypy_extensions"}
    declared = set()
    for requirement in project["project"]["dependencies"] + project["project"]["optional-dependencies"]["gpu"]:
        name = requirement.split(">")[0].split("=")[0].strip()
        declared.add(names.get(name, name))
    ours = {"chairlift", *PACKAGES, ""}
    found = {name for path in MODULES for name in imported(path)} - set(sys.stdlib_module_names) - ours
    engines = {"vllm", "sglang"}
    within_engines = {module_name(path) for path in MODULES if engines & set(imported(path))}

    # the engine imports these itself, where it runs: it is not the project's to bring
    assert within_engines == {f"backend.recorder.{name}" for name in ("vllm", "vllm_stats", "sglang")}
    brought = {"pydantic_core", "typing_extensions"}  # by pydantic
    assert found - GPU_LIBRARIES - extras() - declared - brought - engines == set()


def extras() -> set[str]:
    """What only some commands need: declared as extras, imported where it is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    return {each.split(">")[0].strip() for name, needed in optional.items() if name != "dev" for each in needed}


AT_HOME = [path for path in MODULES if not module_name(path).startswith("backend.gpu.")]


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


def test_no_property_test_has_a_deadline() -> None:
    assert settings.default is not None
    assert settings.default.deadline is None
    assert [
        file for file in (ROOT / "tests").rglob("test_*.py") if "deadline=" in file.read_text() and file != HERE
    ] == []
