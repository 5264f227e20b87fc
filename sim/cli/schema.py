"""The JSON Schemas of scenario files, with the settings of all policies, routers and backends, and of sweep files."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from chairlift.backend import specs
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.file import PlanFile
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.schema import Scenario
from chairlift.sim.sweep.file import Based, SweepFile


def schema(
    sweep: Annotated[bool, typer.Option("--sweep", help="Of sweep files instead.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Of plan files instead.")] = False,
) -> None:
    """Print the JSON Schema of scenario files, for editors that complete and check YAML."""
    if sweep and plan:
        raise BadInput(Problem("must not be given beside --sweep", file="--plan"))
    found = plan_schema() if plan else sweep_schema() if sweep else scenario_schema()
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def scenario_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) that an editor can check and complete scenario YAML with."""
    schema = Scenario.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Chairlift scenario"
    file = {"type": "string", "pattern": r"\.py(:\w+)?$"}
    choices: dict[str, dict[str, Any]] = {
        "policy": {"anyOf": [*_choices(plugins.POLICY), file]},
        "router": {"anyOf": [*_choices(plugins.ROUTER), file]},
        "backend": {"anyOf": _choices(plugins.BACKEND)},
        "model": {"anyOf": [{"enum": list(specs.MODELS)}, {"type": "string"}, _numbers(specs.Model)]},
        "gpu": {"anyOf": [{"enum": list(specs.GPUS)}, {"type": "string"}, _numbers(specs.GPU)]},
    }
    for holder in (schema, schema["$defs"]["Variant"]):
        for key, choice in choices.items():
            holder["properties"][key] = {**choice, "description": holder["properties"][key]["description"]}
    return schema


def sweep_schema() -> dict[str, Any]:
    """The same for sweep YAML; a list stands for an axis of these values."""
    return _with_axes(SweepFile, "sweep")


def plan_schema() -> dict[str, Any]:
    """The same for plan YAML."""
    return _with_axes(PlanFile, "plan")


def _with_axes(kind: type[Based], name: str) -> dict[str, Any]:
    schema = kind.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"Chairlift {name}"
    axis = schema["$defs"]["Axis"]
    schema["$defs"]["Axis"] = {"anyOf": [{"type": "array", "minItems": 1}, axis]}
    return schema


def _choices(kind: plugins.Kind) -> list[dict[str, Any]]:
    """Every name that can be given, alone or with its settings; installed plug-ins that work are among them."""
    kinds, _ = plugins.available(kind)
    found: list[dict[str, Any]] = [{"enum": list(kinds)}]
    for name, (each, _) in kinds.items():
        settings = _settings(each)
        settings["properties"] = {"name": {"const": name}, **settings.get("properties", {})}
        settings["required"] = ["name", *settings.get("required", [])]
        settings["description"] = plugins.summary(each)
        found.append(settings)
    return found


def _settings(kind: type[Any]) -> dict[str, Any]:
    return plugins.settings(kind).model_json_schema()


def _numbers(kind: type[Any]) -> dict[str, Any]:
    """None is required: beside the name of a known GPU or model they change that one."""
    return {key: value for key, value in _settings(kind).items() if key != "required"}
