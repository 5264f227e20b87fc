"""A run's key changes with every file that is read, with the code that shapes rows, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.files import files_read
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep import runs
from chairlift.sim.sweep.runs import Run, code_digest, made_by
from kit.command import POLICY, SCENARIO
from kit.places import IMPORTS, ROOT

BASE: dict[str, Any] = yaml.safe_load(SCENARIO)
ROUTER = """\
from dataclasses import dataclass
from chairlift import Router

@dataclass
class First(Router):
    def route(self, request, replicas):
        return replicas.indices[0]
"""
CONFIG = {
    **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 97, "max_position_embeddings": 4096},
}
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n"
PROFILE = "h200-llama-3.1-8b-vllm-0.23"


def pulse(folder: Path) -> None:
    """RAGPulse: a trace, and five maps beside it."""
    folder.mkdir()
    maps = {"1_sys_prompt": "sys_prompt_id", "2_passages": "passage_id", "3_history": "history_id"}
    maps |= {"5_web_search": "web_search_id", "4_user_input": "user_input_id"}
    for name, key in maps.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({key: 1, "token_length": 10}) + "\n")
    hashes = {"sys_prompt": [1], "passages_ids": [1], "history": [], "web_search": [], "user_input": [1]}
    row = {"timestamp": "7", "input_length": 40, "output_length": 5, "hash_ids": hashes, "session_id": "a"}
    (folder / "0_trace.jsonl").write_text(json.dumps(row) + "\n")


def served(folder: Path) -> None:
    """ServeGen: a folder of one client."""
    folder.mkdir()
    (folder / "chunk-0-trace.csv").write_text("0,2,1,Gamma,1,0.5\n600,2,1,Gamma,1,0.5\n")
    lengths = {"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{5: 1.0}"}}
    (folder / "chunk-0-dataset.json").write_text(json.dumps(lengths))


def everything(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scenarios that name files of all kinds in ``folder``."""
    (folder / "mine.py").write_text(POLICY)
    (folder / "route.py").write_text(ROUTER)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "trace.csv").write_text(TRACE)
    (folder / "other.csv").write_text(TRACE.replace("20", "30"))
    pulse(folder / "pulse")
    served(folder / "served")
    shipped = ROOT / "backend" / "calibrated" / "profiles" / f"{PROFILE}.json"
    (folder / "own.json").write_text(shipped.read_text())
    vllm, llama = {"name": "vllm"}, {"model": "llama-3.1-8b", "gpu": "h200"}
    clients = {"servegen": {"file": "served"}, "requests": 20}
    parts = {"a": {"file": "trace.csv"}, "b": {"file": "other.csv"}, "c": clients}

    yield "policy", BASE | {"policy": {"name": "mine.py", "budget": 999}, "router": "route.py"}
    yield "class", BASE | {"policy": "mine.py:Mine", "router": {"name": "route.py:First"}}
    yield "groups", BASE | {"policy": vllm, "replicas": [{"count": 1}, {"count": 1, "policy": "mine.py"}]}
    yield "model", BASE | {"model": "tiny/config.json"}
    yield "profile", BASE | llama | {"backend": "own.json"}
    yield "profile setting", BASE | llama | {"backend": {"name": "profile", "profile": "own.json"}}
    (folder / "curve.yaml").write_text("on: {1: 1.8, 2: 2.4}\n")
    drafts = {"method": "eagle3", "tokens": 2, "acceptance": {"file": "curve.yaml:on"}}
    yield "curve", BASE | {"policy": vllm, "speculate": drafts}
    yield "trace", BASE | {"workload": {"file": "trace.csv"}}
    yield "companions", BASE | {"workload": {"file": "pulse/0_trace.jsonl"}}
    yield "clients", BASE | {"workload": clients}
    yield "mix", BASE | {"workload": {"mix": parts}}
    yield "none", BASE


NAMES = [
    *(
        "policy",
        "class",
        "groups",
        "model",
        "profile",
        "profile setting",
        "curve",
        "trace",
        "companions",
        "clients",
        "mix",
    ),
    "none",
]
_opened: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | os.PathLike):
        _opened.append(os.path.abspath(os.fspath(arguments[0])))


sys.addaudithook(_hear)  # for good: there is no taking it back


def opened_by(call: Callable[[], object], folder: Path) -> set[Path]:
    """The files below ``folder`` that Python opens during ``call``."""
    global _opened
    _opened = []
    try:
        call()
    finally:
        paths, _opened = {Path(name) for name in _opened}, None
    return {path for path in paths if folder in path.parents and path.is_file() and "__pycache__" not in path.parts}


def run_of(data: dict[str, Any], folder: Path) -> Run:
    return Run(Document(data, {}, "scenario.yaml"), folder, trust=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_declared_is_what_is_opened(name: str, tmp_path: Path) -> None:
    data = dict(everything(tmp_path))[name]
    read = {path for named in files_read(Document(data, {}, ""), tmp_path).values() for path in named.files}

    assert read == opened_by(lambda: prepare(Document(data, {}, ""), tmp_path, trust=True), tmp_path)
    assert bool(read) == (name != "none")


@pytest.mark.parametrize("name", NAMES)
def test_a_key_changes_with_each_file_that_is_read_and_with_no_other(name: str, tmp_path: Path) -> None:
    data = dict(everything(tmp_path))[name]
    read = {path for named in files_read(Document(data, {}, ""), tmp_path).values() for path in named.files}
    before = run_of(data, tmp_path).key
    for path in sorted(tmp_path.rglob("*.*")):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert (run_of(data, tmp_path).key != before) == (path in read), path
        path.write_bytes(content)
        assert run_of(data, tmp_path).key == before


def test_a_text_that_happens_to_be_the_name_of_a_file_is_no_file(tmp_path: Path) -> None:
    data = BASE | {"question": "notes.txt", "note": "mine.py", "gpu": "a100-40gb", "policy": {"name": "vllm"}}
    before = run_of(data, tmp_path).key
    for name in ("notes.txt", "mine.py", "a100-40gb", "vllm", "vllm.py", "opt-13b", "config.json"):
        (tmp_path / name).write_text("anything")

    assert run_of(data, tmp_path).key == before


def test_files_count_by_content_and_name_wherever_they_lie(tmp_path: Path) -> None:
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "trace.csv").write_text(TRACE)
        keys.append(run_of(BASE | {"workload": {"file": "deep/trace.csv"}}, tmp_path / folder).key)
    keys.append(run_of(BASE | {"workload": {"file": str(tmp_path / "here" / "deep" / "trace.csv")}}, tmp_path).key)

    assert len(set(keys)) == 1


