"""What the engine that executes steps can be told; importing it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge


@dataclass(frozen=True)
class Options:
    """Device, arithmetic, weights and sizes of one engine."""

    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if torch sees one; the CPU is for tiny models
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: float16 for OPT, float32 on the CPU
    weights: str | None = None  # a folder with config.json and *.safetensors; null: random weights
    quantization: Literal["none", "fp8"] = "none"  # fp8: the layers' weights and their inputs in 8-bit floats (e4m3)
    routing_skew: Annotated[float, Ge(0)] | None = None  # experts drawn ∝ rank^-skew; null: as the model's router says
    graphs: bool = True  # replay CUDA graphs in steps of up to 1,024 tokens, in FP8 and with experts more
    max_batch: Annotated[int, Ge(1)] = 256  # sequences at once
    temperature: Annotated[float, Ge(0)] = 0.0  # of sampling; 0: the likeliest token
    seed: int = 0  # of random weights
