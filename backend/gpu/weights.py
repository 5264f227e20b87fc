"""Weights of a model: drawn at random, or read from a folder of safetensors; and the model made of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chairlift.backend import hf_config
from chairlift.backend.checked import MOST_TEXT, a_file, json_of, reading
from chairlift.backend.gpu.options import Options
from chairlift.backend.gpu.ranks import Ranks, Stage
from chairlift.backend.gpu.transformer import Arithmetic, Transformer
from chairlift.backend.shapes import GIB, Model

STD = 0.02  # of random weights, as transformers initialises
SPARE = 4 * GIB  # bytes of a GPU left for activations, graphs and libraries


_latest: dict[Any, Transformer] = {}  # one at most


def loaded(
    model: Model,
    options: Options,
    device: torch.device,
    dtype: torch.dtype,
    block: int,
    max_model_len: int,
    ranks: Ranks,
    stage: Stage,
) -> Transformer:
    """The model with its weights on the device. The latest is kept for the next engine, and freed before another."""
    wanted = (model, options, device, dtype, block, max_model_len, ranks, stage)
    if wanted not in _latest:
        _latest.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _latest[wanted] = _load(*wanted)
    return _latest[wanted]


def _load(
    model: Model,
    options: Options,
    device: torch.device,
    dtype: torch.dtype,
    block: int,
    max_model_len: int,
    ranks: Ranks,
    stage: Stage,
) -> Transformer:
    arithmetic = Arithmetic()
    weight = random_weights(dtype, device, options.seed)
    if options.weights is not None:
        folder = Path(options.weights)
        told, arithmetic = described(folder, model.name, max_model_len)
        for size in ("layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocab"):
            if getattr(told, size) != getattr(model, size):
                raise ValueError(f"{folder}: {size} {getattr(told, size)}, but the model has {getattr(model, size)}")
        weight = saved_weights(folder, dtype, device)
    built = (options.max_batch + 1, max_model_len, options.quantization == "fp8", options.routing_skew, ranks, stage)
    check_room(device, round(model.parameters * dtype.itemsize / ranks.count), f"{model.name}'s weights")
    return Transformer(model, arithmetic, dtype, device, weight, block, *built)


def check_room(device: torch.device, need: int, what: str) -> None:
    """Raise ValueError unless ``need`` bytes and something to spare are free on a GPU."""
    if device.type != "cuda":
        return  # the engine has looked at the machine's, once for all processes
    free = torch.cuda.mem_get_info(device)[0] - SPARE
    if need > free:
        raise ValueError(
            f"{what} needs {need / GIB:.1f} GiB; {max(0, free) / GIB:.1f} GiB of {torch.cuda.get_device_name(device)}"
            " are free for it: give kv.blocks or a smaller kv.memory_utilization, or another model"
        )


def random_weights(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """Weights drawn afresh: norms at one, biases and matrices normal with standard deviation `STD`."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(name: str, *shape: int) -> Tensor:
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)

    return weight


def saved_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Weights of the ``*.safetensors`` in ``folder``, named as `transformers` saves them.

    Raises ValueError without safetensors, without any file, if one cannot be read, and, when asked for a weight, if it
    is missing or of another shape.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("reading weights needs safetensors: pip install 'chairlift[gpu]'") from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {folder}")
    opened = {}
    for path in files:
        with reading(path, ValueError, SafetensorError):
            opened[path] = safe_open(a_file(path), "pt")
    where = {name: file for file in opened.values() for name in file.keys()}  # noqa: SIM118 - no mapping

    def weight(name: str, *shape: int) -> Tensor:
        for known in (name, name.removeprefix("model.")):
            if known in where:
                found: Tensor = where[known].get_tensor(known)
                if tuple(found.shape) != shape:
                    raise ValueError(f"{folder}: {known} must be {list(shape)} (got {list(found.shape)})")
                return found.to(device=device, dtype=dtype)
        raise ValueError(f"{folder}: {name} is missing")

    return weight


def described(folder: Path, name: str, longest: int) -> tuple[Model, Arithmetic]:
    """What ``config.json`` of a folder of weights says of the model, which is called ``name``.

    Sequences have at most ``longest`` tokens. Raises ValueError, one sentence that names the file.
    """
    config = read_config(folder)
    try:
        return hf_config.model(config, name), Arithmetic.from_hf_config(config, longest)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        rule = f"missing {error}" if isinstance(error, LookupError) else str(error)
        raise ValueError(f"{folder / 'config.json'}: {rule}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder of weights. Raises ValueError, one sentence."""
    path = folder / "config.json"
    with reading(path, ValueError):
        config = json_of(path, MOST_TEXT)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a mapping")
    return config
