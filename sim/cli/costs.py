"""``chairlift explain-cost`` and ``fit-check``: where a step's time goes, and what fits on which GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from chairlift.backend import memory, specs
from chairlift.backend.base import Batch, Chunk
from chairlift.backend.by_part import ByPart
from chairlift.backend.parallel import Parallel
from chairlift.backend.parts import Part
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GIB, GPU, Model
from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.cli.terminal import console
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.resolve import find_model
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.units import PS_PER_S

BAR = 16  # characters of the longest bar
WIDTH = 100  # columns in a pipe

Found = TypeVar("Found")
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name, or a config.json.")]
Degree = Annotated[int, typer.Option(min=1, help="As parallel's key of that name in a scenario.")]


def explain_cost(
    model: ModelName,
    gpu: Annotated[str, typer.Option(help="A GPU's name.")],
    tokens: Annotated[int, typer.Option(min=0, help="Requests that decode, one token each.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of context of each of them.")] = 1024,
    prompt: Annotated[int, typer.Option(min=0, help="Tokens of a prompt computed in the same step.")] = 0,
    past: Annotated[int, typer.Option(min=0, help="Tokens of that prompt computed before.")] = 0,
    tensor: Degree = 1,
    pipeline: Degree = 1,
    data: Degree = 1,
    expert: Degree = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the roofline: --set mfu=0.6. Repeatable."),
    ] = None,
) -> None:
    """Say where the time of one engine step goes, part by part, by the roofline.

    [bold]chairlift explain-cost qwen3-30b-a3b --gpu h200 --tokens 64 --context 1024[/bold]
    """
    if not tokens and not prompt:
        raise BadInput(Problem("must be at least 1 where there is no prompt", file="--tokens", value=tokens))
    shape, card = (
        _tried("MODEL", model, lambda: find_model(model, Path())),
        _tried("--gpu", gpu, lambda: specs.gpu(gpu)),
    )
    if past and not prompt:
        raise BadInput(Problem("must not be given without --prompt", file="--past", value=past))
    longest = f"must be at most the {shape.max_model_len} tokens that {shape.name} takes"
    if context > shape.max_model_len:
        raise BadInput(Problem(longest, file="--context", value=context))
    if past + prompt > shape.max_model_len:
        raise BadInput(Problem(f"{longest}, with --past {past}" if past else longest, file="--prompt", value=prompt))
    parallel = _tried("MODEL", model, lambda: _parallel(tensor, pipeline, data, expert).check(shape))
    efficiency = _efficiency(set_ or [])
    backend = _tried("--gpu", gpu, lambda: ByPart(shape, card, parallel, efficiency))
    batch = Batch((Chunk(past, prompt),) if prompt else (), tokens, tokens * context)
    parts = _tried("--gpu", gpu, lambda: backend.explain(batch))
    out = console(least=WIDTH)
    out.print(_table(parts))
    seconds = backend.step(batch).first / PS_PER_S
    out.print(f"\none step: {1e3 * seconds:.2f} ms", style="bold")
    usual = efficiency.build(shape, card, parallel)
    if not isinstance(usual, ByPart):
        whole = usual.step(batch).first / PS_PER_S
        out.print(f"a scenario prices it as a whole, unless it says by_part: true: {1e3 * whole:.2f} ms", style="dim")
    for name, said in backend.assumptions().items():
        out.print(f"{name}: {said}", style="dim", markup=False)


def fit_check(
    model: ModelName,
    gpu: Annotated[list[str] | None, typer.Option(help="A GPU's name, repeatable; default: all.")] = None,
    tensor: Annotated[
        list[int] | None, typer.Option(min=1, help="GPUs that share every layer, repeatable; default: 1, 2, 4, 8.")
    ] = None,
    pipeline: Degree = 1,
    data: Degree = 1,
    expert: Degree = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request, to count how many fit.")] = 4096,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step at most, on each rank.")] = memory.TOKENS,
    sequences: Annotated[int, typer.Option(min=1, help="Requests of a step at most, on each rank.")] = memory.SEQUENCES,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the memory in use.")] = 0.9,
) -> None:
    """Say on which GPUs a model fits and how much KV there is room for, with the sum.

    [bold]chairlift fit-check gpt-oss-120b --gpu h100 --gpu h200[/bold]
    """
    shape = _tried("MODEL", model, lambda: find_model(model, Path()))
    cards = [_card(name) for name in gpu or specs.GPUS]
    out = console(least=WIDTH)
    widths = sorted({f"{part.bytes_each:g}" for part in shape.weights})
    out.print(
        f"{escape(shape.name)}: {shape.parameters / 1e9:,.1f} billion parameters, {shape.active_parameters / 1e9:,.1f}"
        f" of them for a token; matrices of {' and '.join(widths)} B a weight;"
        f" KV {shape.kv_bytes_per_token:,} B a token"
    )
    table = Table(box=None, pad_edge=False)
    for label in ("GPU", "GPUs", "weights", "reserve", "KV, GiB", "tokens", f"requests of {context:,}", ""):
        table.add_column(label, justify="left" if label in ("GPU", "") else "right")
    sums = []
    for card in cards:
        for degree in tensor or (1, 2, 4, 8):
            parallel = _parallel(degree, pipeline, data, expert)
            row, explained = _fit(shape, card, parallel, context, step_tokens, sequences, utilization)
            table.add_row(*row)
            sums.append(explained)
    out.print(table)
    out.print()
    if gpu is None:  # of all GPUs that there are, the sums would hide the table
        sums = [*(each for each in sums if each.startswith("no:")), "with --gpu NAME: the sum of each row"]
    for explained in dict.fromkeys(sums):
        out.print(explained, style="dim", markup=False)


def _fit(
    shape: Model,
    card: GPU,
    parallel: Parallel,
    context: int,
    tokens: int,
    sequences: int,
    utilization: float,
) -> tuple[list[str], str]:
    """A row of the table, and the sum or what is in the way."""
    name = [card.name, str(parallel.gpus)]
    try:
        parallel.check(shape)
        fit = memory.kv_blocks(
            *(shape, card, parallel), memory_utilization=utilization, tokens=tokens, sequences=sequences
        )
    except ValueError as error:
        return [*name, "–", "–", "–", "–", "–", "no"], f"no: {error}"
    sizes = [f"{size / GIB:,.1f}" for size in (fit.weight_bytes, fit.reserve_bytes, fit.kv_bytes)]
    at_once = fit.blocks // -(-context // fit.block_size)
    fits = "yes" if at_once else f"no: not one request of {context:,} tokens"
    return [*name, *sizes, f"{fit.tokens:,}", f"{at_once:,}", fits], fit.explain()


def _table(parts: list[Part]) -> Table:
    table = Table(box=None, pad_edge=False)
    for label in ("part", "GB read", "TFLOP", "reading, ms", "FLOPs, ms", "fixed, ms", "ms", "share", ""):
        table.add_column(label, justify="left" if label in ("part", "") else "right", no_wrap=True)
    total = sum(part.seconds for part in parts) or 1.0
    longest = max(part.seconds for part in parts) or 1.0
    for part in parts:
        times = (part.memory_s, part.compute_s, part.fixed_s, part.seconds)
        cells = [f"{part.bytes / 1e9:.3f}" if part.bytes else "", f"{part.flops / 1e12:.3f}" if part.flops else ""]
        cells += [f"{1e3 * each:.3f}" if each else "" for each in times]
        bar = "█" * round(BAR * part.seconds / longest)
        table.add_row(part.name, *cells, f"{100 * part.seconds / total:.0f} %", bar)
    return table


def _card(name: str) -> GPU:
    return _tried("--gpu", name, lambda: specs.gpu(name))


def _parallel(tensor: int, pipeline: int, data: int, expert: int) -> Parallel:
    return Parallel(tensor=tensor, pipeline=pipeline, data=data, expert=expert)


def _efficiency(assignments: list[str]) -> Efficiency:
    document = Document({}, {}, "--set")
    document.set(assignments)
    settings: dict[str, Any] = document.check(plugins.settings(Efficiency)).model_dump()
    return Efficiency(**settings)


def _tried(option: str, value: str, find: Callable[[], Found]) -> Found:
    """What ``find`` returns. Raises `BadInput`, which names the option, where it raises."""
    try:
        return find()
    except BadInput:
        raise
    except (LookupError, ValueError) as error:
        raise BadInput(Problem(str(error.args[0] if error.args else error), file=option, value=value)) from None
