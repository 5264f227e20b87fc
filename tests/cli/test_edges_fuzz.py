"""The fast part of ``make fuzz``, whether it would see what it looks for, and what it found."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuzz import drawn, every, fuzz, in_a_folder, judged, summed
from kit.command import SCENARIO, Result, chairlift, replaced
from kit.damage import Csv, Damaged, Json, Yaml, mutated, places, scripted
from kit.places import IMPORTS
from kit.readers import HANG, SILENT, TRACEBACK, UNSAID, WRONG, Reader, table, tried

SLOW = ("page:", "plan:", "weights:")  # a tenth of a second or more for each file, or torch
SPAWNING = "sweep: journal"  # its sweep goes on from each file, in processes of its own: seconds


@pytest.fixture(scope="module")
def readers() -> list[Reader]:
    """All but slow ones."""
    words = (
        "trace",
        "scenario",
        "rec",
        "results",
        "ServeGen",
        "log",
        "profile",
        "agree",
        "sweep",
        "prices",
        "config.json",
    )
    return [reader for reader in table(*words, "bench") if not reader.name.startswith(SLOW)]


def test_no_scripted_damage_is_wrong(readers: list[Reader]) -> None:
    told: list[str] = []

    def some(reader: Reader) -> Iterator[Damaged]:
        return every(reader, len(reader.name), 1511 if reader.name == SPAWNING else 151)

    counts = fuzz(readers, some, told.append)

    assert told == []
    assert len({name for name, _ in counts}) > 40
    assert {kind for _, kind in counts} >= {"accepted", "refused"}
    assert sum(counts.values()) > 60


def test_no_mutation_is_wrong(readers: list[Reader]) -> None:
    told: list[str] = []

    counts = fuzz(readers, drawn(2, 5), told.append)

    assert told == []
    assert sum(counts.values()) == 2 * len(readers)


# ---- whether it would see what it looks for ----


def of(read: Any, strict: bool = False, good: bytes = b'{"a": 1}') -> Reader:
    return Reader("made", "f.json", Json(), read, strict=strict, files={"f.json": good})


def content() -> Any:
    return json.loads(Path("f.json").read_text())


def as_a_number() -> Result:
    return Result(0, str(float(content()["a"])), "")  # takes True for 1.0


def ignores_it() -> Result:
    content()
    return Result(0, "always the same", "")


def crashes() -> Result:
    raise KeyError("a")


def says_nothing() -> Result:
    return Result(2, "", "error: cannot be read\n")


def says_so() -> Result:
    return Result(2, "", "error: f.json: cannot be read\n")


def waits() -> Result:
    while True:
        pass


NONSENSE = Damaged("a = True", b'{"a": true}', True)
OTHER = Damaged("a = 2", b'{"a": 2}', False)


@pytest.mark.parametrize(
    ("read", "strict", "damaged", "kind"),
    [
        (as_a_number, False, Damaged("a is misspelt", b'{"a": "7"}', True), SILENT),
        (as_a_number, False, OTHER, "accepted"),
        (as_a_number, False, Damaged("a = 1", b'{"a": 1.0}', True), "accepted"),  # the same answer
        (ignores_it, False, NONSENSE, "accepted"),
        (ignores_it, True, NONSENSE, SILENT),
        (crashes, False, OTHER, TRACEBACK),
        (says_nothing, False, OTHER, UNSAID),
        (says_so, True, NONSENSE, "refused"),
    ],
)
def test_what_is_wrong_is_seen(read: Any, strict: bool, damaged: Damaged, kind: str) -> None:
    reader = of(read, strict)
    with in_a_folder():
        good = tried(reader, reader.good)
        assert judged(reader, damaged, good).kind == kind
    assert (kind in WRONG) == (kind not in ("accepted", "refused"))


def test_what_does_not_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.readers.HANG_S", 0.05)
    with in_a_folder():
        assert tried(of(waits), b"{}").kind == HANG


def test_wrong_ones_are_counted_and_told() -> None:
    told: list[str] = []
    reader = of(as_a_number)

    counts = fuzz([reader], lambda _reader: iter([OTHER, Damaged("a = '7'", b'{"a": "7"}', True)]), told.append)

    assert summed(counts)[1] == 1
    assert told == ["made: a = '7': silent acceptances: nonsense is accepted, and changes the answer"]


@pytest.mark.parametrize(
    ("how", "data"),
    [
        (Json(), b'{"a": 1, "b": ["x", {"c": 2.5}]}'),
        (Json(lines=True), b'{"a": 1}\n{"a": 2}\n'),
        (Yaml(), b"a: 1\nb: [x, {c: 2.5}]\n"),
        (Csv(), b"a,b\n1,x\n2,y\n"),
    ],
)
def test_every_place_of_a_file_is_damaged(how: Any, data: bytes) -> None:
    found = list(scripted(data, how))

    assert how.load(how.dump(how.load(data))) == how.load(data)
    for at in places(how.load(data)):
        told = ".".join(map(str, at))
        mine = [each for each in found if each.what.startswith((f"{told} =", f"{told} is", f"{told} stands"))]
        assert len(mine) > 8
        assert any(each.nonsense for each in mine)
    drawn_ones = {mutated(data, how, random.Random(seed)).data for seed in range(50)}
    assert len(drawn_ones) > 25


# ---- what it found ----


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    return tmp_path


def refused(*command: str, says: str) -> None:
    result = chairlift(*command)
    assert (result.status, result.out) == (2, ""), result
    assert result.err.startswith("error: ")
    assert says in result.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=true", "seed: must be a whole number (got True)"),
        ("replicas=yes", "replicas: must be a whole number"),
        ("replicas='2'", "replicas: must be a whole number"),
        ("policy.max_num_seqs=true", "policy.max_num_seqs: must be"),
        ("slo.ttft_ms=true", "slo.ttft_ms: must be a number (got True)"),
        ("parallel.tensor=true", "parallel.tensor: must be a whole number (got True)"),
        ("claims=[{says: x, published: [.nan, 1], of: s}]", "claims.0.published"),
        ("claims=[{says: x, published: .inf, of: s}]", "claims.0.published"),
        ("gpu={name: h100, memory_gib: 1.0e+300}", "gpu.memory_gib: must be at most 1000000000000000 (got 1e+300)"),
    ],
)
def test_a_number_is_a_number(here: Path, change: str, says: str) -> None:
    refused("run", "s.yaml", "-q", "--set", change, says=says)


def test_a_long_name_is_not_repeated_at_length(here: Path) -> None:
    name = "x\\0" * 2500
    Path("s.yaml").write_text(SCENARIO + f'compare: [{{name: "{name}"}}, {{name: b}}]\nbaseline: [a]\n')

    result = chairlift("run", "s.yaml", "-q")

    assert result.status == 2
    assert "s.yaml" in result.err
    assert len(result.err) < 500


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, '"a' + "b" * 5000, '"a"b"c"\n1,2,3\n'])
def test_a_trace_of_no_format_is_described_whatever_its_first_line(here: Path, text: str) -> None:
    Path("t.csv").write_text(text)
    refused("trace", "describe", "t.csv", says="t.csv")


def test_a_key_that_stands_twice_in_json_is_refused(here: Path) -> None:
    row = '{"timestamp": 0, "input_length": 600, "output_length": 5, "input_length": 700, "hash_ids": [1, 2]}\n'
    Path("t.jsonl").write_text(row)
    refused("trace", "describe", "t.jsonl", says="t.jsonl:1: not JSON: the key 'input_length' stands twice")


def test_a_table_of_prices_that_is_not_there_is_told_with_the_plan(here: Path) -> None:
    Path("q.yaml").write_text(replaced("seed: 7\n", ""))
    Path("p.yaml").write_text(
        "base: q.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: 1\naxes: {replicas: [1]}\nprices: dear.yaml\n"
    )
    refused("plan", "p.yaml", "--dry-run", says="p.yaml:5: prices: no such file (got 'dear.yaml')")


def test_a_client_of_servegen_that_is_no_text_is_named(here: Path) -> None:
    Path("m").mkdir()
    Path("m/chunk-0-trace.csv").write_bytes(b"0,1,1,Gamma,1,\xff\n")
    Path("s.yaml").write_text(SCENARIO[: SCENARIO.index("workload:")] + "workload: {servegen: {file: m}, requests: 3}")
    refused("run", "s.yaml", "-q", says="chunk-0-trace.csv:1: must be UTF-8 text")


@pytest.mark.skipif(sys.platform == "win32", reason="a signal of POSIX")
def test_an_interrupt_while_chairlift_is_imported_is_no_traceback(here: Path) -> None:
    """The signal comes as the command line's own module is looked for."""
    script = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'chairlift.sim.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['chairlift', 'list', 'policies']\n"
        "runpy.run_module('chairlift', run_name='__main__')\n"
    )
    environment = {"PYTHONPATH": str(IMPORTS), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


FOUND = [  # reader, damage, what the refusal says
    ("log: log.jsonl", "0.who = {'qxq': 1}", "log.jsonl:1: who: must be a name or a number"),
    ("ServeGen: trace.csv", "0.0 = inf", "chunk-0-trace.csv:1: must be a window's start"),
    ("ServeGen: dataset.json", "0.output_tokens is misspelt", "ouqxqtput_tokens is unknown"),
    ("ServeGen: dataset.json", "0.input_tokens is gone", "0: needs output_tokens, and input_tokens or text_tokens"),
    ("profile", "format = True", "p.json: not a profile: format must be 1"),
    ("benchmark", "duration stands twice", "bench.json: cannot be read: the key 'duration' stands twice"),
    ("recorder: steps.csv", "0.done_s = '-1'", "raw-1.steps.csv:2: is done before it is scheduled"),
    ("recorder: steps.csv", "0.waiting = '0.5'", "raw-1.steps.csv:2: must be whole numbers"),
    ("config.json", "model_type = {'qxq': 1}", "config.json: a value is of another kind than it must be"),
    ("sweep: results", "columns.loop.0 = [[]]", "loop must be synchronous, asynchronous, mixed or nothing"),
    ("sweep: results", "columns.mean_ttft_ms.3 = '1e+300'", "mean_ttft_ms must be numbers of at most 1e+18"),
    ("agree", "the file is a list of nothing", "comparison.json: must be the comparison.json of a run"),
    ("recorder: steps.csv", "the file is cut at 10%", "raw-1.steps.csv"),
    ("recording: requests.csv.gz", "0.prefix_group = '0.5'", "prefix_group must be a whole number (got 0.5)"),
    ("recording: requests.csv.gz", "0.prefix_group = '0'", "r: served: prompts share prefixes"),
    ("results: study.json", "runs.0.rows.steps = '0'", "study.json: runs.rows.steps: is damaged"),
    ("page: comparison.json", "0.kv_internal is misspelt", "comparison.json: kv_internal: is damaged"),
    ("page: comparison.json", "1.p95_ttft_ms = True", "comparison.json: p95_ttft_ms: is damaged"),
    ("page: comparison.json", "0.completed = nan", "comparison.json: completed: is damaged"),
    ("page: comparison.json", "0.kv_free = 'None'", "comparison.json: kv_free: is damaged"),
    ("page: comparison.json", "0.variant = 'x", "comparison.json: variant: is damaged"),
    ("page: comparison.json", "1.assumptions is gone", "comparison.json: assumptions: is damaged"),
]


@pytest.fixture(scope="module")
def pages() -> dict[str, Reader]:
    return {reader.name: reader for word in ("page", "weights") for reader in table(word)}


@pytest.mark.parametrize(("name", "what", "says"), FOUND)
def test_damage_that_once_passed_is_refused(
    readers: list[Reader], pages: dict[str, Reader], name: str, what: str, says: str
) -> None:
    known = pages | {reader.name: reader for reader in readers}
    damaged = next(scripted(known[name].good, known[name].how, begins=what))

    with in_a_folder():
        found = tried(known[name], damaged.data)

    assert found.kind == "refused"
    assert says in found.told
