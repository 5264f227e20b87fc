"""Files that are written whole or not at all: no reader, interrupt or crash finds half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. The file takes the place of ``path`` at the end, or goes if that fails.

    Each process has a file of its own, so that several may write the same ``path``: the last one stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
