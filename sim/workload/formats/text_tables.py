"""Text files as tables of cells, in CSV or JSON lines, with the line of everything that is wrong in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from itertools import compress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from chairlift.backend.checked import a_file, not_text, once
from chairlift.sim.bad_input import NOTHING, BadInput, Problem, did_you_mean, nearest, reading
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.trace import shortened

T = TypeVar("T")

MOST_LINE = 1 << 27  # bytes, unpacked: a small gzip file may unpack to more than any memory holds
MOST_DOCUMENT = 1 << 29  # bytes, unpacked, of a file that is one JSON document
LONGEST_CELL = MOST_LINE  # characters; the limit of csv itself, 131,072, is too short for the hash ids of a long prompt
_FINITE = 10**19  # larger numbers are refused before `int` writes out all their digits
EPOCH_PS = date(1970, 1, 1).toordinal() * 86_400 * PS_PER_S  # of a Unix time of 0, on the clock of `stamp_ps`
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?(?:Z|([+-])(\d\d):?(\d\d))?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_ALIKE = 0.8  # similarity from which on a column that is not read is taken for a misspelt one


class Table:
    """Rows of cells with named columns, and the problems found in them so far.

    A reader goes on after a problem, so that `done` can report all of them at once.

    The table remembers which columns were read and which were looked for, so that `unread` can name the others: no
    column is passed over in silence.
    """

    def __init__(self, path: Path) -> None:
        self.file = str(path)
        self.name = path.name
        self.header: list[str] = []
        self.rows: list[Sequence[Any]] = []
        self.lines: list[int] = []  # line of each row, from 1
        self.problems: list[Problem] = []
        self.others: list[str] = []  # keys of JSON rows that have no column here
        self._read: set[str] = set()
        self._wanted: set[str] = set()

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

    def has(self, column: str) -> bool:
        """Whether there is such a column; one that is not there may be a misspelt one among those of `unread`."""
        self._wanted.add(column)
        return column in self.header

    def unread(self) -> list[str]:
        """The columns whose cells nobody read, each with the column that it may be meant for."""
        found = []
        for name in (*self.header, *self.others):
            if name not in self._read:
                meant = nearest(name, self._wanted - self._read, _ALIKE)
                found.append(f"{name} – did you mean '{meant}'?" if meant else name)
        return found

    def sound(self) -> list[bool]:
        """For each row, whether nothing of its line was refused so far."""
        broken = {problem.line for problem in self.problems}
        return [line not in broken for line in self.lines]

    def cells(self, column: str) -> list[Any]:
        """The cells of one column, from the first row to the last."""
        self._read.add(column)
        i = self.header.index(column)
        return [row[i] for row in self.rows]

    def parsed(self, column: str, parse: Callable[[Any], T], instead: T) -> list[T]:
        """What ``parse`` makes of the cells of a column.

        A cell for which ``parse`` raises ValueError is refused, and ``instead`` takes its place.
        """
        cells = self.cells(column)
        if parse is whole and (numbers := _digits(cells)) is not None:
            return numbers  # type: ignore[return-value]  # what `whole` returns
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


def read_csv(path: Path, limit: int | None, delimiter: str = ",") -> Table:
    """The first ``limit`` rows (None: all) of a CSV file with a header. Blank lines are skipped, but counted as lines.

    Raises:
        BadInput: the file cannot be read, or has no rows. A row of the wrong width is no reason to raise: it is added
            to the ``problems`` of the table.
    """
    table = Table(path)
    old_limit = csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_lines(path, limit), strict=True, delimiter=delimiter)
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


def _lines(path: Path, limit: int | None) -> Iterator[str]:
    """The lines of a file. A file that is read to its end is decoded in one go, in half the time."""
    if limit is None:
        with opened(path) as file:
            raw = file.read()
        try:
            return io.StringIO(raw.decode("utf-8-sig"), newline="\n")
        except UnicodeDecodeError:
            pass  # line by line, so that the error has a line
    return (text for _, text in read_lines(path))


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
            row = json.loads(text, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON: {error}"
            continue
        yield line, row if isinstance(row, dict) else "must be a JSON object"


def read_json_table(
    path: Path,
    limit: int | None,
    keys: Iterable[str],
    optional: Sequence[str] = (),
    sparse: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> Table:
    """The first ``limit`` rows (None: all) of a file of JSON lines, with a column for each of ``keys``.

    A key of ``optional`` gets a column if any row has it; then all rows must have it. A key of ``sparse`` gets a column
    if any row has it, and its cell is None in rows without it. All other keys of the rows are the table's ``others``.
    ``aliases`` are other names of keys, and the keys that they mean. Lines that are wrong are added to the
    ``problems`` of the table.

    Raises:
        BadInput: the file cannot be read.
    """
    table = Table(path)
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    seen: dict[str, None] = {}  # keys in order of first appearance
    for line, row in read_json_lines(path, limit):
        if isinstance(row, str):
            table.refuse(row, line)
            continue
        if aliases:
            row = {aliases.get(name, name): value for name, value in row.items()}
        rows.append(row)
        lines.append(line)
        seen.update(dict.fromkeys(row))
    table.header = list(keys)
    table.header += [name for name in (*optional, *sparse) if name in seen and name not in table.header]
    table.others = [name for name in seen if name not in table.header]
    table._wanted.update(table.header, optional, sparse)
    needed = [name for name in table.header if name not in sparse]
    for line, row in zip(lines, rows, strict=True):
        missing = [name for name in needed if name not in row]
        for name in missing:
            table.refuse(f"missing key{did_you_mean(name, list(row))}", line, name)
        if not missing:
            table.rows.append([row.get(name) for name in table.header])
            table.lines.append(line)
    return table


def read_json_document(path: Path) -> Any:
    """What a file that is one JSON document holds; numbers with a point are decimals.

    Raises:
        BadInput: the file cannot be read, or is not JSON.
    """
    text = read_document(path)
    with reading(path):
        return json.loads(text, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=once)


def read_document(path: Path) -> str:
    """The text of a file, unpacked if it is gzipped, that is not read line by line.

    Raises:
        BadInput: the file cannot be read, or is longer than `MOST_DOCUMENT`.
    """
    with opened(path) as file:
        raw = file.read(MOST_DOCUMENT)
    if len(raw) == MOST_DOCUMENT:
        raise BadInput(Problem(f"is longer than {MOST_DOCUMENT:,} bytes, unpacked", file=str(path)))
    with reading(path):
        return raw.decode("utf-8-sig")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number, from 1, and the text of each line, including the line's end. A gzipped file is unpacked.

    Raises:
        BadInput: there is no such file, or it is a folder, cut short, damaged, or not UTF-8.
    """
    line = 0
    with opened(path) as file:
        while raw := file.readline(MOST_LINE):
            line += 1
            if len(raw) == MOST_LINE:
                raise BadInput(Problem(f"is longer than {MOST_LINE:,} bytes", str(path), line))
            try:
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(Problem(not_text(error), str(path), line)) from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, open for reading. A gzipped file, told by its first two bytes and not by its name, is unpacked.

    Raises:
        BadInput: there is no such file, or it is a folder; while reading: it is cut short or damaged.
    """
    with reading(path), a_file(path).open("rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        if not packed:
            yield raw
            return
        with gzip.open(raw) as unpacked:
            yield cast(IO[bytes], unpacked)


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


def blank(cell: Any) -> bool:
    """Whether a cell is empty, and so says "none": a JSON null, or a text of nothing but spaces."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


