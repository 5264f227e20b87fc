"""A handful of requests at a cost that one can add up by hand: 100 ps a step and 1 ps a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from chairlift.backend.base import Backend, Batch, StepCost
from chairlift.policies.base import Scheduler
from kit.worlds import World, check_books, play, trace_of

Row = tuple[int, ...]  # arrival ps, prompt, output (, declared output; else the output)

PS_IN_MS = 1e-9


class TokenAPs(Backend):
    """100 ps a step and 1 ps a token."""

    def step(self, batch: Batch) -> StepCost:
        return StepCost(100 + sum(c.length for c in batch.prefills) + batch.decodes + batch.padded)


def serve(rows: Sequence[Row], policy: Callable[[], Scheduler], **world: Any) -> World:
    """Play ``rows`` on a pool of 1000 tokens, or as ``world`` says, and check the books."""
    names = ("priority", "tenant", "tenants", "prefix_group", "prefix_tokens")
    columns = {name: world.pop(name) for name in names if name in world}
    trace = trace_of([(row[0], row[1], row[2]) for row in rows], max_tokens=[row[-1] for row in rows], **columns)
    played = play(trace, policy, TokenAPs, **({"block_size": 1} | world))
    check_books(played)
    return played


def first(world: World) -> list[int]:
    return list(world.requests.first_token)


def finished(world: World) -> list[int]:
    return list(world.requests.finished)


def rows(world: World, *columns: str) -> list[tuple[int, ...]]:
    runs = world.engines[0].records.runs()
    return list(zip(*(runs[name].tolist() for name in columns), strict=True))
