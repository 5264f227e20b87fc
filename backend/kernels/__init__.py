"""CUDA C++ kernels, compiled when first used by CuPy (NVRTC) for the GPU at hand, launched on torch's stream."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SHARED_BYTES = 232_448  # what a thread block may have on Hopper, 227 KiB


class Kernel:
    """One compiled kernel. Tensors are passed as they are (no copies): their data pointer is the argument."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        if shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = shared_bytes
        self._function = function.kernel
        self._shared = shared_bytes

    def __call__(self, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Launch on torch's current stream; int → int32, float → float32, None → a null pointer."""
        import torch

        stream = _external(torch.cuda.current_stream().cuda_stream)
        self._function(grid, (threads,), [_argument(a) for a in arguments], shared_mem=self._shared, stream=stream)


class _Raw:
    """A CUDA stream by its address, in CUDA's stream protocol."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@cache
def _external(stream: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_Raw(stream))


def _argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)
    if isinstance(value, int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, np.generic):
        return value
    return np.uint64(value.data_ptr())


@cache
def kernel(file: str, name: str, shared_bytes: int = 0, **defines: int) -> Kernel:
    """The kernel ``name`` of ``kernels/<file>.cu`` with these macros. Raises RuntimeError without CuPy."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError("the GPU engine needs CuPy: pip install 'chairlift[gpu]'") from error
    options = ("--std=c++17", *(f"-D{key}={value}" for key, value in sorted(defines.items())))
    module = cupy.RawModule(code=(FOLDER / f"{file}.cu").read_text(encoding="utf-8"), options=options)
    return Kernel(module.get_function(name), shared_bytes)
