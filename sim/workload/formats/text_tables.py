"""Text files as tables of cells, in CSV or JSON lines, with the line of everything that is wrong in them."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import compress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from chairlift.sim.bad_input import NOTHING, BadInput, Problem, did_you_mean
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.trace import shortened

T = TypeVar("T")

LONGEST_CELL = 1 << 28  # characters; the limit of csv itself, 131,072, is too short for the hash ids of a long prompt
_FINITE = 10**19  # larger numbers are refused before `int` writes out all their digits


class Table:
    """Rows of cells with named columns, and the problems found in them so far.

    A reader goes on after a problem, so that `done` can report all of them at once.
    """

    def __init__(self, path: Path) -> None:
        self.file = str(path)
        self.name = path.name
        self.header: list[str] = []
        self.rows: list[Sequence[Any]] = []
        self.lines: list[int] = []  # line of each row, from 1
        self.problems: list[Problem] = []

    def refuse(self, rule: str, line: int | None = None, column: str = "", value: object = NOTHING) -> None:
        """Add a problem to those found so far."""
        self.problems.append(Problem(rule, self.file, line, column, value))

    def done(self) -> None:
        """Do nothing if nothing was refused so far.

        Raises:
            BadInput: the first twenty problems, in order of lines.
        """
        if self.problems:
            raise BadInput(shortened(sorted(self.problems, key=lambda problem: problem.line or 0)))

    def require(self, *columns: str) -> None:
        """Do nothing if the header names all these columns.

        Raises:
            BadInput: the columns that are missing, each with the column of the header that looks most like it.
        """
        missing = [column for column in columns if column not in self.header]
        for column in missing:
            self.refuse(f"missing column{did_you_mean(column, self.header)}", 1, column)
        if missing:
            self.done()

    def sound(self) -> list[bool]:
        """For each row, whether nothing of its line was refused so far."""
        broken = {problem.line for problem in self.problems}
        return [line not in broken for line in self.lines]

    def cells(self, column: str) -> list[Any]:
        """The cells of one column, from the first row to the last."""
        i = self.header.index(column)
        return [row[i] for row in self.rows]

    def parsed(self, column: str, parse: Callable[[Any], T], instead: T) -> list[T]:
        """What ``parse`` makes of the cells of a column.

        A cell for which ``parse`` raises ValueError is refused, and ``instead`` takes its place.
        """
        cells = self.cells(column)
        try:
            return list(map(parse, cells))
        except ValueError:
            return [self._try(i, column, cell, parse, instead) for i, cell in enumerate(cells)]

    def _try(self, i: int, column: str, cell: Any, parse: Callable[[Any], T], instead: T) -> T:
        try:
            return parse(cell)
        except ValueError as error:
            self.refuse(str(error), self.lines[i], column, cell)
            return instead

    def keep(self, kept: Collection[bool]) -> None:
        """Drop the rows for which ``kept``, one value a row, is False."""
        self.rows = list(compress(self.rows, kept))
        self.lines = list(compress(self.lines, kept))


def read_csv(path: Path, limit: int | None) -> Table:
    """The first ``limit`` rows (None: all) of a CSV file with a header. Blank lines are skipped, but counted as lines.

    Raises:
        BadInput: the file cannot be read, or has no rows. A row of the wrong width is no reason to raise: it is added
            to the ``problems`` of the table.
    """
    table = Table(path)
    old_limit = csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader((text for _, text in read_lines(path)), strict=True)
    try:
        table.header = [name.strip() for name in next(reader, [])]
        for name in sorted({name for name in table.header if table.header.count(name) > 1}):
            table.refuse("the header names this column twice", 1, name)
        for row in reader:
            if not row:
                continue
            if len(row) != len(table.header):
                rule = f"must have {len(table.header)} columns, as the header does"
                table.refuse(rule, reader.line_num, value=len(row))
                continue
            table.rows.append(row)
            table.lines.append(reader.line_num)
            if len(table.rows) == limit:
                break
    except csv.Error as error:
        table.refuse(f"not CSV: {error}", reader.line_num)
        table.done()
    finally:
        csv.field_size_limit(old_limit)
    if not table.rows:
        table.done()
        table.refuse("no requests below the header")
        table.done()
    return table


def read_json_lines(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number and the object of each line that is not blank, of the first ``limit`` of these (None: all).

    In place of an object comes a text if the line is wrong; the text says what is wrong with it.
    """
    count = 0
    for line, text in read_lines(path):
        if count == limit:
            return
        if not text.strip():
            continue
        count += 1
        try:
            row = json.loads(text, parse_float=Decimal, parse_constant=Decimal)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON: {error}"
            continue
        yield line, row if isinstance(row, dict) else "must be a JSON object"


