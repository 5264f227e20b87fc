"""Every block of every README is run or loaded; what it names exists, and the map is the tree.

A block of ``yaml`` or ``python`` begins with a comment that names its file: ``# my.yaml``. The files of all READMEs lie
in one folder, in which the lines of ``sh`` blocks are run one after the other. `LATER` lists what is not run here, and
why; of that, options and files are looked up all the same.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.recorder import folder as recorder
from chairlift.sim.cli import main as cli
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from house.test_structure import MAY_IMPORT, SPINE
from kit import benched
from kit.command import SCENARIO, chairlift
from kit.places import IMPORTS, ROOT
from kit.synthetic import Planted, record, write

FOLDERS = ("sim", "backend", "policies", "scenarios", "tests")
READMES = [ROOT / "README.md", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("README.md")))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
NAMES = list(TEXTS)

LATER = {  # how a command begins → why it is not run here
    "make": "sets up an environment from the network, and takes minutes",
    "python -m pip": "needs a network",
    "python -m venv peer": "needs a network",
    "python -m chairlift.sim.cli.peers": "needs a peer, which needs a network",
    "python -m pytest": "runs tests",
    "CHAIRLIFT_EXAMPLES=2000 python -m pytest": "runs tests, for minutes",
    "python -m chairlift.backend.gpu.bench": "needs a GPU",
    "chairlift calibrate --backend torch": "needs a GPU",
    "chairlift run executed.yaml": "needs a GPU",
    "chairlift run hardware_23x": "needs a GPU",
    "chairlift run hardware_policies": "needs a GPU",
    "chairlift agree runs/hardware_policies": "compares what was measured on a GPU",
    "CHAIRLIFT_RECORDING=DIR vllm serve": "needs vLLM, weights and a GPU",
    "CHAIRLIFT_RECORDING=DIR sglang serve": "needs SGLang, weights and a GPU",
    "chairlift-record DIR": "needs what a server wrote",
    "chairlift plan my_plan.yaml --emit": "simulates for a minute, and a dry run starts nothing",
    "chairlift plan my_plan.yaml --what-would-change": "simulates for minutes, and a dry run changes nothing",
    "chairlift run runs/my_plan/plan.json": "needs the plan's results, which take a minute",
}
SMALLER = {  # command → options that make it small enough to run here
    "run": ("--set", "workload.requests=40"),
    "diff-engines": ("--set", "workload.requests=40"),
    "sweep": ("--set", "workload.requests=15", "-j1"),
    "plan": ("--dry-run",),
}
WHOLE = ("anyscale_23x",)  # these are small enough


QWEN_14B = {  # the sizes of Qwen2.5-14B (huggingface.co/Qwen/Qwen2.5-14B): a model that no table here has
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16"},
    **{"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40},
    **{"num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False},
}


def blocks(readme: str, *languages: str) -> list[str]:
    """The fenced blocks of a README in one of ``languages``."""
    fenced = re.findall(r"^```([\w-]*)\n(.*?)^```$", TEXTS[readme], re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if language in languages]


def named(language: str) -> dict[str, str]:
    """File name → text of the blocks of all READMEs in ``language``."""
    found: dict[str, str] = {}
    for readme in NAMES:
        for text in blocks(readme, language):
            first = re.match(r"# (\w+\.(?:yaml|py))\n", text)
            assert first, f"{readme}: a block does not begin with the name of its file: {text[:60]!r}"
            assert first[1] not in found, f"{readme}: another block is called {first[1]} too"
            found[first[1]] = text
    return found


def commands(readme: str) -> list[str]:
    """The lines of its ``sh`` blocks, without comments."""
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def later(command: str) -> str | None:
    """The key of `LATER` under which a command is not run."""
    return next((start for start in LATER if f"{command} ".startswith(f"{start} ")), None)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of all READMEs and those that their commands take for granted."""
    monkeypatch.chdir(tmp_path)
    for name, text in {**named("yaml"), **named("python")}.items():
        Path(name).write_text(text.replace("seeds: 8", "seeds: 1"), encoding="utf-8")
    rows = "".join(f"2023-11-16 18:15:{second:02}.0000000,{300 + second},{20 + second}\n" for second in range(20))
    log = "".join(
        f'{{"ts": {1_767_600_000 + i}, "prompt_tokens": {90 + i}, "completion_tokens": 20}}\n' for i in range(20)
    )
    Path("log.jsonl").write_text(log, encoding="utf-8")
    Path("azure_conv.csv.gz").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}", encoding="utf-8")
    write(tmp_path / "DIR", [record(Planted())])
    Path("bench.json").write_text(json.dumps(benched.burst()), encoding="utf-8")
    Path("config.json").write_text(json.dumps(QWEN_14B), encoding="utf-8")
    return tmp_path


