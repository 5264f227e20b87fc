"""Damage to files: what stands in a document replaced by nonsense, and bytes that are cut, flipped or doubled.

Nonsense is never meant: a mapping where a number stands, a key that nobody knows, NaN. Whoever reads it must refuse it,
or come to the same answer as without it. Other damage may be meant (a 5 that was a 3), so only its reading is judged.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import math
import random
import re
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Place = tuple[str | int, ...]
MOST = 10**4  # of a number that is drawn: a hundred thousand requests are work, no damage; ELSEWHERE has the absurd
STRANGE = "qxq"  # no key, name or number of anything
OF_NUMBERS: tuple[object, ...] = ({STRANGE: 1}, STRANGE, True, math.nan, math.inf)
OF_TEXT: tuple[object, ...] = ({STRANGE: 1}, [[]])
OF_CONTAINERS: tuple[object, ...] = (STRANGE, True)
ELSEWHERE: tuple[object, ...] = (None, 0, -1, 0.5, 1e300, 10**25, [], "x\0" * 2500)
_NUMBER = re.compile(rb"\d+(\.\d+)?")
NUMBERS = ("0", "-1", "1e30", ".inf", "NaN", "1.5", "''", "null", "true", "[1]", '{"a":1}', "10000000000000000000000")


@dataclass(frozen=True)
class Damaged:
    """A file's content after something was done to it."""

    what: str  # what, and where
    data: bytes
    nonsense: bool  # refused, or the same answer


class Damage:
    """How one kind of file is taken apart and put together."""

    named = True  # the keys of its mappings stand in the file

    def load(self, data: bytes) -> Any:
        """The document in ``data``: mappings, lists and scalars."""
        raise NotImplementedError

    def dump(self, document: Any) -> bytes:
        """The file of ``document``."""
        raise NotImplementedError

    def twice(self, _document: Any, _at: Place) -> bytes | None:
        """The file in which the key at ``at`` stands a second time with another value; None: no file can."""
        return None


class Yaml(Damage):
    """YAML."""

    def load(self, data: bytes) -> Any:
        return yaml.safe_load(data)

    def dump(self, document: Any) -> bytes:
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()

    def twice(self, document: Any, at: Place) -> bytes | None:
        marked = _with_second(document, at)
        return None if marked is None else self.dump(marked).replace(_SECOND.encode(), str(at[-1]).encode())


class Json(Damage):
    """JSON; ``lines`` of it; packed by gzip or not."""

    def __init__(self, lines: bool = False) -> None:
        self._lines = lines

    def load(self, data: bytes) -> Any:
        return [json.loads(line) for line in data.splitlines()] if self._lines else json.loads(data)

    def dump(self, document: Any) -> bytes:
        if self._lines and isinstance(document, list):
            return "".join(json.dumps(row) + "\n" for row in document).encode()
        return json.dumps(document).encode()

    def twice(self, document: Any, at: Place) -> bytes | None:
        marked = _with_second(document, at)
        return None if marked is None else self.dump(marked).replace(_SECOND.encode(), str(at[-1]).encode())


class Csv(Damage):
    """A table of text, as a list of mappings, one for each row; packed by gzip or not."""

    def __init__(self, header: bool = True) -> None:
        self._header = self.named = header

    def load(self, data: bytes) -> Any:
        rows = list(csv.reader(io.StringIO(data.decode())))
        names = rows[0] if self._header else [str(i) for i in range(len(rows[0]))]
        return [dict(zip(names, map(_scalar, row), strict=True)) for row in rows[self._header :]]

    def dump(self, document: Any) -> bytes:
        if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
            return json.dumps(document).encode()
        out = io.StringIO()
        writer = csv.writer(out)
        names = list(dict.fromkeys(name for row in document for name in row))
        if self._header:
            writer.writerow(names)
        for row in document:
            writer.writerow([_text(row[name]) for name in names if name in row])
        return out.getvalue().encode()


class Columns(Damage):
    """Parquet, as a mapping from columns to lists of values; a column of mixed values becomes one of text."""

    def load(self, data: bytes) -> Any:
        table = pq.read_table(io.BytesIO(data))
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items() if k != b"ARROW:schema"}
        return {"columns": table.to_pydict(), "about": {name: _maybe_json(text) for name, text in meta.items()}}

    def dump(self, document: Any) -> bytes:
        columns, about = document.get("columns"), document.get("about", {})
        if not isinstance(columns, dict) or not isinstance(about, dict):
            return b"PAR1"
        arrays = {}
        for name, values in columns.items():
            values = values if isinstance(values, list) else [values]
            try:
                arrays[name] = pa.array(values)
                if {} in values:
                    raise pa.ArrowInvalid("Parquet has no mapping of nothing")
                if len({isinstance(value, bool) for value in values if value is not None}) > 1:
                    raise pa.ArrowInvalid("beside numbers, a truth value would become 0 or 1")
            except (pa.ArrowException, OverflowError):
                arrays[name] = pa.array([None if v is None else _text(v) for v in values])
        least = min(map(len, arrays.values()), default=0)
        table = pa.table({name: array.slice(0, least) for name, array in arrays.items()})
        said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        out = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(said), out)
        return out.getvalue()


