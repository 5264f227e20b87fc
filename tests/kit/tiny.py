"""A tiny Llama with weights of its own, a plain forward pass of it, and runs on the CPU's engine: what its tests share.

The weights are large enough that every token depends on all before it: a wrong block or position shows in the answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.backend.base import Backend
from chairlift.backend.gpu.settings import Torch
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GPU as Gpu
from chairlift.backend.shapes import Model
from chairlift.policies.base import Scheduler
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.results.records import Status
from chairlift.sim.study import ReplicaGroup, Setup
from chairlift.sim.workload.trace import Trace
from kit.clusters import GPU, Served, serve, setup_of

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")
torch.set_num_threads(1)  # for so small matrices more are slower

LONGEST = 160  # tokens of prompt and output
MODEL = Model("tiny", 2, 32, 4, 2, 64, 48, 97, LONGEST)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": MODEL.layers,
    "hidden_size": MODEL.hidden,
    "num_attention_heads": MODEL.heads,
    "num_key_value_heads": MODEL.kv_heads,
    "head_dim": MODEL.head_size,
    "intermediate_size": MODEL.ffn,
    "vocab_size": MODEL.vocab,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
CLOSE = 1e-3  # logits, which are of order one: float32 against float64 differs by some 1e-5


@cache
def weights(layers: int = MODEL.layers) -> dict[str, Any]:
    """Name → float32 tensor, as `transformers` names them."""
    m = MODEL
    rng = np.random.default_rng(3)
    query, kv = m.heads * m.head_size, m.kv_heads * m.head_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (m.vocab, m.hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (m.hidden,),
            f"{at}self_attn.q_proj.weight": (query, m.hidden),
            f"{at}self_attn.k_proj.weight": (kv, m.hidden),
            f"{at}self_attn.v_proj.weight": (kv, m.hidden),
            f"{at}self_attn.o_proj.weight": (m.hidden, query),
            f"{at}post_attention_layernorm.weight": (m.hidden,),
            f"{at}mlp.gate_proj.weight": (m.ffn, m.hidden),
            f"{at}mlp.up_proj.weight": (m.ffn, m.hidden),
            f"{at}mlp.down_proj.weight": (m.hidden, m.ffn),
        }
    shapes |= {"model.norm.weight": (m.hidden,), "lm_head.weight": (m.vocab, m.hidden)}
    found = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        if len(shape) == 1:
            values = 1 + 0.2 * values
        elif "embed" not in name:
            values *= 1.4 / math.sqrt(shape[1])
        found[name] = torch.tensor(values, dtype=torch.float32)
    return found


def save(folder: Path, layers: int = MODEL.layers) -> Path:
    """Write the weights and their config.json as `transformers` does."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    save_file(weights(layers), folder / "model.safetensors")
    return folder


@cache
def _wide(layers: int) -> dict[str, Any]:
    return {name: weight.double() for name, weight in weights(layers).items()}


