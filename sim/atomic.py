"""Files and folders that are written whole or not at all: no reader, interrupt or crash finds half of one."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast


class Busy(OSError):
    """Another process holds the lock."""

    def __init__(self) -> None:
        super().__init__("another process is writing here")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to. The file takes the place of ``path`` at the end, or goes if that fails.

    Each process has a file of its own, so that several may write the same ``path``: the last one stays. What is no
    file of its own (a pipe, a device, a link) is not replaced but written to.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all. Raises OSError."""
    with writing(path) as file:
        file.write(text)


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """A file of text that becomes ``path``, whole or not at all; gzipped where the name ends so. Raises OSError."""
    with replacing(path) as partial, partial.open("wb") as raw:
        # gzip would write the name of the partial file, and the time, into its header
        packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(cast("IO[bytes]", packed), encoding="utf-8", newline="") as file:
            yield file


class NewFolder:
    """A folder that is filled beside ``folder`` and takes its place in one go.

    Until `commit` all is written to ``path``, a hidden folder beside; ``folder`` stays as it was. `commit` swaps the
    two and takes over what in the old folder is not one of ``made``, the names that such a folder consists of.
    `abandon` throws ``path`` away. A process that is killed leaves the old folder, or the new one, whole: the next
    `NewFolder` of the same ``folder`` ends what the killed one had begun.

    One process at a time fills a folder. Raises `Busy` if another does, and OSError if something cannot be written or
    must not be replaced: a folder that the process works in, or one with a folder where a file of ``made`` belongs.
    """

    def __init__(self, folder: Path, made: Collection[str]) -> None:
        self._folder = folder.resolve()
        self._made = made
        if self._folder in (here := Path.cwd().resolve(), *here.parents):
            raise OSError("it is the working directory, or holds it: name a folder below")
        beside = self._folder.parent
        beside.mkdir(parents=True, exist_ok=True)
        self.path = beside / f".{self._folder.name}.partial"
        self._old = beside / f".{self._folder.name}.old"
        self._lock = _Lock(beside / f".{self._folder.name}.lock")
        try:
            self._recover()
            if self._folder.exists():
                self._check()
            if self.path.exists():  # of a process that was killed
                shutil.rmtree(self.path)
            self.path.mkdir()
        except BaseException:
            self._lock.release()
            raise

    def commit(self) -> None:
        """Let the new folder take the place of the old one."""
        try:
            if self._folder.exists():
                os.rename(self._folder, self._old)
            os.rename(self.path, self._folder)
        finally:
            try:
                self._recover()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Throw the new folder away, if it is not in place yet, and let others write."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _check(self) -> None:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name in self._made and entry.is_dir() and Path(entry.name).suffix:
                    raise OSError(f"{entry.name} is a folder there")

    def _recover(self) -> None:
        """End a swap that was begun: the old folder comes back, or hands over what is not of ``made`` and goes."""
        if not self._old.exists():
            return
        if not self._folder.exists():
            os.rename(self._old, self._folder)
            return
        for entry in sorted(self._old.iterdir()):
            if entry.name not in self._made:
                os.rename(entry, self._folder / entry.name)
        shutil.rmtree(self._old)


class _Lock:
    """The right to write, which ends with the process. Raises `Busy` if another process has it, and OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has = True
        while True:
            try:
                self._held = sqlite3.connect(path, timeout=0, isolation_level=None)
            except sqlite3.Error as error:
                raise OSError(str(error)) from None
            try:
                self._held.execute("BEGIN EXCLUSIVE")  # SQLite knows how to lock a file, on every system
            except sqlite3.Error as error:
                self._held.close()
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise Busy from None
                raise OSError(str(error)) from None
            if path.exists():
                return
            self._held.close()  # the one who had it removed the file after this process had opened it: once more

    def release(self) -> None:
        """Let others have it; a second call does nothing."""
        if self._has:
            self._has = False
            with suppress(OSError):  # Windows removes no file that is open
                self._path.unlink(missing_ok=True)
            self._held.close()
