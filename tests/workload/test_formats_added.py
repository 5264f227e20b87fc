"""Formats that are added, as one file of the package or by an installed one, and the files that a workload reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.workload import build, files_of
from kit.made import SYNTHETIC, needs_traces, workload
from kit.places import IMPORTS, TRACES, copied

# Pairs of lengths after a first line `PAIRS`; the file `NAME.gaps` beside it says the seconds between two requests.
PAIRS = '''\
"""Pairs of prompt and output lengths, a line each."""

from __future__ import annotations

from pathlib import Path

from chairlift.sim.workload.formats.columns import trace_of
from chairlift.sim.workload.formats.text_tables import Table, first_line, read_lines
from chairlift.sim.workload.trace import Trace


def told(head: bytes) -> bool:
    return first_line(head) == "PAIRS"


def companions(path: Path) -> list[Path]:
    return [path.with_suffix(".gaps")]


def read(path: Path, limit: int | None, times: bool) -> Trace:
    table = Table(path)
    table.header = ["in", "out"]
    for line, text in read_lines(path):
        if line > 1 and (limit is None or len(table.rows) < limit):
            table.rows.append(text.split())
            table.lines.append(line)
    [gap] = (int(text) for path in companions(path) for _, text in read_lines(path))
    arrivals = [i * gap * 10**12 for i in range(len(table.rows))]
    return trace_of(table, "pairs", {"prompt_tokens": "in", "output_tokens": "out"}, {"arrival_ps": arrivals})
'''

SCENARIO = """\
model: opt-13b
gpu: a100-40gb
policy: vllm
max_model_len: 2048
workload: {file: lengths.txt, format: pairs}
"""


def lengths(folder: Path) -> Path:
    (folder / "lengths.txt").write_text("PAIRS\n7 3\n8 4\n9 5\n")
    (folder / "lengths.gaps").write_text("2\n")
    return folder / "lengths.txt"


COMMANDS = [
    ["trace", "describe", "lengths.txt", "--json"],
    ["list", "formats"],
    ["schema"],
    ["run", "s.yaml", "--json", "--out", "out"],
]
SCRIPT = """
import contextlib, io, json, sys
from chairlift.sim.cli.main import main
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["chairlift", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    said.append(out.getvalue())
print(json.dumps(said))
"""


def reads_pairs(imports: Path, also: Path, folder: Path) -> str:
    """In a new process the format is told, listed, offered by the schema, and replayed by a scenario.

    The process finds the package in ``imports`` and other packages in ``also``. Returns the list of formats.
    """
    lengths(folder)
    (folder / "s.yaml").write_text(SCENARIO)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{imports}{os.pathsep}{also}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    trace, listed, schema, ran = json.loads(done.stdout)

    described = json.loads(trace)
    assert (described["requests"], described["prompt_tokens"]["total"], described["duration_s"]) == (3, 24, 4.0)
    assert described["source"] == "lengths.txt (pairs format)"
    assert "pairs" in json.loads(schema)["$defs"]["Workload"]["properties"]["format"]["enum"]
    summary = json.loads(ran)
    assert (summary["completed"], summary["total_input_tokens"], summary["total_output_tokens"]) == (3, 24, 12)
    return str(listed)


def test_a_format_is_one_file_of_the_package(tmp_path: Path) -> None:
    imports = copied(tmp_path / "copy")
    (tmp_path / "copy" / "sim" / "workload" / "formats" / "pairs.py").write_text(PAIRS)

    assert "Pairs of prompt and output lengths, a line each." in reads_pairs(imports, tmp_path, tmp_path)


def distribution(folder: Path, points: str, **modules: str) -> Path:
    """A folder as ``pip install --target`` leaves it: a package Our-Logs 1.2, its entry points and its modules."""
    about = folder / "site" / "our_logs-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: our-logs\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[chairlift.formats]\n{points}\n")
    for name, text in modules.items():
        (folder / "site" / f"{name}.py").write_text(text)
    return folder / "site"


def test_a_format_is_an_entry_point_of_an_installed_package(tmp_path: Path) -> None:
    site = distribution(tmp_path, "pairs = our_pairs", our_pairs=PAIRS)

    assert "lengths, a line each. (our-logs 1.2)" in reads_pairs(IMPORTS, site, tmp_path)


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs entry points and modules in this process, until the test ends."""

    def forget() -> None:
        formats._installed.cache_clear()
        formats._loaded.cache_clear()

    def install(points: str, **modules: str) -> None:
        monkeypatch.syspath_prepend(distribution(tmp_path, points, **modules))
        forget()

    yield install
    monkeypatch.undo()
    forget()


def test_an_installed_format_has_companions(tmp_path: Path, install: Install) -> None:
    install("pairs = pairs_here", pairs_here=PAIRS)
    lengths(tmp_path)
    said = workload(file="lengths.txt", requests=2)

    assert build(said, 0, tmp_path).arrival_ps.tolist() == [0, 2 * 10**12]
    assert files_of(said, tmp_path) == {("file",): [tmp_path / "lengths.txt", tmp_path / "lengths.gaps"]}


@pytest.mark.parametrize(
    ("points", "text", "rule"),
    [
        ("pairs = M", "import nothing_of_that_name", "of our-logs 1.2 cannot be loaded: ModuleNotFoundError"),
        ("pairs = M", "def told(head): return True", "that of our-logs 1.2 has no read and no companions"),
        ("pairs = M\npairs = M:x", PAIRS, "several .* have this name, those of our-logs 1.2 and our-logs 1.2"),
    ],
)
def test_a_format_that_does_not_work_is_in_the_way_only_of_its_own_files(
    tmp_path: Path, install: Install, points: str, text: str, rule: str
) -> None:
    module = f"pairs_of_{tmp_path.name}"  # which no other test has imported
    install(points.replace("M", module), **{module: text})
    (tmp_path / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")

    assert "pairs" in formats.names()
    assert re.search(rule, formats.summary("pairs"))
    with pytest.raises(BadInput, match=f"format: .*{rule}"):
        formats.load(lengths(tmp_path), "pairs")
    with pytest.raises(BadInput, match=f"not a trace format Chairlift knows(.|\n)*format: .*{rule}"):
        formats.load(lengths(tmp_path))
    assert len(formats.load(tmp_path / "own.csv")) == 1


def test_the_name_of_a_shipped_format_cannot_be_taken(tmp_path: Path, install: Install) -> None:
    install("azure = pairs_here", pairs_here=PAIRS)

    with pytest.raises(BadInput, match=r"several .* have this name, those of Chairlift and our-logs 1\.2: uninstall"):
        formats.load(lengths(tmp_path), "azure")


def test_a_file_that_two_formats_take_for_theirs_must_be_named(tmp_path: Path, install: Install) -> None:
    greedy = PAIRS.replace('first_line(head) == "PAIRS"', 'head.startswith(b"PAR1") or b"prompt" in head')
    install("greedy = greedy_here", greedy_here=greedy)
    (tmp_path / "own.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")

    with pytest.raises(BadInput, match=r"own\.csv: may be of several trace formats \(chairlift, greedy\); name it"):
        formats.load(tmp_path / "own.csv")
    assert len(formats.load(tmp_path / "own.csv", "chairlift")) == 1


def test_an_unknown_format_of_a_workload_gets_a_suggestion() -> None:
    with pytest.raises(ValidationError, match="no such trace format – did you mean 'mooncake'"):
        workload(file="x", format="mooncak")


@needs_traces
@pytest.mark.parametrize("path", sorted(TRACES.glob("*.gz")), ids=lambda path: path.name)
def test_no_public_file_is_of_two_formats(path: Path) -> None:
    told = [name for name in formats.names() if formats.by_name(name).told(formats.head(path))]

    assert len(told) == (0 if re.match("servegen|splitwise|ragpulse_[1-5]", path.name) else 1)


# ---- which files are read ----

OPENED: list[str] = []  # files that the interpreter opened, once somebody watches


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.fspath(arguments[0]))


@pytest.fixture(scope="session")
def watched() -> None:
    sys.addaudithook(watch)  # for good: a hook cannot be taken away


LENGTHS_OF_CLIENT = '{"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{5: 1.0}"}}'
CLIENT = {"trace.csv": "0,2,1,Gamma,1,0.5\n600,2,1,Gamma,1,0.5\n", "dataset.json": LENGTHS_OF_CLIENT}
OWN = "arrival_s,prompt_tokens,output_tokens\n0,20,4\n1,30,5\n"
PULSE = {"timestamp": "3", "input_length": 40, "output_length": 2, "session_id": "a"}
PULSE_IDS = {"sys_prompt": [1], "passages_ids": [], "history": [], "web_search": [], "user_input": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind that a workload names, and some that it does not."""
    (tmp_path / "own.csv").write_text(OWN)
    (tmp_path / "other.csv").write_text(OWN)
    (tmp_path / "0_trace.jsonl").write_text(json.dumps(PULSE | {"hash_ids": PULSE_IDS}) + "\n")
    for name in ("1_sys_prompt", "2_passages", "3_history", "4_user_input", "5_web_search", "6_other"):
        (tmp_path / f"{name}.jsonl").write_text('{"x_id": 1, "token_length": 32}\n')
    (tmp_path / "clients").mkdir()
    for name, text in CLIENT.items():
        (tmp_path / "clients" / f"chunk-0-{name}").write_text(text)
    (tmp_path / "clients" / "chunk-notes.txt").write_text("no client")
    with tarfile.open(tmp_path / "clients.tar", "w") as archive:
        archive.add(tmp_path / "clients", "clients")
    return tmp_path


MAPS = ["1_sys_prompt.jsonl", "2_passages.jsonl", "3_history.jsonl", "5_web_search.jsonl", "4_user_input.jsonl"]
TABLES = ["clients/chunk-0-dataset.json", "clients/chunk-0-trace.csv"]


@pytest.mark.parametrize(
    ("keys", "files"),
    [
        (SYNTHETIC, {}),
        ({"name": "azure-conv-2023", "requests": 5}, {}),
        ({"file": "own.csv"}, {("file",): ["own.csv"]}),
        ({"file": "own.csv", "format": "chairlift", "limit": 1}, {("file",): ["own.csv"]}),
        ({"file": "0_trace.jsonl"}, {("file",): ["0_trace.jsonl", *MAPS]}),
        ({"file": "0_trace.jsonl", "format": "ragpulse"}, {("file",): ["0_trace.jsonl", *MAPS]}),
        ({"servegen": {"file": "clients"}, "requests": 9}, {("servegen", "file"): TABLES}),
        ({"servegen": {"file": "clients.tar"}, "requests": 9}, {("servegen", "file"): ["clients.tar"]}),
        (
            {"mix": {"a": {"file": "own.csv"}, "b": {"mix": {"c": {"servegen": {"file": "clients"}, "requests": 9}}}}},
            {("mix", "a", "file"): ["own.csv"], ("mix", "b", "mix", "c", "servegen", "file"): TABLES},
        ),
    ],
)
@pytest.mark.usefixtures("watched")
def test_the_files_of_a_workload_are_those_that_building_it_opens(
    folder: Path, keys: dict[str, Any], files: dict[tuple[str, ...], list[str]]
) -> None:
    said = workload(**keys)
    OPENED.clear()
    build(said, 0, folder)
    opened = {Path(path).relative_to(folder).as_posix() for path in OPENED if path.startswith(str(folder))}

    assert files_of(said, folder) == {place: [folder / name for name in names] for place, names in files.items()}
    assert opened == {name for names in files.values() for name in names}


@pytest.mark.parametrize("file", ["none.csv", "empty.csv", "odd.csv", "clients"])
def test_a_file_that_cannot_be_read_is_one_of_the_files_all_the_same(folder: Path, file: str) -> None:
    (folder / "empty.csv").write_text("")
    (folder / "odd.csv").write_text("a,b\n1,2\n")

    assert files_of(workload(file=file), folder) == {("file",): [folder / file]}


def test_maps_that_are_not_there_are_none_of_the_files(folder: Path) -> None:
    (folder / MAPS[1]).unlink()

    assert files_of(workload(file="0_trace.jsonl"), folder)["file",] == [
        folder / name for name in ("0_trace.jsonl", MAPS[0], *MAPS[2:])
    ]
