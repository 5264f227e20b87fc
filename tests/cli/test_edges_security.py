"""What a file of somebody else's can and cannot do: each sentence of `sim/README.md` has a test, some of them here."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from chairlift.backend.fitting.recording import RecordingError, _gaps
from kit.command import POLICY, SCENARIO, chairlift, replaced
from kit.places import ROOT

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_sentence_on_security_names_its_test() -> None:
    text = (ROOT / "sim" / "README.md").read_text()
    section = text[text.index("\n## Security\n") :].removeprefix("\n## Security\n").partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]

    assert len(rows) >= 15
    for says, tests in rows:
        assert says.strip().endswith("."), says
        named = NAMED.findall(tests)
        assert named, says
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['made']", "!!python/name:os.system", "!run made"])
def test_a_tag_of_a_yaml_makes_nothing(tag: str) -> None:
    Path("s.yaml").write_text(replaced("{name: vllm}", tag))

    result = chairlift("run", "s.yaml", "-q")

    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: s.yaml:5: ")
    assert not Path("made").exists()


def test_a_policy_that_is_run_may_do_whatever_you_may() -> None:
    Path("mine.py").write_text(POLICY + "\n\nopen('made', 'w').close()\n")
    Path("s.yaml").write_text(SCENARIO)

    assert chairlift("run", "s.yaml", "-q", "--policy", "mine.py").status == 0
    assert Path("made").exists()


def test_a_scenario_reads_any_file_that_you_may_read_and_shows_what_is_wrong_there(tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / "elsewhere.csv"
    elsewhere.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,secret,3\n")
    head, _, _ = SCENARIO.partition("workload:")
    Path("s.yaml").write_text(head + f"workload: {{file: {elsewhere}}}\n")

    result = chairlift("run", "s.yaml", "-q")

    assert result.status == 2
    assert "secret" in result.err


def test_a_run_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_more: Any) -> NoReturn:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Path("s.yaml").write_text(SCENARIO)

    assert chairlift("run", "s.yaml", "-q").status == 0
    assert chairlift("report", "runs/s").status == 0
    assert chairlift("explain", "--slowest", "1", "--in", "runs/s").status == 0


class _Makes:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.mkdir, (Path("made"),)  # type: ignore[return-value]


def test_nothing_of_a_recording_is_unpickled() -> None:
    np.savez("gaps.npz", a=np.array([_Makes()], dtype=object))

    with pytest.raises(RecordingError, match=r"gaps\.npz: cannot be read: "):
        _gaps(Path("gaps.npz"))
    assert not Path("made").exists()


def test_a_name_is_no_markup_of_a_page() -> None:
    name = "<script>alert(1)</script>"
    compared = f"compare:\n  - {{name: '{name}', policy: vllm}}\n  - {{name: b, policy: sarathi}}"
    Path("s.yaml").write_text(replaced("policy: {name: vllm}", compared))

    assert chairlift("run", "s.yaml", "-q").status == 0
    assert chairlift("report", "runs/s").status == 0
    page = Path("runs/s/report.html").read_text(encoding="utf-8")
    assert name not in page
    assert "&lt;script&gt;alert(1)" in page
