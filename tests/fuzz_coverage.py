"""Mutations led by coverage: ``python tests/fuzz_coverage.py SECONDS [WORD]`` for so long, with Atheris.

Atheris (``pip install atheris``, Linux, CPython up to 3.13) mutates bytes towards code that none has reached yet. The
first byte chooses the reader (`kit.readers`), the others are its file. Anything but an answer, a refusal in words or a
run that completes nothing is printed, with the file's bytes, and counted; it goes on after each. ``WORD`` keeps to the
readers whose names hold it.
"""

from __future__ import annotations

import gzip
import importlib
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["chairlift"]):
    import chairlift

    for module in pkgutil.walk_packages(chairlift.__path__, "chairlift."):
        if re.match(r"chairlift\.(sim|policies|backend)\b(?!\.(gpu|recorder\.vllm))", module.name):
            importlib.import_module(module.name)
    from kit.damage import Packed
    from kit.readers import WRONG, Reader, table, tried

SLOW = ("page:", "plan: journal")  # readers that take a tenth of a second
LONGEST = 6000  # bytes of a file


def main() -> None:
    seconds, word = int(sys.argv[1]), "".join(sys.argv[2:3])
    readers = [reader for reader in table(word) if not reader.name.startswith(SLOW) and len(reader.good) <= LONGEST]
    folder = Path(tempfile.mkdtemp())
    corpus, work = folder / "corpus", folder / "work"
    corpus.mkdir()
    work.mkdir()
    for number, reader in enumerate(readers):
        (corpus / f"{number:03d}").write_bytes(bytes([number]) + _unpacked(reader))
    os.chdir(work)
    counts = Counter[str]()
    seen = set[str]()
    end = time.monotonic() + seconds

    def one(data: bytes) -> None:
        if time.monotonic() > end:
            told = ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))
            sys.stdout.write(f"{len(readers)} readers, {counts.total():,} files: {told}\n")
            sys.stdout.flush()
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(sum(counts[kind] for kind in WRONG) > 0)
        if len(data) < 2:
            return
        reader = readers[data[0] % len(readers)]
        content = data[1:]
        found = tried(reader, gzip.compress(content, 1) if isinstance(reader.how, Packed) else content)
        counts[found.kind] += 1
        last = re.sub(r"\W|\d", "", f"{reader.name} {found.told.strip().rpartition(chr(10))[2]}")[:90]
        if found.kind in WRONG and last not in seen:  # each kind once
            seen.add(last)
            sys.stdout.write(f"{reader.name}: {found.kind}: {content!r}\n{found.told}\n")
            sys.stdout.flush()

    atheris.Setup([sys.argv[0], str(corpus), f"-max_len={LONGEST}", "-timeout=600", "-rss_limit_mb=6000"], one)
    atheris.Fuzz()


def _unpacked(reader: Reader) -> bytes:
    return gzip.decompress(reader.good) if isinstance(reader.how, Packed) else reader.good


if __name__ == "__main__":
    main()
