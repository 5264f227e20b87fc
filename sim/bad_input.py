"""What is wrong with an input, said once and in one shape: ``file:line: path: rule (got value)``."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from chairlift.backend.checked import UNREADABLE, unreadable

_ESCAPED = {"\n": " ", "\r": "", "\t": " "}  # a problem is one line, whatever a file or a library puts into it


class _Nothing(Enum):  # an enumeration, for it stays the same when another process is told
    NOTHING = ""


NOTHING = _Nothing.NOTHING  # a problem without a value to show
MOST_TOLD = 100  # problems of one input: nobody reads more
MOST_SHOWN = 60  # characters of a value or a name


class Problem(NamedTuple):
    """One mistake of one input file or command-line option."""

    rule: str  # what should hold, as a sentence fragment
    file: str = ""
    line: int | None = None  # 1-based
    path: str = ""  # dotted path of the key, or a column name
    value: object = NOTHING

    def __str__(self) -> str:
        where = self.file + (f":{self.line}" if self.line is not None else "")
        head = ": ".join(part for part in (where, self.path) if part)
        got = "" if self.value is NOTHING else f" (got {_short(self.value)})"
        said = f"{head}: {self.rule}{got}" if head else f"{self.rule}{got}"
        return "".join(c if c.isprintable() else _ESCAPED.get(c, repr(c)[1:-1]) for c in said.strip())


class BadInput(Exception):
    """Input that cannot be used; the command line prints it and exits with status 2.

    Collects every problem found, so that a user mends a file in one go.
    """

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.told())))

    def __reduce__(self) -> tuple[type[BadInput], tuple[list[Problem]]]:
        """How a process of a pool tells its parent."""
        return type(self), (self.problems,)

    def told(self) -> list[Problem]:
        """The problems; of more than `MOST_TOLD` the first ones, and one that counts the others."""
        if (more := len(self.problems) - MOST_TOLD) <= 1:
            return self.problems
        return [*self.problems[:MOST_TOLD], Problem(f"and {more:,} more problems", file=self.problems[0].file)]


@contextmanager
def reading(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Inside, what keeps the file ``path`` from being read is `BadInput`: `UNREADABLE`, and errors ``also`` given."""
    try:
        yield
    except (*UNREADABLE, *also) as error:
        rule, line = unreadable(error)
        raise BadInput(Problem(rule, str(path), line)) from None


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Inside, what keeps the file or folder ``path`` from being written, an OSError, is `BadInput`."""
    try:
        yield
    except OSError as error:
        there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
        wanted = there != path or isinstance(error, NotADirectoryError)  # as a folder, which is said in several ways
        why = error.strerror or error if there.is_dir() or not wanted else f"{there} is no folder"
        raise BadInput(Problem(f"cannot be written: {why}", str(path))) from None


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`` – did you mean 'x'?`` for the nearest known word, else the words allowed (at most twelve).

    Letters count as equal whatever their case: ``vLLM`` is near ``vllm``.
    """
    if near := nearest(word, known):
        return f" – did you mean {_short(near)}?"
    shown = ", ".join(name if len(name) <= MOST_SHOWN else _short(name) for name in sorted(known)[:12]) + (
        ", …" if len(known) > 12 else ""
    )
    return f" – allowed: {shown}" if shown else ""


def names_a_file(name: str) -> bool:
    """Whether ``name`` is a file's or a folder's in any folder, on every system: it leads nowhere else."""
    elsewhere = name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]|^[A-Za-z]:", name)
    return not elsewhere and name == name.strip()


def nearest(word: str, known: Iterable[str], cutoff: float = 0.55) -> str | None:
    """The one of ``known`` that begins with ``word`` or looks most like it; None if none is near. Case is ignored."""
    by_folded: dict[str, str] = {}
    for name in sorted(known):
        by_folded.setdefault(name.casefold(), name)
    folded = word.casefold()
    near = [name for name in by_folded if folded and name.startswith(folded)][:1]
    near = near or difflib.get_close_matches(folded, list(by_folded), n=1, cutoff=cutoff)
    return by_folded[near[0]] if near else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
