"""What a shell completes: names of scenarios, policies, routers and backends, and dotted keys for ``--set``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from chairlift.backend.calibrated.profile import shipped as profiles
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.schema import Scenario


def policies(begun: str) -> list[str]:
    """Policies whose name begins so."""
    return _beginning(begun, plugins.names(plugins.POLICY))


def routers(begun: str) -> list[str]:
    """Routers whose name begins so."""
    return _beginning(begun, plugins.names(plugins.ROUTER))


def backends(begun: str) -> list[str]:
    """Backends, shipped profiles among them, whose name begins so."""
    return _beginning(begun, [*plugins.names(plugins.BACKEND), *profiles()])


def keys(begun: str) -> list[str]:
    """Dotted keys of a scenario that begin so, each with its ``=``: ``workload.rate_per_s=``."""
    return _beginning(begun, [f"{key}=" for key in dict.fromkeys(_keys(Scenario))])


def _beginning(begun: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(begun)]


def _keys(model: type[BaseModel], under: str = "") -> Iterator[str]:
    """Every key of ``model`` and of models that are its values; of lists only the key itself."""
    for name, field in model.model_fields.items():
        yield f"{under}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if _is_model(kind) and under.count(".") < 2:
                yield from _keys(kind, f"{under}{name}.")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