def run(command: str) -> None:
    """Run one command of a README, made smaller; it must succeed."""
    words = shlex.split(command)
    if words[0] == "python":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(IMPORTS), str(ROOT / "tests")])}
        ours = Path(words[1]).exists()  # a script of a README; the others are the repository's
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=None if ours else ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stderr)
        return
    assert words[0] == "chairlift", command
    small = () if words[2:3] and words[2] in WHOLE else SMALLER.get(words[1], ())
    result = chairlift(*words[1:], *small)
    assert result.status == 0, (command, result.out, result.err)


@pytest.mark.parametrize("readme", NAMES)
def test_commands_run(readme: str, scene: Path) -> None:
    Path("bench.json").write_text(json.dumps(benched.burst(100)), encoding="utf-8")  # a fit simulates them many times
    for command in commands(readme):
        if later(command) is None:
            run(command)


def test_what_is_not_run_could_be() -> None:
    found = [command for readme in NAMES for command in commands(readme) if later(command)]
    group = typer.main.get_command(cli.app)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    assert {later(command) for command in found} == set(LATER)
    for command in found:
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[0] == "chairlift":
            assert isinstance(group, typer.core.TyperGroup)
            command_here = group.get_command(None, words[1])
            assert command_here is not None, command
            command_here.make_context(words[1], words[2:])  # raises if an option is unknown
        elif words[0] == "vllm":
            module, _, name = words[words.index("--scheduler-cls") + 1].rpartition(".")
            origin = find_spec(module)
            assert origin is not None, command
            assert f"class {name}(" in Path(str(origin.origin)).read_text(encoding="utf-8"), command
        elif words[0] == "sglang":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            module, _, name = project["project"]["entry-points"]["sglang.srt.plugins"]["chairlift"].partition(":")
            assert callable(getattr(import_module(module), name))
        elif words[0] == "chairlift-record":
            recorder.parser().parse_args(words[1:])
        else:
            assert words[:2] == ["python", "-m"], command
            assert find_spec(words[2]) is not None, command
            for file in (word for word in words if word.startswith("tests/")):
                assert (ROOT / file).exists(), command


@pytest.mark.parametrize("name", named("yaml"))
def test_yaml_is_understood(name: str, scene: Path) -> None:
    keys = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    if "base" not in keys:
        study = load(Path(name), ["workload.requests=40"] if "requests" in keys["workload"] else [], trust=True)
        for setup in study.setups:
            if not setup.executes:
                assert simulate(setup).summary["completed"] > 0
    else:
        result = chairlift("plan" if "slo" in keys else "sweep", name, "--dry-run")
        assert result.status == 0, result.err