def test_a_model_is_called_as_the_folder_of_its_file_which_counts(tmp_path: Path) -> None:
    keys = set()
    for folder in ("tiny", "small"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(CONFIG))
        keys.add(run_of(BASE | {"model": f"{folder}/config.json"}, tmp_path).key)

    assert len(keys) == 2


def test_two_classes_of_one_file_are_two_systems(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)

    assert len({run_of(BASE | {"policy": f"mine.py{name}"}, tmp_path).key for name in ("", ":One", ":Two")}) == 3


def test_a_file_that_appears_later_changes_the_key(tmp_path: Path) -> None:
    data = BASE | {"workload": {"file": "trace.csv"}}
    before = run_of(data, tmp_path).key
    with pytest.raises(BadInput, match="no such file"):
        prepare(Document(data, {}, ""), tmp_path)
    (tmp_path / "trace.csv").write_text(TRACE)

    assert run_of(data, tmp_path).key != before


def test_a_scenario_that_is_wrong_has_a_key_too(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{}, {"workload": 3, "policy": 4, "replicas": [5]}, {"model": {"name": []}}]

    assert len({run_of(data, tmp_path).key for data in wrong}) == 3


# ---- code ----


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("backend", "policies", "sim"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_code_that_shows_what_came_out_does_not_count_and_all_other_code_does(copy: Path) -> None:
    before = code_digest(copy)
    assert before == code_digest(ROOT)
    shown = ("sim/cli/", "sim/report/")
    shapes = (
        "sim/cluster/",
        "sim/replica/",
        "sim/results/",
        "sim/scenario/",
        "sim/workload/",
        "sim/plan/",
        "policies/",
    )
    kept, changed = 0, 0
    for path in sorted(copy.rglob("*.*")):
        name = path.relative_to(copy).as_posix()
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        if name.startswith(shown) or path.suffix == ".md":
            assert code_digest(copy) == before, name
            kept += 1
        elif name.startswith(shapes) or (name.startswith("backend/") and path.suffix in (".py", ".cu", ".cuh")):
            assert code_digest(copy) != before, name
            changed += 1
        path.write_bytes(content)
    assert kept > 10
    assert changed > 60
    assert code_digest(copy) == before


def test_a_file_that_comes_goes_or_moves_counts(copy: Path) -> None:
    before = code_digest(copy)
    (copy / "backend" / "gpus.csv").write_text("h100,1\n")
    with_table = code_digest(copy)
    (copy / "backend" / "gpus.csv").rename(copy / "backend" / "cards.csv")

    assert len({before, with_table, code_digest(copy)}) == 3
    (copy / "backend" / "cards.csv").unlink()
    assert code_digest(copy) == before


RUN = """\
import json, sys
from pathlib import Path
import yaml
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local
from chairlift.sim.sweep.runs import Run, run_one
folder = Path(sys.argv[1])
row = run_one(Run(Document(json.loads(sys.argv[2]), {}, ""), folder, trust=True))
assert not row.error, row.error
plan = read_plan(folder / "plan.yaml")
with Journal(folder) as journal:
    assert len(Simulations(journal, Local(1), tuple(plan.spec.slo)).of(plan.candidates[0])(1.0, 100, 2)) == 2
print(json.dumps([module.__file__ for name, module in sys.modules.items() if name.startswith("chairlift.")]))
"""


def test_code_that_does_not_count_is_not_even_loaded_where_rows_are_made(tmp_path: Path) -> None:
    data = dict(everything(tmp_path))["profile"] | {"policy": "mine.py", "router": "route.py"}
    (tmp_path / "base.yaml").write_text(SCENARIO.replace("seed: 7\n", ""))
    (tmp_path / "plan.yaml").write_text("base: base.yaml\nslo: [{percentile: 90, ttft_ms: 300}]\nrate_per_s: 8\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), json.dumps(data)],
        env={**os.environ, "PYTHONPATH": str(IMPORTS)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = {Path(file).resolve().relative_to(ROOT).as_posix() for file in json.loads(done.stdout) if file}

    assert {"sim/sweep/runs.py", "sim/plan/replications.py", "sim/simulate.py"} <= loaded
    assert [name for name in loaded if name.startswith(runs._SHAPES_NO_ROW)] == []
    assert all(any(ROOT.glob(f"{name}*")) for name in runs._SHAPES_NO_ROW)


def test_plug_ins_that_are_installed_are_part_of_what_made_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made_by()
    keys = []
    for found in ({}, {"fast": "1.2+abc"}, {"fast": "1.2+abd"}):
        monkeypatch.setattr(plugins, "versions", lambda found=found: found)
        made_by.cache_clear()
        keys.append(made_by())
    monkeypatch.undo()
    made_by.cache_clear()

    assert keys[0] == before
    assert len(set(keys)) == 3
