"""What collectives between the GPUs of one host take by the size of a message, in CUDA graphs and launched one by one.

NCCL's, without NVLink's multicast (`backend.gpu.ranks`). Layers of a replica that shares its model make the first kind;
experts whose tokens are sent to them make the last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chairlift.backend.gpu.ranks import Ranks, Team

KINDS = ("all_reduce", "all_gather", "all_to_all")
SIZES = tuple(1024 * 4**i for i in range(10))  # bytes that each GPU gives: 1 KiB to 256 MiB
BYTES = 64 << 20  # that one timing moves: of small messages it is `MOST` in a row, of large ones one
MOST = 20
REPEATS = 9


_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13, before


class Times:
    """One GPU's part; all of them are asked for the same, in the same order."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device

    def once(self, kind: str, size: int) -> Tensor:
        """What this GPU has after a collective of ``size`` bytes, of which each GPU gives its number, from 1 on."""
        given, made = self._buffers(kind, size)
        given.fill_(self._ranks.rank + 1)
        self._collective(kind, given, made)
        return made

    def measure(self, kind: str, size: int, graph: bool) -> float:
        """Microseconds of one collective, the median of `REPEATS` timings of some in a row; ``graph``: captured."""
        given, made = self._buffers(kind, size)
        given.zero_()
        count = max(1, min(MOST, BYTES // size))

        def run() -> None:
            for _ in range(count):
                self._collective(kind, given, made)

        run()
        replay = _captured(run) if graph else run
        return statistics.median(self._took(replay) for _ in range(REPEATS)) / count

    def _buffers(self, kind: str, size: int) -> tuple[Tensor, Tensor]:
        """What is given and what comes of it, bfloat16: of a sum the same, of a gather as many shares as GPUs."""
        count = -(-size // 2 // self._ranks.count) * self._ranks.count
        given = torch.empty(count, dtype=torch.bfloat16, device=self._device)
        if kind == "all_reduce":
            return given, given
        return given, given.new_empty(count * (self._ranks.count if kind == "all_gather" else 1))

    def _collective(self, kind: str, given: Tensor, made: Tensor) -> None:
        if kind == "all_reduce":
            dist.all_reduce(given)
        elif kind == "all_gather":
            _gather(made, given)
        else:
            dist.all_to_all_single(made, given)

    def _took(self, run: Callable[[], Any]) -> float:
        if self._device.type == "cpu":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own threads go on
        run()
    graph.replay()
    torch.cuda.synchronize()
    replay: Callable[[], None] = graph.replay
    return replay


def rows(gpus: int, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """A row for each kind and size, between so many GPUs, or as many processes of a CPU, where no graphs are."""
    team = Team(gpus, device, Times)
    try:
        own = Times(Ranks(0, gpus), torch.device(device, 0) if device == "cuda" else torch.device(device))
        team.ready()
        for kind in KINDS:
            for size in SIZES:
                took = {}
                for name, graph in (("graph_us", True), ("eager_us", False)):
                    if graph and device != "cuda":
                        continue
                    team.tell("measure", kind, size, graph)
                    took[name] = round(own.measure(kind, size, graph), 1)
                yield {"bench": "collective", "kind": kind, "gpus": gpus, "bytes": size, **took}
    finally:
        team.close()
