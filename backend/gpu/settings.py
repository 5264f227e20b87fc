"""Settings of the engine that executes steps; importing them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from chairlift.backend.base import Backend
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Torch:
    """Execute every step on a GPU and measure it, instead of modelling what it costs."""

    executes: ClassVar[bool] = True

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if torch sees one; the CPU is for tiny models
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: float16 for OPT, float32 on the CPU
    weights: str | None = None  # a folder with config.json and *.safetensors; null: random weights
    quantization: Literal["none", "fp8"] = "none"  # fp8: the layers' weights and their inputs in 8-bit floats (e4m3)
    graphs: bool = True  # replay CUDA graphs in steps of up to 1,024 tokens
    max_batch: Annotated[int, Ge(1)] = 256  # sequences at once
    temperature: Annotated[float, Ge(0)] = 0.0  # of sampling; 0: the likeliest token
    seed: int = 0  # of random weights

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Backend:
        """The engine. Raises ValueError without torch, without a kernel for the model, or for several GPUs."""
        if tensor_parallel != 1:
            raise ValueError(f"the torch backend runs on one GPU (got tensor_parallel {tensor_parallel})")
        try:
            from chairlift.backend.gpu.engine import TorchEngine
        except ImportError as error:
            if error.name not in ("torch", "cupy"):
                raise
            raise ValueError(f"the torch backend needs {error.name}: pip install 'chairlift[gpu]'") from None
        return TorchEngine(model, gpu, self)