class Entries(Damage):
    """A journal, as a mapping from keys to entries."""

    def load(self, data: bytes) -> Any:
        with _database(data) as (rows, _):
            return {key: json.loads(entry) for key, entry in rows.execute("SELECT key, entry FROM results")}

    def dump(self, document: Any) -> bytes:
        with _database(self._whole) as (rows, file):
            rows.execute("DELETE FROM results")
            for key, entry in document.items() if isinstance(document, dict) else ():
                rows.execute("INSERT INTO results VALUES (?, ?)", (key, json.dumps(entry)))
            rows.commit()
            rows.execute("VACUUM")
            return file.read_bytes()

    def __init__(self, whole: bytes) -> None:
        self._whole = whole


class Arrays(Damage):
    """``.npz``, as a mapping from names to lists."""

    def load(self, data: bytes) -> Any:
        with np.load(io.BytesIO(data)) as arrays:
            return {name: arrays[name].tolist() for name in arrays.files}

    def dump(self, document: Any) -> bytes:
        out = io.BytesIO()
        arrays = {}
        for name, values in document.items() if isinstance(document, dict) else ():
            try:
                arrays[name] = np.array(values)
            except (ValueError, OverflowError):
                arrays[name] = np.array(str(values))
            alike = {isinstance(value, bool) for value in values} if isinstance(values, list) else {0}
            if arrays[name].dtype == object or len(alike) > 1:
                arrays[name] = np.array(str(values))
        np.savez_compressed(out, **arrays)
        return out.getvalue()


class Tensors(Damage):
    """The header of ``.safetensors``, as its JSON; the bytes behind it stay."""

    def __init__(self, whole: bytes) -> None:
        [size] = struct.unpack("<Q", whole[:8])
        self._rest = whole[8 + size :]

    def load(self, data: bytes) -> Any:
        [size] = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + size])

    def dump(self, document: Any) -> bytes:
        header = json.dumps(document).encode()
        return struct.pack("<Q", len(header)) + header + self._rest


class Packed(Damage):
    """What ``inner`` takes apart, in gzip."""

    def __init__(self, inner: Damage) -> None:
        self.inner = inner

    def load(self, data: bytes) -> Any:
        return self.inner.load(gzip.decompress(data))

    def dump(self, document: Any) -> bytes:
        return gzip.compress(self.inner.dump(document), 1)

    def twice(self, document: Any, at: Place) -> bytes | None:
        found = self.inner.twice(document, at)
        return None if found is None else gzip.compress(found, 1)


_SECOND = "zzzsecondzzz"


def _with_second(document: Any, at: Place) -> Any:
    value = got(document, at)
    if not at or not isinstance(at[-1], str) or isinstance(value, dict | list):
        return None
    other = value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else STRANGE
    made = copy.deepcopy(document)
    got(made, at[:-1])[_SECOND] = other
    return made


