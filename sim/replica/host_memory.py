"""Host memory beside a replica: where swapped KV lies, and what moving it costs."""

from __future__ import annotations

from chairlift.policies.base import PolicyError
from chairlift.sim.replica.request import Live

PS_PER_GB_S = 1000  # ps a byte at 1e9 bytes a second


class HostMemory:
    """Room for ``blocks`` KV blocks, each of which takes ``block_ps`` ps to move in or out.

    A swapped request's blocks move all together, before the step that is being planned (as in vLLM V0, whose copies
    and kernels share a stream), or beside it where the policy says `Scheduler.overlaps_swaps`; what does not fit
    beside it makes the step longer. In and out are then at once: the link is duplex.
    """

    __slots__ = ("_block_size", "_incoming", "_outgoing", "_overlaps", "block_ps", "blocks", "busy", "free")

    def __init__(self, blocks: int = 0, block_ps: int = 0, block_size: int = 1, overlaps: bool = False) -> None:
        self.blocks = blocks
        self.block_ps = block_ps
        self.free = blocks
        self.busy = False  # blocks are to be moved with the next step
        self._block_size = block_size
        self._overlaps = overlaps
        self._outgoing = 0  # blocks that leave before the next step
        self._incoming = 0

    def put(self, request: Live, tokens: int) -> bool:
        """Take in the KV of a preempted request's first ``tokens`` tokens; False if there is no room."""
        blocks = -(-tokens // self._block_size)
        if not 0 < blocks <= self.free:
            return False
        self.free -= blocks
        self._outgoing += blocks
        self.busy = True
        request.swap_out(tokens)
        return True

    def fetch(self, request: Live) -> None:
        """A swapped request starts again: its KV moves back."""
        self._incoming += -(-request.in_host // self._block_size)
        self.busy = True
        self.drop(request)

    def drop(self, request: Live) -> None:
        """A request's swapped KV is of no more use."""
        self.free += -(-request.in_host // self._block_size)
        request.swap_in()

    def delay(self, step_ps: int) -> int:
        """By how much the moves that are due lengthen a step of ``step_ps``; they are then done."""
        outgoing, incoming = self._outgoing, self._incoming
        self._outgoing = self._incoming = 0
        self.busy = False
        if self._overlaps:
            return max(0, max(outgoing, incoming) * self.block_ps - step_ps)
        return (outgoing + incoming) * self.block_ps


class NoLink(HostMemory):
    """Host memory behind a link whose speed nobody gave: KV cannot be swapped to it."""

    __slots__ = ()

    def put(self, request: Live, tokens: int) -> bool:
        """Raises `PolicyError`: nobody can say how long the move takes."""
        raise PolicyError("a policy swaps KV to host memory, but host_gb_per_s of the GPU is unknown: give it")


def host_memory(
    gib: float, kv_bytes_per_token: int, gb_per_s: float | None, block_size: int, overlaps: bool = False
) -> HostMemory:
    """``gib`` of host memory for each GPU, whose part of a token's KV is ``kv_bytes_per_token``.

    ``gb_per_s``: what each GPU's link moves in one direction, 1e9 bytes a second; the GPUs of a replica move their
    parts at the same time. None: unknown (`NoLink`).
    """
    if gb_per_s is None:
        return NoLink(block_size=block_size)
    block = kv_bytes_per_token * block_size
    return HostMemory(int(gib * 2**30) // block, round(block / gb_per_s * PS_PER_GB_S), block_size, overlaps)
