"""The price of a step where nobody names one: a profile that fits, else one of another GPU, else the roofline.

Runs and plans price alike by it (``backend: auto``, which is a plan's default), and results say what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from annotated_types import Ge

from chairlift.backend.base import Backend
from chairlift.backend.calibrated import profile
from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.calibrated.settings import Settings
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GPU, Model


@dataclass(frozen=True)
class Auto:
    """The profile measured on this GPU, else one scaled from another, else the roofline; results say which."""

    draw: Annotated[int, Ge(0)] = 0  # which draw of a profile's errors to add; 0: none

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """The backend of `chosen`. Raises `ProfileError` for a draw of the errors of the roofline, which knows none."""
        found: Backend = self.settings(model, gpu, parallel).build(model, gpu, parallel)
        return found

    def settings(self, model: Model, gpu: GPU, parallel: Parallel, drafts: Drafts | None = None) -> Any:
        """Those of a profile or of the roofline, for steps that verify ``drafts``. Raises as `build`."""
        name = chosen(model, gpu, parallel, drafts)
        if name is not None:
            return Settings(name, draw=self.draw)
        if self.draw:
            raise profile.ProfileError(f"no profile fits {model.name} on {gpu.name}, and the roofline knows no errors")
        return Efficiency()


def chosen(
    model: Model, gpu: GPU, parallel: Parallel, drafts: Drafts | None = None, engine: str = "vllm"
) -> str | None:
    """The name of the shipped profile that prices a replica's steps; None: none fits.

    A profile fits a model by its name, and a replica by its degrees of parallelism. Profiles of ``engine`` come first,
    among them those of the GPU itself, among these those of engines that made ``drafts`` so, and among these that of
    the newest version. None made drafts in another way.
    """
    methods = (None, drafts and drafts.method)
    fitting = [
        p
        for p in _shipped()
        if p.model == model.name and p.parallel == parallel and (p.drafts and p.drafts.method) in methods
    ]
    if not fitting:
        return None

    def order(p: profile.Profile) -> tuple[object, ...]:
        return p.engine.startswith(engine), p.gpu == gpu.name, p.drafts is not None, version(p.engine)

    return max(fitting, key=order).name


def version(engine: str) -> tuple[int, ...]:
    """The numbers in the version of ``engine``: of "vllm 0.26.0" 0, 26 and 0."""
    return tuple(int(part) for part in engine.split()[-1].split(".") if part.isdigit())


@cache
def _shipped() -> tuple[profile.Profile, ...]:
    """All shipped profiles, read once."""
    return tuple(map(profile.load, profile.shipped()))