def label(cell: Any) -> str:
    """The name of a tenant or a session: a text or a number; "" where the cell says none.

    Raises:
        ValueError: ``cell`` is something else.
    """
    if blank(cell):
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
        raise ValueError("must be a name or a number")
    return str(cell)


def whole(cell: Any) -> int:
    """A whole number in the digits 0 to 9. It may be written as ``512.0``, as programs do that keep numbers as floats.

    Raises:
        ValueError: ``cell`` is something else.
    """
    if type(cell) is int:
        return cell
    if isinstance(cell, str) and len(cell) < 20 and cell.isascii() and cell.isdigit():
        return int(cell)
    return _whole_decimal(cell)


def _digits(cells: Sequence[Any]) -> list[int] | None:
    """As `whole` of each cell, three times as fast, if all are texts of at most 19 digits; else None."""
    try:
        together = "".join(cells)
        if together.isascii() and together.isdigit() and max(map(len, cells)) < 20:
            return list(map(int, cells))
    except (TypeError, ValueError):  # a cell that is no text, or an empty one
        pass
    return None


def whole_or(none: int) -> Callable[[Any], int]:
    """A parser of whole numbers in which an empty cell is ``none``."""
    return lambda cell: none if blank(cell) else whole(cell)


def _whole_decimal(cell: Any) -> int:
    number = decimal(cell, "must be a whole number")
    if number != number.to_integral_value():
        raise ValueError("must be a whole number")
    return int(number)


def decimal(cell: Any, rule: str = "must be a number") -> Decimal:
    """A finite number, in the digits 0 to 9, as an exact decimal.

    A float counts as the shortest decimal that reads back as that float.

    Raises:
        ValueError: ``cell`` is something else, or NaN, or infinite; its text is ``rule``.
    """
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal):
        raise ValueError(rule)
    if isinstance(cell, str):
        cell = cell.strip()
        if _NUMBER.fullmatch(cell) is None:  # `Decimal` itself takes digits of any script, and underscores
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


def stamp_ps(cell: str) -> int:
    """A wall-clock time, in UTC unless it says its zone, as picoseconds since the year 1.

    Raises:
        ValueError: ``cell`` is no such time.
    """
    found = _STAMP.fullmatch(cell.strip())
    if found is None:
        raise ValueError("must be a time like 2023-11-16 18:17:03.9799600")
    day, hour, minute, second, fraction, sign, zone_h, zone_m = found.groups()
    if hour > "23" or minute > "59" or second > "59":
        raise ValueError("must be a time of day")
    minutes = int(hour) * 60 + int(minute)
    if sign:
        minutes -= int(sign + "1") * (int(zone_h) * 60 + int(zone_m))
    whole_s = date.fromisoformat(day).toordinal() * 86_400 + minutes * 60 + int(second)
    return whole_s * PS_PER_S + int((fraction or "").ljust(12, "0"))
