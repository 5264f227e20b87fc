"""What ``vllm bench serve --save-result --save-detailed`` would have left of a recorded run: its requests alone."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.places import TESTS

Column = npt.NDArray[Any]
CLOCK_S = 353_399.7  # of the client's monotonic clock when the run began
NAMES = ("arrival_s", "first_token_s", "last_token_s", "prompt_tokens", "output_tokens")


def result_of(requests: Mapping[str, Column], gaps_s: Column | None = None, model: str = "m") -> dict[str, Any]:
    """The document, with the keys of vLLM 0.26's.

    Args:
        requests: columns of a recording's requests, `NAMES`.
        gaps_s: all gaps between tokens, request by request; None: each request's are equal.
    """
    start, first, last, prompts, outputs = (np.asarray(requests[name]) for name in NAMES)
    if gaps_s is None:
        gaps_s = np.repeat((last - first) / np.maximum(outputs - 1, 1), outputs - 1)
    gaps = np.split(gaps_s, np.cumsum(outputs - 1)[:-1])
    duration = float(last.max() - start.min())
    ttft, tpot = 1e3 * (first - start), 1e3 * ((last - first)[outputs > 1] / (outputs[outputs > 1] - 1))
    found: dict[str, Any] = {"date": "20260105-080000", "endpoint_type": "openai", "backend": "openai", "label": None}
    found |= {"model_id": model, "tokenizer_id": model, "num_prompts": len(start), "request_rate": "inf"}
    found |= {"burstiness": 1.0, "max_concurrency": None, "duration": duration, "completed": len(start), "failed": 0}
    found |= {"total_input_tokens": int(prompts.sum()), "total_output_tokens": int(outputs.sum())}
    found |= {"input_lens": prompts.tolist(), "output_lens": outputs.tolist(), "ttfts": (ttft / 1e3).tolist()}
    found |= {"itls": [each.tolist() for each in gaps], "start_times": (start + CLOCK_S).tolist()}
    found |= {"generated_texts": ["x"] * len(start), "errors": [""] * len(start)}
    for name, values in (("ttft", ttft), ("tpot", tpot)):
        found |= {f"median_{name}_ms": float(np.median(values)), f"p99_{name}_ms": float(np.percentile(values, 99))}
    return found


def burst(requests: int = 1000) -> dict[str, Any]:
    """Of vLLM's recorded burst of 1,000 requests in `tests/recordings`, or of its first: OPT-13B on an H200."""
    path: Path = TESTS / "recordings" / "burst" / "opt-13b_requests.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:requests]
    kinds = {name: float if name.endswith("_s") else int for name in NAMES}
    return result_of({name: np.array([kind(row[name]) for row in rows]) for name, kind in kinds.items()})
