"""What a comparison says of the loops that its engines ran (`sim.study.Setup.loop`)."""

from __future__ import annotations

from collections.abc import Iterable

LOOPS = ("synchronous", "asynchronous", "mixed")


def warning(ran: Iterable[tuple[str, str]]) -> str:
    """A sentence where not all (name, loop) of ``ran`` are of one loop; else "". Loops that are "" are not known."""
    names: dict[str, dict[str, None]] = {}
    for name, loop in ran:
        if loop:
            names.setdefault(loop, {})[name] = None
    if len(names) < 2:
        return ""
    told = "; ".join(f"{loop}: {', '.join(found)}" for loop, found in names.items())
    return (
        f"not all run the same engine loop ({told}); an engine that plans a step ahead does not wait for its host, and "
        "sees arrivals a step later, so part of the difference is the loop's and not the policy's"
    )
