"""Base classes of the pydantic models that a YAML file's mappings are checked by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Spec(BaseModel):
    """A mapping of a YAML file. It refuses unknown keys, NaN, infinity and numbers in quotes, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class OneOf(Spec):
    """A mapping with exactly one of its keys given; ``chosen`` is the value of that key."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    @model_validator(mode="after")
    def _exactly_one(self) -> OneOf:
        known = type(self).model_fields
        given = [name for name in known if getattr(self, name) is not None]
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise ValueError(f"exactly one of {', '.join(known)} must be given, not {names}")
        return self

    @property
    def chosen(self) -> Any:
        """The value of the one key that is given."""
        return next(value for name in type(self).model_fields if (value := getattr(self, name)) is not None)


def or_number(number: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """For ``json_schema_extra`` of a `OneOf` that may also be written as a bare number.

    ``number`` is the JSON Schema of that number. The schema of the model becomes: the number, or the mapping.
    """

    def change(schema: dict[str, Any]) -> None:
        mapping = dict(schema) | {"minProperties": 1, "maxProperties": 1}
        schema.clear()
        schema.update(title=mapping.pop("title"), description=mapping.pop("description"), anyOf=[number, mapping])

    return change
