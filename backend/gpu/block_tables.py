"""The host's side of a paged KV cache: which row and which blocks each running sequence has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from chairlift.backend.base import Members, Prompt, Verified

Ints = npt.NDArray[np.int32]
Tokens = npt.NDArray[np.int64]


class Sequences:
    """Up to ``most`` sequences of ``longest`` tokens and padding in front, over ``blocks`` blocks of ``block`` tokens.

    With ``named`` blocks the scheduler's pool says which blocks a sequence has; else they are handed out here as tokens
    come. Padding in front of a sequence takes whole blocks of its table, but none of the pool: nothing is stored for it
    and nothing attends to it, so its cells name blocks of others, in turn. Row ``most`` belongs to no sequence: the
    rows that fill a batch up to a graph's size go there.
    """

    def __init__(self, most: int, blocks: int, block: int, longest: int, named: bool) -> None:
        self.most = most
        self.block = block
        self.longest = longest
        self.columns = 2 * -(-longest // block) + 1
        self._named = named
        self.table: Ints = np.zeros((most + 1, self.columns), dtype=np.int32)
        self.length: Ints = np.zeros(most, dtype=np.int32)  # tokens in KV, padding included
        self.first: Ints = np.zeros(most, dtype=np.int32)  # of those: padding, in front, to the end of a block
        self.row: dict[int, int] = {}  # request → its row of all these
        self.prompt: dict[int, Tokens] = {}
        self._rows = list(range(most - 1, -1, -1))  # free ones
        self._synced = [0] * most  # blocks of each row that its table has
        self._blocks = blocks
        self._padding = 0  # the block that the next cell of padding names
        self._free = list(range(blocks - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    def take(self, request: int, pad: int, prompt: Callable[[], Tokens]) -> int:
        """The row of ``request``, a free one if it has none yet.

        Raises RuntimeError when all are taken, or where ``pad`` tokens in front are more than a sequence can have.
        """
        row = self.row.get(request)
        if row is None:
            if not self._rows:
                raise RuntimeError(f"more than {self.most} sequences at once: raise the backend's max_batch")
            if pad > self.longest:
                raise RuntimeError(f"a padding of {pad} tokens: sequences have at most {self.longest}")
            row = self.row[request] = self._rows.pop()
            self.prompt[request] = prompt()
            self.first[row] = -(-pad // self.block) * self.block
        return row

    def release(self, request: int) -> None:
        """Give a request's row and blocks back, if it has any."""
        row = self.row.pop(request, None)
        if row is not None:
            self._rows.append(row)
            self._synced[row] = 0
            del self.prompt[request]
            self._free += reversed(self._owned.pop(request, []))

    def cover(self, request: int, tokens: int, members: Members) -> tuple[list[int], list[int]]:
        """Bring a request's table up to ``tokens`` tokens, padding included: cells that change, blocks that go there.

        A cell is ``row · columns + column``. Raises RuntimeError when the pool has no block for them.
        """
        row = self.row[request]
        done, upto = self._synced[row], -(-tokens // self.block)
        if upto <= done:
            return [], []
        padding = int(self.first[row]) // self.block
        more = self._borrowed(padding) if done < padding else []
        begin = done + len(more)
        if self._named:
            table = members.table(request)
            assert table is not None
            own = list(table[begin - padding : upto - padding])
        else:
            own = [self._free.pop() for _ in range(min(upto - begin, len(self._free)))]
            self._owned.setdefault(request, []).extend(own)
        more += own
        if len(more) < upto - done:
            if request not in members.dead:
                raise RuntimeError(f"request {request} has no block for its token {tokens - padding * self.block}")
            more += [int(self.table[row, done - 1])] * (upto - done - len(more))  # it overwrites what nobody needs
        self.table[row, done:upto] = more
        self._synced[row] = upto
        first = row * self.columns
        return list(range(first + done, first + upto)), more

    def renamed(self, request: int, table: Sequence[int]) -> tuple[list[int], list[int]]:
        """Let a request's table be ``table`` as far as it goes: cells that change, blocks that go there."""
        row = self.row.get(request)
        if row is None:
            return [], []
        padding = int(self.first[row]) // self.block
        done = self._synced[row]
        new = np.array(table[: max(0, done - padding)], dtype=np.int32)
        changed = np.flatnonzero(self.table[row, padding:done] != new) + padding
        self.table[row, padding:done] = new
        return (row * self.columns + changed).tolist(), self.table[row, changed].tolist()

    def _borrowed(self, count: int) -> list[int]:
        """Blocks for cells of padding: others each time, so that reading them is not made cheap by a cache."""
        found = [(self._padding + i) % self._blocks for i in range(count)]
        self._padding += count
        return found

    def slots(self, row: int, start: int, stop: int) -> Tokens:
        """Where tokens ``start`` … ``stop`` - 1 of a row are: ``block · block size + place in it``."""
        places = np.arange(start, stop)
        found: Tokens = self.table[row, places // self.block].astype(np.int64) * self.block + places % self.block
        return found

    def verify(
        self, decodes: Sequence[Verified], members: Members, passes: int
    ) -> tuple[Ints, Ints, Ints, list[int], list[int]]:
        """One more token for each of ``decodes``, and its drafts, at most `Verified.kept` of which stay.

        Of each decode its row, its first token's place among those of all and how many those are, ``[3, decodes]``; of
        each token its decode, position and slot, ``[3, tokens]``; cells of block tables that change, and what they
        become. Blocks are there for ``passes`` of a draft head too.
        """
        columns = np.array([(self.row[v.request], v.start, v.drafts, v.kept) for v in decodes], dtype=np.int32)
        row, start, drafts, kept = columns.reshape(-1, 4).T
        self.length[row] = start + 1 + kept
        upto = np.minimum(np.maximum(start + 1 + drafts, start + kept + passes), self.longest)
        cells: list[int] = []
        blocks: list[int] = []
        for i, need in enumerate((-(-upto // self.block)).tolist()):
            if need > self._synced[row[i]]:
                changed, more = self.cover(decodes[i].request, int(upto[i]), members)
                cells += changed
                blocks += more
        count = 1 + drafts
        first = np.cumsum(count) - count
        decode = np.repeat(np.arange(len(decodes)), count)
        position = start[decode] + np.arange(len(decode)) - first[decode]
        slot = self.table[row[decode], position // self.block] * self.block + position % self.block
        each = np.stack((row, first, count)).astype(np.int32)
        return each, np.stack((decode, position, slot)).astype(np.int32), start + kept, cells, blocks

    def decode(self, requests: Sequence[int], members: Members, staged: Ints) -> None:
        """One more token for each of ``requests``: write what the device needs of it into ``staged``.

        ``staged`` [6, most + 1]: rows, lengths, padding in front, positions, and the cells and blocks of tables that
        change; rows past the requests are nobody's.
        """
        rows, lengths, first, positions, cells, blocks = staged
        n = len(requests)
        rows[n:] = self.most
        lengths[n:] = first[n:] = positions[n:] = 0
        cells[:] = self.most * self.columns
        if n:
            row = self.row
            at = np.fromiter([row[r] for r in requests], dtype=np.int32, count=n)
            self.length[at] = np.minimum(self.length[at] + 1, self.first[at] + self.longest)  # beyond: the dead
            rows[:n], lengths[:n], first[:n] = at, self.length[at], self.first[at]
            positions[:n] = lengths[:n] - 1 - first[:n]
            for i in np.nonzero(lengths[:n] % self.block == 1)[0].tolist():
                changed, more = self.cover(requests[i], int(lengths[i]), members)
                if changed:
                    cells[i], blocks[i] = changed[0], more[0]


class Practice:
    """Members of a step of made-up requests, by which an engine is warmed up and timed.

    Where blocks are named, request -1 has all but the first three, and every other request has those three.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        decodes: Sequence[int] = (),
        longest: int = 100_000,
        verified: Sequence[Verified] = (),
    ) -> None:
        self.prompts, self.decodes, self.verified = prompts, decodes, verified
        self.dead: Sequence[int] = ()
        self._longest = longest  # tokens of a prompt; to make up more than are computed takes time

    def table(self, request: int) -> Sequence[int]:
        """Its blocks."""
        return range(3, 100_000) if request == -1 else range(3)

    def tokens(self, request: int) -> Tokens:
        """Some tokens, others for each request."""
        return np.arange(abs(request) * 7919, abs(request) * 7919 + self._longest)
