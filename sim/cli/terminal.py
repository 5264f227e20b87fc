"""What a terminal shows while a run is simulated, and how it ends one."""

from __future__ import annotations

import codecs
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from chairlift.sim.atomic import write_text
from chairlift.sim.bad_input import BadInput, Problem, saving

if TYPE_CHECKING:
    from chairlift.sim.study import Study

UNREAD = 128 + 13  # exit status where the output's reader has gone: 128 and SIGPIPE's number, as a shell has it
Advance = Callable[[int, str, float | None], None]  # requests arrived, what runs, simulated seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the same way as Ctrl-C (SIGINT)."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread; afterwards it does what it did before."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that Python does not know, and cannot set again
            signal.signal(signal.SIGTERM, before)


def stopped(by: KeyboardInterrupt) -> int:
    """The exit status of a command that a signal ended: 128 and the signal's number, as a shell has it."""
    return 128 + (signal.SIGTERM if isinstance(by, Terminated) else signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal ends the process with one line."""
    try:
        yield
    except KeyboardInterrupt as stop:
        console(stderr=True).print("interrupted")
        raise SystemExit(stopped(stop)) from None


class Interruptible(TyperGroup):
    """Commands that say in one line that they were interrupted, and nothing where nobody reads on."""

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        """Read the options. What comes of a signal later is told by `invoke`."""
        with interruptible():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with interruptible():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except BrokenPipeError:  # whoever reads has seen enough, as ``| head`` has: no mistake, and nothing to say
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it once more at its end
            raise SystemExit(UNREAD) from None


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # what rich is handling; rich itself would end the program without a word


_PLAIN = {"×": "x", "≤": "<=", "≥": ">=", "–": "-", "−": "-", "…": "...", "→": "->", "±": "+/-", "·": ".", "≈": "~"}


def forgive_encodings() -> None:
    """From now on the output shows a replacement for what its encoding lacks, ``x`` for ``×``, instead of failing."""

    def replacement(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end

    codecs.register_error("chairlift", replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="chairlift")


def console(stderr: bool = False, least: int = 0, soft_wrap: bool = False) -> Console:
    """What a command prints to.

    It shows no colours in a pipe, in CI and where `NO_COLOR` is set. In a pipe it is at least ``least`` columns wide.
    With ``soft_wrap`` it breaks no line itself.
    """
    made = _Console(
        emoji=False,
        stderr=stderr,
        highlight=False,
        soft_wrap=soft_wrap,
        no_color=True if os.environ.get("CI") else None,
    )
    if not made.is_terminal:
        made.width = max(made.width, least)
    return made


def must_end_in(file: Path | None, *endings: str, hint: str = "") -> None:
    """Raise `BadInput` if ``file`` is the name of another kind of file than is written there."""
    if file is not None and not file.name.endswith(endings):
        *others, last = endings
        named = f"{', '.join(others)} or {last}" if others else last
        raise BadInput(Problem(f"must end in {named}{hint}", file=str(file)))


def save(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, whose folder is made, or leave it as it was. Raises `BadInput` if that cannot be."""
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def run_folder(name: Path) -> Path:
    """The folder that ``name`` means: a path, or ``runs/NAME`` below the current folder for a bare name."""
    folder = Path("runs") / name
    return folder if len(name.parts) == 1 and not name.exists() and folder.exists() else name


@contextmanager
def status(silent: bool, every_s: float = math.inf) -> Iterator[Callable[[str], None]]:
    """A function that shows on a terminal what is being done; if ``silent``, it shows nothing.

    Where there is no terminal it prints a line now and then, at most one in ``every_s`` seconds.
    """
    err = console(stderr=True)
    if silent:
        yield lambda _what: None
        return
    if not err.is_terminal:
        last = time.monotonic()

        def line(what: str) -> None:
            nonlocal last
            if time.monotonic() - last >= every_s:
                last = time.monotonic()
                err.print(escape(what), soft_wrap=True)

        yield line
        return
    with err.status("") as shown:
        yield lambda what: shown.update(escape(what))


class _Rate(ProgressColumn):
    """Requests per second of wall time."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def progress(study: Study, to: Console, silent: bool) -> Iterator[Advance]:
    """A function that moves a bar over the requests of ``study``; in pipes and in CI it shows nothing.

    The bar tells simulated time, requests per second and the time left.
    """
    if silent or not to.is_terminal or os.environ.get("CI"):
        yield lambda _count, _label, _now: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,}/{task.total:,} requests"),
        _Rate(),
        TextColumn("{task.fields[at]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total = sum(len(setup.trace) for setup in study.setups)
    with Progress(*columns, console=to, transient=True) as bar:
        task = bar.add_task("", total=total, at="")

        def advance(count: int, label: str, now: float | None) -> None:
            at = "" if now is None else f"· simulated {now:,.0f} s ·"
            bar.update(task, completed=count, description=label, at=at)

        yield advance
