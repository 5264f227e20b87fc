"""The file in which a sweep writes each result down as it comes: one line of JSON a run, only ever added to.

A line is there whole or not at all: a start drops what a crash left half written. Two writers at once are refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem

try:
    import fcntl
except ImportError:  # no such thing on Windows: there nobody watches over two writers
    fcntl = None  # type: ignore[assignment]


class Journal:
    """Results by key, on disk. Raises `BadInput` if ``path`` cannot be written, or if another process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise BadInput(Problem(f"cannot be written: {error.strerror or error}", file=str(path))) from None
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise BadInput(Problem("another process is writing here", file=str(path))) from None
        self._read()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._known[entry.pop("key")] = entry
            except (ValueError, KeyError, AttributeError):
                self._file.close()
                rule = "not a line of a sweep's journal: move the file away to start anew"
                raise BadInput(Problem(rule, str(self.path), number)) from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was written down under ``key``, the key with it; None: nothing."""
        known = self._known.get(key)
        return None if known is None else {"key": key, **known}

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Write ``entry`` down; it is in the hands of the system when this returns, also if the process is killed."""
        rest = {name: value for name, value in entry.items() if name != "key"}
        self._file.write(json.dumps({"key": key, **rest}).encode() + b"\n")
        self._file.flush()
        self._known[key] = rest

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
