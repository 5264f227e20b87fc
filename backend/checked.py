"""The first thing that is wrong with a file, in one sentence: its field, the rule and the value."""

from __future__ import annotations

from pydantic import ValidationError

_MOST = 60  # characters of a value that are shown


def wrong(error: ValidationError) -> str:
    """``gpu_time.kv_s must be greater than or equal to 0 (got -1)``; several mistakes are told by the first."""
    first = error.errors(include_url=False)[0]
    at = ".".join(map(str, first["loc"])) or "the file"
    kind = first["type"]
    if kind.startswith("missing"):
        return f"{at} is required"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{at} is unknown"
    if kind in ("dataclass_type", "dataclass_exact_type", "dict_type", "model_type"):
        return f"{at} must be an object"
    if kind == "json_invalid":
        return f"not JSON: {first['ctx']['error']}"
    if kind == "value_error":
        return f"{at} {first['ctx']['error']}"
    told = repr(first["input"])
    rule = first["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return f"{at} {rule} (got {told if len(told) <= _MOST else told[: _MOST - 3] + '...'})"
