"""How long the GPUs of a replica take to exchange activations: a small measured table, interpolated.

`collectives.yaml` was measured on one host of 8 H200. On another GPU what a message takes beyond the smallest one is
scaled by the bandwidth of the links. All-reduces go no further than one host; dispatching tokens to experts does, where
the slower of the links and an assumed network sets the pace.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from chairlift.backend.shapes import GPU

HOST_GPUS = 8
MEASURED_GB_PER_S = 450  # one direction of an H200's links
NETWORK_GB_PER_S = 50  # of one GPU to other hosts: a 400 Gb/s card each (assumed)
NETWORK_US = 20  # latency over the network, dispatch and combine (assumed)


@cache
def _table() -> dict[str, Any]:
    file = Path(__file__).resolve().with_suffix(".yaml")
    table: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return table


def one_way_gb_per_s(gpu: GPU, what: str) -> float:
    """What the links of a GPU move in one direction, or PCIe where it has none. Raises ValueError if unknown."""
    return gpu.needed("nvlink_gb_per_s", what) / 2 or gpu.needed("host_gb_per_s", what)


def all_reduce_us(gpu: GPU, gpus: int, size: float, graph: bool) -> float:
    """Microseconds of an all-reduce of ``size`` bytes between ``gpus`` GPUs; ``graph``: within a CUDA graph."""
    if gpus == 1:
        return 0
    if gpus > HOST_GPUS:
        raise ValueError(
            f"tensor must be at most {HOST_GPUS}: all-reduces beyond one host are not modelled (got {gpus})"
        )
    table = _table()["all_reduce"]
    rows = table["graph" if graph else "eager"]
    row = rows[min(count for count in rows if count >= gpus)]
    return _scaled(_interpolated(table["bytes"], row, size), row[0], gpu, "tensor parallelism")


def all_to_all_us(gpu: GPU, gpus: int, tokens: float, width: int, experts_per_token: int, graph: bool) -> float:
    """Microseconds to take ``tokens`` of each of ``gpus`` GPUs to their experts, and the results back."""
    if gpus == 1:
        return 0
    table = _table()["all_to_all"]
    rows = table["graph" if graph else "eager"]
    share = width * experts_per_token / (table["width"] * table["experts_per_token"])
    fixed = rows["us"][0]
    inside = fixed + (_interpolated(rows["tokens"], rows["us"], tokens) - fixed) * share
    taken = _scaled(inside, fixed, gpu, "expert parallelism")
    if gpus <= HOST_GPUS:
        return taken
    beyond = 1 - HOST_GPUS / gpus
    moved = tokens * min(experts_per_token, gpus) * width * 3 * beyond  # there in FP8, back in bfloat16
    return max(taken, NETWORK_US + moved / NETWORK_GB_PER_S / 1e3)


def _scaled(taken: float, fixed: float, gpu: GPU, what: str) -> float:
    return fixed + max(0.0, taken - fixed) * MEASURED_GB_PER_S / one_way_gb_per_s(gpu, what)


def _interpolated(at: Sequence[float], values: Sequence[float], x: float) -> float:
    """On straight lines between the points, and beyond the last one along the last line."""
    if x <= at[0]:
        return values[0]
    i = min(bisect_right(at, x), len(at) - 1)
    slope = (values[i] - values[i - 1]) / (at[i] - at[i - 1])
    return values[i - 1] + slope * (x - at[i - 1])
