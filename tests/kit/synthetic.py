"""A recording with known coefficients: the second implementation of vLLM's loop runs random steps and logs them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kit.loop import Loop, Work

GRAPHS = np.array([1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)])
LIMITS = {"num_gpu_blocks": 60000, "max_num_batched_tokens": 8192, "max_num_seqs": 256, "block_size": 16}


@dataclass(frozen=True)
class Planted:
    """What the recording was made with, seconds."""

    weights: float = 0.005
    token: float = 21e-6
    kv: float = 33e-9
    kv_mixed: float = 60e-9
    pair: float = 0.9e-9
    schedule: float = 80e-6
    schedule_request: float = 8e-6
    update: float = 140e-6
    update_request: float = 12e-6
    piecewise: float = 0.007
    eager: float = 0.015
    graph: float = 0.0005
    drafts: int = 0  # of each sequence and step
    each_pass: float = 0.0  # that drafts
    draft_token: float = 0.0  # each token of the step
    draft: float = 0.0  # each draft that is verified
    hot_computed: float = 0.0  # of what steps with chunks compute, on a GPU whose clock has sunk
    hot_kv: float = 0.0  # of the attention of decodes alone

    def gpu(self, tokens: int, decodes: int, context: int, pairs: int, chunked: bool, warm: float = 0.0) -> float:
        """A step's GPU time; the larger of two bounds, attention, and drafting."""
        if chunked:
            slower = 1 + self.hot_computed * warm
            return self._work(self.kv_mixed * slower, tokens, decodes, context, pairs, slower)
        return self._work(self.kv * (1 + self.hot_kv * warm), tokens, decodes, context, pairs)

    def _work(self, kv: float, tokens: int, decodes: int, context: int, pairs: int, slower: float = 1.0) -> float:
        found = max(self.weights, self.token * slower * tokens) + kv * context + self.pair * slower * pairs
        return found + self.drafts * self.draft * decodes + self.passes(tokens)

    def passes(self, tokens: int) -> float:
        """The part of it that drafts, behind the step's output."""
        return self.drafts * self.each_pass + self.draft_token * tokens


@dataclass
class Log:
    """The rows of one experiment."""

    name: str
    steps: list[list[float]] = field(default_factory=list)
    requests: list[list[float]] = field(default_factory=list)


def record(planted: Planted, seed: int = 1, noise: float = 0.01, name: str = "made") -> Log:
    """Phases of decodes that chunks break into, at random sizes."""
    random = np.random.default_rng(seed)
    log, loop = Log(name), Loop()
    flying: list[float] | None = None
    warm = behind = 0.0
    for phase in range(150):
        decodes = min(256, int(2 ** random.uniform(0, 8.4)))
        per = int(2 ** random.uniform(6, 11))
        plan = [(0, decodes)] * int(random.integers(4, 12))
        size = int(2 ** random.uniform(5, 12.9))
        plan += [(size, decodes if random.random() < 0.8 else 0)] * int(random.integers(1, 3))
        if phase % 5 == 0:
            plan.append((0, 0))  # nothing to do for a while
        for chunk, running in plan:
            if not chunk and not running:
                done = loop.turn(None)
                if flying is not None and done is not None:
                    flying[1] = done
                    log.steps.append(flying)
                flying = None
                behind = 0.0
                loop.now += 0.01
                warm *= float(np.exp(-0.1))
                continue
            tokens = chunk + running * (1 + planted.drafts)
            graph = tokens <= 512
            computed = int(GRAPHS[np.searchsorted(GRAPHS, tokens)]) if graph else tokens
            pairs = chunk * (chunk + 1) // 2
            context = running * per
            usual = planted.gpu(computed, running, context, pairs, chunk > 0)
            over, warm = _warmed(warm, usual, min(1.0, planted.token * tokens / usual) if chunk else 0.0)
            gpu = planted.gpu(computed, running, context, pairs, chunk > 0, over) + behind - planted.passes(computed)
            behind = planted.passes(computed)
            gpu *= float(np.exp(random.normal(0, noise)))
            sequences = running + (chunk > 0)
            schedule = planted.schedule + planted.schedule_request * sequences
            launch = (planted.piecewise if graph else planted.eager) if chunk else planted.graph
            launch *= float(np.exp(random.normal(0, noise)))
            update = planted.update + planted.update_request * sequences
            at = loop.now
            done = loop.turn(Work(schedule, launch, update, gpu, 0.0 if chunk or planted.drafts else -1))
            if flying is not None and done is not None:
                flying[1] = done
                log.steps.append(flying)
            flying = [
                at,
                0.0,
                schedule,
                update,
                float(chunk > 0),
                chunk,
                pairs,
                running,
                context,
                sequences,
                0,
                5000,
                0,
            ]
    end = log.steps[-1][1]
    log.requests = [[i, 0.0, 0.0, 10, 5, -1, end / 2, end, 5] for i in range(3)]
    return log


def _warmed(warm: float, seconds: float, share: float) -> tuple[float, float]:
    """A GPU's warmth over a step that computes prompts for so long (at the start of one that does not), and behind it.

    In slices of a ms: by e in 50 ms up while it does, in 100 ms down while it does not.
    """
    slices = []
    for left in np.arange(seconds, 0.0, -1e-3).tolist():
        slices.append(warm)
        warm += min(left, 1e-3) * (share * (1 - warm) / 0.05 - (1 - share) * warm / 0.1)
    return (sum(slices) / len(slices) if share else slices[0]), warm


STEPS = (
    "experiment,schedule_s,done_s,schedule_cpu_s,update_cpu_s,prefill_requests,prefill_tokens,prefill_pairs,"
    "decode_requests,decode_context_tokens,running,waiting,free_blocks,preempted"
)
REQUESTS = (
    "experiment,index,arrival_s,added_s,prompt_tokens,output_tokens,prefix_group,first_token_s,last_token_s,tokens_seen"
)


def write(
    folder: Path, logs: list[Log], model: str = "llama-3.1-8b", graph_tokens: int = 512, **speculative: object
) -> Path:
    """The recording's three files, of an engine whose largest CUDA graph had so many tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, header in (("steps", STEPS), ("requests", REQUESTS)):
        lines = [header]
        for log in logs:
            lines += [",".join([log.name, *(f"{v:.9g}" for v in row)]) for row in getattr(log, what)]
        (folder / f"{model}_{what}.csv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    summary = {
        "engine": {
            "gpu": "NVIDIA H200",
            "vllm": "0.23.0",
            **({"extra": {"speculative": speculative}} if speculative else {}),
        },
        "experiments": [{"name": log.name, "engine": {**LIMITS, "graph_tokens": graph_tokens}} for log in logs],
    }
    (folder / f"{model}_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
