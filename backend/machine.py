"""The memory of this machine, looked at before much of it is taken.

Linux hands out more memory than there is, and ends a process of its own choice once that is used: no MemoryError comes.
"""

from __future__ import annotations

from pathlib import Path

GIB = 2**30
MEMINFO = Path("/proc/meminfo")  # of Linux, proc(5)


def memory_to_give() -> int | None:
    """Bytes that new work may take, as Linux estimates them (``MemAvailable``); None where nothing says so."""
    try:
        told = MEMINFO.read_text(encoding="ascii")
        return int(told.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def check_memory(need: float, what: str) -> None:
    """Raise MemoryError, one sentence, unless the machine has ``need`` bytes to give; ``what`` needs them."""
    free = memory_to_give()
    if free is not None and need > free:
        raise MemoryError(
            f"{what} would take some {need / GIB:,.3g} GiB, and this machine has {free / GIB:,.3g} to give"
        )
