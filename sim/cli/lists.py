"""``chairlift list``: what scenarios can name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.backend import specs
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.cli.shipped import SCENARIOS, shipped
from chairlift.sim.cli.terminal import console
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.yaml_document import read as read_document
from chairlift.sim.workload import named
from chairlift.sim.workload.formats import read as formats

SCENARIO_KINDS = (
    *("policies", "models", "gpus", "scenarios", "backends", "workloads", "formats", "routers", "sweeps", "plans"),
)

out = console(least=100)
err = console(stderr=True)


def list_(
    kind: Annotated[str | None, typer.Argument(help=" | ".join(SCENARIO_KINDS), show_default=False)] = None,
) -> None:
    """List what scenarios can name: policies, routers, models, gpus, backends, workloads, trace formats and more."""
    if kind is None:
        raise BadInput(Problem(f"say of what – allowed: {', '.join(sorted(SCENARIO_KINDS))}", file="list"))
    if kind not in SCENARIO_KINDS:
        raise BadInput(Problem(f"no such list{did_you_mean(kind, SCENARIO_KINDS)}", value=kind))
    table = Table(show_header=kind in ("models", "gpus"), box=None, pad_edge=False)
    for row in _rows(kind, table):
        table.add_row(*map(escape, row))
    out.print(table)


def _rows(kind: str, table: Table) -> Iterator[tuple[str, ...]]:
    kinds = {"policies": plugins.POLICY, "routers": plugins.ROUTER, "backends": plugins.BACKEND}
    if kind in kinds:
        for name, (each, origin) in _named(kinds[kind]):
            yield name, plugins.summary(each) + (f" ({origin})" if origin else "")
            for field, (kind_of, default) in plugins.fields(each).items():
                given = "" if default is ... else f" = {default!r}"
                yield "", f"  {field}: {plugins.type_name(kind_of)}{given}"
    elif kind == "models":
        for label in (
            "model",
            "layers",
            "hidden",
            "heads",
            "KV heads",
            "params, B",
            "a token's",
            "KV B/token",
            "max length",
        ):
            table.add_column(label, justify="left" if label == "model" else "right")
        for name, m in specs.MODELS.items():
            numbers = (
                m.layers,
                m.hidden,
                m.heads,
                m.kv_heads,
                f"{m.parameters / 1e9:.2f}",
                f"{m.active_parameters / 1e9:.2f}",
                m.kv_bytes_per_token,
            )
            yield (name, *map(str, numbers), str(m.max_model_len))
    elif kind == "gpus":
        for label in ("gpu", "TFLOP/s", "GB/s", "GiB", "links GB/s", "$/h", "seen"):
            table.add_column(label, justify="left" if label in ("gpu", "seen") else "right")
        for name, g in specs.GPUS.items():
            peaks = (g.bf16_tflops, g.hbm_gb_per_s, g.memory_gib, g.nvlink_gb_per_s, g.usd_per_gpu_hour)
            yield (
                name,
                *("–" if n is None else f"{n:g}" for n in peaks),
                f"{g.price_date}: {g.price_source}" if g.price_date else "",
            )
    elif kind == "scenarios":
        for name, path in shipped().items():
            yield name, _question(path)
    elif kind in ("sweeps", "plans"):
        for path in sorted((SCENARIOS / kind).glob("*.yaml")):
            yield path.stem, _question(path)
    elif kind == "formats":
        for name in formats.names():
            yield name, formats.summary(name)
    else:
        for name in named.names():
            yield name, named.get(name).text


def _named(kind: plugins.Kind) -> Iterable[tuple[str, plugins.Named]]:
    """Every policy, router or backend there is. A plug-in that cannot be used is told of on standard error."""
    found, problems = plugins.available(kind)
    for problem in problems:
        err.print(f"[yellow]left out:[/yellow] {escape(str(problem))}", soft_wrap=True)
    return found.items()


def _question(path: Path) -> str:
    question, mark, _ = str(read_document(path).data.get("question", "")).strip().partition("?")
    return question + mark
