"""``make gallery``: pictures of pages, and those that lie in ``scenarios/gallery``."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from chairlift.sim.cli import gallery
from chairlift.sim.cli.shipped import SCENARIOS, shipped
from chairlift.sim.scenario.load import load
from kit.command import SCENARIO

README = (SCENARIOS / "README.md").read_text(encoding="utf-8")
PICTURED = {
    path.stem: path for path in shipped().values() if not any(setup.executes for setup in load(path).setups[:1])
}


def size(png: Path) -> tuple[int, int]:
    """Width and height that the header of a PNG file says."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_without_a_browser_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert gallery.main(["failures", "--out", str(tmp_path)]) == 2
    assert "no browser on PATH (chromium, " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not any(map(shutil.which, gallery.BROWSERS)), reason="no chromium here: apt-get install chromium")
def test_a_picture_is_taken_of_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(SCENARIO)

    assert gallery.main([str(tmp_path / "small.yaml"), "hardware_check", "--out", str(tmp_path / "out")]) == 0
    assert "hardware_check: left out, needs a GPU" in capsys.readouterr().out
    [png] = (tmp_path / "out").iterdir()
    assert png.name == "small.png"
    assert size(png) == (600, 590)
    assert gallery.LEAST_BYTES <= png.stat().st_size <= gallery.MOST_BYTES


@pytest.mark.parametrize("name", PICTURED)
def test_every_scenario_has_its_picture(name: str) -> None:
    png = SCENARIOS / "gallery" / f"{name}.png"
    file = PICTURED[name].relative_to(SCENARIOS).as_posix()

    width, height = size(png)
    assert width >= 400
    assert height / width == pytest.approx(gallery.HEIGHT / gallery.WIDTH, rel=0.01)
    assert png.stat().st_size <= 60_000
    assert f"[![{name}](gallery/{name}.png)]({file})" in README


def test_there_is_no_other_picture() -> None:
    assert {png.stem for png in (SCENARIOS / "gallery").iterdir()} == set(PICTURED)
