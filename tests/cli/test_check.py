"""``chairlift check`` as a user meets it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kit.command import POLICY, ROUTER, chairlift, replaced

MINE = replaced("request.prompt_tokens + 60", "request.remaining + 60", POLICY)  # also where it computes again
LATE = (
    replaced("return 1", "return 1 << 40", MINE)
    + "\n    def heeds_arrival(self, step: Step) -> bool:\n        return False\n"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_policy_that_keeps_its_promises() -> None:
    Path("mine.py").write_text(MINE)
    result = chairlift("check", "mine.py")

    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "policy Mine of mine.py"
    assert [line[0] for line in lines[1:-1]] == ["✓"] * 9
    assert lines[-1] == "9 promises kept, 0 broken, 0 not checked"
    assert not Path("runs").exists()


def test_a_broken_promise_shows_the_step_the_numbers_and_requests_that_show_it_again() -> None:
    Path("mine.py").write_text(LATE)
    result = chairlift("check", "mine.py:Mine", "--set", "budget=100")

    assert (result.status, result.err) == (1, "")
    assert re.search(r"^✗ it vouches only for steps that it would plan alike", result.out, re.MULTILINE)
    assert re.search(r"step \d+ of replica 0: as it vouched, .* at \d+\.\d+ ms; asked before each step, ", result.out)
    rows = Path("runs/check/Mine-leaps.csv").read_text().splitlines()
    assert len(rows) == 3  # one that runs, and one that comes
    assert [f"      {row}" for row in rows] == [line for line in result.out.splitlines() if line.startswith("      ")]
    assert "8 promises kept, 1 broken, 0 not checked" in result.out
    [again] = [line.strip() for line in result.out.splitlines() if line.startswith("    again: ")]
    repeated = chairlift(*shlex.split(again.removeprefix("again: "))[1:])
    assert (repeated.status, repeated.out) == (1, result.out)


def test_a_choice_that_breaks_a_promise_is_set_when_it_is_tried_again() -> None:
    code = replaced("    budget", "    calm: bool = True\n    budget", LATE)
    Path("mine.py").write_text(
        replaced("return 1 << 40", "return 1 if self.calm else 1 << 40", code).replace(
            "return False", "return self.calm"
        )
    )
    result = chairlift("check", "mine.py")

    assert result.status == 1
    assert "with calm=False" in result.out
    assert "again: chairlift check mine.py --set=calm=False --case " in result.out


def test_a_router_from_a_file() -> None:
    Path("mine.py").write_text(ROUTER)
    result = chairlift("check", "mine.py")

    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("router Last of mine.py\n")
    broken = chairlift("check", "mine.py", "--set", "step=2")
    assert broken.status == 1
    assert "positions are 0 to 0" in broken.out


@pytest.mark.parametrize("name", ["tgi", "round_robin"])
def test_a_name(name: str) -> None:
    assert chairlift("check", name).status == 0


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, ["mine.py"], "mine.py: no such file"),
        ("x = 1\n", ["mine.py"], "mine.py: holds no Scheduler or Router subclass"),
        (
            MINE + ROUTER,
            ["mine.py"],
            "mine.py: holds several policies or routers (Mine, Last): say which, as mine.py:Class",
        ),
        (MINE, ["mine.py:Mien"], "mine.py: holds no policy or router of that name – did you mean 'Mine'? (got 'Mien')"),
        (MINE, ["mine.py", "--set", "budget=0"], "--set budget=0: budget: must be above 0 (got 0)"),
        (
            replaced("budget: Positive = 2048", "budget: Positive", MINE),
            ["mine.py"],
            "mine.py: budget: is required",
        ),
        (MINE, ["mine.py", "--case", "rom"], "--case: no such case – did you mean 'room'? (got 'rom')"),
        (MINE, ["mine.py", "--requests", "none.csv"], "none.csv: no such file"),
        (
            "from policies.base import Scheduler\n",
            ["mine.py"],
            "mine.py:1: Chairlift's packages are under one name now: write `from chairlift import Scheduler`",
        ),
        (None, ["tgl"], "no such policy or router, and no file.py – did you mean 'tgi'? (got 'tgl')"),
        (
            None,
            ["vllm", "--set", "enable_chunked_prefill=false", "--set", "max_num_batched_tokens=64"],
            "vllm: ",
        ),
    ],
)
def test_what_cannot_be_checked(content: str | None, arguments: list[str], said: str) -> None:
    if content is not None:
        Path("mine.py").write_text(content)
    result = chairlift("check", *arguments)

    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"error: {said}")
    assert result.err.count("\n") == 1
