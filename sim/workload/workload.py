"""From the description of a workload to its trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.units import picoseconds
from chairlift.sim.workload import named
from chairlift.sim.workload.arrivals import MOST_REQUESTS, Arrivals
from chairlift.sim.workload.clients import restarted, starts, weighted
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.mix import merged
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.shared_prefix import first_of_session, with_prefixes
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import LATEST_PS, IntArray, Trace, shortened

_FIRST_DRAW = 256  # requests that are drawn at first where a duration says how many there are


def build(workload: Workload, seed: int, folder: Path = Path()) -> Trace:
    """The trace that ``workload`` describes: the same for the same ``seed`` (>= 0) and the same files.

    Args:
        workload: the description.
        seed: arrivals, prompt lengths, output lengths and so on are drawn from random streams of their own.
        folder: where relative paths start.

    Raises:
        BadInput: a file is wrong, arrivals run past what the clock can say, or prompts of sessions grow too long.
    """
    if workload.mix is not None:
        seeds = {name: int(stream(seed, f"mix {name}").integers(2**62)) for name in workload.mix}
        trace = merged({name: build(part, seeds[name], folder) for name, part in workload.mix.items()})
        trace = trace if workload.requests is None else trace.head(workload.requests)
        return _until(trace, workload.duration_s)
    replays = workload.file is not None or workload.servegen is not None
    return _capped(workload, _replayed(workload, seed, folder) if replays else _drawn(workload, seed))


def files_of(workload: Workload, folder: Path = Path()) -> dict[tuple[str, ...], list[Path]]:
    """The files that `build` reads, by the place in the description of the text that names them.

    A place is a path of keys: ``("file",)``, ``("servegen", "file")``, ``("mix", "chat", "file")``. The files of a
    place are always in the same order: a trace file first, then its companions; of a folder of ServeGen the files of
    its clients. A file that is not there, or that no format is told from, is listed as well.
    """
    if workload.mix is not None:
        parts = {name: files_of(part, folder) for name, part in workload.mix.items()}
        return {("mix", name, *place): files for name, found in parts.items() for place, files in found.items()}
    if workload.servegen is not None:
        return {("servegen", "file"): workload.servegen.files(folder)}
    if workload.file is not None:
        path = folder / workload.file
        return {("file",): [path, *formats.companions(path, workload.format)]}
    return {}


def _drawn(workload: Workload, seed: int) -> Trace:
    """The trace of a synthetic or a named workload."""
    prompt, output, arrivals = workload.prompt_tokens, workload.output_tokens, workload.arrivals
    sessions = workload.sessions_drawn()
    source = "synthetic"
    if workload.name is not None:
        known = named.get(workload.name)
        prompt, output = known.prompt_tokens, known.output_tokens
        if workload.clients is None:
            arrivals = arrivals or known.arrivals_at(workload.rate_per_s)
        source = f"named workload {workload.name} ({known.source}; {known.licence})"
    if prompt is None or output is None:
        raise AssertionError("Workload lets no such description through")
    cap = workload.max_tokens if isinstance(workload.max_tokens, int) else None

    def draw(n: int) -> Trace:
        if sessions is not None and arrivals is not None:
            return sessions.draw(n, seed, arrivals, prompt, output, cap)
        return Trace(
            arrival_ps=np.zeros(n, np.int64) if arrivals is None else arrivals.times_ps(n, stream(seed, "arrivals")),
            prompt_tokens=prompt.sample(n, stream(seed, "prompt_tokens")).astype(np.int32),
            output_tokens=output.sample(n, stream(seed, "output_tokens")).astype(np.int32),
        )

    trace = _enough(draw, workload.requests, _end_s(workload, arrivals))
    if workload.requests is not None and len(trace) < workload.requests:
        told = f"{workload.requests:,} requests wanted, {len(trace):,} arrive in the time that is asked for"
        trace = dataclasses.replace(trace, notes=(*trace.notes, told))
    if sessions is not None and arrivals is not None:
        source = f"{source}; {_said_of_sessions(trace, arrivals)}"
    notes = (*trace.notes, *(() if arrivals is None else arrivals.notes))
    trace = _labelled(workload, dataclasses.replace(trace, source=source, notes=notes), seed)
    return trace if workload.clients is None else workload.clients.loop(trace, seed)


def _said_of_sessions(trace: Trace, arrivals: Arrivals) -> str:
    """What a rate counts where sessions are drawn, and what it comes to in requests."""
    each = len(trace) / starts(trace)
    rate = arrivals.mean_rate_per_s
    come = "all sessions start at once" if rate is None else f"{rate:.4g} sessions/s start"
    total = "" if rate is None else f", in the long run {rate * each:.4g} requests/s"
    return f"{come}, of {each:.3g} requests each{total}"


def _end_s(workload: Workload, arrivals: Arrivals | None) -> float | None:
    """The seconds after which no request arrives; None: the number of requests alone says when there are no more."""
    ends = [workload.duration_s, None if arrivals is None else arrivals.length_s]
    return min((end for end in ends if end is not None), default=None)


def _enough(draw: Callable[[int], Trace], requests: int | None, end_s: float | None) -> Trace:
    """As many requests as ``requests`` says, or as arrive within ``end_s`` seconds, whichever are fewer."""
    if requests is not None:
        return _until(draw(requests), end_s)
    if end_s is None:
        raise AssertionError("Workload lets no such description through")
    n = _FIRST_DRAW
    while (trace := draw(n)).arrival_ps[-1] <= picoseconds(end_s):
        n *= 2
        if n > MOST_REQUESTS:
            rule = f"more than {MOST_REQUESTS:,} requests arrive within {end_s:g} s: lower the rate or give requests"
            raise BadInput(Problem(rule, path="duration_s", value=end_s))
    return _until(trace, end_s)


def _until(trace: Trace, end_s: float | None) -> Trace:
    """The requests of ``trace`` that arrive within its first ``end_s`` seconds; None: all of them.

    A request that follows another counts as arriving with the first of its chain.
    """
    if end_s is None:
        return trace
    count = int(np.searchsorted(trace.arrival_ps, picoseconds(end_s), side="right"))
    if count == 0:
        first = int(trace.arrival_ps[0]) / 1e12
        raise BadInput(
            Problem(f"no request arrives so early: the first comes at {first:g} s", path="duration_s", value=end_s)
        )
    return trace.head(count)


def _labelled(workload: Workload, trace: Trace, seed: int) -> Trace:
    """``trace`` with prefix, tenant and priority of each request. All requests of a session are alike."""
    n = len(trace)
    sender = np.arange(n)
    if trace.session is not None:  # sessions have the first numbers, requests without a session those behind
        sender = np.where(trace.session >= 0, trace.session, int(trace.session.max()) + 1 + sender)
        n = int(sender.max()) + 1
    columns: dict[str, Any] = {}
    if workload.prefix is not None:
        group = workload.prefix.draw(n, stream(seed, "prefix"))[sender]
        tokens = np.minimum(trace.prompt_tokens, workload.prefix.tokens)
        if short := int(np.count_nonzero(trace.prompt_tokens < workload.prefix.tokens)):
            told = f"{short:,} of {len(trace):,} prompts are shorter than the prefix, so all of them is shared"
            trace = dataclasses.replace(trace, notes=(*trace.notes, told))
        if trace.session is None:
            columns |= {"prefix_group": group, "prefix_tokens": tokens}
        else:
            trace = with_prefixes(trace, group, tokens)
    if workload.tenants is not None:
        columns["tenants"] = tuple(workload.tenants)
        columns["tenant"] = weighted(list(workload.tenants.values()), n, stream(seed, "tenants"))[sender]
    if workload.priority is not None:
        columns["priority"] = weighted(workload.priority.weights, n, stream(seed, "priority"))[sender]
    return dataclasses.replace(trace, **columns)


def _replayed(workload: Workload, seed: int, folder: Path) -> Trace:
    """The trace in a file, or the requests of ServeGen's clients, with the times that the description asks for."""
    if workload.servegen is not None:
        path, servegen = folder / workload.servegen.file, workload.servegen
        trace = _enough(
            lambda n: servegen.draw(n, seed, folder, workload.rate_per_s),
            workload.requests,
            None if workload.arrivals is not None else workload.duration_s,
        )
    else:
        path = folder / str(workload.file)
        limits = [limit for limit in (workload.limit, workload.requests) if limit is not None]
        timed = workload.arrivals is None and workload.clients is None
        asked = {name: getattr(workload, name) for name in formats.OPTIONS}
        trace = formats.load(path, workload.format, min(limits, default=None), times=timed, options=asked)
        trace = _overlaid(workload, _with_groups_of_sessions(trace, path), seed, path)
    notes = list(trace.notes)
    if workload.requests is not None:
        trace = trace.head(workload.requests)  # where the file holds sessions, its limit counts those
        if len(trace) < workload.requests:
            notes.append(f"{workload.requests} requests wanted, {len(trace)} read")
    times = trace.arrival_ps
    if workload.clients is not None:
        notes.append(f"arrival times replaced by {workload.clients.concurrency} clients in a closed loop")
        return workload.clients.loop(dataclasses.replace(trace, notes=tuple(notes)), seed)
    if workload.arrivals is not None:
        notes += ["arrival times replaced", *workload.arrivals.notes]
        trace = restarted(trace, workload.arrivals.times_ps(starts(trace), stream(seed, "arrivals")))
        kept = _until(trace, _end_s(workload, workload.arrivals))
        if workload.ends():
            notes.append(f"{len(kept):,} of {len(trace):,} requests arrive in the time that is asked for")
        return dataclasses.replace(kept, notes=tuple(notes))
    if workload.rate_per_s is not None and workload.servegen is None:
        if trace.duration_s == 0:
            rule = "all requests of the file arrive at once, which no stretching makes a rate; give arrivals"
            raise BadInput(Problem(rule, file=str(path), path="rate_per_s", value=workload.rate_per_s))
        times = _stretched(times, (starts(trace) - 1) / trace.duration_s / workload.rate_per_s, path)
        what = "requests" if trace.follows is None else "sessions"
        notes.append(f"arrival times stretched to {workload.rate_per_s:g} {what}/s")
    elif workload.time_scale != 1:
        times = _stretched(times, workload.time_scale, path)
        notes.append(f"arrival times multiplied by {workload.time_scale:g}")
    trace = dataclasses.replace(trace, arrival_ps=times, notes=tuple(notes))
    return _until(trace, workload.duration_s)


