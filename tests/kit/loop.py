"""vLLM's loop with asynchronous scheduling, written down a second time: what engine timing is held to."""

from __future__ import annotations

from typing import NamedTuple

WHOLE = -1


class Work(NamedTuple):
    """One step: what the host and the GPU do for it, any unit of time."""

    schedule: float  # taking arrivals in included
    launch: float
    update: float
    gpu: float
    tail: float = WHOLE
    head: float = 0


class Loop:
    """The clocks of host and GPU. `turn` is one turn of the loop that schedules and launches a step."""

    def __init__(self, now: float = 0) -> None:
        self.now = now  # the host's clock: the next turn begins
        self.gpu_free = now
        self.flying: Work | None = None

    def turn(self, work: Work | None) -> float | None:
        """Launch ``work`` (None: there is nothing to schedule), then process what was in flight.

        Returns when that one's processing began; None if nothing was in flight.
        """
        ended = self.gpu_free  # the GPU's last step
        if work is not None:
            begun = self.now + work.schedule
            self.now = begun + work.launch
            if work.tail == WHOLE:
                self.gpu_free = max(ended, self.now) + work.gpu
            else:
                self.gpu_free = max(max(ended, begun + work.head) + work.gpu, self.now + work.tail)
        before, self.flying = self.flying, work
        if before is None:
            return None
        self.now = max(self.now, ended)
        done = self.now
        self.now += before.update
        return done
