"""Compile the core with mypyc: ``python .package/compile.py [--into FOLDER] [--optimise LEVEL]``.

Without ``--into`` the compiled modules are put beside their sources, where Python takes them first. With it, FOLDER
becomes a place to import the whole package from, and the checkout stays as it is.

Needs a C compiler and the extra ``fast``. It takes some three minutes. With ``--trained`` GCC compiles twice: the first
build counts which ways the code takes in small runs of the bench's cases, and the second is laid out by these counts
(profile-guided optimisation). It takes twice as long. Other compilers keep their counts differently: they build once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDERS = ("backend", "policies", "scenarios", "sim")
GROUP = "chairlift"  # of modules that are compiled together; its library lies beside the package

# What the core imports is looked at, not checked: `make types` does that.
CONFIGURATION = """[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-simpy.*]
follow_imports = skip
[mypy-pydantic.*]
follow_imports = skip
"""

SETUP = """import shutil, subprocess, sys
from mypyc.build import mypycify
from setuptools import setup
level, trained, *files = sys.argv[1:]
built = mypycify(["--config-file", "mypy.ini", *files], opt_level=level, debug_level="0", group_name="{group}")
# GCC looks for misleading indentation in generated code, 200,000 lines of it, for longer than it compiles.
heedless = [] if sys.platform == "win32" else ["-Wno-misleading-indentation"]
given = [([*one.extra_compile_args, *heedless], list(one.extra_link_args)) for one in built]
def build(compiling, linking):
    for one, (before, ahead) in zip(built, given, strict=True):
        one.extra_compile_args, one.extra_link_args = [*before, *compiling], [*ahead, *linking]
    setup(name="{group}-core", packages=[], ext_modules=built, script_args=["build_ext", "--inplace", "--force", "-j2"])
if trained == "trained":
    inlined = "-fno-semantic-interposition"  # no other library replaces its functions, so they may be inlined
    build([inlined, "-fprofile-generate", "-fprofile-update=single"], ["-fprofile-generate"])
    subprocess.run([sys.executable, "-m", "chairlift.sim.cli.bench", "--exercise"], check=True)
    build([inlined, "-fprofile-use", "-fprofile-partial-training", "-Wno-missing-profile"], [])
else:
    build([], [])
"""


def build(folder: Path, level: str, trained: bool = False) -> list[Path]:
    """Make ``folder`` a place to import the compiled package from; the libraries in it.

    Raises SystemExit with the compiler's last words if it fails.
    """
    sys.path.insert(0, str(HERE))
    from chairlift.sim.cli.compiled import MODULES  # from the sources beside

    package = folder / "chairlift"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "gallery")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    (package / "__init__.py").touch()  # the face imports what is not compiled
    (package / "py.typed").touch()
    (folder / "mypy.ini").write_text(CONFIGURATION)
    (folder / "setup.py").write_text(SETUP.format(group=GROUP))
    files = [f"chairlift/{name.replace('.', '/')}.py" for name in MODULES]
    done = subprocess.run(
        [sys.executable, "setup.py", level, "trained" if trained and _by_gcc() else "once", *files],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},  # what is trained is what was just built
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit("".join(done.stdout.splitlines(keepends=True)[-20:]) + "the core could not be compiled")
    for part in ("build", ".mypy_cache"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for face in (HERE / "chairlift").glob("*.py"):
        shutil.copy(face, package / face.name)
    return [path for path in folder.rglob("*") if path.suffix in (".so", ".pyd")]


def _by_gcc() -> bool:
    """Whether the compiler that Python's extensions are built with is GCC."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "")
    if not compiler:
        return False
    try:
        untranslated = {**os.environ, "LC_ALL": "C"}
        said = subprocess.run([*compiler, "-v"], capture_output=True, text=True, check=False, env=untranslated)
    except OSError:
        return False
    return "\ngcc version" in said.stderr


def main() -> None:
    """Compile, and say where to."""
    parser = argparse.ArgumentParser(description="Compile the core of Chairlift with mypyc.")
    parser.add_argument("--into", type=Path, help="a folder to make, for the whole package")
    parser.add_argument("--optimise", default="2", choices="0123", help="the C compiler's level (default 2)")
    parser.add_argument("--trained", action="store_true", help="laid out by what small runs do; twice the time")
    options = parser.parse_args()
    folder = options.into or ROOT / "build" / "core"
    libraries = build(folder.resolve(), options.optimise, options.trained)
    if options.into is None:
        for name in FOLDERS:  # what was compiled before, of modules that are compiled no longer too
            for library in (ROOT / name).rglob("*.so"):
                library.unlink()
        for library in libraries:
            place = library.relative_to(folder.resolve())
            shutil.copy(library, HERE / place)  # the folders of the package are links to those at the top
        shutil.rmtree(folder)
    sys.stdout.write(f"{len(libraries) - 1} modules are compiled\n")


if __name__ == "__main__":
    main()
