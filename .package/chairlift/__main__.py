"""The command ``chairlift``, also as ``python -m chairlift``."""

from __future__ import annotations

import signal
import threading


def main() -> None:
    """The console script: `chairlift.sim.cli.main.main`. Ctrl-C while that is imported is silent, not a traceback."""
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from chairlift.sim.cli.main import main as command

    if ours:
        signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
