"""Memory of each GPU of a replica that the others read: sums without a copy, taken by the kernel that needs them.

A small step waits for its sums more than it waits for what they move, and a large one for its passes over memory. So
each GPU writes its share of a product into memory that all have mapped (CUDA IPC, over NVLink). The norm that follows
reads all shares (`Share` in `backend.gpu.kernels.layers`). There are two places for shares, used in turn: whoever writes
one again has met all others at the other one since, so they have read it. Nothing here knows of NVLink's multicast.
"""

from __future__ import annotations

import cupy
import torch
import torch.distributed as dist
from torch import Tensor

from chairlift.backend.gpu.kernels.layers import Share
from chairlift.backend.gpu.ranks import Ranks

ROWS = 8192 + 256  # of the largest step that goes this way: a budget's prompts and decodes beside them
HEAD = 4096  # bytes at the start, for the flags by which GPUs meet (``Flags`` in ``layers.cu``)


class Exchange:
    """Room on every GPU for two shares of up to `ROWS` rows of ``width`` elements. All processes make it together."""

    def __init__(self, ranks: Ranks, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._ranks = ranks
        self.rows = rows = ROWS
        self._scales_at = [HEAD + i * 4 * rows for i in range(2)]
        self._values_at = [HEAD + 8 * rows + i * rows * width * dtype.itemsize for i in range(2)]
        size = HEAD + 8 * rows + 2 * rows * width * dtype.itemsize
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
        memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(self._own, size, self), 0)
        whole = torch.as_tensor(cupy.ndarray((size,), cupy.uint8, memory), device=device)
        self._scales = whole[HEAD : HEAD + 8 * rows].view(torch.float32).view(2, rows)
        self._values = whole[HEAD + 8 * rows :].view(dtype).view(2, rows, width)

    def share(self, place: int, rows: int, columns: Tensor | None) -> Share:
        """Where this GPU's share of ``rows`` rows goes; with ``columns`` it is before its scales, see `Share`."""
        scales = None if columns is None else self._scales[place, :rows]
        at = (self._values_at[place], self._scales_at[place])
        return Share(self._values[place, :rows], scales, columns, self._bases, self._ranks.rank, *at)

    def close(self) -> None:
        """Give the memory back; no kernel may use it any more."""
        with self._device:
            cupy.cuda.runtime.deviceSynchronize()
            for base in self._others:
                cupy.cuda.runtime.ipcCloseMemHandle(base)
            cupy.cuda.runtime.free(self._own)
