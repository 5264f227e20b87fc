"""The host's side of a paged KV cache: which row and which blocks each running sequence has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from backend.base import Members, Prompt

Ints = npt.NDArray[np.int32]
Tokens = npt.NDArray[np.int64]


class Sequences:
    """Up to ``most`` sequences over ``blocks`` blocks of ``block`` tokens, ``longest`` tokens each.

    With ``named`` blocks the scheduler's pool says which are whose; else they are handed out here as tokens come.
    Row ``most`` is nobody's: padding of a batch goes there.
    """

    def __init__(self, most: int, blocks: int, block: int, longest: int, named: bool) -> None:
        self.most = most
        self.block = block
        self.columns = -(-longest // block) + 1
        self._named = named
        self.table: Ints = np.zeros((most + 1, self.columns), dtype=np.int32)
        self.length: Ints = np.zeros(most, dtype=np.int32)  # tokens in KV, padding included
        self.first: Ints = np.zeros(most, dtype=np.int32)  # of those: padding, in front
        self.row: dict[int, int] = {}  # request → its row of all these
        self.prompt: dict[int, Tokens] = {}
        self._rows = list(range(most - 1, -1, -1))  # free ones
        self._synced = [0] * most  # blocks of each row that its table has
        self._free = list(range(blocks - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    def take(self, request: int, pad: int, prompt: Callable[[], Tokens]) -> int:
        """The row of ``request``, a free one if it has none yet. Raises RuntimeError when all are taken."""
        row = self.row.get(request)
        if row is None:
            if not self._rows:
                raise RuntimeError(f"more than {self.most} sequences at once: raise the backend's max_batch")
            row = self.row[request] = self._rows.pop()
            self.prompt[request] = prompt()
            self.first[row] = pad
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
        """Bring a request's table up to ``tokens`` tokens: the cells that change, and the blocks that go there.

        A cell is ``row · columns + column``.
        """
        row = self.row[request]
        done, upto = self._synced[row], -(-tokens // self.block)
        if upto <= done:
            return [], []
        if self._named:
            table = members.table(request)
            assert table is not None
            more = list(table[done:upto])
        else:
            more = [self._free.pop() for _ in range(done, upto)]
            self._owned.setdefault(request, []).extend(more)
        self.table[row, done:upto] = more
        self._synced[row] = upto
        first = row * self.columns
        return list(range(first + done, first + upto)), more

    def slots(self, row: int, tokens: int) -> Tokens:
        """Where the first ``tokens`` tokens of a row are: ``block · block size + place in it``."""
        places = np.arange(tokens)
        found: Tokens = self.table[row, places // self.block].astype(np.int64) * self.block + places % self.block
        return found

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
            self.length[at] += 1
            rows[:n], lengths[:n], first[:n] = at, self.length[at], self.first[at]
            positions[:n] = lengths[:n] - 1 - first[:n]
            for i in np.nonzero(lengths[:n] % self.block == 1)[0].tolist():
                changed, more = self.cover(requests[i], int(lengths[i]), members)
                if changed:
                    cells[i], blocks[i] = changed[0], more[0]


class Practice:
    """Members of a step of made-up requests, to warm an engine up and to time it.

    Where blocks are named, request -1 has all but the first three, and every other one those.
    """

    def __init__(self, prompts: Sequence[Prompt], decodes: Sequence[int] = ()) -> None:
        self.prompts, self.decodes = prompts, decodes
        self.dead: Sequence[int] = ()

    def table(self, request: int) -> Sequence[int]:
        """Its blocks."""
        return range(3, 100_000) if request == -1 else range(3)

    def tokens(self, request: int) -> Sequence[int]:
        """Some tokens, others for each request."""
        return range(abs(request) * 7919, abs(request) * 7919 + 100_000)
