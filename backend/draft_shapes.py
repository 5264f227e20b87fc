"""The layers that draft for a model, as shapes: of speculative decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chairlift.backend.shapes import Model


def head_of(model: Model, method: str) -> Model:
    """The layer that drafts for ``model``, unless a scenario says more of it.

    "eagle3": a dense layer with the model's attention and a head of its own. "mtp": one of the model's own last layers;
    it shares embedding and head with the model.
    """
    alike: dict[str, Any] = {"layers": 1, "window": 0, "window_layers": 0, "chunked": False, "dense_layers": 0}
    alike |= {"other_parameters": 0, "mtp_layers": 0, "learned_positions": 0}
    if method == "mtp":
        return replace(model, name=f"{model.name} MTP", **alike)
    alike |= dict.fromkeys(("experts", "experts_per_token", "expert_ffn", "shared_ffn"), 0)
    alike |= dict.fromkeys(("attention_bytes_per_param", "mlp_bytes_per_param", "expert_bytes_per_param"))
    alike |= {"head_bytes_per_param": None, "arithmetic": None, "quantization": "none", "quantized": "layers"}
    alike |= {"tied_embeddings": True, "expert_ffn_multiple": 1}
    return replace(model, name=f"{model.name} {method}", **alike)


def in_memory(draft: Model, method: str, apart: Model | None = None) -> Model:
    """``draft`` as far as it takes memory of its own: embedding and head of MTP layers are the model's.

    ``apart``: the model, where its input embedding lies on another stage of a pipeline than the layers that draft, the
    last: those then have a copy (vLLM 0.33, `maybe_share_target_embed` of `vllm/v1/worker/gpu/spec_decode/eagle`).
    """
    kept = replace(draft, vocab=1) if method == "mtp" else draft
    if apart is None or method == "draft_model":
        return kept
    return replace(kept, other_parameters=kept.other_parameters + apart.vocab * apart.hidden)
