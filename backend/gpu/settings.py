"""The engine that executes steps as a scenario's ``backend``; importing it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from chairlift.backend.base import Backend
from chairlift.backend.gpu.options import Options
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Torch(Options):
    """Execute every step on a GPU and measure it, instead of modelling what it costs."""

    executes: ClassVar[bool] = True
    drafts_by: ClassVar[tuple[str, ...]] = ("eagle3",)  # methods of speculation that it executes

    def build(self, model: Model, gpu: GPU, parallel: Parallel, draft: Model | None = None, drafts: int = 0) -> Backend:
        """The engine, on so many GPUs of a host. Raises ValueError without torch, or if it cannot serve the model.

        A model whose layers are in FP8 (``llama-3.1-8b-fp8``) is served as ``quantization: fp8`` says. With a ``draft``
        head, which is of random weights, decodes verify up to ``drafts`` drafts.
        """
        options = self
        if model.quantization == "fp8" and model.quantized == "layers":
            model, options = replace(model, quantization="none"), replace(self, quantization="fp8")
        if parallel.data != 1 or (parallel.pipeline != 1 and parallel.tensor != 1):
            raise ValueError(
                f"the torch backend shares a replica out by tensors and experts, or by stages (got {parallel})"
            )
        if model.experts and parallel.expert != parallel.tensor:
            raise ValueError(
                f"the torch backend shares experts out whole: parallel.expert must be {parallel.tensor}, as tensor is"
            )
        if model.latent or model.window_layers or not model.one_width:
            raise ValueError(
                f"the torch backend runs models with full attention by head and weights of one width (got {model.name})"
            )
        try:
            from chairlift.backend.gpu.engine import TorchEngine
        except ImportError as error:
            if error.name not in ("torch", "cupy"):
                raise
            raise ValueError(f"the torch backend needs {error.name}: pip install 'chairlift[gpu]'") from None
        return TorchEngine(model, gpu, options, parallel.tensor, parallel.pipeline, draft, drafts)