def _scalar(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _database:
    def __init__(self, data: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "j.sqlite"
        self._file.write_bytes(data)
        self._rows = sqlite3.connect(self._file)

    def __enter__(self) -> tuple[sqlite3.Connection, Path]:
        return self._rows, self._file

    def __exit__(self, *_: object) -> None:
        with closing(self._rows):
            pass
        self._folder.cleanup()


def got(document: Any, at: Place) -> Any:
    """What stands at ``at``."""
    for part in at:
        document = document[part]
    return document


def places(document: Any, at: Place = ()) -> Iterator[Place]:
    """Where something stands; of a long list only its first and last item, for the others are like them."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        numbered = list(enumerate(document))
        items = list(numbered if len(numbered) < 3 else [numbered[0], numbered[-1]])
    for part, below in items:
        yield (*at, part)
        yield from places(below, (*at, part))


def with_value(document: Any, at: Place, value: Any) -> Any:
    """A copy of ``document`` in which ``value`` stands at ``at``; with ``...`` nothing does."""
    made = copy.deepcopy(document)
    here = got(made, at[:-1])
    if value is ...:
        del here[at[-1]]
    else:
        here[at[-1]] = value
    return made


def misspelt_at(document: Any, at: Place) -> Any:
    """A copy of ``document`` whose key at ``at`` has letters in it that make it no other key."""
    made = copy.deepcopy(document)
    here = got(made, at[:-1])
    key = str(at[-1])
    items = list(here.items())
    here.clear()
    here.update({key[:2] + STRANGE + key[2:] if name == at[-1] else name: value for name, value in items})
    return made


def scripted(data: bytes, how: Damage, start: int = 0, step: int = 1, begins: str = "") -> Iterator[Damaged]:
    """Every kind of damage at every place of a file.

    From number ``start`` on, every ``step``-th is made, if what it is ``begins`` so.
    """
    for what, made, nonsense in islice(_scripted(data, how), start, None, step):
        if what.startswith(begins):
            yield Damaged(what, made(), nonsense)


def _scripted(data: bytes, how: Damage) -> Iterator[tuple[str, Callable[[], bytes], bool]]:
    """Of each `Damaged` what it is, what makes its file, and whether it is nonsense."""
    document = how.load(data)

    def put(at: Place, value: object) -> Callable[[], bytes]:
        return lambda: how.dump(with_value(document, at, value))

    def misspelt(at: Place) -> Callable[[], bytes]:
        return lambda: how.dump(misspelt_at(document, at))

    for at in places(document):
        told = ".".join(map(str, at))
        value = got(document, at)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        container = isinstance(value, dict | list)
        nonsense = OF_NUMBERS if number else OF_CONTAINERS if container else OF_TEXT
        for other in nonsense:
            if type(other) is type(value):
                continue
            yield f"{told} = {other!r}", put(at, other), True
        for other in ELSEWHERE:
            yield f"{told} = {str(other)[:20]!r}", put(at, other), False
        yield f"{told} is gone", put(at, ...), False
        if isinstance(at[-1], str) and how.named:
            yield f"{told} is misspelt", misspelt(at), True
            if (twice := how.twice(document, at)) is not None:
                yield f"{told} stands twice", partial(bytes, twice), True
    for each in whole(data):
        yield each.what, partial(bytes, each.data), each.nonsense


def whole(data: bytes) -> Iterator[Damaged]:
    """What can be wrong with a file as a whole."""
    for what, other in (
        ("empty", b""),
        ("a blank", b" \n"),
        ("a NUL", b"\0"),
        ("a list of nothing", b"[]"),
        ("null", b"null"),
        ("an open bracket", b"{"),
        ("deep", b"[" * 100_000),
        ("deep mappings", b'{"a":' * 20_000),
        ("not UTF-8", b"\xff\xfe" + data),
        ("rubbish", bytes(range(256)) * 20),
    ):
        yield Damaged(f"the file is {what}", other, True)
    for part in (0.1, 0.5, 0.9):
        yield Damaged(f"the file is cut at {part:.0%}", data[: int(len(data) * part)], False)
    yield Damaged("the file begins with a mark of UTF-8", b"\xef\xbb\xbf" + data, False)
    yield Damaged("the file stands twice", data + data, False)


def renumbered(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one of its numbers made another."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return data
    place = draw.choice(found)
    return data[: place.start()] + draw.choice(NUMBERS).encode() + data[place.end() :]


def cut(data: bytes, draw: random.Random) -> bytes:
    """``data`` without its end."""
    return data[: draw.randrange(len(data) + 1)]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """``data`` with one byte made another."""
    if not data:
        return data
    at = draw.randrange(len(data))
    return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """``data`` with a piece of it twice."""
    low, high = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:high] + data[low:high] + data[high:]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (renumbered, cut, flipped, doubled)


def mutated(data: bytes, how: Damage, draw: random.Random) -> Damaged:
    """One mutation, drawn: of bytes (those in the packing, where it is packed), or at a place of the document."""
    if draw.random() < 0.5:
        change = draw.choice(BYTES)
        if isinstance(how, Packed) and draw.random() < 0.8:
            return Damaged(change.__name__, gzip.compress(change(gzip.decompress(data), draw), 1), False)
        return Damaged(change.__name__, change(data, draw), False)
    document = how.load(data)
    at = draw.choice(list(places(document)))
    told = ".".join(map(str, at))
    if isinstance(at[-1], str) and how.named and draw.random() < 0.3:
        return Damaged(f"{told} is misspelt", how.dump(misspelt_at(document, at)), True)
    value = got(document, at)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if draw.random() < 0.4:
        kinds = OF_NUMBERS if number else OF_CONTAINERS if isinstance(value, dict | list) else OF_TEXT
        other = draw.choice([kind for kind in kinds if type(kind) is not type(value)])
        return Damaged(f"{told} = {other!r}", how.dump(with_value(document, at, other)), True)
    drawn = draw.choice([*ELSEWHERE, ..., draw.randint(-MOST, MOST), draw.uniform(-1e3, 1e3)])
    return Damaged(f"{told} = {str(drawn)[:20]!r}", how.dump(with_value(document, at, drawn)), False)
