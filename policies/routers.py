"""Routers: which replica gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.base import ReplicaView, Request, Router


@dataclass
class RoundRobin(Router):
    """Deal requests out in turn, whatever the replicas' load."""

    turn: int = field(default=0, init=False)

    def route(self, request: Request, replicas: Sequence[ReplicaView]) -> int:
        """The next replica in turn."""
        chosen = self.turn % len(replicas)
        self.turn = chosen + 1
        return chosen
