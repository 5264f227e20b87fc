"""A file is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from chairlift.sim.atomic import replacing


def test_what_stood_there_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert (path.read_text(), partial.parent) == ("old", tmp_path)

    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("how", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, how: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise how

    with pytest.raises(type(how)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error_and_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"
