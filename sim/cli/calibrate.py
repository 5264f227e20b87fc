"""The commands ``calibrate`` and ``validate``: from recordings to profiles, and from profiles to recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chairlift.backend import specs
from chairlift.backend.calibrated.profile import Profile, ProfileError, load
from chairlift.backend.fitting import residuals
from chairlift.backend.fitting.fit import CalibrationError
from chairlift.backend.fitting.recording import Experiment, Recording, RecordingError, read
from chairlift.backend.fitting.steps import STALL, stalls, steps_of
from chairlift.backend.gpu.settings import Torch
from chairlift.backend.parallel import labelled
from chairlift.sim.bad_input import BadInput, Problem, names_a_file, saving
from chairlift.sim.calibration import bench_parts, from_bench, grid, validate
from chairlift.sim.calibration import fit as fitting
from chairlift.sim.cli import benched
from chairlift.sim.cli.shipped import complete
from chairlift.sim.cli.terminal import console, must_end_in, save, status

WIDTH = 100  # columns of a table that goes to a file or a pipe

RecordingOption = Annotated[
    Path | None,
    typer.Option("--recording", metavar="DIR", help="A recording: <model>_requests.csv.gz, _steps, _summary."),
]
ExperimentsOption = Annotated[
    list[str] | None,
    typer.Option("--experiments", metavar="E", help="Only these, separated by commas. Repeatable."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def calibrate(
    more: Annotated[
        list[Path] | None,
        typer.Argument(readable=False, metavar="[RESULT]...", help="Further results, beside that of --bench."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="The model: llama-3.1-8b, opt-13b.")] = None,
    recording: RecordingOption = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="RESULT",
            help="Fit to results of vllm bench serve --save-detailed, at several rates.",
        ),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(metavar="S", help="With --bench: what served; default: vLLM as it comes, of --model on --gpu."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="P", help="With --bench: the profile to start from.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="torch", help="Measure this engine on a grid first (some minutes), recorded in DIR."),
    ] = None,
    experiments: ExperimentsOption = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The profile; default <gpu>-<model>-<engine>.json.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Recorded against predicted step times, held out.")
    ] = None,
    name: Annotated[str, typer.Option(metavar="N", help="The profile's name; default from the recording.")] = "",
    gpu: Annotated[
        str, typer.Option(metavar="G", help="The GPU in Chairlift's words; default from the recording.")
    ] = "",
    fast: Annotated[
        bool, typer.Option("--fast", help="Do not fit again without each experiment: no errors known.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a profile of step costs to what an engine was recorded doing, or to what its clients measured.

    Prints how far a fit without each experiment was off on its steps. Refuses data that cannot tell a term, and says
    which and why. [bold]chairlift calibrate --recording DIR --model llama-3.1-8b[/bold]

    With --bench, parts of the nearest profile get factors, with intervals that hold 9 in 10:
    [bold]chairlift calibrate --bench q4.json q16.json burst.json --model llama-3.1-8b --gpu h200[/bold]
    """
    out = console(least=WIDTH)
    if name and not names_a_file(name):
        raise BadInput(
            Problem("must be a file's name, without / or \\ or control characters", file="--name", value=name)
        )
    must_end_in(out_file, ".json", hint=", by which a scenario's backend tells a file from a shipped profile")
    must_end_in(plot, ".html")
    if bench is not None or more:
        others = {"--recording": recording, "--backend": backend, "--experiments": experiments, "--plot": plot}
        if given := [option for option, value in others.items() if value]:
            raise BadInput(Problem("must not be given beside --bench", file=given[0]))
        if bench is None:
            raise BadInput(Problem("results are given with --bench", file=str((more or [Path()])[0])))
        if (scenario is None) == (model is None) or (scenario is None) == (not gpu):
            raise BadInput(Problem("give either --scenario S, or --model M and --gpu G", file="calibrate --bench"))
        deployment = scenario or (model or "", gpu)
        _from_results(out, [bench, *(more or [])], deployment, start, not fast, name, out_file, quiet)
        return
    for option, value in (("--scenario", scenario), ("--from", start)):
        if value:
            raise BadInput(Problem("goes with --bench", file=option))
    if model is None:
        raise BadInput(Problem("is required", file="--model"))
    if backend not in (None, "torch"):
        raise BadInput(Problem("must be torch, the only backend that executes steps", file="--backend", value=backend))
    if recording is None and backend is None:
        raise BadInput(Problem("give --recording DIR, or --backend torch to make one", file="calibrate"))
    recording = recording or Path("recordings") / model
    with _bad_input(), status(quiet) as progress:
        if backend is not None:
            plainly = model.removesuffix(f"-{grid.DRAFTS.method}")
            name_of, parallel = labelled(plainly)
            if parallel.pipeline > 1:
                rule = "must name no stages: their steps run several at a time, and none has a time of its own"
                raise BadInput(Problem(rule, file="--model", value=model))
            shape = specs.model(name_of)
            engine = Torch(routing_skew=0.0 if shape.experts else None)  # a router of random weights chooses anything
            grid.measure(shape, specs.gpu(gpu or "h200"), engine, recording, progress, parallel, model != plainly)
        source = read(recording, model)
        chosen = source.select(_names(experiments))
        progress("fit")
        profile = fitting.fitted(source, chosen, name, gpu)
        held = fitting.Held() if fast else fitting.hold_out(source, chosen, progress)
    profile = fitting.with_errors(profile, held)
    path = out_file or Path(f"{profile.name}.json")
    source_of = f"--recording {recording.name}" if backend is None else f"--backend {backend}"
    command = f"chairlift calibrate {source_of} --model {model}"
    profile.provenance["command"] = command + (f" --experiments {','.join(_names(experiments))}" if experiments else "")
    save(path, profile.to_json())
    if plot is not None:
        with saving(plot):
            _parity(held, plot)
    if quiet:
        return
    if held.steps:
        out.print(_regimes(residuals.summary(list(held.steps.values())), "steps of experiments left out of the fit"))
        out.print(_regimes(residuals.summary(list(held.gpu.values())), "of those, GPU time where it shows"))
    else:
        inside = residuals.foresee(profile.gpu_time, profile.host, steps_of(chosen))
        out.print(_regimes(residuals.summary([inside]), "steps, in sample"))
    for each, why in held.skipped.items():
        out.print(f"not held out: {escape(each)}: {escape(why)}")
    for note in profile.notes:
        out.print(f"note: {escape(note)}")
    out.print(f"profile {profile.name} ({profile.digest}) in {escape(str(path))}", style="dim")