def plain(tokens: list[int], layers: int = MODEL.layers, inputs: list[Any] | None = None) -> Any:
    """Logits after each of ``tokens``, float64 [tokens, vocab]: a forward pass without a cache, nothing shared.

    ``inputs`` gets what enters each layer, [tokens, hidden].
    """
    m, w, n = MODEL, _wide(layers), len(tokens)

    def norm(x: Any, name: str) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * w[name]

    angle = torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor(
        [float(CONFIG["rope_theta"]) ** (-2 * i / m.head_size) for i in range(m.head_size // 2)], dtype=torch.float64
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def heads(x: Any, name: str, count: int) -> Any:
        return (x @ w[name].T).view(n, count, m.head_size)

    def rotated(x: Any) -> Any:  # element i is the real part, i + size / 2 the imaginary one
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(layers):
        at = f"model.layers.{i}."
        if inputs is not None:
            inputs.append(x)
        y = norm(x, f"{at}input_layernorm.weight")
        query = rotated(heads(y, f"{at}self_attn.q_proj.weight", m.heads))
        key = rotated(heads(y, f"{at}self_attn.k_proj.weight", m.kv_heads))
        value = heads(y, f"{at}self_attn.v_proj.weight", m.kv_heads)
        mixed = []
        for head in range(m.heads):
            shared = head * m.kv_heads // m.heads
            scores = query[:, head] @ key[:, shared].T / math.sqrt(m.head_size)
            scores += torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)
            mixed.append(scores.softmax(-1) @ value[:, shared])
        x = x + torch.cat(mixed, dim=-1) @ w[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, f"{at}post_attention_layernorm.weight")
        gate = y @ w[f"{at}mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ w[f"{at}mlp.up_proj.weight"].T)) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


class Kept:
    """Settings of a backend that keep what they build, to look into it afterwards."""

    executes = True

    def __init__(self, options: Torch) -> None:
        self.options = options
        self.built: list[Any] = []

    def build(self, model: Model, gpu: Gpu, parallel: Parallel, *drafts: Any) -> Backend:
        """As the options."""
        self.built.append(self.options.build(model, gpu, parallel, *drafts))
        backend: Backend = self.built[-1]
        return backend


def system(
    trace: Trace,
    scheduler: type[Scheduler],
    settings: Mapping[str, Any],
    backend: Any = None,
    blocks: int = 40,
    block_size: int = 16,
    parallel: Parallel = ONE,
    **more: Any,
) -> Setup:
    """One replica of the tiny model; ``backend`` are its settings, modelled steps by default."""
    if (own := scheduler(**settings).block_tokens) is not None:
        blocks, block_size = blocks * block_size // own, own
    settings = dict(settings)
    parts = (1, "mixed", GPU, parallel, scheduler, settings, backend or Efficiency(), blocks, block_size, "made up")
    return setup_of(trace, [ReplicaGroup(*parts)], **{"model": MODEL, "max_model_len": LONGEST, **more})


def executed(setup: Setup, journal: bool = False) -> Served:
    """Serve ``setup`` on hardware."""
    return serve(setup, leap=False, journal=journal)


@dataclass
class Answers:
    """A run and the tokens that it generated."""

    served: Served
    tokens: dict[int, list[int]]


def answers(
    folder: Path,
    trace: Trace,
    scheduler: type[Scheduler],
    settings: Mapping[str, Any],
    graphs: bool = True,
    **more: Any,
) -> Answers:
    """Run ``trace`` on the tiny model's engine; with ``graphs`` chunks are padded, as on a GPU."""
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=32, graphs=graphs))
    served = executed(system(trace, scheduler, settings, kept, **more))
    return Answers(served, kept.built[-1].generated)


def prompt_of(trace: Trace, request: int, block_size: int, vocab: int = MODEL.vocab, ahead: int = 0) -> list[int]:
    """The tokens that a request's prompt stands for."""
    numbers = Identity(trace, block_size, ahead).tokens(request, int(trace.prompt_tokens[request]))
    return [int(n) % vocab for n in numbers]


def prompts(got: Answers, block_size: int = 16, ahead: int = 0) -> list[list[int]]:
    """Every prompt: one that is as long as the session's last prompt and answer begins with them."""
    trace = got.served.setup.trace
    found: list[list[int]] = []
    last: dict[int, list[int]] = {}  # session → its last prompt and answer
    for i in range(len(trace)):
        prompt = prompt_of(trace, i, block_size, ahead=ahead)
        session = -1 if trace.session is None else int(trace.session[i])
        known = last.get(session, [])
        if len(known) <= len(prompt):
            prompt[: len(known)] = known
        found.append(prompt)
        if session >= 0:
            last[session] = prompt + got.tokens[i]
    return found


def check_greedy(got: Answers, block_size: int = 16, given: list[list[int]] | None = None) -> None:
    """Every finished request has the tokens that a plain forward pass likes best, one after the other.

    ``given`` are the prompts, if they are not `prompts`.
    """
    trace = got.served.setup.trace
    given = given or prompts(got, block_size)
    for i, status in enumerate(got.served.requests.status):
        if status != Status.FINISHED:
            continue
        prompt, tokens = given[i], got.tokens[i]
        assert len(tokens) == trace.output_tokens[i], f"request {i}"
        logits = plain(prompt + tokens, got.served.setup.model.layers)[len(prompt) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        wrong = (short > CLOSE).nonzero()[:, 0].tolist()
        assert wrong == [], f"request {i}: token {wrong[0]} of {len(tokens)}"
