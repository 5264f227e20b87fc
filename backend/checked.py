"""Files that others wrote: whether one can be read to its end, and the first thing that is wrong with what it holds."""

from __future__ import annotations

import errno
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a machine that only measures lacks it
    from pydantic import ValidationError

MOST_TEXT = 1 << 26  # bytes of a document that a person may have written; longer than any, and read in seconds
_MOST = 60  # characters of a value that are shown
# What keeps a file from being read
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, EOFError, RecursionError, zlib.error)


def unreadable(error: Exception) -> tuple[str, int | None]:
    """Why a file cannot be read, as a sentence fragment, and the line to blame, counted from 1, if one is.

    ``error`` is one of `UNREADABLE`, or another that a library reads with raises. A UnicodeDecodeError is of the file
    from its beginning on.
    """
    match error:
        case FileNotFoundError():
            return "no such file", None
        case IsADirectoryError():
            return "is a folder, not a file", None
        case UnicodeDecodeError():
            return not_text(error), error.object.count(b"\n", 0, error.start) + 1
        case json.JSONDecodeError():
            return f"not JSON: {error.msg}", error.lineno
        case RecursionError():
            return "is nested too deeply", None
        case EOFError():
            return "the gzip file is cut short", None
        case zlib.error() | gzip.BadGzipFile():
            return f"the gzip file is damaged: {error}", None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    return f"cannot be read: {reason}", None


def not_text(error: UnicodeDecodeError) -> str:
    """The rule that a byte breaks, and the byte."""
    return f"must be UTF-8 text (got {error.object[error.start : error.start + 1]!r})"


@contextmanager
def reading(path: Path, refused: Callable[[str], Exception], *also: type[Exception]) -> Iterator[None]:
    """Inside, what keeps the file ``path`` from being read is raised as ``refused("path:line: rule")``.

    That are the errors of `UNREADABLE`, and those ``also`` given.
    """
    try:
        yield
    except (*UNREADABLE, *also) as error:
        rule, line = unreadable(error)
        raise refused(f"{path}{'' if line is None else f':{line}'}: {rule}") from None


def text_of(path: Path, most: int | None = None) -> str:
    """The UTF-8 text of a file of at most ``most`` bytes. Raises some of `UNREADABLE`."""
    return a_file(path, most).read_bytes().decode("utf-8-sig")


def json_of(path: Path, most: int | None = None) -> Any:
    """What a JSON file of at most ``most`` bytes holds, whose keys stand once. Raises some of `UNREADABLE`."""
    return json.loads(text_of(path, most), object_pairs_hook=once)


def a_file(path: Path, most: int | None = None) -> Path:
    """``path``, if reading it comes to an end: a file, of at most ``most`` bytes.

    A pipe that nobody writes to would keep its reader for ever, and /dev/zero fill all memory. Raises OSError.
    """
    try:
        found = path.stat()
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    if most is not None and found.st_size > most:
        rule = f"is {found.st_size:,} bytes long; such a file has at most {most:,}"
        raise OSError(errno.EFBIG, rule, str(path))
    if not os.access(path, os.R_OK):  # here, for libraries have words of their own
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of ``pairs``, for ``object_pairs_hook`` of `json`. Raises ValueError for a key that stands twice.

    JSON does not say which of two values counts, and readers differ in it.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def wrong(error: ValidationError) -> str:
    """``gpu_time.kv_s must be greater than or equal to 0 (got -1)``; several mistakes are told by the first."""
    first = error.errors(include_url=False)[0]
    at = ".".join(map(str, first["loc"])) or "the file"
    kind = first["type"]
    if kind.startswith("missing"):
        return f"{at} is required"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{at} is unknown"
    if kind in ("dataclass_type", "dataclass_exact_type", "dict_type", "model_type"):
        return f"{at} must be an object"
    if kind == "json_invalid":
        return f"not JSON: {first['ctx']['error']}"
    if kind == "value_error":
        return f"{at} {first['ctx']['error']}"
    told = repr(first["input"])
    rule = first["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return f"{at} {rule} (got {told if len(told) <= _MOST else told[: _MOST - 3] + '...'})"
