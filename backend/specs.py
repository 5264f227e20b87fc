"""Known GPUs and language models, and how much KV cache fits: the numbers a cost model starts from.

The known ones are rows of `gpus.yaml` and `models.yaml`. `gpu` and `model` find one by its name, or make one of
numbers, which may be few where the name is known; `Model.from_hf_config` reads a model's ``config.json``; `kv_blocks`
counts the blocks that fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from chairlift.backend.names import hint
from chairlift.backend.shapes import ABSENT, GIB, GPU, BadShape, Model, Shape, Wrong, described

__all__ = [
    "ABSENT",
    "GIB",
    "GPU",
    "GPUS",
    "MODELS",
    "RESERVE_GIB",
    "BadShape",
    "BadTable",
    "KVFit",
    "Model",
    "changed",
    "gpu",
    "kv_blocks",
    "model",
]

RESERVE_GIB = 1.9
"""GiB a GPU keeps besides weights and KV (activations, CUDA context, graphs, what the driver hides).

What closes the sum for vLLM 0.23 on an H200 at utilisation 0.90 with 8192 batched tokens: 1.92 GiB with
Llama-3.1-8B (56,057 blocks), 1.83 GiB with OPT-13B (8,240 blocks). More batched tokens need more.
"""


@dataclass(frozen=True)
class KVFit:
    """The sum behind a KV cache size, for one GPU of the ``tensor_parallel`` that hold the model."""

    model: str
    gpu: str
    tensor_parallel: int
    block_size: int  # tokens
    memory_utilization: float
    total_bytes: int
    weight_bytes: int
    reserve_bytes: int
    kv_bytes_per_token: int

    @property
    def kv_bytes(self) -> int:
        """Bytes left for KV; negative when the weights do not fit."""
        return int(self.total_bytes * self.memory_utilization) - self.weight_bytes - self.reserve_bytes

    @property
    def blocks(self) -> int:
        """Whole blocks; a block spans all GPUs, so this is the pool of the replica."""
        return max(0, self.kv_bytes // (self.kv_bytes_per_token * self.block_size))

    @property
    def tokens(self) -> int:
        """Token slots in those blocks."""
        return self.blocks * self.block_size

    def explain(self) -> str:
        """The sum on one line, in GiB, so that a reader sees what was assumed."""
        each = f" on each of {self.tensor_parallel} GPUs" if self.tensor_parallel > 1 else ""
        return (
            f"{self.model} on {self.gpu}{each}:"
            f" {self.total_bytes / GIB:.2f} GiB × {self.memory_utilization:g}"
            f" − {self.weight_bytes / GIB:.2f} weights − {self.reserve_bytes / GIB:.2f} reserve"
            f" = {self.kv_bytes / GIB:.2f} GiB for KV = {self.blocks:,} blocks of {self.block_size} tokens"
            f" = {self.tokens:,} tokens"
        )


def kv_blocks(
    model: Model,
    gpu: GPU,
    tensor_parallel: int = 1,
    block_size: int = 16,
    memory_utilization: float = 0.9,
    reserve_gib: float = RESERVE_GIB,
) -> KVFit:
    """How many KV blocks of ``block_size`` tokens fit beside ``model`` on ``tensor_parallel`` × ``gpu``.

    Per GPU: memory × utilisation (vLLM's ``gpu_memory_utilization``) − weights ÷ GPUs − reserve. A measured
    block count is better where there is one. Raises ValueError for settings out of range, heads that
    cannot be shared out, and, with the sum, for a model that leaves no room for a single block.
    """
    if not 0 < memory_utilization <= 1:
        raise ValueError(f"memory_utilization must be above 0 and at most 1 (got {memory_utilization})")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 (got {block_size})")
    if not 0 <= reserve_gib < math.inf:
        raise ValueError(f"reserve_gib must be at least 0 (got {reserve_gib})")
    fit = KVFit(
        model=model.name,
        gpu=gpu.name,
        tensor_parallel=tensor_parallel,
        block_size=block_size,
        memory_utilization=memory_utilization,
        kv_bytes_per_token=model.kv_bytes_per_token_on(tensor_parallel),  # also checks tensor_parallel
        total_bytes=gpu.memory_bytes,
        weight_bytes=-(-model.weight_bytes // tensor_parallel),
        reserve_bytes=round(reserve_gib * GIB),
    )
    if not fit.blocks:
        raise ValueError(f"no room for KV: {fit.explain()}; use more or larger GPUs, or narrower weights")
    return fit


def gpu(choice: str | Mapping[str, object]) -> GPU:
    """The GPU called ``choice`` in any common spelling (``h100``, ``NVIDIA A100-SXM4-80GB``), or with these numbers.

    Numbers beside the name of a known GPU change that one: ``{"name": "h100", "memory_gib": 94}``. Raises LookupError
    with the nearest name, or `BadShape`.
    """
    if not isinstance(choice, str):
        return _with_numbers(GPU, choice, gpu)
    words = choice.lower().replace(" ", "-").replace("_", "-").split("-")
    return GPUS.find("-".join(word for word in words if word and word not in _GPU_NOISE), choice)


def model(choice: str | Mapping[str, object]) -> Model:
    """The model called ``choice``, with or without its organisation (``facebook/opt-13b``), or with these numbers.

    Chat and instruct versions have their base model's shape. Numbers, and what is raised, are as for `gpu`.
    """
    if not isinstance(choice, str):
        return _with_numbers(Model, choice, model)
    key = choice.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    while key.endswith(_SAME_SHAPE):
        key = key.rpartition("-")[0]
    return MODELS.find(key, choice)


def changed(known: Shape, given: Mapping[str, object]) -> Shape:
    """``known`` with the numbers ``given`` in place of its own, as its name then tells: ``h100 (memory_gib 94)``.

    ``known`` itself if none of them differs. Raises `BadShape`.
    """
    own = vars(known)
    others = {key: value for key, value in given.items() if key != "name" and own.get(key, ABSENT) != value}
    if not others:
        return known
    told = ", ".join(f"{key} {value}" for key, value in others.items())
    return described(type(known), {**own, **others, "name": f"{known.name} ({told})"})


def _with_numbers(kind: type[Shape], given: Mapping[str, object], find: Callable[[str], Shape]) -> Shape:
    """A known shape that ``given`` names and changes, or one of its own."""
    name = given.get("name")
    if not isinstance(name, str):
        return described(kind, {"name": "custom", **given})
    try:
        known = find(name)
    except LookupError as unknown:
        said = str(unknown.args[0])
        return described(kind, given, f": {said}" if "did you mean" in said else "")
    return changed(known, given)


class BadTable(ValueError):
    """A data file that cannot be used: a line a mistake, ``file:line: row.key: rule (got value)``."""


class _Row(NamedTuple):
    """A row as the file has it."""

    name: str
    line: int
    lines: dict[str, int]  # of its keys
    values: dict[str, Any]


class Table(Mapping[str, Shape]):
    """The rows of a data file by name; the file is read when first needed, and raises `BadTable` then."""

    def __init__(self, path: Path, kind: type[Shape], what: str) -> None:
        self.path = path
        self._kind: type[Shape] = kind
        self._what = what

    def __getitem__(self, name: str) -> Shape:
        return self._read[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read[0])

    def __len__(self) -> int:
        return len(self._read[0])

    def find(self, key: str, asked: str) -> Shape:
        """The row called ``key``, by which a user who wrote ``asked`` is understood. Raises LookupError."""
        rows, also = self._read
        key = also.get(key, key)
        if key in rows:
            return rows[key]
        raise LookupError(f"unknown {self._what} {asked!r} – {hint(key, rows)}")

    @cached_property
    def _read(self) -> tuple[dict[str, Shape], dict[str, str]]:
        """Name → shape, and other name → name."""
        rows: dict[str, Shape] = {}
        also: dict[str, str] = {}
        wrong: list[tuple[int, str]] = []  # line, mistake
        for row in self._rows():
            others = row.values.pop("also", [])
            mistakes = []
            if row.name in rows:
                mistakes.append(Wrong("", "is a second row of that name"))
            if "name" in row.values:
                mistakes.append(Wrong("name", "must not be given: a row's key is its name", row.values["name"]))
            if not row.values.get("source"):
                mistakes.append(Wrong("source", "is required"))
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                mistakes.append(Wrong("also", "must be a list of names", others))
                others = []
            try:
                rows[row.name] = described(self._kind, {**row.values, "name": row.name})
            except BadShape as bad:
                mistakes += bad.wrong
            also |= dict.fromkeys(others, row.name)
            for key, rule, value in mistakes:
                got = "" if value is ABSENT else f" (got {value!r})"
                where = f"{row.name}.{key}" if key else row.name
                wrong.append((row.lines.get(key, row.line), f"{where}: {rule}{got}"))
        if wrong:
            raise BadTable("\n".join(f"{self.path}:{line}: {mistake}" for line, mistake in sorted(wrong)))
        return rows, also

    def _rows(self) -> Iterator[_Row]:
        loader = yaml.SafeLoader(self.path.read_text(encoding="utf-8"))
        try:
            top = loader.get_single_node()
            if not isinstance(top, yaml.MappingNode):
                raise BadTable(f"{self.path}:1: must be a mapping of names to rows")
            for name, row in top.value:
                line = name.start_mark.line + 1
                if not isinstance(row, yaml.MappingNode):
                    raise BadTable(f"{self.path}:{line}: {name.value}: must be a mapping of keys to values")
                lines = {key.value: key.start_mark.line + 1 for key, _ in row.value}
                values = loader.construct_mapping(row, deep=True)
                yield _Row(name.value, line, lines, {str(key): value for key, value in values.items()})
        except yaml.MarkedYAMLError as error:
            line = 1 if error.problem_mark is None else error.problem_mark.line + 1
            raise BadTable(f"{self.path}:{line}: not YAML: {error.problem}") from None


GPUS = Table(Path(__file__).resolve().parent / "gpus.yaml", GPU, "GPU")
MODELS = Table(Path(__file__).resolve().parent / "models.yaml", Model, "model")

_GPU_NOISE = {"nvidia", "amd", "instinct", "tesla", "sxm", "sxm4", "sxm5", "hbm3"}  # not "pcie": it is slower
_SAME_SHAPE = ("-instruct", "-chat", "-base", "-hf", "-it")
