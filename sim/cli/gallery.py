"""Pictures of the shipped scenarios' pages: ``make gallery``, or ``python -m chairlift.sim.cli.gallery [NAME …]``.

Runs each scenario as it ships, draws its page, and lets a Chromium without a window take a picture of its beginning,
into ``scenarios/gallery``. Scenarios that execute steps are left out: they need a GPU. Some ten minutes for all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.run import FEW
from chairlift.sim.cli.shipped import SCENARIOS, find_scenario, shipped
from chairlift.sim.cli.terminal import console, interruptible, terminable
from chairlift.sim.report import page
from chairlift.sim.results.reader import read
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Study

GALLERY = SCENARIOS / "gallery"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1200, 1180  # of the window, in pixels of the page
SCALES = (0.5, 0.45, 0.4, 0.35)  # of the picture, the first that keeps it small
MOST_BYTES = 60_000  # of a picture
LEAST_BYTES = 8_000  # a blank page is smaller
PATIENCE_S = 120


def main(arguments: list[str] | None = None) -> int:
    """Make the pictures; the exit status: 2 if there is no Chromium, or no such scenario."""
    parser = argparse.ArgumentParser(prog="python -m chairlift.sim.cli.gallery", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios; default: all that ship and need no GPU")
    parser.add_argument("--out", type=Path, default=GALLERY, help="where the pictures go (default scenarios/gallery)")
    options = parser.parse_args(arguments)
    out = console()
    try:
        browser = found()
        files = [find_scenario(name) for name in options.names] or list(shipped().values())
        options.out.mkdir(parents=True, exist_ok=True)
        for file in files:
            study = load(file)
            if any(setup.executes for setup in study.setups):
                out.print(f"{study.name}: left out, needs a GPU", style="dim")
                continue
            with tempfile.TemporaryDirectory() as folder:
                taken = picture(browser, drawn(study, Path(folder) / "run"), options.out / f"{study.name}.png")
            out.print(f"{study.name}: {taken / 1000:.0f} KB")
    except BadInput as error:
        for problem in error.problems:
            out.print(f"error: {problem}", markup=False)
        return 2
    return 0


def found() -> str:
    """The Chromium on PATH. Raises `BadInput` if there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        rule = f"no browser on PATH ({', '.join(BROWSERS)}): apt-get install chromium"
        raise BadInput(Problem(rule, file="make gallery"))
    return browser


def drawn(study: Study, folder: Path) -> Path:
    """The page of ``study``, which is run into ``folder``."""
    with Writer(folder, study) as writer:
        for setup in study.setups:
            writer.add(simulate(setup, journal=len(setup.trace) <= FEW))
    page.write(read(folder), folder / "report.html")
    return folder / "report.html"


def picture(browser: str, html: Path, png: Path) -> int:
    """Write a picture of the beginning of the page ``html`` to ``png``; its size in bytes.

    Raises `BadInput` if the browser takes none, or none that is small enough.
    """
    size = 0
    for scale in SCALES:
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
            command += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)  # root has none
            command += [f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={scale}"]
            command += ["--virtual-time-budget=20000", f"--screenshot={png}", html.resolve().as_uri()]
            png.unlink(missing_ok=True)
            try:
                subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
                size = png.stat().st_size
            except (OSError, subprocess.SubprocessError) as error:
                raise BadInput(Problem(f"the browser takes no picture: {error}", file=str(png))) from None
        if LEAST_BYTES <= size <= MOST_BYTES:
            return size
    png.unlink()
    raise BadInput(Problem(f"has {size:,} bytes, not {LEAST_BYTES:,} to {MOST_BYTES:,}", file=str(png)))


if __name__ == "__main__":
    with interruptible(), terminable():
        sys.exit(main())