@pytest.mark.parametrize("name", named("python"))
def test_python_runs(name: str, scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(name).read_text(encoding="utf-8")
    if re.search(r"\((Scheduler|Router)\):", text):
        result = chairlift("check", name)
        assert result.status == 0, result.out
        assert " 0 broken, 0 not checked" in result.out
    else:
        runpy.run_path(name)


@pytest.mark.parametrize("readme", NAMES)
def test_toml_names_groups_of_entry_points(readme: str) -> None:
    for text in blocks(readme, "toml"):
        assert set(tomllib.loads(text)["project"]["entry-points"]) <= set(plugins.GROUPS)


@pytest.mark.parametrize("readme", NAMES)
def test_each_block_is_of_a_known_kind(readme: str) -> None:
    kinds = re.findall(r"^```([\w-]*)\n.*?^```$", TEXTS[readme], re.DOTALL | re.MULTILINE)

    assert set(kinds) <= {"sh", "yaml", "python", "toml", "text"}
    assert kinds.count("text") == (readme == "README.md")  # the map


@pytest.mark.parametrize("readme", NAMES)
def test_links_and_paths_lead_somewhere(readme: str) -> None:
    folder = (ROOT / readme).parent
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[readme]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / readme
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, link
    for path in re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|yaml|cu|md|jsonl?))?)`", TEXTS[readme]):
        if not path.startswith(("runs/", "..")):
            assert any((base / path).exists() for base in (folder, ROOT)), path


def test_the_top_page_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200


# The map: folders and files of each level of sim; then those of the other folders.

[MAP] = blocks("README.md", "text")
PLACE = re.compile(r"\w+(?:/|\.py)")


def levels() -> list[list[str]]:
    """What stands on each level of `sim` in the map, from the lowest."""
    found: dict[int, list[str]] = {}
    now = None
    for line in MAP.partition("sim/")[2].partition("├──►")[0].splitlines():
        if number := re.match(r" +(\d) ", line):
            now = int(number[1])
        if now is not None and (places := PLACE.findall(line[:45])):
            found.setdefault(now, []).extend(place.removesuffix("/").removesuffix(".py") for place in places)
    return [found[level] for level in sorted(found)]


def is_tools_own(folder: str) -> bool:
    """Whether a tool keeps things for itself there: Python, Hypothesis, pytest."""
    return folder in ("__pycache__", ".hypothesis", ".pytest_cache")


def test_the_map_names_every_folder() -> None:
    holding = {
        path.parent.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not any(is_tools_own(part) for part in path.parts)
    }
    drawn = {place.removesuffix("/") for place in PLACE.findall(MAP)}
    mirrored = {"backend", "policies", *(path.name for path in (ROOT / "sim").iterdir() if path.is_dir())}

    assert set(FOLDERS) <= drawn
    for folder in sorted(holding):
        if folder.parts[:2] == ("tests", "data"):
            continue  # what others recorded, a folder a case
        inside_tests = folder.parts[0] == "tests"
        for part in folder.parts:
            assert part in drawn or (inside_tests and (part in mirrored or part == folder.parts[-1] == "burst")), folder
    known = {part for folder in holding for part in folder.parts}
    assert {name for name in drawn if not name.endswith(".py")} <= known


def test_the_map_shows_who_may_import_whom() -> None:
    drawn = levels()
    level = {name: number for number, names in enumerate(drawn) for name in names}

    assert set(drawn[0]) == set(SPINE)
    assert set(level) - {"assets", "formats"} == set(MAY_IMPORT)
    for name, (allowed, _, _) in MAY_IMPORT.items():
        below = {prefix.partition(".")[0] for prefix in allowed}
        for other in (set(MAY_IMPORT) if "" in below else below) - {name}:
            assert level[other] < level[name], (name, other)


def test_every_policy_has_its_row() -> None:
    text = TEXTS["policies/README.md"]

    for name in plugins.shipped(plugins.POLICY):
        assert f"`{name}`" in text, name


def test_every_scenario_has_its_row() -> None:
    shipped = ROOT / "scenarios"

    for path in shipped.rglob("*.yaml"):
        assert f"]({path.relative_to(shipped).as_posix()})" in TEXTS["scenarios/README.md"], path


def test_every_folder_of_tests_and_of_sim_is_described() -> None:
    for home in ("tests", "sim"):
        for folder in (ROOT / home).iterdir():
            if folder.is_dir() and not is_tools_own(folder.name):
                assert f"`{folder.name}/`" in TEXTS[f"{home}/README.md"], folder


def test_every_file_of_a_replica_has_its_row() -> None:
    for path in (ROOT / "sim" / "replica").glob("[!_]*.py"):
        assert f"[`{path.name}`](replica/{path.name})" in TEXTS["sim/README.md"], path


# What single examples come to


def test_the_policy_of_ones_own_serves_everybody_also_where_kv_is_short(scene: Path) -> None:
    Path("short.yaml").write_text(SCENARIO.replace("tokens: 4000", "tokens: 400"), encoding="utf-8")
    result = chairlift("run", "short.yaml", "--policy", "shortest.py", "--set", "workload.arrivals={burst: {}}")

    assert result.status == 0, result.err
    assert re.search(r"completed +30", result.out)
    assert re.search(r"preemptions +[1-9]", result.out)


def test_tables_say_what_a_scenario_has_changed_of_a_known_gpu_and_model(scene: Path) -> None:
    result = chairlift("run", "shapes.yaml", "--set", "workload.requests=20")

    assert result.status == 0, result.err
    said = " ".join(result.out.split())
    for name in ("h100 (memory_gib 94)", "llama-3.1-8b (bytes_per_param 1)", "mine"):
        assert name in said


def test_the_backend_of_ones_own_prices_a_run(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(scene)
    backend = import_module("fixed_cost").FixedCost(us_per_token=20)
    Path("fixed.yaml").write_text(
        "model: opt-13b\ngpu: h100\npolicy: vllm\nworkload: {requests: 3, arrivals: {burst: {}}, prompt_tokens: 10,"
        " output_tokens: 5}\n",
        encoding="utf-8",
    )
    [setup] = load(Path("fixed.yaml")).setups
    setup = replace(setup, groups=[replace(group, backend=backend) for group in setup.groups])

    built = backend.build(setup.model, setup.groups[0].gpu, 1)
    assert built.step(Batch((Chunk(0, 7),), 2, 100))[:3] == (9 * 20_000_000, 0, 1)
    assert simulate(setup).summary["duration"] == pytest.approx((30 + 4 * 3) * 20e-6)


def test_the_script_says_something_of_each_variant(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path("late.py").read_text(encoding="utf-8").replace("requests=2000", "requests=100")
    exec(script, {})

    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["vllm", "orca"]
    assert all("p99 TTFT" in line for line in shown)
