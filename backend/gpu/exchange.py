"""Memory of each GPU of a replica that the others read: sums without a copy, taken by the kernel that needs them.

A small step waits for its sums more than it waits for what they move, and a large one for its passes over memory.
So each GPU writes its share of a product into memory that all have mapped (CUDA IPC, over NVLink). The norm that
follows adds up all shares (`Share` in `backend.gpu.kernels.layers`). There are two places for shares, used in turn:
whoever writes one again has met all others at the other one since, so they have read it. Nothing here knows of NVLink's
multicast.
"""

from __future__ import annotations

import cupy
import torch
import torch.distributed as dist
from torch import Tensor

from chairlift.backend.gpu.kernels import kernel
from chairlift.backend.gpu.kernels.layers import Share, largest
from chairlift.backend.gpu.ranks import Ranks

ROWS = 8192 + 256  # of the largest step that goes this way: a budget's prompts and decodes beside them
HALVED = 4096  # rows from which two GPUs send each other halves, see `Exchange.half`
HEAD = 4096  # bytes at the start, for the flags by which GPUs meet (``Flags`` in ``layers.cu``)
FLAGS = 256  # bytes from those of whole shares to those of first halves, of second ones, and of likeliest tokens
SETS = 4  # of flags


class Exchange:
    """Room on every GPU for two shares of up to `ROWS` rows of ``width`` elements. All processes make it together.

    Two GPUs also have room for what the other sends: of a large step, whose sums are worth sending while the other half
    of its rows is computed.
    """

    def __init__(self, ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._ranks, self.rows = ranks, ROWS
        self.halved = HALVED if ranks.count == 2 else ROWS + 1
        self._row = width * dtype.itemsize
        shares = 2 * ROWS * self._row  # bytes
        self._scales, self._best, self._columns = HEAD, HEAD + 8 * ROWS, HEAD + 12 * ROWS  # where they begin
        self._values = HEAD + 16 * ROWS
        inbox = self._values + shares
        size = inbox + shares if ranks.count == 2 else inbox
        self._device = cupy.cuda.Device(device.index or 0)
        with self._device:
            self._own = cupy.cuda.runtime.malloc(size)
            cupy.cuda.runtime.memset(self._own, 0, size)
            handle = cupy.cuda.runtime.ipcGetMemHandle(self._own)
            mine = torch.tensor(list(handle), dtype=torch.uint8, device=device)
            handles = [torch.empty_like(mine) for _ in range(ranks.count)]
            dist.all_gather(handles, mine)
            bases = [
                self._own if i == ranks.rank else cupy.cuda.runtime.ipcOpenMemHandle(bytes(other.tolist()))
                for i, other in enumerate(handles)
            ]
        self._others = [base for i, base in enumerate(bases) if i != ranks.rank]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        sent = [self._own + (0 if i == ranks.rank else shares) for i in range(ranks.count)]
        self._sent = torch.tensor(sent, dtype=torch.int64, device=device)  # sources of halves
        self._inbox = self._others[0] + shares  # what is sent goes there, as far from it as it is here from the start
        memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(self._own, size, self), 0)
        whole = torch.as_tensor(cupy.ndarray((size,), cupy.uint8, memory), device=device)
        self._row_scales = whole[self._scales : self._best].view(torch.float32).view(2, ROWS)
        self._likeliest = whole[self._best : self._columns].view(torch.float32)
        self._likeliest_at = whole[self._columns : self._values].view(torch.int32)
        self._rows = whole[self._values : inbox].view(dtype).view(2, ROWS, width)
        self._met = torch.full((ranks.count,), 1 << 30, dtype=torch.int32).pin_memory()
        self._beside = torch.cuda.Stream(device, priority=-1)  # to tell the other is not to wait for a product

    def share(self, place: int, rows: int, columns: Tensor | None) -> Share:
        """Where this GPU's share of ``rows`` rows goes; with ``columns`` it is before its scales, see `Share`."""
        scales = None if columns is None else self._row_scales[place, :rows]
        at = (self._values + place * ROWS * self._row, self._scales + 4 * place * ROWS, 0)
        tables = (self._bases, self._bases, self._ranks.rank)
        return Share(self._rows[place, :rows], scales, columns, *tables, *at, ours=1)

    def half(self, place: int, rows: slice, second: bool) -> Share:
        """Where this GPU's share of these rows of a large step goes, scales applied; `send` it once it is there."""
        at = (self._values + (place * ROWS + rows.start) * self._row, 0, FLAGS * (1 + second))
        tables = (self._bases, self._sent, self._ranks.rank)
        return Share(self._rows[place, rows], None, None, *tables, *at, ours=0)

    def send(self, share: Share) -> None:
        """Copy a half to the other GPU while the current stream goes on, and tell it when that has been done."""
        self._beside.wait_stream(torch.cuda.current_stream())
        size = share.values.numel() * share.values.element_size()
        ends = (self._inbox + share.values_at, self._own + share.values_at)
        kind = cupy.cuda.runtime.memcpyDefault
        with torch.cuda.stream(self._beside):
            cupy.cuda.runtime.memcpyAsync(*ends, size, kind, self._beside.cuda_stream)
            run = kernel("layers", "tell_of_copy", early=False, BF16=1, PEERS=2)
            run((1,), 1, self._bases, share.rank, share.flags_at)

    def largest(self, scores: Tensor) -> Tensor:
        """`Ranks.largest`. Whoever writes scores again has met all others in a layer since, so they have read them."""
        rows, width = scores.shape
        largest(scores, self._ranks.rank * width, (self._likeliest[:rows], self._likeliest_at[:rows]))
        out = torch.empty(rows, dtype=torch.int32, device=scores.device)
        run = kernel("layers", "largest_of_all", BF16=1, PEERS=self._ranks.count)
        places = (self._best, self._columns, (SETS - 1) * FLAGS)
        run((-(-rows // 256),), 256, self._bases, self._ranks.rank, *places, out, rows)
        return out

    def give_up(self) -> None:
        """Let kernels of this GPU wait for nobody any more: another process has died, and they would wait for ever."""
        stream = torch.cuda.Stream(priority=-1).cuda_stream
        for flags in range(SETS):  # by copies, which find room on a GPU full of kernels that wait
            to, size = self._own + flags * FLAGS, 4 * len(self._met)
            cupy.cuda.runtime.memcpyAsync(to, self._met.data_ptr(), size, cupy.cuda.runtime.memcpyHostToDevice, stream)

    def close(self) -> None:
        """Give the memory back; no kernel may use it any more."""
        with self._device:
            cupy.cuda.runtime.deviceSynchronize()
            for base in self._others:
                cupy.cuda.runtime.ipcCloseMemHandle(base)
            cupy.cuda.runtime.free(self._own)
