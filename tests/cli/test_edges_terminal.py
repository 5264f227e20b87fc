"""Names are text on a terminal, whatever they look like, and any encoding and any path will do."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.command import SCENARIO, chairlift
from kit.places import IMPORTS

NAMES = ("vllm [tuned]", "vllm [base]", "x[/x]", ":x:", "[red]r[/red]", "a\\")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_scenario_is_called_as_it_is(name: str) -> None:
    text = SCENARIO + f"name: 'run {name.replace('/', '')}'\n"
    Path("s.yaml").write_text(text)
    result = chairlift("run", "s.yaml", "--out", "o")
    assert (result.status, result.err) == (0, "")
    assert f"run {name.replace('/', '')}" in result.out


@pytest.mark.parametrize("tables", ["throughput", "latency", "fleet", "cdf"])
def test_a_variant_and_a_case_are_called_as_they_are(tables: str) -> None:
    compared = ", ".join(f"{{name: '{name}'}}" for name in NAMES)
    head = f"tables: [{tables}]\nbaseline: ['{NAMES[0]}', '{NAMES[2]}']\n"
    Path("s.yaml").write_text(SCENARIO + f"compare: [{compared}]\n{head}cases: [{{name: 'c [bold]'}}]\n")
    result = chairlift("run", "s.yaml", "--out", "o")
    assert (result.status, result.err) == (0, "")
    for name in (*NAMES, "c [bold]"):
        assert name in result.out


def test_a_message_says_a_name_as_it_is() -> None:
    for name in (":x:y", "[/x]", "[red]a"):
        result = chairlift("run", name)
        assert result.status == 2
        assert f"(got '{name}')" in result.err or f"{name}: no such file" in result.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_a_sign_gets_another(encoding: str) -> None:
    command = [sys.executable, "-m", "chairlift", "run", "s.yaml", "--out", "o"]
    env = {**os.environ, "PYTHONPATH": str(IMPORTS), "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"<=" in done.stdout


@pytest.mark.parametrize("name", ["y" * 5000, "y" * 5000 + ".yaml", "/dev/null", "."])
def test_a_path_that_is_no_file_is_one_line(name: str) -> None:
    for arguments in (["run", name], ["sweep", name], ["plan", name], ["trace", "describe", name], ["report", name]):
        result = chairlift(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), (arguments, result)
    result = chairlift("run", "s.yaml", "--out", "y" * 5000)
    assert (result.status, result.err.count("\n")) == (2, 1)


READERS = {  # files of these names, and what reads them
    "s.yaml": ("run", "s.yaml"),
    "w.yaml": ("sweep", "w.yaml"),
    "pl.yaml": ("plan", "pl.yaml"),
    "config.json": ("run", "good.yaml", "--set", "model=config.json"),
    "p.json": ("run", "good.yaml", "--backend", "p.json"),
    "p.py": ("run", "good.yaml", "--policy", "p.py"),
    "t.csv": ("run", "good.yaml", "--set", "workload={file: t.csv}"),
    "t.jsonl": ("trace", "describe", "t.jsonl"),
    "t.parquet": ("trace", "describe", "t.parquet"),
    "t.tar": ("run", "good.yaml", "--set", "workload={servegen: {file: t.tar}, requests: 5}"),
    "prices.yaml": ("plan", "good_plan.yaml", "--dry-run"),
    "o/summary.json": ("report", "o"),
    "o/requests.parquet": ("report", "o"),
    "o/results.parquet": ("compare", "o"),
    "o/journal.sqlite": ("sweep", "good_sweep.yaml", "--out", "o", "-j", "1", "-q"),
    "o/comparison.json": ("agree", "o", "o"),
    "r/x_summary.json": ("calibrate", "--recording", "r", "--model", "x", "--out", "made.json"),
    "o/study.json": ("explain", "0", "--in", "o"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_a_device_in_place_of_a_file_is_one_line(name: str) -> None:
    Path("good.yaml").write_text(SCENARIO)
    Path("good_sweep.yaml").write_text("base: good.yaml\naxes: {policy.max_num_seqs: [1]}\n")
    Path("unseeded.yaml").write_text(SCENARIO.replace("seed: 7\n", ""))
    promise = "slo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: [1]\n"
    Path("good_plan.yaml").write_text(f"base: unseeded.yaml\n{promise}axes: {{replicas: [1]}}\nprices: prices.yaml\n")
    if name.startswith("o/") and name.split("/")[1] in ("summary.json", "requests.parquet", "study.json"):
        assert chairlift("run", "good.yaml", "--out", "o", "-q").status == 0
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        result = chairlift(*READERS[name])
        assert (result.status, result.err.count("\n")) == (2, 1), result
        assert result.err.startswith("error: ")
        path.unlink()
        Path("made.json").unlink(missing_ok=True)


@pytest.mark.skipif(os.name != "posix", reason="a folder in use cannot be removed")
@pytest.mark.parametrize("words", ["run s.yaml", "run anyscale_latency", "list policies", "sweep w.yaml", "schema"])
def test_a_working_directory_that_is_gone_is_one_line(words: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "-", sys.executable, "-m", "chairlift", *words.split()]
    env = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    done = subprocess.run(command, cwd=gone, env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    if words in ("list policies", "schema"):
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"arrival_s,prompt_tokens,output_tokens\n", "not CSV: field larger than field limit (134217728)"),
        (
            b'{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n',
            "is longer than 134,217,728 bytes",
        ),
    ],
)
def test_a_trace_whose_line_never_ends_is_one_line(head: bytes, says: str) -> None:
    """A gzip file of 140 MB of zeros: no line of a trace is so long."""
    with gzip.open("t.gz", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(140):
            file.write(b"0" * 1_000_000)
    result = chairlift("trace", "describe", "t.gz", *(("--format", "mooncake") if head[:1] == b"{" else ()))
    assert (result.status, result.err) == (2, f"error: t.gz:2: {says}\n")


def test_a_document_that_nobody_wrote_by_hand_is_one_line() -> None:
    with open("large.yaml", "wb") as file:
        file.truncate(1 << 34)  # sparse: 16 GiB that take no room
    result = chairlift("run", "large.yaml")
    assert result.status == 2
    assert result.err == (
        "error: large.yaml: cannot be read: is 17,179,869,184 bytes long; such a file has at most 67,108,864\n"
    )


UNREAD = ["run s.yaml --out o", "run s.yaml --out o --json", "list models", "list policies", "schema"]


@pytest.mark.skipif(os.name != "posix", reason="a pipe of POSIX")
@pytest.mark.parametrize("words", UNREAD)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(words: str) -> None:
    """As ``| head`` does. What a run leaves is whole all the same."""
    unread, output = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "chairlift", *words.split()]
    env = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.PIPE, timeout=60)
    os.close(output)
    assert (done.returncode, done.stderr) == (141, b"")
    if words.startswith("run"):
        assert chairlift("report", "o").status == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", UNREAD)
def test_an_output_that_is_full_is_one_line(words: str) -> None:
    command = [sys.executable, "-m", "chairlift", *words.split()]
    env = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, timeout=60)
    told = b"error: standard output: cannot be used: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_the_command_is_ready_for_an_interrupt_before_it_imports_anything() -> None:
    """Until then Python answers Ctrl-C with a traceback. What pip writes imports `re` and `sys` before."""
    script = (
        "import re, sys; before = {*sys.modules}; from chairlift.__main__ import main; print(*{*sys.modules} - before)"
    )
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, env={"PYTHONPATH": str(IMPORTS)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) <= {"__future__", "chairlift", "chairlift.__main__", "signal"}
