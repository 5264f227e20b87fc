"""Known GPUs and language models: the numbers a cost model starts from.

The known ones are rows of `gpus.yaml` and `models.yaml`. `gpu` and `model` find one by its name, or make one of
numbers, which may be few where the name is known.

"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from chairlift.backend.names import hint
from chairlift.backend.shapes import ABSENT, GIB, GPU, BadShape, Model, Quantization, Shape, Wrong, described

__all__ = [
    "ABSENT",
    "GIB",
    "GPU",
    "GPUS",
    "MODELS",
    "BadShape",
    "BadTable",
    "Model",
    "changed",
    "gpu",
    "model",
]


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

    Chat and instruct versions have their base model's shape; one in FP8, INT4 or FP4 is that model in another format
    (`_FORMATS`). Numbers, and what is raised, are as for `gpu`.
    """
    if not isinstance(choice, str):
        return _with_numbers(Model, choice, model)
    key = choice.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    for suffix, quantization in _FORMATS.items():
        if key.endswith(suffix):
            return _in_format(key.removesuffix(suffix), choice, suffix, quantization)
    return MODELS.find(_base(key), choice)


def _base(key: str) -> str:
    while key.endswith(_SAME_SHAPE):
        key = key.rpartition("-")[0]
    return key


@cache
def _in_format(key: str, asked: str, suffix: str, quantization: Quantization) -> Model:
    """The model called ``key`` with its layers' matrices in another format, which its name then ends with."""
    known = MODELS.find(_base(key), asked)
    if quantization == "fp8" and known.name.startswith(_IN_BLOCKS):
        quantization = "fp8_block"
    source = f"{known.source}, weights in {quantization}"
    name = known.name + ("-fp8" if quantization.startswith("fp8") else suffix)
    return replace(known, name=name, quantization=quantization, source=source)


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


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML has it, reads a table in a tenth


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
        loader = _LOADER(self.path.read_text(encoding="utf-8"))
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
_IN_BLOCKS = ("qwen3", "glm-4", "deepseek", "minimax", "kimi")  # whose published FP8 has a scale for 128 × 128 weights
_FORMATS: dict[str, Quantization] = {
    "-fp8": "fp8",
    "-fp8-dynamic": "fp8",
    "-w8a8": "int8",
    "-quantized.w8a8": "int8",
    "-w4a16": "int4",
    "-quantized.w4a16": "int4",
    "-awq": "int4",
    "-awq-int4": "int4",
    "-gptq": "int4",
    "-gptq-int4": "int4",
    "-nvfp4": "nvfp4",
    "-fp4": "nvfp4",
    "-mxfp4": "mxfp4",
}
_SAME_SHAPE = ("-instruct", "-chat", "-base", "-hf", "-it")
