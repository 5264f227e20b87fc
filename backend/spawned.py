"""Processes beside this one. They are spawned, not forked, on every system, and end with the one that started them.

Interrupts are not their business.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

SPAWN = get_context("spawn")
_ENDING = (signal.SIGINT, signal.SIGTERM)


def spawned(target: Callable[..., None], *arguments: Any) -> SpawnProcess:
    """Start a daemon that calls ``target(*arguments)``, which must be picklable.

    It hears no SIGINT, from its first instruction on: Ctrl-C reaches all processes of a terminal, and each would print
    a traceback. A SIGINT or SIGTERM that comes while it starts takes effect once it has started, and ends it: a process
    that was given half of what it needs prints a traceback too. It ends as soon as this process has, in the midst of
    whatever it does.
    """
    process = SPAWN.Process(target=_begun, args=(target, arguments), daemon=True)
    try:
        with _whole():
            process.start()
    except BaseException:
        if process.pid is not None:
            process.kill()
        raise
    return process


def _begun(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where nothing could be blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _whole() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block, and what is started inside hear no SIGINT."""
    came: list[signal.Signals] = []

    def again() -> None:
        for number in came:
            signal.raise_signal(number)

    with ExitStack() as after:  # whose last comes first, and all of which comes though one raises
        after.callback(again)
        if threading.current_thread() is threading.main_thread():  # signals are handled nowhere else
            for number in _ENDING:
                handler = signal.getsignal(number)
                if callable(handler):  # else the system handles it, or nobody
                    after.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, _: came.append(signal.Signals(number)))
        if hasattr(signal, "pthread_sigmask"):  # Windows has none
            # Python starts this process with the first one that is spawned, and unblocks SIGINT then.
            resource_tracker.ensure_running()
            # A process inherits this. It does not keep the signal from here: the system gives it to another thread.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            after.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        yield
