"""A profile as a scenario's ``backend``: which one, with which graphs, and with which draw of its errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from chairlift.backend import specs
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import Drafts, Profile, ProfileError, load
from chairlift.backend.calibrated.resampled import Resampled
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Settings:
    """Step costs calibrated on a real engine: a shipped profile's name, or a .json file."""

    profile: str
    graph_tokens: Annotated[int, Ge(1)] | None = None  # tokens of the largest captured CUDA graph; None: as recorded
    draw: Annotated[int, Ge(0)] = 0  # which draw of its errors to add; 0: none

    def build(self, model: Model, gpu: GPU, parallel: Parallel, drafts: Drafts | None = None) -> Calibrated:
        """The cost model; scaled by `scaled`, which it then says, where the GPU is not the profile's.

        ``drafts``: those that its steps verify. A profile of an engine without any tells what it costs to verify them,
        but not to make them. Raises `ProfileError` if there is no such profile, or if it is of another model, number of
        GPUs, or method of drafting.
        """
        profile = load(self.profile)
        if profile.model != model.name:
            raise ProfileError(f"profile {profile.name} is of {profile.model}, not of {model.name}")
        if profile.parallel != parallel:
            own, asked = ((p.tensor if p.only_tensor else f"{p.gpus} ({p})") for p in (profile.parallel, parallel))
            raise ProfileError(f"profile {profile.name} is of {own} GPUs, not of {asked}")
        if profile.drafts and (drafts is None or drafts.method != profile.drafts.method):
            rule = f"was measured {profile.drafts}, not {drafts or 'without any'}: name another one, or auto"
            raise ProfileError(f"profile {profile.name} {rule}")
        if profile.gpu != gpu.name:
            if profile.scaled:
                rule = "itself scaled, and must not be scaled again: name a measured profile"
                raise ProfileError(f"profile {profile.name} is {rule}")
            profile = scaled(profile, gpu)
        if self.draw:
            return Resampled(profile, self.graph_tokens, self.draw)
        return Calibrated(profile, self.graph_tokens)


@dataclass(frozen=True)
class Given:
    """Settings that hold the profile itself, not its name."""

    profile: Profile
    graph_tokens: int | None = None

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Calibrated:
        """The cost model, whatever the GPU."""
        return Calibrated(self.profile, self.graph_tokens)


def scaled(profile: Profile, gpu: GPU) -> Profile:
    """``profile`` for another GPU, by the ratios of data-sheet peaks: a guess, and marked as one.

    Matrix products scale with FLOP/s, reading weights and KV with memory bandwidth; the host's time stays.
    """
    own = specs.gpu(profile.gpu)
    compute, bandwidth = gpu.bf16_tflops / own.bf16_tflops, gpu.hbm_gb_per_s / own.hbm_gb_per_s
    return replace(
        profile,
        name=f"{gpu.name}-{profile.name} (scaled)",
        gpu=gpu.name,
        gpu_time=profile.gpu_time.scaled(compute, bandwidth),
        scaled=f"{profile.gpu} → {gpu.name}: compute × {compute:.3g}, bandwidth × {bandwidth:.3g}; host time as there",
    )
