"""The file in which a sweep writes each result down as it comes: ``journal.sqlite`` in the sweep's folder.

SQLite's write-ahead log keeps what was written when the process is killed, and repairs itself at the next start. Its
lock lasts as long as the `Journal`: two writers at once are refused, also on Windows. A crash of the machine may lose
the last results, which then run once more, and no others.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chairlift.sim.bad_input import BadInput, Problem, saving

NAME = "journal.sqlite"
_BEFORE = "journal.jsonl"  # its name up to version 0.1.0 of Chairlift
_DAMAGED, _ANEW = "is no journal of a sweep, or damaged", ": move the file away to start anew"
_OURS = 0x43484C46  # "CHLF", SQLite's application_id: tells our file from other people's


class Journal:
    """Results by key, on disk in ``folder``, which is made if need be.

    Raises `BadInput` if the file cannot be written, if another process writes it, if it is no journal or a damaged
    one, or if the folder holds a journal of a Chairlift that wrote JSON. Rows of that one stand for other code, so
    no run would use them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        if (folder / _BEFORE).exists():
            rule = "its rows are an earlier Chairlift's, and none stands for today's code: delete it to start anew"
            raise BadInput(Problem(rule, file=str(folder / _BEFORE)))
        with saving(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._rows = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            with self._told():
                self._open()
        except BadInput:
            self._rows.close()
            raise

    def _open(self) -> None:
        """Take the lock, and make or check the table."""
        rows = self._rows
        rows.execute("PRAGMA locking_mode = EXCLUSIVE")  # what the next line locks stays locked until it is closed
        rows.execute("BEGIN EXCLUSIVE")
        [made_by] = rows.execute("PRAGMA application_id").fetchone()
        if made_by != _OURS:
            if rows.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                raise BadInput(Problem(f"is no journal of a sweep{_ANEW}", str(self.path)))
            rows.execute(f"PRAGMA application_id = {_OURS}")
            rows.execute("CREATE TABLE results (key TEXT PRIMARY KEY, entry TEXT NOT NULL)")
        rows.execute("COMMIT")
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute("PRAGMA synchronous = NORMAL")  # a row does not wait for the disk
        [said] = rows.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise BadInput(Problem(f"{_DAMAGED} ({said.splitlines()[-1]}){_ANEW}", str(self.path)))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says is wrong, as `BadInput`."""
        try:
            yield
        except sqlite3.Error as error:
            code = (
                getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            )  # higher bits say more; text that is no UTF-8 has no code
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                rule = "another process is writing here"
            elif code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                rule = f"{_DAMAGED} ({error}){_ANEW}"
            else:
                rule = f"cannot be written: {error}"
            raise BadInput(Problem(rule, file=str(self.path))) from None

    def __len__(self) -> int:
        with self._told():
            [count] = self._rows.execute("SELECT count(*) FROM results").fetchone()
            return int(count)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was written down under ``key``, the key with it; None: nothing."""
        with self._told():
            found = self._rows.execute("SELECT entry FROM results WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        try:
            return {"key": key, **json.loads(found[0])}
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(Problem(f"{_DAMAGED} ({error}){_ANEW}", str(self.path))) from None

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Write ``entry`` down in place of what was there; it stays when this returns and the process is killed."""
        text = json.dumps({name: value for name, value in entry.items() if name != "key"})
        with self._told():
            self._rows.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Let others write."""
        with self._told():
            self._rows.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