def read_json_table(path: Path, limit: int | None, keys: Iterable[str], optional: Sequence[str] = ()) -> Table:
    """The first ``limit`` rows (None: all) of a file of JSON lines, with a column for each of ``keys``.

    A key of ``optional`` gets a column if the first row has it; then all rows must have it. Lines that are wrong are
    added to the ``problems`` of the table.

    Raises:
        BadInput: the file cannot be read.
    """
    table = Table(path)
    table.header = list(keys)
    for line, row in read_json_lines(path, limit):
        if isinstance(row, str):
            table.refuse(row, line)
            continue
        if not table.rows:
            table.header += [name for name in optional if name in row and name not in table.header]
        missing = [name for name in table.header if name not in row]
        for name in missing:
            table.refuse(f"missing key{did_you_mean(name, list(row))}", line, name)
        if not missing:
            table.rows.append([row[name] for name in table.header])
            table.lines.append(line)
    return table


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number, from 1, and the text of each line, including the line's end. A gzipped file is unpacked.

    Raises:
        BadInput: there is no such file, or it is a folder, cut short, damaged, or not UTF-8.
    """
    line = 0
    with opened(path) as file:
        for raw in file:
            line += 1
            try:
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                rule = f"not UTF-8 text: {error.reason} at byte {error.start} of the line"
                raise BadInput(Problem(rule, str(path), line)) from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for reading. A gzipped file, told by its first two bytes and not by its name, is unpacked.

    Raises:
        BadInput: there is no such file, or it is a folder; while reading: it is cut short or damaged.
    """
    try:
        if path.is_dir():
            raise BadInput(Problem("is a folder, not a trace file", file=str(path)))
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            if not packed:
                yield raw
                return
            with gzip.open(raw) as unpacked:
                yield cast(IO[bytes], unpacked)
    except FileNotFoundError:
        raise BadInput(Problem("no such file", file=str(path))) from None
    except EOFError:
        raise BadInput(Problem("the gzip file is cut short", file=str(path))) from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(Problem(f"the gzip file is damaged: {error}", file=str(path))) from None
    except OSError as error:
        raise BadInput(Problem(f"cannot be read: {error.strerror or error}", file=str(path))) from None


def head(path: Path, size: int = 4096) -> bytes:
    """The first ``size`` bytes of a file, unpacked if it is gzipped.

    Raises:
        BadInput: as `opened`.
    """
    with opened(path) as file:
        return file.read(size)


def first_line(head: bytes) -> str:
    """The first line of a file that begins with ``head``, without spaces before it and without its end."""
    lines = head.decode("utf-8-sig", "replace").splitlines()
    return lines[0].lstrip() if lines else ""


def column_names(head: bytes) -> list[str]:
    """The columns that the header of a CSV file names, if the file begins with ``head``."""
    return [name.strip() for name in first_line(head).split(",")]


def whole(cell: Any) -> int:
    """A whole number. It may be written as ``512.0``, as programs do that keep numbers as floats.

    Raises:
        ValueError: ``cell`` is something else.
    """
    if type(cell) is int:
        return cell
    try:
        return int(cell) if isinstance(cell, str) else _whole_decimal(cell)
    except ValueError:
        return _whole_decimal(cell)


def _whole_decimal(cell: Any) -> int:
    number = decimal(cell, "must be a whole number")
    if number != number.to_integral_value():
        raise ValueError("must be a whole number")
    return int(number)


def decimal(cell: Any, rule: str = "must be a number") -> Decimal:
    """A finite number as an exact decimal. A float counts as the shortest decimal that reads back as that float.

    Raises:
        ValueError: ``cell`` is something else, or NaN, or infinite; its text is ``rule``.
    """
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal):
        raise ValueError(rule)
    try:
        number = Decimal(repr(cell) if isinstance(cell, float) else cell)
        if abs(number) < _FINITE:
            return number
    except ArithmeticError:  # not a number at all, or NaN
        pass
    raise ValueError(rule)


def seconds_ps(cell: Any) -> int:
    """Seconds as picoseconds; what is finer than a picosecond is rounded, once.

    Raises:
        ValueError: ``cell`` is no finite number.
    """
    return int((decimal(cell, "must be a number of seconds") * PS_PER_S).to_integral_value())
