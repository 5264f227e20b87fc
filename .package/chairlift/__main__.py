"""``python -m chairlift`` is the command ``chairlift``."""

from chairlift.sim.cli.main import main

main()
