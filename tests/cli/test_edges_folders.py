"""A results folder is the old one or the new one, whole, whatever ends the command that writes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chairlift.sim.atomic import Busy, NewFolder
from kit.command import SCENARIO, chairlift, replaced
from kit.places import IMPORTS, ROOT

MEASURED = ROOT / "backend" / "gpu" / "measured"
LONG = replaced("requests: 30", "requests: 300000")  # it is still at work whenever a busy machine sends a signal
TWO = SCENARIO + "compare: [{name: a}, {name: b, policy: orca}]\n"
SWEEP = "base: s.yaml\nseeds: 2\naxes: {policy: [vllm]}\n"
PLAN = "base: unseeded.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: [1]\naxes: {replicas: [1]}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    Path("two.yaml").write_text(TWO)
    Path("long.yaml").write_text(LONG)
    Path("w.yaml").write_text(SWEEP)


def started(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """A process of its own; ``before`` are commands of a shell that come first."""
    command = [sys.executable, "-m", "chairlift", *arguments]
    if before:
        command = ["bash", "-c", f'{before}; exec "$@"', "-", *command]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(IMPORTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heeds_interrupts,
    )


def _heeds_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts in the background ignore them


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def await_staging(process: subprocess.Popen[str]) -> None:
    while not Path(".out.partial/scenario.yaml").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def hidden() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.name.startswith("."))


def test_nothing_of_another_scenario_stays_and_what_is_somebodys_own_does() -> None:
    assert chairlift("run", "two.yaml", "--out", "out", "-q", "--report").status == 0
    assert {"comparison.json", "report.html", "events.parquet"} <= set(content("out"))
    Path("out/notes.txt").write_text("mine")
    assert chairlift("run", "s.yaml", "--out", "out", "-q", "--no-events").status == 0
    tables = {"requests.parquet", "steps.parquet"}
    assert set(content("out")) == {"notes.txt", "summary.json", "study.json", "scenario.yaml", *tables}
    assert Path("out/notes.txt").read_text() == "mine"
    assert hidden() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_old_folder_and_says_one_line(number: signal.Signals, status: int) -> None:
    assert chairlift("run", "s.yaml", "--out", "out", "-q").status == 0
    before = content("out")
    with started("run", "long.yaml", "--out", "out", "--events") as process:
        await_staging(process)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (status, "", "interrupted: nothing is written to out\n")
    assert content("out") == before
    assert hidden() == []


def test_a_signal_does_what_it_did_once_a_command_has_ended() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert chairlift("run", "s.yaml", "-q").status == 0
    assert chairlift("run", "nothing.yaml").status == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_kill_leaves_the_old_folder_and_the_next_run_clears_up() -> None:
    assert chairlift("run", "s.yaml", "--out", "out", "-q").status == 0
    before = content("out")
    with started("run", "long.yaml", "--out", "out", "--events") as process:
        await_staging(process)
        process.kill()
    assert content("out") == before
    assert chairlift("run", "two.yaml", "--out", "out", "-q").status == 0
    assert "comparison.json" in content("out")
    assert hidden() == []


def test_two_runs_in_one_folder_are_refused() -> None:
    with started("run", "long.yaml", "--out", "out", "-q") as process:
        await_staging(process)
        result = chairlift("run", "s.yaml", "--out", "out")
        assert (result.status, result.out) == (2, "")
        assert result.err == "error: out: cannot be written: another process is writing here\n"
        process.terminate()
    assert not Path("out").exists()
    assert chairlift("run", "s.yaml", "--out", "out", "-q").status == 0


@pytest.mark.parametrize("swapped", [False, True])
def test_a_swap_that_was_cut_short_is_ended_by_the_next(swapped: bool) -> None:
    """A kill between the two renames, and one after them."""
    Path(".out.old").mkdir()
    Path(".out.old/summary.json").write_text("old")
    Path(".out.old/notes.txt").write_text("mine")
    if swapped:
        Path("out").mkdir()
        Path("out/summary.json").write_text("new")
    NewFolder(Path("out"), {"summary.json"}).abandon()
    assert content("out") == {"summary.json": b"new" if swapped else b"old", "notes.txt": b"mine"}
    assert hidden() == []


def test_the_folder_that_one_works_in_is_not_replaced() -> None:
    for name in (".", "..", str(Path.cwd())):
        result = chairlift("run", "s.yaml", "--out", name)
        assert result.status == 2
        assert result.err.startswith(f"error: {name}: cannot be written: it is the working directory")
    assert Path("s.yaml").read_text() == SCENARIO


def test_the_folder_of_a_sweep_is_not_replaced() -> None:
    assert chairlift("sweep", "w.yaml", "--out", "out", "-q", "-j", "1").status == 0
    before = content("out")
    result = chairlift("run", "s.yaml", "--out", "out")
    assert result.err == "error: out: cannot be written: it holds journal.sqlite, of a sweep or a plan\n"
    assert content("out") == before


@pytest.mark.skipif(os.name != "posix", reason="a limit of file sizes stands for a full disk")
@pytest.mark.parametrize("command", ["run long.yaml --set workload.requests=30000 --events", "sweep w.yaml -j 1"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(command: str) -> None:
    name, file, *rest = command.split()
    if name == "run":
        assert chairlift("run", "s.yaml", "--out", "out", "-q").status == 0
        before = content("out")
    with started(name, file, *rest, "--out", "out", "-q", before="ulimit -f 4") as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: out")
    assert "cannot be written: " in err
    if name == "run":
        assert content("out") == before


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("run s.yaml -q --out", "x"),
        ("sweep w.yaml -q --out", "x"),
        ("plan p.yaml -q --out", "x"),
        ("new --from routing", "x.yaml"),
        ("report r --out", "x.html"),
        ("report r --perfetto --out", "x.json"),
        ("trace export --to mooncake s.yaml", "x.jsonl"),
        ("agree M/hardware_policies.json M/hardware_policies.json --json", "x.json"),
        ("validate --recording M/hardware_check --model MODEL --profile h200-MODEL-chairlift-0.1 --json", "x.json"),
        ("calibrate --recording M/grid --model MODEL --fast -q --out", "x.json"),
        ("calibrate --recording M/grid --model MODEL --fast -q --out p.json --plot", "x.html"),
    ],
)
def test_a_file_where_a_folder_must_be_is_named(command: str, file: str) -> None:
    Path("f").write_text("mine")
    Path("p.yaml").write_text(PLAN)
    Path("unseeded.yaml").write_text(replaced("seed: 7\n", ""))
    if "r" in command.split():
        assert chairlift("run", "s.yaml", "--out", "r", "-q").status == 0
    words = command.replace("M/", f"{MEASURED}/").replace("MODEL", "qwen3-30b-a3b").split()

    result = chairlift(*words, f"f/{file}")

    assert result.status == 2
    assert "cannot be written: f is no folder\n" in result.err
    assert result.err.startswith(f"error: f/{file}")
    assert result.err.count("\n") == 1
    assert Path("f").read_text() == "mine"


def test_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    first = NewFolder(tmp_path / "a" / "out", {"x"})
    with pytest.raises(Busy):
        NewFolder(tmp_path / "a" / "out", {"x"})
    (first.path / "x").write_text("1")
    first.commit()
    second = NewFolder(tmp_path / "a" / "out", {"x"})
    second.abandon()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert json.loads((tmp_path / "a" / "out" / "x").read_text()) == 1
