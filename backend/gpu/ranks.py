"""One replica over several GPUs of a host: a process a GPU, the scheduler's process being the first.

Tensor parallelism is as in Megatron-LM (Shoeybi et al. 2019): each GPU has its share of the heads and of the MLP's
width, and two sums a layer bring the shares together. Experts are shared out whole (expert parallelism): all GPUs route
all tokens and each computes its own experts; the sum that follows a layer adds them up. The head's vocabulary is cut
too; the likeliest token is the likeliest of every GPU's likeliest. Collectives are NCCL's where `backend.gpu.exchange`
has no room, so in no captured graph: NCCL gives up those that wait for a process that has died once no graph is left.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from chairlift.backend.base import DeviceError
from chairlift.backend.gpu.kernels.layers import TOP, Eights, largest, quantised
from chairlift.backend.spawned import SPAWN, spawned

if TYPE_CHECKING:
    from chairlift.backend.gpu.paged_attention import Heads


@dataclass(frozen=True)
class Ranks:
    """Which of ``count`` GPUs this process has."""

    rank: int = 0
    count: int = 1

    def heads(self, heads: Heads) -> Heads:
        """This GPU's heads. A KV head is on several GPUs where there are more GPUs than KV heads."""
        return heads._replace(query=heads.query // self.count, kv=max(1, heads.kv // self.count))

    def part(self, size: int, each: int = 1) -> slice:
        """This GPU's part of ``size`` things of ``each`` numbers; of fewer than GPUs, the one that it shares."""
        if size >= self.count:
            own = size // self.count
            return slice(self.rank * own * each, (self.rank + 1) * own * each)
        at = self.rank * size // self.count
        return slice(at * each, (at + 1) * each)

    def sum(self, x: Tensor) -> Tensor:
        """``x``, in place, added up over all GPUs."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def quantised(self, weight: Tensor) -> Eights:
        """Of rows of which every GPU has a part, this one's in 8-bit floats; a row's scale is the same on all."""
        if self.count == 1:
            return quantised(weight)
        top = weight.float().abs().amax(-1).clamp(min=1e-12)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        scale = top / TOP
        return Eights((weight.float() / scale[:, None]).clamp(-TOP, TOP).to(torch.float8_e4m3fn), scale)

    def largest(self, scores: Tensor) -> Tensor:
        """For each row the column of its largest score, int32; columns are counted over the shares of all GPUs."""
        best, at = largest(scores, self.rank * scores.shape[1])
        if self.count == 1:
            return at
        mine = torch.stack((best, at.float()))  # exact up to 16,777,216 columns
        each = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(each, mine)
        scores, columns = torch.stack(each).unbind(1)
        return columns.gather(0, scores.argmax(0)[None])[0].to(torch.int32)


ALONE = Ranks()


@dataclass(frozen=True)
class Stage:
    """Which of ``count`` stages of a pipeline this process is."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether tokens enter here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether tokens are chosen here."""
        return self.index == self.count - 1

    def layers(self, count: int) -> range:
        """Its own of a model's ``count`` layers.

        Each stage has as many; the stages before the last, which has the head, take one more each of what is left, from
        the back: ``get_pp_indices`` of vLLM 0.33 (`vllm/distributed/utils.py`). Of 10 layers 4 stages have 2, 3, 3, 2.
        """
        each, more = divmod(count, self.count)
        widths = [each + (self.count - 1 - more <= i < self.count - 1) for i in range(self.count)]
        start = sum(widths[: self.index])
        return range(start, start + widths[self.index])


ONLY = Stage()


def indivisible(heads: int, kv_heads: int, ffn: int, vocab: int, experts: int, count: int) -> str | None:
    """Why a model of these sizes cannot be shared out over ``count`` GPUs; None if it can."""
    for what, size in (("query heads", heads), ("vocabulary", vocab), ("experts", experts), ("MLP width", ffn)):
        if size % count:
            return f"{size:,} ({what}) cannot be shared out over {count} GPUs"
    if kv_heads % count and count % kv_heads:
        return f"{kv_heads} KV heads cannot be shared out over {count} GPUs"
    return None


def missing(count: int) -> str | None:
    """Why there are not ``count`` GPUs to share a model; None if there are."""
    seen = torch.cuda.device_count()
    return f"{count} GPUs are asked for, and torch sees {seen}" if count > seen else None


class Team:
    """The processes of the other GPUs. They do what `tell` says, in order, each on its own runner.

    ``build(ranks, device)`` makes a process's runner; it must be picklable, and so must what it is made of. Raises
    ValueError with a process's own words if its runner cannot be made, `DeviceError` if one dies before it begins.
    """

    def __init__(self, count: int, device: str, build: Callable[[Ranks, torch.device], Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(1, count):
            ours, theirs = SPAWN.Pipe()
            with theirs:
                self._processes.append(spawned(_follow, theirs, rank, count, port, device, build))
            self._ends.append(ours)
        self.on_loss: Callable[[], None] = _nothing  # what else there is to end once a process has died
        self.ready()  # all have begun: whoever died before would be waited for in vain
        join(0, count, port, device)
        self._looked = time.monotonic()

    def ready(self) -> None:
        """Wait until every process has begun; the second time: until it has its runner."""
        for end in self._ends:
            self._answer(end)

    def tell(self, method: str, *arguments: Any) -> None:
        """Let every process call this method of its runner."""
        for end, process in zip(self._ends, self._processes, strict=True):
            try:
                end.send((method, arguments))
            except OSError:
                raise self._lost(process) from None

    def look(self, now: bool = False) -> None:
        """Raise `DeviceError` if a process has died. It looks twice a second at most, or ``now``, if one just did."""
        if not now and time.monotonic() < self._looked + 0.5:
            return
        for process in self._processes:
            if now:
                process.join(1)
            if process.exitcode is not None:
                raise self._lost(process)
        self._looked = time.monotonic()

    def close(self) -> None:
        """End all processes."""
        for end in self._ends:
            end.close()  # a process that reads on finds the end
        for process in self._processes:
            process.join(5)
            if process.exitcode is None:
                process.kill()
                process.join()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _answer(self, end: Connection) -> None:
        try:
            said = end.recv()
        except (EOFError, OSError):
            raise self._lost(self._processes[self._ends.index(end)]) from None
        if said is not None:
            self._kill()
            raise ValueError(said)

    def _lost(self, process: Any) -> DeviceError:
        process.join(1)
        rank, code = self._processes.index(process) + 1, process.exitcode
        self._kill()
        self.on_loss()
        if dist.is_initialized() and dist.get_backend() == "nccl":  # its kernels wait for the dead one too
            dist.distributed_c10d._abort_process_group()
        return DeviceError(f"the process of GPU {rank} has died (exit code {code}); the others are ended too")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def _nothing() -> None:
    pass


def join(rank: int, count: int, port: int, device: str) -> None:
    """Make this process one of ``count`` that speak with one another.

    Processes that have to share a GPU, as in tests where there is only one, speak by Gloo: NCCL wants one for each.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if device == "cuda":
        torch.cuda.set_device(place(device, rank))
    own = device == "cuda" and missing(count) is None
    dist.init_process_group("nccl" if own else "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)


def place(device: str, rank: int) -> torch.device:
    """Where the process of this rank computes."""
    return torch.device(device, rank % torch.cuda.device_count()) if device == "cuda" else torch.device(device)


def _follow(end: Connection, rank: int, count: int, port: int, device: str, build: Callable[..., Any]) -> None:
    """What a process does: make a runner, then what it is told, until nobody tells it any more."""
    if device == "cpu":
        torch.set_num_threads(1)
    end.send(None)
    join(rank, count, port, device)
    try:
        runner = build(Ranks(rank, count), place(device, rank))
    except ValueError as error:
        end.send(str(error))
        return
    end.send(None)
    while True:
        try:
            method, arguments = end.recv()
        except (EOFError, OSError):
            return
        getattr(runner, method)(*arguments)
