"""Files that cannot be read: every reader says why in the same words, with the file and, for text, the line."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuzz import in_a_folder
from kit.command import Result, chairlift
from kit.damage import Arrays, Columns, Entries, Packed, Tensors
from kit.readers import Reader, laid, table

BINARY = (Arrays, Columns, Entries, Tensors)
# What says more than that there is no such file: reader → its words. "": nothing is missing.
ABSENT = {
    "prices": "p.yaml:6: prices: no such file (got 'prices.yaml')",
    "ServeGen: trace.csv": "m: servegen.file: holds no chunk-N-trace.csv: name the folder of one model",
    "ServeGen: dataset.json": "m: servegen.file: holds no chunk-N-dataset.json",
    "recorder: json": "r: no engine recorded a request that ended",
    "recording: summary.json": "r: no recording of 'opt-13b': it has no *_summary.json",
    "recording: itl.npz": "",
    "results: study.json": "runs/s: has no study.json: it is of another version of Chairlift",
    "results: summary.json": "runs/s: has no summary.json: not a results folder",
    "page: comparison.json": "runs/c: has no comparison.json: it is of another version of Chairlift",
    "sweep: journal": "",
    "sweep: results": "runs/w: no results of a sweep here: run chairlift sweep first",
    "weights: header": "no *.safetensors in weights",
}


@pytest.fixture(scope="module")
def readers() -> list[Reader]:
    """All but those of a plan's results, which take half a minute to make."""
    return table(*("trace", "scenario", "sweep", "prices", "log: ", "ServeGen", "config.json", "profile", "benchmark"),
                 *("recorder", "recording", "results", "page", "agree", "weights"))  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own() -> Iterator[None]:
    with in_a_folder():
        yield


def missing(path: Path, _reader: Reader) -> tuple[str, str]:
    path.unlink()
    return "", "no such file"


def a_folder(path: Path, _reader: Reader) -> tuple[str, str]:
    path.unlink()
    path.mkdir()
    return "", "is a folder, not a file"


def a_link_to_itself(path: Path, _reader: Reader) -> tuple[str, str]:
    path.unlink()
    path.symlink_to(path.name)
    return "", "cannot be read: Too many levels of symbolic links"


def another_users(path: Path, _reader: Reader) -> tuple[str, str]:
    path.chmod(0)
    return "", "cannot be read: Permission denied"


def latin_1(path: Path, reader: Reader) -> tuple[str, str]:
    packed = isinstance(reader.how, Packed)
    lines = (gzip.decompress(reader.good) if packed else reader.good).splitlines(keepends=True)
    at = min(1, len(lines) - 1)
    lines[at] = lines[at][:3] + b"\xe9" + lines[at][3:]
    data = b"".join(lines)
    path.write_bytes(gzip.compress(data) if packed else data)
    return f":{at + 1}", "must be UTF-8 text (got b'\\xe9')"


def said(reader: Reader) -> Result:
    return chairlift(*reader.read) if isinstance(reader.read, tuple) else reader.read()


@pytest.mark.parametrize(
    "becomes",
    [
        *(missing, a_folder, a_link_to_itself, latin_1),
        pytest.param(another_users, marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")),
    ],
)
def test_every_reader_says_why_a_file_cannot_be_read(
    becomes: Callable[[Path, Reader], tuple[str, str]], readers: list[Reader]
) -> None:
    wrong = []
    tried = 0
    for reader in readers:
        if reader.name.endswith(": journal") or (becomes is latin_1 and isinstance(reader.how, BINARY)):
            continue
        laid(reader.files)
        line, rule = becomes(Path(reader.file), reader)
        words = [f"{reader.file}{line}", rule]
        if becomes is missing:
            words = [ABSENT.get(reader.name, ": ".join(words))]
        result = said(reader)
        tried += 1
        one_line = (result.status, result.err.count("\n")) == (2, 1) and result.err.startswith("error: ")
        if not (one_line and all(word in result.err for word in words) if words[0] else result.status == 0):
            wrong.append(f"{reader.name}: {words} not in {result}")

    assert "\n".join(wrong) == ""
    assert tried > 40


def test_a_plan_that_is_not_there_is_no_damaged_one() -> None:
    result = chairlift("run", "none/plan.json", "--system", "1")

    assert (result.status, result.err) == (2, "error: none/plan.json: no such file\n")
