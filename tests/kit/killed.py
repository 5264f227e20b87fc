"""``python killed.py EVENT SIGNAL TOTAL COMMAND…``: Chairlift, which sends itself a signal at a change of the disk.

``EVENT`` counts what Python does to files and folders below the working directory (0: no signal); their number is
written to the file ``TOTAL`` at the end. A process that is started in the background of a shell ignores SIGINT, and so
would its children: here a signal does what it does in a terminal.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # a worker process imports this file
    for stops in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stops, signal.SIG_DFL)

import atexit
import os
import runpy
import sys
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "sqlite3.connect")


def main() -> None:
    event, number, total = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sys.argv = ["chairlift", *sys.argv[4:]]
    home, process, count = os.getcwd(), os.getpid(), 0

    def heard(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if name == "open":
            path, _mode, flags = arguments
            if not isinstance(path, str) or not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            if os.path.isabs(path) and not path.startswith(home):
                return
        elif name not in CHANGES:
            return
        if os.getpid() != process:
            return
        count += 1
        if count == event:
            os.kill(process, number)

    if total != "-":
        atexit.register(lambda: Path(total).write_text(str(count)))
    sys.addaudithook(heard)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_module("chairlift", run_name="__main__")


if __name__ == "__main__":
    main()
