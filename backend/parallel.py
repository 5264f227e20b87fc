"""How the GPUs of one replica share a model."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from chairlift.backend.shapes import Model


class _Whole:
    """Tells pydantic, which reads scenarios, to take numbers alone, no text and no truth value. It needs no import."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        return {**handler(source), "strict": True}


Count = Annotated[int, _Whole(), Ge(1), Le(1024)]


@dataclass(frozen=True)
class Parallel:
    """The degrees of parallelism of one replica, which has tensor × pipeline × data GPUs.

    ``data`` groups of ``tensor`` GPUs each hold the whole attention and its KV for their own requests; the experts are
    shared out over all of a stage's GPUs, ``expert`` groups of them holding different experts.
    """

    # a mapping of a strict document may become one
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": False}

    tensor: Count = field(
        default=1, metadata={"description": "GPUs that share the heads and the width of every layer."}
    )
    pipeline: Count = field(default=1, metadata={"description": "Stages, each of so many of the layers."})
    data: Count = field(
        default=1, metadata={"description": "Ranks with queue, attention and KV of their own (DP-attention)."}
    )
    expert: Count = field(
        default=1, metadata={"description": "Groups of GPUs that hold different experts; a divisor of tensor × data."}
    )

    @property
    def ranks(self) -> int:
        """GPUs of one stage."""
        return self.tensor * self.data

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.ranks * self.pipeline

    @property
    def expert_tensor(self) -> int:
        """GPUs that share the width of one expert."""
        return self.ranks // self.expert

    @property
    def only_tensor(self) -> bool:
        """Whether there is no other kind of parallelism."""
        return self.gpus == self.tensor and self.expert == 1

    @property
    def label(self) -> str:
        """What the name of a recording says of it behind the model's: ``-tp2-ep``, ``-pp4``; "" of one GPU."""
        tensor = (f"-tp{self.tensor}" if self.tensor > 1 else "") + ("-ep" if self.expert > 1 else "")
        return tensor + (f"-pp{self.pipeline}" if self.pipeline > 1 else "")

    def __str__(self) -> str:
        named = [f"{short} {n}" for short, n in zip(("TP", "PP", "DP", "EP"), astuple(self), strict=True) if n > 1]
        return ", ".join(named) or "1 GPU"

    def check(self, model: Model) -> Parallel:
        """This, if ``model`` can be shared out so. Raises ValueError, one sentence, otherwise."""
        model.kv_bytes_per_token_on(self.tensor)
        if self.pipeline > model.layers:
            raise ValueError(
                f"pipeline must be at most the {model.layers} layers of {model.name} (got {self.pipeline})"
            )
        if not model.experts:
            if self.expert > 1:
                raise ValueError(f"expert must be 1: {model.name} has no experts (got {self.expert})")
            if self.data > 1:
                raise ValueError(
                    f"data must be 1: {model.name} has no experts, so its ranks are replicas; give replicas"
                    f" (got {self.data})"
                )
            return self
        if self.ranks % self.expert:
            raise ValueError(f"expert must divide tensor × data, {self.ranks} (got {self.expert})")
        if model.experts % self.expert:
            raise ValueError(f"expert must divide the {model.experts} experts of {model.name} (got {self.expert})")
        return self


ONE = Parallel()


def labelled(name: str) -> tuple[str, Parallel]:
    """The model in the name of a recording, and how GPUs shared it: the inverse of `Parallel.label`."""
    found = re.fullmatch(r"(.+?)(?:-tp([1-9]\d*)(-ep)?)?(?:-pp([1-9]\d*))?", name)
    assert found is not None
    tensor = int(found[2] or 1)
    return found[1], Parallel(tensor, int(found[4] or 1), expert=tensor if found[3] else 1)
