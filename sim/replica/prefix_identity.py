"""Which blocks of a trace's requests hold the same tokens.

A trace has no token ids. What two blocks need to be equal, they and all before them, is told from what a trace does
say: ids of its own (Mooncake), a shared prefix of a group, or a session whose next prompt begins with the last one
and its answer. Every other block is its request's own, found again only by itself after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chairlift.policies.base import FOREVER
from chairlift.sim.workload.trace import Trace, named_tokens, streams

OWN, GROUP, SESSION, HASHED = range(4)
INDEX_BITS = 24  # blocks a request can have


class Identity:
    """Which blocks of a trace's requests are equal: `key` gives equal ones, in equal places, the same integer.

    The blocks that another request can have too come first in a request; ``shareable[i]`` counts those of row i.
    ``ahead``: tokens behind a block that must be equal as well. In three steps, with blocks of 4 tokens and one ahead:
    two prompts have their first 8 tokens in common; their first blocks and the token behind each are equal; the token
    behind their second blocks is not, so only the first is the same block.
    """

    def __init__(self, trace: Trace, block_size: int, ahead: int = 0) -> None:
        self.block_size = block_size
        self.ahead = ahead
        n = len(trace)
        self._group: list[int] = [-1] * n if trace.prefix_group is None else trace.prefix_group.tolist()
        self._stream = streams(trace)
        self._hash_block = trace.hash_block
        self._hashes: list[int] = []
        self._offsets: list[int] = [0] * (n + 1)
        shareable = np.zeros(n, dtype=np.int64)
        if trace.prefix_group is not None and trace.prefix_tokens is not None:
            shareable = np.where(trace.prefix_group >= 0, np.maximum(trace.prefix_tokens - ahead, 0), 0) // block_size
        self._hashed: list[int] = [0] * n  # leading blocks that an id of the trace names
        if trace.hash_ids is not None:
            self._hashes = trace.hash_ids.values.tolist()
            self._offsets = trace.hash_ids.offsets.tolist()
            covered = np.maximum(named_tokens(trace) - ahead, 0) // block_size
            self._hashed = covered.tolist()
            shareable = np.maximum(shareable, covered)
        if self._stream is not None:
            shareable = np.where(np.array(self._stream) >= 0, 1 << INDEX_BITS, shareable)
        self.shareable: list[int] = shareable.tolist()
        self._common: dict[tuple[int, int], list[int]] = {}  # group or stream, which of them → its keys, from block 0

    @property
    def answers_too(self) -> bool:
        """Whether blocks with generated tokens can be shared: only sessions do so."""
        return self._stream is not None

    def streams(self, request: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A request's tokens, prompt and answer, as streams and where each stops: as (1, 2), (512, 4096).

        Two requests have the same token at a place if they are on the same stream there. The last stream has no end.
        """
        size = self.block_size
        streams, stops = [], []
        named = self._hashed[request] * size
        for at in range(0, named, self._hash_block):
            streams.append(self._hashes[self._offsets[request] + at // self._hash_block] << 2 | HASHED)
            stops.append(min(at + self._hash_block, named))
        shared = self.shareable[request] * size
        if shared > named:
            stream = -1 if self._stream is None else self._stream[request]
            streams.append(stream << 2 | SESSION if stream >= 0 else self._group[request] << 2 | GROUP)
            stops.append(shared)
        streams.append(request << 2 | OWN)
        stops.append(FOREVER)
        return tuple(streams), tuple(stops)

    @staticmethod
    def shares(trace: Trace) -> bool:
        """Whether any two requests of ``trace`` can have a block in common."""
        if trace.hash_ids is not None and len(np.unique(trace.hash_ids.values)) < len(trace.hash_ids.values):
            return True
        if trace.prefix_group is not None and _repeats(trace.prefix_group):
            return True
        return trace.session is not None and _repeats(trace.session)

    def tokens(self, request: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Numbers for the first ``count`` tokens of a request: equal in two requests where their blocks' keys are.

        So are the tokens ``ahead`` of such blocks.
        """
        size, ahead = self.block_size, self.ahead
        keys = np.array([self.key(request, block) for block in range(-(-count // size))], dtype=np.uint64)
        of = np.append(keys[:1].repeat(ahead), np.repeat(keys, size))[:count]
        each = (of << np.uint64(8)) + np.arange(count, dtype=np.uint64) % np.uint64(size)
        each = (each ^ (each >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's mixing (Steele 2014)
        each = (each ^ (each >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers: np.ndarray[tuple[int], np.dtype[np.int64]] = (each >> np.uint64(1)).astype(np.int64)
        return numbers

    def named(self, request: int) -> int:
        """Leading tokens of a request whose blocks ids of the trace name."""
        return self._hashed[request] * self.block_size

    def earlier_turns(self) -> dict[int, list[int]]:
        """For each request whose prompt repeats earlier ones of its session and their answers: those, in order."""
        found: dict[int, list[int]] = {}
        latest: dict[int, int] = {}  # stream → its latest request
        for request, stream in enumerate(self._stream or ()):
            if stream >= 0:
                if (before := latest.get(stream)) is not None:
                    found[request] = [*found.get(before, ()), before]
                latest[stream] = request
        return found

    def share(self, request: int, blocks: int) -> None:
        """Let others have only the first ``blocks`` blocks of a request, and those that ids of the trace name."""
        self.shareable[request] = max(blocks, self._hashed[request])

    def key(self, request: int, block: int) -> int:
        """An integer for block number ``block`` (from 0, full) of a request, its row in the trace."""
        if block < self._hashed[request]:  # an id stands for all before it too
            at = self._offsets[request] + ((block + 1) * self.block_size - 1 + self.ahead) // self._hash_block
            return (self._hashes[at] << INDEX_BITS | block) << 2 | HASHED
        if block >= self.shareable[request]:
            return (request << INDEX_BITS | block) << 2 | OWN
        if self._stream is not None and self._stream[request] >= 0:
            return (self._stream[request] << INDEX_BITS | block) << 2 | SESSION
        return (self._group[request] << INDEX_BITS | block) << 2 | GROUP

    def keys(self, request: int, begin: int, end: int) -> Sequence[int]:
        """`key` of the blocks ``begin`` to ``end - 1`` of a request; a group or session works its own out once."""
        if self._hashed[request] or end > self.shareable[request]:
            return [self.key(request, block) for block in range(begin, end)]
        kind, number = GROUP, self._group[request]
        if self._stream is not None and self._stream[request] >= 0:
            kind, number = SESSION, self._stream[request]
        common = self._common.setdefault((kind, number), [])
        if end > len(common):
            common.extend((number << INDEX_BITS | block) << 2 | kind for block in range(len(common), end))
        return common[begin:end]


def _repeats(column: np.ndarray[tuple[int], np.dtype[np.signedinteger]]) -> bool:
    given = column[column >= 0]
    return len(np.unique(given)) < len(given)
