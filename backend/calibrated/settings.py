"""A profile as a scenario's ``backend``: which one, with which graphs, and with which draw of its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from chairlift.backend.calibrated.carry import carried
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
    carry: bool = False  # also to another model, format or number of GPUs, as always to another GPU: not measured

    def build(self, model: Model, gpu: GPU, parallel: Parallel, drafts: Drafts | None = None) -> Calibrated:
        """The cost model; `carried`, which it then says, where the GPU is not the profile's.

        ``drafts``: those that its steps verify. A profile of an engine without any tells what it costs to verify them,
        but not to make them. Raises `ProfileError` if there is no such profile, if it is of another method of drafting,
        or, without ``carry``, of another model or number of GPUs.
        """
        profile = load(self.profile)
        if profile.model != model.name and not self.carry:
            rule = f"is of {profile.model}, not of {model.name} (carry: true carries it over)"
            raise ProfileError(f"profile {profile.name} {rule}")
        if profile.parallel != parallel and not self.carry:
            own, asked = ((p.tensor if p.only_tensor else f"{p.gpus} ({p})") for p in (profile.parallel, parallel))
            rule = f"is of {own} GPUs, not of {asked} (carry: true carries it over)"
            raise ProfileError(f"profile {profile.name} {rule}")
        if profile.drafts and (drafts is None or drafts.method != profile.drafts.method):
            rule = f"was measured {profile.drafts}, not {drafts or 'without any'}: name another one, or auto"
            raise ProfileError(f"profile {profile.name} {rule}")
        if (profile.model, profile.gpu, profile.parallel) != (model.name, gpu.name, parallel):
            if profile.scaled:
                rule = "itself carried, and must not be carried again: name a measured profile"
                raise ProfileError(f"profile {profile.name} is {rule}")
            profile = carried(profile, model, gpu, parallel)
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