def _with_groups_of_sessions(trace: Trace, path: Path) -> Trace:
    """``trace``, read from ``path``, with block ids where requests of a session have a prefix group as well.

    Raises:
        BadInput: the requests of a session are of several groups.
    """
    group, tokens, session = trace.prefix_group, trace.prefix_tokens, trace.session
    if session is None or group is None or tokens is None or not ((session >= 0) & (group >= 0)).any():
        return trace
    if trace.hash_ids is not None:
        note = "prefix groups of requests with a session not used: hash ids and sessions say what these prompts share"
        return dataclasses.replace(trace, notes=(*trace.notes, note))
    first = first_of_session(trace)
    problems = [
        Problem(
            f"must be that of the session's first request, {group[first[i]]}", str(path), None, "prefix_group", value
        )
        for i, value in enumerate(group.tolist())
        if session[i] >= 0 and value != group[first[i]]
    ]
    if problems:
        raise BadInput(shortened(problems))
    return with_prefixes(dataclasses.replace(trace, prefix_group=None, prefix_tokens=None), group, tokens)


def _overlaid(workload: Workload, trace: Trace, seed: int, path: Path) -> Trace:
    """``trace``, read from ``path``, with the prefixes, tenants and priorities that the description lays over it."""
    notes = list(trace.notes)
    if workload.prefix is not None:
        shared = {"hash ids": trace.hash_ids, "prefix groups": trace.prefix_group}
        if own := [name for name, column in shared.items() if column is not None]:
            rule = f"must not be given with a file whose {' and '.join(own)} say what its prompts share"
            raise BadInput(Problem(rule, file=str(path), path="prefix"))
        notes.append("prefixes laid over the file's requests")
    for key, column in (("tenants", trace.tenant), ("priority", trace.priority)):
        if getattr(workload, key) is not None:
            notes.append(f"{key} {'replaced' if column is not None else 'laid over the requests'}")
    if workload.max_tokens is not None and trace.max_tokens is not None:
        notes.append("max_tokens replaced")
    return _labelled(workload, dataclasses.replace(trace, notes=tuple(notes)), seed)


def _capped(workload: Workload, trace: Trace) -> Trace:
    """``trace`` with the caps on outputs that clients declare, as ``max_tokens`` says."""
    if workload.max_tokens is None:
        return trace
    if workload.max_tokens == "exact":
        return dataclasses.replace(trace, max_tokens=trace.output_tokens)
    cap = np.full(len(trace), workload.max_tokens, np.int32)
    over = int(np.count_nonzero(trace.output_tokens > cap))
    notes = (*trace.notes, f"{over} outputs end at max_tokens {workload.max_tokens}") if over else trace.notes
    outputs = np.minimum(trace.output_tokens, cap)
    return dataclasses.replace(trace, max_tokens=cap, output_tokens=outputs, notes=notes)


def _stretched(times: IntArray, factor: float, path: Path) -> IntArray:
    """``times`` multiplied by ``factor`` in float64: exact to some picoseconds, and in the same order."""
    longest = float(times[-1]) * factor
    if not longest < LATEST_PS:
        rule = "arrivals stretched so far run past what the clock can say (106 days)"
        raise BadInput(Problem(rule, file=str(path), path="time_scale", value=factor))
    stretched: IntArray = np.rint(times * factor).astype(np.int64)
    return stretched
