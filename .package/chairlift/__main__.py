"""The command ``chairlift``, also as ``python -m chairlift``."""

from __future__ import annotations

import signal


def main() -> None:
    """The console script: `chairlift.sim.cli.main.main`. Ctrl-C while that is imported is silent, not a traceback.

    Until this is called Python answers Ctrl-C with a traceback, so nothing else is imported before.
    """
    ours = (before := signal.getsignal(signal.SIGINT)) is signal.default_int_handler
    if ours:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        except ValueError:
            ours = False  # not the main thread, which alone may say what a signal does
    from chairlift.sim.cli.main import main as command

    if ours:
        signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
