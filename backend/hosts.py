"""The host's floor under a step: what an engine's own process takes, by engine, version and number of GPUs.

`hosts.yaml` was read off recordings. A GPU however fast waits for its host: vLLM 0.26 plans, launches and processes no
step of decodes in less than 2.6 ms, and 31 µs more for each request; and a step with prompts, which no single CUDA
graph holds, is launched layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from chairlift.backend.base import PS
from chairlift.backend.shapes import Model

NONE = "none"
MS = PS // 1000


@dataclass(frozen=True)
class Pace:
    """What a step takes an engine's host, by `hosts.yaml`, whose keys the fields are."""

    step_ms: float = 0.0
    request_us: float = 0.0
    prepare_ms: float = 0.0
    launch_us: float = 0.0
    eager_us: float = 0.0


class Floors(NamedTuple):
    """No step of a model is shorter, ps."""

    step: int = 0  # of decodes that are one CUDA graph
    request: int = 0  # of those, for each request
    piecewise: int = 0  # with prompts, launched in pieces of graphs
    eager: int = 0  # beyond the largest graph: launched kernel by kernel
    graph_tokens: int = 0  # of the largest graph

    def decodes(self, slots: int) -> int:
        """Of a step of ``slots`` decodes alone."""
        return self.step + self.request * slots if slots <= self.graph_tokens else self.eager

    def prompts(self, tokens: int) -> int:
        """Of a step of ``tokens``, some of which are prompts'."""
        return self.piecewise if tokens <= self.graph_tokens else self.eager


@cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    file = Path(__file__).resolve().with_suffix(".yaml")
    table: dict[str, dict[str, dict[str, float]]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return table


def pace(host: str, gpus: int) -> Pace:
    """That of the engine called ``host``, with a process for each of several GPUs; `NONE`: it takes no time."""
    if host == NONE:
        return Pace()
    rows = _table()[host]
    return Pace(**(rows["one"] if gpus == 1 else rows.get("several", rows["one"])))


def floors(pace: Pace, model: Model, graph_tokens: int) -> Floors:
    """Those of steps of ``model`` at this ``pace``; captured graphs have up to ``graph_tokens`` tokens."""
    layers, eager = model.layers, model.layers + model.expert_layers
    return Floors(
        step=round(pace.step_ms * MS),
        request=round(pace.request_us * 10**6),
        piecewise=round(pace.prepare_ms * MS + layers * pace.launch_us * 10**6),
        eager=round(pace.prepare_ms * MS + eager * pace.eager_us * 10**6),
        graph_tokens=graph_tokens,
    )


def told(host: str, pace: Pace, floors: Floors) -> str:
    """What a reader of results must know of them, a sentence."""
    if not any(floors[:-1]):
        return "takes no time (assumed)"
    return (
        f"no step of N decodes below {pace.step_ms:g} ms + N · {pace.request_us:g} µs, none with prompts below"
        f" {floors.piecewise / MS:.1f} ms, {floors.eager / MS:.1f} ms beyond {floors.graph_tokens} tokens"
        + ("" if host == NONE else f" (measured: {host} on hosts of H200s)")
    )
