"""Files that others wrote: whether one can be read to its end, and the first thing that is wrong with what it holds."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a machine that only measures lacks it
    from pydantic import ValidationError

MOST_TEXT = 1 << 26  # bytes of a document that a person may have written; longer than any, and read in seconds
_MOST = 60  # characters of a value that are shown


def a_file(path: Path, most: int | None = None) -> Path:
    """``path``, if reading it comes to an end: a file, of at most ``most`` bytes; folders are left to the caller.

    A pipe that nobody writes to would keep its reader for ever, and /dev/zero fill all memory. Raises OSError, whose
    ``strerror`` is one sentence.
    """
    try:
        found = path.stat()
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    if most is not None and stat.S_ISREG(found.st_mode) and found.st_size > most:
        rule = f"is {found.st_size:,} bytes long; such a file has at most {most:,}"
        raise OSError(errno.EFBIG, rule, str(path))
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
