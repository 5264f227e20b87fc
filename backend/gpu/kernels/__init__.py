"""CUDA C++ kernels, compiled when first used by CuPy (NVRTC) for the GPU at hand, launched on torch's stream."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SHARED_BYTES = 232_448  # what a thread block may have on Hopper, 227 KiB


class Kernel:
    """One compiled kernel. Tensors are passed as they are (no copies): their data pointer is the argument.

    It is launched through the CUDA driver itself with arguments that are only filled in, for a step without a graph
    makes hundreds of launches, and building their arguments anew took most of its host's time.
    """

    def __init__(self, function: Any, shared_bytes: int) -> None:
        if shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = shared_bytes
        self._function = function  # keeps the module loaded
        self._handle = ctypes.c_void_p(function.kernel.ptr)
        self._shared = shared_bytes
        self._slots: list[Any] = []
        self._addresses: Any = None

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launch on torch's current stream; int → int32, float → float32, None → a null pointer.

        Raises RuntimeError with CUDA's error code if the launch fails.
        """
        import torch

        if not self._slots:
            self._slots = [_slot(a) for a in arguments]
            pointers = [ctypes.cast(ctypes.pointer(slot), ctypes.c_void_p) for slot in self._slots]
            self._addresses = (ctypes.c_void_p * len(pointers))(*pointers)
        for slot, value in zip(self._slots, arguments, strict=True):
            slot.value = value if value is None or isinstance(value, int | float) else _plain(value)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        height = grid[1] if len(grid) > 1 else 1
        failed = _driver().cuLaunchKernel(
            self._handle, grid[0], height, 1, threads, 1, 1, self._shared, stream, self._addresses, None
        )
        if failed:
            raise RuntimeError(f"CUDA error {failed} when launching a kernel on {grid} × {threads} threads")


def _slot(value: Any) -> Any:
    """Where an argument of this kind is kept for the launch."""
    if isinstance(value, np.uint64):
        return ctypes.c_uint64()
    if isinstance(value, int):
        return ctypes.c_int32()
    return ctypes.c_float() if isinstance(value, float) else ctypes.c_void_p()


def _plain(value: Any) -> int:
    return int(value) if isinstance(value, np.generic) else int(value.data_ptr())


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def kernel(file: str, name: str, shared_bytes: int = 0, **defines: int) -> Kernel:
    """The kernel ``name`` of ``kernels/<file>.cu`` with these macros. Raises RuntimeError without CuPy."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError("the GPU engine needs CuPy: pip install 'chairlift[gpu]'") from error
    options = ("--std=c++17", f"-I{FOLDER}", *(f"-D{key}={value}" for key, value in sorted(defines.items())))
    module = cupy.RawModule(code=(FOLDER / f"{file}.cu").read_text(encoding="utf-8"), options=options)
    return Kernel(module.get_function(name), shared_bytes)
