"""The engine that executes steps as a scenario's ``backend``; importing it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from chairlift.backend.base import Backend
from chairlift.backend.gpu.options import Options
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Torch(Options):
    """Execute every step on a GPU and measure it, instead of modelling what it costs."""

    executes: ClassVar[bool] = True

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Backend:
        """The engine, on so many GPUs. Raises ValueError without torch, or where the model cannot be served."""
        try:
            from chairlift.backend.gpu.engine import TorchEngine
        except ImportError as error:
            if error.name not in ("torch", "cupy"):
                raise
            raise ValueError(f"the torch backend needs {error.name}: pip install 'chairlift[gpu]'") from None
        return TorchEngine(model, gpu, self, tensor_parallel)
