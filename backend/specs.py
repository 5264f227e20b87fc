"""Known GPUs and language models, and how much KV cache fits: the numbers a cost model starts from.

Look a shape up with :func:`gpu` and :func:`model`, read a model's from its ``config.json`` with
:meth:`Model.from_hf_config`, and count KV blocks with :func:`kv_blocks`. The tables stand at the end.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from chairlift.backend.shapes import GIB, GPU, Model

__all__ = ["GIB", "GPU", "GPUS", "MODELS", "RESERVE_GIB", "KVFit", "Model", "gpu", "kv_blocks", "model"]

Shape = TypeVar("Shape", GPU, Model)

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


def gpu(name: str) -> GPU:
    """The GPU called ``name``, in any common spelling: ``h100``, ``A100-40``, ``NVIDIA A100-SXM4-80GB``.

    Raises LookupError with the nearest name.
    """
    words = name.lower().replace(" ", "-").replace("_", "-").split("-")
    key = "-".join(word for word in words if word and word not in _GPU_NOISE)
    return _find(_GPU_ALIASES.get(key, key), name, GPUS, "GPU")


def model(name: str) -> Model:
    """The model called ``name``, with or without its organisation: ``facebook/opt-13b``, ``Qwen3-8B``.

    Chat and instruct versions have their base model's shape. Raises LookupError with the nearest name.
    """
    key = name.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    if key.startswith("mistral-7b"):
        key = key.replace("-v0.1", "").replace("-v0.2", "")  # v0.3 has a larger vocabulary
    while key.endswith(_SAME_SHAPE):
        key = key.rpartition("-")[0]
    return _find(key, name, MODELS, "model")


def _find(key: str, asked: str, table: Mapping[str, Shape], kind: str) -> Shape:
    if key in table:
        return table[key]
    near = sorted(name for name in table if key and name.startswith(key))[:1]
    near = near or difflib.get_close_matches(key, table, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
    raise LookupError(f"unknown {kind} {asked!r} – {hint}")


_GPU_NOISE = {"nvidia", "amd", "instinct", "tesla", "sxm", "sxm4", "sxm5", "hbm3"}  # not "pcie": it is slower
_GPU_ALIASES = {
    "a100-40": "a100-40gb",
    "a100-80": "a100-80gb",
    "h100-80gb": "h100",
    "h200-141gb": "h200",
    "mi300x-oam": "mi300x",
}
_SAME_SHAPE = ("-instruct", "-chat", "-base", "-hf", "-it")

# Peaks: vendors' data sheets for the SXM/OAM boards. Memory: the total nvidia-smi (rocm-smi) shows in MiB,
# from memory; with the H200's, one reserve closes the sum for both recorded block counts (RESERVE_GIB).
# From memory too: the A10G's TFLOP/s, and PCIe at line rate (x16: Gen 4 31.5, Gen 5 63 GB/s). Prices: one
# offer, or a median, out of the range beside it; vendors and years differ by a factor of two.
_SEEN = "2026-03 to 2026-11"
GPUS: dict[str, GPU] = {
    shape.name: shape
    for shape in (
        GPU(
            "a100-40gb", 312, 1555, 40960 / 1024, 600, 31.5, 400,
            1.99, _SEEN, "Lambda; range 0.80–3.40", "NVIDIA A100 40GB SXM data sheet",
        ),
        GPU(
            "a100-80gb", 312, 2039, 81920 / 1024, 600, 31.5, 400,
            2.79, _SEEN, "Lambda; range 1.39–3.43", "NVIDIA A100 80GB SXM data sheet",
        ),
        GPU(
            "h100", 989, 3350, 81559 / 1024, 900, 63, 700,
            2.95, _SEEN, "median; range 2.69–12.29", "NVIDIA H100 SXM data sheet",
        ),
        GPU(
            "h200", 989, 4800, 143771 / 1024, 900, 63, 700,
            4.00, _SEEN, "specialised clouds, middle; range 2.50–7.00", "NVIDIA H200 SXM data sheet",
        ),
        GPU(
            "b200", 2250, 8000, 183359 / 1024, 1800, 63, 1000,
            6.03, _SEEN, "Spheron; range 4.50–6.69", "NVIDIA B200 SXM data sheet (HGX: 7700 GB/s)",
        ),
        GPU(
            "l4", 121, 300, 23034 / 1024, 0, 31.5, 72,
            0.805, "from memory", "AWS g6.xlarge; range 0.40–0.81", "NVIDIA L4 data sheet",
        ),
        GPU(
            "a10g", 70, 600, 23028 / 1024, 0, 31.5, 300,
            1.006, "from memory", "AWS g5.xlarge; range 1.01–1.21", "AWS g5 page; TFLOP/s from memory",
        ),
        GPU(
            "mi300x", 1307, 5300, 196592 / 1024, 896, 63, 750,
            1.85, "2026", "Vultr; range 1.71–5.00", "AMD MI300X data sheet (links: 7 × 128 GB/s)",
        ),
    )
}  # fmt: skip


def _opt(size: str, layers: int, hidden: int, heads: int) -> Model:
    # arXiv:2205.01068, table 1; FFN 4 × hidden, 2048 positions, vocabulary of facebook/opt-*
    return Model(
        f"opt-{size}", layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272, 2048,
        gated_mlp=False, tied_embeddings=True, biases="all", learned_positions=2050,
        source=f"facebook/opt-{size} config.json",
    )  # fmt: skip


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, length: int, org: str
) -> Model:
    return Model(
        name, layers, hidden, heads, kv, hidden // heads, ffn, vocab, length, source=f"{org} config.json"
    )  # fmt: skip


def _qwen25(size: str, layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, tied: bool) -> Model:
    # The length is the Instruct models' (and the small base models'); base models of 7B and more say 131072.
    return Model(
        f"qwen2.5-{size}", layers, hidden, heads, kv, hidden // heads, ffn, vocab, 32768,
        tied_embeddings=tied, biases="qkv", source=f"Qwen/Qwen2.5-{size.upper()}-Instruct config.json",
    )  # fmt: skip


def _qwen3(size: str, layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> Model:
    return Model(
        f"qwen3-{size}", layers, hidden, heads, 8, 128, ffn, 151936, 40960,
        tied_embeddings=tied, qk_norm=True, source=f"Qwen/Qwen3-{size.upper()} config.json",
    )  # fmt: skip


MODELS: dict[str, Model] = {
    shape.name: shape
    for shape in (
        _opt("13b", 40, 5120, 40),
        _opt("30b", 48, 7168, 56),
        _opt("66b", 64, 9216, 72),
        _opt("175b", 96, 12288, 96),
        _llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096, "meta-llama/Llama-2-7b-hf"),
        _llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096, "meta-llama/Llama-2-13b-hf"),
        _llama("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, "meta-llama/Llama-2-70b-hf"),
        _llama("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128256, 131072, "meta-llama/Llama-3.1-8B"),
        _llama("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128256, 131072, "meta-llama/Llama-3.1-70B"),
        _llama("mistral-7b", 32, 4096, 32, 8, 14336, 32000, 32768, "mistralai/Mistral-7B-Instruct-v0.2"),
        _qwen25("0.5b", 24, 896, 14, 2, 4864, 151936, True),
        _qwen25("1.5b", 28, 1536, 12, 2, 8960, 151936, True),
        _qwen25("3b", 36, 2048, 16, 2, 11008, 151936, True),
        _qwen25("7b", 28, 3584, 28, 4, 18944, 152064, False),
        _qwen25("14b", 48, 5120, 40, 8, 13824, 152064, False),
        _qwen25("32b", 64, 5120, 40, 8, 27648, 152064, False),
        _qwen25("72b", 80, 8192, 64, 8, 29568, 152064, False),
        _qwen3("0.6b", 28, 1024, 16, 3072, True),
        _qwen3("1.7b", 28, 2048, 16, 6144, True),
        _qwen3("4b", 36, 2560, 32, 9728, True),
        _qwen3("8b", 36, 4096, 32, 12288, False),
        _qwen3("14b", 40, 5120, 40, 17408, False),
        _qwen3("32b", 64, 5120, 64, 25600, False),
    )
}
