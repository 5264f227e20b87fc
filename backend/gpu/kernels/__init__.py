"""CUDA C++ kernels, compiled when first used by CuPy (NVRTC) for the GPU at hand, launched on torch's stream."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # a ``CUlaunchAttributeID``
OF_HOPPER = ("paged_chunks",)  # with products of warp groups where the GPU has them
SM_BYTES = 228 * 1024  # of shared memory on Hopper; each thread block takes 1 KiB more than it asks for
SHARED_BYTES = SM_BYTES - 1024  # what one may ask for


class _Attribute(ctypes.Structure):
    """CUDA's ``CUlaunchAttribute``."""

    _fields_ = (
        *(("id", ctypes.c_int), ("before", ctypes.c_char * 4)),
        *(("value", ctypes.c_int), ("after", ctypes.c_char * 60)),
    )


class _Launch(ctypes.Structure):
    """CUDA's ``CUlaunchConfig``."""

    _fields_ = (
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)),
    )


class Kernel:
    """One compiled kernel. Tensors are passed as they are (no copies): their data pointer is the argument.

    A kernel may start before the one ahead of it in the stream has ended, and waits for it itself (``in_order`` in
    ``half.cuh``). It is launched through the CUDA driver itself with arguments that are only filled in, for a step
    without a graph makes hundreds of launches, and building their arguments anew took most of its host's time.
    """

    def __init__(self, function: Any, shared_bytes: int, early: bool = True) -> None:
        if shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = shared_bytes
        self._function = function  # keeps the module loaded
        self._handle = ctypes.c_void_p(function.kernel.ptr)
        attribute = _Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._launch = _Launch(shared_bytes=shared_bytes, attributes=ctypes.pointer(attribute), count=int(early))
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
        launch = self._launch
        launch.grid[:] = grid[0], grid[1] if len(grid) > 1 else 1, 1
        launch.block[:] = threads, 1, 1
        # of the device in use; `torch.cuda.current_stream` takes 10 µs for the same, more than the launch itself
        launch.stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        failed = _driver().cuLaunchKernelEx(ctypes.byref(launch), self._handle, self._addresses, None)
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
def kernel(file: str, name: str, shared_bytes: int = 0, early: bool = True, **defines: int) -> Kernel:
    """The kernel ``name`` of ``kernels/<file>.cu`` with these macros. Raises RuntimeError without CuPy.

    Not ``early``: it is launched once all that is ahead of it has ended, as after a copy it must be.
    """
    return Kernel(_module(file, tuple(sorted(defines.items()))).get_function(name), shared_bytes, early)


@cache
def _module(file: str, defines: tuple[tuple[str, int], ...]) -> Any:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError("the GPU engine needs CuPy: pip install 'chairlift[gpu]'") from error
    code = (FOLDER / f"{file}.cu").read_text(encoding="utf-8")
    options = ("--std=c++17", f"-I{FOLDER}", *(f"-D{key}={value}" for key, value in defines))
    if file not in OF_HOPPER or cupy.cuda.Device().compute_capability != "90":
        return cupy.RawModule(code=code, options=options)
    nvrtc = cupy.cuda.nvrtc  # CuPy compiles for sm_90, which has not all that Hopper has
    program = nvrtc.createProgram(code, f"{file}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, "-arch=sm_90a"))
        compiled = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)
    path = Path(_scratch().name, "-".join((file, *(f"{key}{value}" for key, value in defines))) + ".cubin")
    path.write_bytes(compiled)
    return cupy.RawModule(path=str(path))


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
