"""What was written down stays, whatever happens to the writer; there is one writer; other files are left alone."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.sweep.journal import NAME, Journal
from kit.places import IMPORTS
from kit.sweeping import written_down

WRITER = """\
import os, sys
from pathlib import Path
from chairlift.sim.sweep.journal import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(3000):
    journal.add(f"key {i}", {"key": f"key {i}", "n": i, "text": "x" * 2000})
    if i == 20:
        print("go", flush=True)
print("end", flush=True)
sys.stdin.read()
"""


def writer(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        env={"PYTHONPATH": str(IMPORTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def refused(folder: Path) -> str:
    with pytest.raises(BadInput) as told:
        Journal(folder)
    said = str(told.value)
    assert "\n" not in said
    return said


def test_what_is_added_is_found_again_and_the_last_entry_of_a_key_counts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    entry = {"key": "a", "error": "", "metrics": {"x": 0.1 + 0.2, "n": 3, "none": None}}
    with Journal(folder) as journal:
        assert (len(journal), journal.get("a")) == (0, None)
        journal.add("a", {"key": "a", "error": "first"})
        journal.add("b", {"n": 1})
        journal.add("a", entry)
        assert journal.get("a") == entry
    with Journal(folder) as journal:
        assert (len(journal), journal.get("a"), journal.get("b")) == (2, entry, {"key": "b", "n": 1})
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize("when", ["go", "end"])
def test_a_killed_writer_loses_nothing_that_was_added(tmp_path: Path, when: str) -> None:
    with writer(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == when:
                break
        process.kill()
    with Journal(tmp_path) as journal:
        known = len(journal)
        assert known == 3000 if when == "end" else known >= 21
        entries = [journal.get(f"key {i}") for i in range(known)]

    assert entries == [{"key": f"key {i}", "n": i, "text": "x" * 2000} for i in range(known)]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert refused(tmp_path) == f"{tmp_path / NAME}: another process is writing here"
        process.kill()
    with Journal(tmp_path) as journal:
        assert "another process" in refused(tmp_path)  # also in the same process
        journal.add("more", {})


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as rows, rows:
        rows.execute("CREATE TABLE results (key TEXT)")
    before = (tmp_path / NAME).read_bytes()
    assert refused(tmp_path) == f"{tmp_path / NAME}: is no journal of a sweep: move the file away to start anew"
    assert (tmp_path / NAME).read_bytes() == before


@pytest.mark.parametrize("content", [b"{}\n", b"\0" * 5000, b'{"key": "a"}\n' * 999])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)

    assert "is no journal of a sweep, or damaged" in refused(tmp_path)
    assert (tmp_path / NAME).read_bytes() == content


@pytest.mark.parametrize("part", [0.2, 0.5, 0.99])
def test_a_torn_file_is_refused(tmp_path: Path, part: float) -> None:
    with Journal(tmp_path) as journal:
        for i in range(200):
            journal.add(f"key {i}", {"text": "x" * 1000})
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: int(len(whole) * part)])

    assert "is no journal of a sweep, or damaged" in refused(tmp_path)


def test_a_file_with_a_page_of_rubbish_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for i in range(200):
            journal.add(f"key {i}", {"text": "x" * 1000})
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:8192] + b"\xff" * 4096 + whole[12288:])

    assert "is no journal of a sweep, or damaged" in refused(tmp_path)


def test_a_journal_of_before_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"key": "a"}\n')

    assert "journal.jsonl: its rows are an earlier Chairlift's" in refused(tmp_path)
    assert "delete it to start anew" in refused(tmp_path)
    assert written_down(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert "cannot be written: " in refused(tmp_path / "file" / "folder")
    (tmp_path / NAME).mkdir()
    assert "cannot be written: unable to open database file" in refused(tmp_path)
