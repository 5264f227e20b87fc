"""The parts of a profile that results of a benchmark can change, and by how much they are known beforehand.

A part gets a factor, whose logarithm is drawn to 0: the profile as it is. How strongly is measured. Of one model and
GPU it is by how much the profiles of two versions of vLLM differ. Of another model it is by how far a profile that was
`carried` to an engine was off, part by part, over all pairs of shipped profiles. Parts are off together: if steps with
1,024 tokens take 30 % longer than was carried, those with 128 do so too. So a part that results tell moves those that
they do not, by as much as in the pairs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import numpy.typing as npt

from chairlift.backend import specs
from chairlift.backend.calibrated import profile as profiles
from chairlift.backend.calibrated.carry import carried
from chairlift.backend.calibrated.profile import HostTime, Knots, Profile, between
from chairlift.backend.shapes import GPU, Model

Floats = npt.NDArray[np.float64]

DECODES = (1, 16, 64, 256)  # sequences of steps of decodes alone at which what is not their attention has a factor
CHUNKS = (128, 1024, 8192)  # tokens of steps with chunks, likewise
PARTS = (
    *(f"decode steps of {n}" for n in DECODES),
    "attention of decodes",
    *(f"steps with chunks of {n:,} tokens" for n in CHUNKS),
    "attention of prompts",
    "launches by graph pieces",
    "launches kernel by kernel",
    "scheduling and updating",
    "the client's own time",
)
CLIENT = len(PARTS) - 1
HOST = slice(CLIENT - 3, CLIENT)  # what the host does
GPU_TIME = slice(0, CLIENT - 3)
# By how much the parts of two profiles of one model and GPU differ (vLLM 0.23 and 0.26 on an H200), in logarithms.
ALIKE = (0.05, 0.05, 0.065, 0.08, 0.06, 0.2, 0.08, 0.05, 0.08, 0.25, 0.3, 0.35)
SHARED = 0.5  # of what parts of carried profiles were seen to have in common: eight engines tell of twelve parts
SAME_HOST = 0.15  # of one version: what scheduling, and launching a layer, took four engines of vLLM 0.26 on one GPU
APART = 0.5  # by how much of that the factors of neighbouring sizes differ from each other
CLIENT_S = 0.002  # what the client and the server's front may add to TTFT


def changed(profile: Profile, logs: Floats) -> Profile:
    """``profile`` with its parts multiplied by the exponentials of ``logs``. Shape of ``logs``: ``(len(PARTS),)``."""
    decodes, chunks = logs[: len(DECODES)], logs[len(DECODES) + 1 :][: len(CHUNKS)]
    kv = float(np.exp(logs[len(DECODES)]))
    pair, piecewise, eager, host = np.exp(logs[len(DECODES) + 1 + len(CHUNKS) : CLIENT]).tolist()
    times = profile.gpu_time
    factors = {"piecewise_s": piecewise, "eager_s": eager, **dict.fromkeys(("graph_s", "tail_s", "head_s"), 1.0)}
    return replace(
        profile,
        gpu_time=replace(
            times,
            kv_s=times.kv_s * kv,
            kv_mixed_s=times.kv_mixed_s * kv,
            pair_s=times.pair_s * pair,
            whole_pair_s=times.whole_pair_s * pair,
            sequence_s=times.sequence_s * float(np.exp(decodes[-1])),
            decode_residual=_bent(times.decode_residual, DECODES, decodes),
            chunk_residual=_bent(times.chunk_residual, CHUNKS, chunks),
            piecewise_floor_s=times.piecewise_floor_s * piecewise,
            eager_floor_s=times.eager_floor_s * eager,
        ),
        host=HostTime(**{name: seconds * factors.get(name, host) for name, seconds in vars(profile.host).items()}),
    )


def _bent(residual: Knots, at: tuple[int, ...], logs: Floats) -> Knots:
    """``residual`` times factors whose logarithms are ``logs`` at ``at``, and linear between in log tokens."""
    knots = sorted({tokens for tokens, _ in residual} | set(at))
    tokens = np.array(knots, dtype=np.float64)
    factors = between(residual, tokens) * np.exp(np.interp(np.log(tokens), np.log(at), logs))
    return tuple(zip(knots, np.clip(factors, 0.01, 100).tolist(), strict=True))


def taken(profile: Profile) -> Floats:
    """Seconds that each part but the client's takes, in a step of the size in its name. Shape: ``(CLIENT,)``.

    The host's is of a step of 64 sequences.
    """
    times, host = profile.gpu_time, profile.host
    decodes, chunks = np.array(DECODES, dtype=np.float64), np.array(CHUNKS, dtype=np.float64)
    many = 64
    return np.array(
        [
            *(times.matmuls(decodes, times.decode_residual) + times.sequence_s * decodes).tolist(),
            times.kv_s * float(between(times.kv_residual, np.array([many]))[0]),
            *(times.chunk_matmuls(chunks) + times.chunk_s).tolist(),
            times.pair_s,
            max(host.piecewise_s, times.piecewise_floor_s),
            max(host.eager_s, times.eager_floor_s),
            host.schedule_s + host.update_s + many * (host.schedule_request_s + host.update_request_s),
        ]
    )


@cache
def differences(versions: bool, numbers: bool) -> Floats:
    """Logarithms of what parts take over what a profile carried to the engine says. Shape: ``(pairs, CLIENT)``.

    Of all pairs of shipped profiles of vLLM that are of different models, and differ in no more than these do.

    Args:
        versions: whether vLLM's may.
        numbers: whether those of GPUs may.
    """
    engines = [each for each in map(profiles.load, profiles.shipped()) if is_plain_vllm(each)]
    found = []
    for one, other in permutations(engines, 2):
        alike = versions or one.engine == other.engine, numbers or one.tensor_parallel == other.tensor_parallel
        if one.model != other.model and all(alike):
            there = carried(one, specs.model(other.model), specs.gpu(other.gpu), other.parallel)
            found.append(np.log(taken(other) / taken(there)))
    return np.stack(found)


def is_plain_vllm(profile: Profile) -> bool:
    """Whether it is of a vLLM that does not speculate."""
    return profile.engine.startswith("vllm") and profile.drafts is None


def precision(start: Profile, model: Model, gpu: GPU, tensor: int, version: str) -> Floats:
    """Inverse of the covariance of all parts' factors beforehand; the last one's, of seconds.

    Args:
        start: the profile that gets the factors, once it is carried.
        model: of the engine that was benchmarked.
        gpu: likewise.
        tensor: how many of them share the model.
        version: of vLLM, as ``0.26``.
    """
    same_version = start.engine.startswith(f"vllm {version}.")
    found = np.zeros((len(PARTS), len(PARTS)))
    found[CLIENT, CLIENT] = CLIENT_S**-2
    if (start.model, start.gpu) != (model.name, gpu.name):
        pairs = differences(not same_version, start.tensor_parallel != tensor)
        seen = pairs.T @ pairs / len(pairs)
        found[:CLIENT, :CLIENT] = np.linalg.inv(SHARED * seen + (1 - SHARED) * np.diag(np.diag(seen)))
        return found
    width = np.array(ALIKE)
    if same_version:
        width[HOST] = SAME_HOST
    found[:CLIENT, :CLIENT] = np.diag(width**-2)
    chunks = len(DECODES) + 1
    for first, count in ((0, len(DECODES)), (chunks, len(CHUNKS))):
        for one in range(first, first + count - 1):
            apart = np.zeros(len(PARTS))
            apart[one], apart[one + 1] = 1, -1
            found += np.outer(apart, apart) / (APART * min(width[one], width[one + 1])) ** 2
    return found