def _from_results(
    out: Console,
    files: Sequence[Path],
    deployment: str | tuple[str, str],
    start: str | None,
    hold_out: bool,
    name: str,
    out_file: Path | None,
    quiet: bool,
) -> None:
    with _bad_input(), status(quiet) as progress:
        found = benched.fitted(files, deployment, start, hold_out, progress)
        profile = replace(found.profile, name=name or found.profile.name)
        words = ["chairlift", "calibrate", "--bench", *(file.name for file in files)]
        words += ["--scenario", deployment] if isinstance(deployment, str) else ["--model", deployment[0]]
        profile.provenance["command"] = " ".join(words)
        path = out_file or Path(f"{profile.name}.json")
        save(path, profile.to_json())
    if quiet:
        return
    out.print(_factors(found.parts, str(profile.provenance["from"])))
    how = "left out of the fit" if hold_out and len(files) > 1 else "in sample"
    for each, cells in found.cells.items():
        shown = [cell for cell in cells if not cell.metric.endswith("_cdf_distance")]
        out.print(_cells_table(f"{each}, {how}", False, shown))
    for note in profile.notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)
    out.print(f"profile {profile.name} ({profile.digest}) in {escape(str(path))}", style="dim")


def _factors(parts: Sequence[from_bench.Told], source: str) -> Table:
    table = Table(title=f"factors on profile {source}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for label in ("factor", "9 in 10 from", "to", ""):
        table.add_column(label, justify="right")
    for each in parts:
        client = each.part == bench_parts.PARTS[bench_parts.CLIENT]
        values = (f"{1e3 * value:.1f} ms" if client else f"{value:.3f}" for value in each[1:4])
        table.add_row(each.part, *values, "" if each.told else "the results do not tell")
    return table


def validate_(
    scenario: Annotated[
        str | None, typer.Argument(help="With --bench: the deployment that was benchmarked.", autocompletion=complete)
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            readable=False, metavar="FILE", help="A result of vllm bench serve --save-result --save-detailed."
        ),
    ] = None,
    recording: RecordingOption = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="The recorded model.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="P", help="A shipped profile's name, or a .json file.")
    ] = None,
    experiments: ExperimentsOption = None,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Predict each experiment by a fit to all others; needs no --profile."),
    ] = False,
    recorded_host: Annotated[
        bool,
        typer.Option(
            "--recorded-host", help="Take each run's host to be as fast as it was recorded, not as the profile says."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every cell as a list of rows.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Predict what was measured, and compare: durations, latencies and, of recordings, steps and preemptions.

    [bold]chairlift validate my.yaml --bench results.json[/bold] sends a benchmark's requests through the scenario, when
    it sent them. [bold]chairlift validate --recording DIR --model llama-3.1-8b --profile P[/bold] replays each recorded
    experiment with its own arrivals, lengths and limits by the policy of the recorded engine. Grids, made to measure
    steps, and repeats, which show the engine's own noise, are left out unless named.
    """
    must_end_in(json_file, ".json")
    out = console(least=WIDTH)
    if bench is not None or scenario is not None:
        others = {
            **{"--recording": recording, "--model": model, "--profile": profile, "--experiments": experiments},
            **{"--leave-one-out": leave_one_out, "--recorded-host": recorded_host},
        }
        if given := [name for name, value in others.items() if value]:
            raise BadInput(Problem("must not be given beside a scenario and --bench", file=given[0]))
        if bench is None or scenario is None:
            raise BadInput(Problem("give both a scenario and --bench FILE", file="validate"))
        _beside(out, scenario, bench, json_file, quiet)
        return
    if recording is None or model is None:
        raise BadInput(Problem("give a scenario and --bench FILE, or --recording DIR and --model M", file="validate"))
    if leave_one_out == (profile is not None):
        raise BadInput(Problem("give either --profile or --leave-one-out", file="validate"))
    cells: list[validate.Cell] = []
    with _bad_input(), status(quiet) as progress:
        source = read(recording, model)
        names = _names(experiments)
        chosen = source.select(names)
        if not names:
            chosen = [each for each in chosen if not each.is_grid and not each.repeats]
        if not chosen:
            raise BadInput(Problem("holds grids only; name those to predict by --experiments", file=str(recording)))
        for each, by in _profiles(source, chosen, profile, progress):
            found = _predicted(source, each, by, recorded_host, progress)
            cells += found
            if not quiet:
                out.print(_cells_table(each.name, validate.is_burst(each), found))
                pace = validate.host_pace(each, by) if recorded_host else 1.0
                if pace != 1.0:
                    out.print(
                        f"note: {escape(each.name)}: its host took {pace:.2f} times as long to schedule as the"
                        " profile's on average, and is predicted to launch as fast as it scheduled at the time"
                    )
                _, lengths = stalls(each)
                if len(lengths):
                    out.print(
                        f"note: {escape(each.name)}: the engine stalled {len(lengths)} times, {lengths.sum():.1f} s"
                        f" in all (a step {STALL} times as long as those like it); the clock stands still in them"
                    )
        if json_file is not None:  # all rows or none: a file of some would look like one of all
            save(json_file, json.dumps([cell.json() for cell in cells], indent=1) + "\n")
    if not quiet:
        _bands(out, cells, {each.name for each in chosen if validate.is_burst(each)})


def _beside(out: Console, scenario: str, file: Path, json_file: Path | None, quiet: bool) -> None:
    with _bad_input(), status(quiet) as progress:
        cells, burst, notes = benched.compared(scenario, file, progress)
        if json_file is not None:
            save(json_file, json.dumps([cell.json() for cell in cells], indent=1) + "\n")
    if quiet:
        return
    out.print(_cells_table(file.name, burst, cells))
    for note in notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)
    _bands(out, cells, {file.name} if burst else set())


def _bands(out: Console, cells: Sequence[validate.Cell], bursts: set[str]) -> None:
    judged = [validate.allowed(cell, cell.experiment in bursts) for cell in cells]
    banded = [each for each in judged if each is not None]
    out.print(f"{sum(banded)} of {len(banded)} cells that have a band are within it", style="bold")
    out.print(f"bands: {validate.BANDS}", style="dim", soft_wrap=True)


def _profiles(
    source: Recording, chosen: Sequence[Experiment], profile: str | None, progress: Callable[[str], None]
) -> Iterator[tuple[Experiment, Profile]]:
    if profile is not None:
        given = load(profile)
        if given.model != source.shape:
            raise BadInput(Problem(f"is of {given.model}, the recording of {source.model}", file=profile))
        yield from ((each, given) for each in chosen)
        return
    everything = list(source.experiments.values())
    for each, found in fitting.leave_one_out(source, everything, chosen, progress):
        if isinstance(found, str):
            raise BadInput(Problem(found, file=f"without {each.name}"))
        yield each, found


def _predicted(
    source: Recording, experiment: Experiment, profile: Profile, recorded_host: bool, progress: Callable[[str], None]
) -> list[validate.Cell]:
    progress(f"predict {experiment.name}")
    return validate.validate(source, [experiment], lambda _each: profile, recorded_host=recorded_host)


def _cells_table(name: str, burst: bool, cells: Sequence[validate.Cell]) -> Table:
    table = Table(title=escape(name), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for label in ("predicted", "recorded", "error"):
        table.add_column(label, justify="right")
    repeated = any(cell.noise is not None for cell in cells)
    for label in ("engine's own noise",) * repeated + ("",):
        table.add_column(label, justify="right")
    for cell in cells:
        error, noise = cell.relative_error, cell.noise
        distance = cell.metric.endswith("_cdf_distance")
        style = "red" if validate.allowed(cell, burst) is False else None
        table.add_row(
            cell.metric,
            f"{cell.predicted:,.3f}",
            "" if distance else f"{cell.recorded:,.3f}",
            "" if error is None or distance else f"{100 * error:+.2f} %",
            *["" if noise is None else (f"{noise:.3f}" if distance else f"{100 * noise:+.2f} %")] * repeated,
            "outside its band" if style else "",
            style=style,
        )
    return table


def _regimes(found: dict[str, dict[str, float]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("regime")
    for label in ("steps", "median error", "95 % below", "total time"):
        table.add_column(label, justify="right")
    for regime, e in found.items():
        shares = (f"{100 * e['median']:.1f} %", f"{100 * e['p95']:.1f} %", f"{100 * e['total']:+.1f} %")
        table.add_row(regime, f"{e['steps']:,.0f}", *shares)
    return table


def _parity(held: fitting.Held, path: Path) -> None:
    """Recorded against predicted step times, an HTML page that needs no network."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for name, each in held.steps.items():
        every = max(1, len(each.recorded) // 2000)
        figure.add_scatter(
            x=(each.predicted[::every] * 1e3).round(3),
            y=(each.recorded[::every] * 1e3).round(3),
            mode="markers",
            marker={"size": 4},
            name=name,
        )
    figure.add_scatter(x=[2, 500], y=[2, 500], mode="lines", name="equal", line={"color": "black", "width": 1})
    figure.update_xaxes(type="log", title="predicted, ms")
    figure.update_yaxes(type="log", title="recorded, ms")
    figure.update_layout(title="Step times of experiments left out of the fit")
    figure.write_html(path, include_plotlyjs=True)


def _names(experiments: list[str] | None) -> list[str]:
    return [name.strip() for each in experiments or [] for name in each.split(",") if name.strip()]


@contextmanager
def _bad_input() -> Iterator[None]:
    """Turn errors about recordings and profiles, and of a recording that cannot be made, into `BadInput`."""
    try:
        yield
    except (RecordingError, ProfileError, CalibrationError, OSError) as error:
        raise BadInput(Problem(str(error))) from None
