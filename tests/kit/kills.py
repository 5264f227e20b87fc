"""Commands that are killed at random moments: what is on the disk then, and after the same command was let finish.

Each `Victim` is a command with what it may leave. `killed` starts it, ends it by a signal at some moment (so many
seconds after its start, or at so many changes of the disk) and says what is wrong with what it left. `finished` lets it
run to its end and compares that with a run that nobody disturbed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chairlift.sim.plan.promises import Sample
from chairlift.sim.sweep.journal import NAME
from kit.command import SCENARIO
from kit.places import IMPORTS, TESTS
from kit.sweeping import table, written_down

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
SOON_S = 20.0  # until no process of a killed command is left
_WALL = re.compile(r'"(wall_s|requests_per_wall_s|run_s)": [\d.e+-]+')
_SAID = {  # exit status → what is said: nothing where the signal came before Chairlift, or cannot be heard
    0: r"",
    130: r"interrupted.*\n",
    143: r"interrupted.*\n",
    -signal.SIGINT: r"",
    -signal.SIGTERM: r"",
    -signal.SIGKILL: r"",
}

FILES = {
    "old.yaml": SCENARIO,
    "s.yaml": SCENARIO.replace("requests: 30", "requests: 1500"),
    "base.yaml": SCENARIO.replace("requests: 30", "requests: 60"),
    "w.yaml": "base: base.yaml\nseeds: 6\naxes: {policy: [vllm, orca]}\n",
    "q.yaml": SCENARIO.replace("seed: 7\n", "").replace("{uniform: {low: 1, high: 50}}", "2"),
    "p.yaml": "base: q.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: [1]\naxes: {replicas: [1]}\n"
    "search: {requests: 200, most_requests: 800, precision: 0.5, draws: 0}\n",
}


# What it left, what it should come to, and how many results are known to have been written down → what is wrong
Sound = Callable[[Any, Any, dict[str, int]], str]


@dataclass
class Victim:
    """A command that is killed."""

    name: str
    command: tuple[str, ...]
    state: Callable[[], Any]  # what it left: what two undisturbed runs have in common
    sound: Sound
    whole: Any = None  # the state after an undisturbed run
    changes: int = 0  # of the disk, that run made
    seconds: float = 0.0  # that run took
    known: dict[str, int] = field(default_factory=dict)


def _started(victim: Victim, event: int, number: int, total: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / "kit" / "killed.py"), str(event), str(int(number)), total, *victim.command]
    paths = os.pathsep.join((str(IMPORTS), str(TESTS)))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def killed(victim: Victim, number: signal.Signals, draw: random.Random) -> str:
    """Start the command, and end it at a random moment; what is wrong then, "" if nothing is."""
    at_change = draw.random() < 0.5
    event = draw.randint(1, victim.changes) if at_change else 0
    process = _started(victim, event, number, "-")
    moment = f"change {event}"
    if not at_change:
        seconds = draw.uniform(0, 1.05 * victim.seconds)
        moment = f"{seconds:.2f} s"
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
    wrong = [*_ended(process), victim.sound(victim.state(), victim.whole, victim.known)]
    what = "; ".join(filter(None, wrong))
    return f"{victim.name}, {number.name} at {moment}: {what}" if what else ""


def finished(victim: Victim) -> str:
    """Let the command run to its end; in what that differs from an undisturbed run, "" if in nothing."""
    process = _started(victim, 0, 0, "-")
    wrong = [*_ended(process)]
    if process.returncode:
        wrong.append(f"exit status {process.returncode}")
    if victim.state() != victim.whole:
        wrong.append("its results are not those of an undisturbed run")
    hidden = [path.name for path in Path().iterdir() if path.name.startswith(".")]
    if hidden:
        wrong.append(f"left behind: {hidden}")
    return f"{victim.name}, finished: {'; '.join(wrong)}" if wrong else ""


def _ended(process: subprocess.Popen[str]) -> Iterator[str]:
    """What is wrong with how the process ended, and with what it leaves running."""
    try:
        _, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        yield "it does not end"
        return
    if "Traceback" in err or not re.fullmatch(_SAID.get(process.returncode, "impossible"), err):
        yield f"exit status {process.returncode}, {err!r}"
    until = time.monotonic() + SOON_S
    while _lives(process.pid):
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            yield f"processes of its are there after {SOON_S:g} s"
            return
        time.sleep(0.02)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- what commands leave ----


def _folder(name: str) -> dict[str, Any]:
    """The files of a run's folder, without what the clock says."""
    found: dict[str, Any] = {}
    for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        data = path.read_bytes()
        if path.suffix == ".json":
            found[path.name] = _WALL.sub("", data.decode())
        else:
            found[path.name] = data
    return found


def _entries(folder: str) -> dict[str, str]:
    """What the journal knows, as text (NaN is no number equal to itself), without the clock's figures."""
    if not (Path(folder) / NAME).exists():
        return {}
    clocked = ("wall_s", "run_s")
    place = Sample._fields.index("wall_s")
    known = written_down(Path(folder))
    for entry in known.values():
        if "sample" in entry:
            entry["sample"][place] = 0.0
    return {
        key: json.dumps({name: value for name, value in entry.items() if name not in clocked})
        for key, entry in known.items()
    }


