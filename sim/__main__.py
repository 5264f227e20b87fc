"""``python -m sim``: the same as ``chairlift``."""

from sim.cli import main

main()