def _sweep() -> dict[str, Any]:
    rows = table(Path("sweep")).to_pylist() if Path("sweep/results.parquet").exists() else None
    return {"journal": _entries("sweep"), "rows": rows}


def _plan() -> dict[str, Any]:
    path = Path("plan/plan.json")
    text = path.read_text() if path.exists() else None
    answer = None if text is None else json.loads(text)
    if answer is not None:
        answer["assumptions"].pop("simulated", None)  # how much of it this run did, and how much an earlier one
    page = Path("plan/plan.html")
    return {"journal": _entries("plan"), "answer": answer, "page": not page.exists() or _ends(page)}


def _ends(page: Path) -> bool:
    return page.read_text(encoding="utf-8").rstrip().endswith("</html>")


def _grows(answer: str) -> Sound:
    """Results that were written down stay, and are those of an undisturbed run; so is the answer, or it is absent."""

    def sound(state: Any, whole: Any, known: dict[str, int]) -> str:
        wrong = [key for key, entry in state["journal"].items() if whole["journal"].get(key) != entry]
        if wrong:
            return f"{len(wrong)} entries of the journal are not those of an undisturbed run"
        if len(state["journal"]) < known.get("most", 0):
            return f"{len(state['journal'])} entries of {known['most']} that were written down"
        known["most"] = len(state["journal"])
        there = state[answer]
        part = isinstance(there, list) and all(row in whole[answer] for row in there)
        part = part or (isinstance(there, dict) and there == _before_margins(whole[answer]))
        if there is not None and there != whole[answer] and not part:
            return f"its {answer} is not that of an undisturbed run"
        return "" if state.get("page", True) else "a page without its end"

    return sound


def _before_margins(answer: dict[str, Any]) -> dict[str, Any]:
    """A plan's answer as it is written first: the margin of the cheapest system is measured and added after that."""
    first = copy.deepcopy(answer)
    for race in first["cheapest"]:
        if race["winner"] is not None:
            race["winner"]["margin"] = None
    return first


def _file(name: str) -> Callable[[], bytes | None]:
    return lambda: Path(name).read_bytes() if Path(name).exists() else None


def _old_or_new(old: Any) -> Sound:
    def sound(state: Any, whole: Any, _known: dict[str, int]) -> str:
        return "" if state in (old, whole) else "neither what was there nor what should be"

    return sound


# ---- the victims ----


def victims(names: tuple[str, ...] = ("run", "sweep", "plan", "report", "calibrate")) -> list[Victim]:
    """Made in the working directory, each run once without being disturbed, and its results thrown away."""
    from kit.command import chairlift
    from kit.synthetic import Planted, record, write

    for name, text in FILES.items():
        Path(name).write_text(text)
    assert chairlift("run", "old.yaml", "--out", "out", "-q", "--report").status == 0
    shutil.copytree("out", "drawn")
    Path("page.html").write_text("old")
    write(Path("r"), [record(Planted())])
    old = _folder("out")
    calibrate = ("calibrate", "--recording", "r", "--model", "llama-3.1-8b", "--fast", "-q", "--out", "fitted.json")
    made = {
        "run": Victim(
            "run",
            ("run", "s.yaml", "--out", "out", "-q", "--events"),
            lambda: _folder("out"),
            _old_or_new(old),
        ),
        "sweep": Victim(
            "sweep",
            ("sweep", "w.yaml", "--out", "sweep", "-q", "-j", "2"),
            _sweep,
            _grows("rows"),
        ),
        "plan": Victim("plan", ("plan", "p.yaml", "--out", "plan", "-q", "-j", "1"), _plan, _grows("answer")),
        "report": Victim("report", ("report", "drawn", "--out", "page.html"), _file("page.html"), _old_or_new(b"old")),
        "calibrate": Victim("calibrate", calibrate, _file("fitted.json"), _old_or_new(None)),
    }
    chosen = [made[name] for name in names]
    for victim in chosen:
        begin = time.monotonic()
        process = _started(victim, 0, 0, "total")
        assert (wrong := list(_ended(process))) == [], (victim.name, wrong)
        assert process.returncode == 0, victim.name
        victim.seconds = time.monotonic() - begin
        victim.changes = int(Path("total").read_text())
        victim.whole = victim.state()
        reset(victim)
    return chosen


def reset(victim: Victim) -> None:
    """Put back what was there before the command ran for the first time."""
    if victim.name == "run":
        shutil.rmtree("out")
        shutil.copytree("drawn", "out")
    elif victim.name == "report":
        Path("page.html").write_text("old")
    elif victim.name == "calibrate":
        Path("fitted.json").unlink(missing_ok=True)
    else:
        shutil.rmtree(victim.name, ignore_errors=True)
    victim.known.clear()
