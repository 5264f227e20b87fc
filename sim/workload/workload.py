"""Where a scenario's requests come from: distributions, a named workload, or a trace file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.workload import named
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.clients import Clients, Prefix, Priority, Sessions, Weight, restarted, starts, weighted
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.lengths import IntArray, Lengths, Spec, Tokens
from chairlift.sim.workload.mix import merged
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.servegen import ServeGen
from chairlift.sim.workload.trace import LATEST_PS, HashIds, Trace
from chairlift.sim.workload.varying_rates import Rate

__all__ = ["HashIds", "Trace", "Workload"]

Count = Annotated[int, Field(ge=1)]


class Workload(Spec):
    """The workload of a scenario; `build` makes a `Trace` of it.

    Lengths come from exactly one of: ``prompt_tokens`` and ``output_tokens`` (synthetic), ``name``, ``file``,
    ``servegen``, ``mix``.
    Arrivals come from ``arrivals`` or ``clients``, or else from the named workload or the file.
    """

    requests: Count | None = Field(
        default=None, description="How many requests, all turns of sessions counted; with a file, at most how many."
    )
    arrivals: Arrivals | None = Field(
        default=None,
        description="When requests arrive, or sessions start; replaces the times of a file or name.",
    )
    clients: Clients | None = Field(
        default=None,
        description="Instead of arrivals: clients that send a request when their last has ended (a closed loop).",
    )
    sessions: Sessions | None = Field(
        default=None,
        description="Chats of several turns: arrivals are their starts, prompt_tokens the new tokens of a turn.",
    )
    prompt_tokens: Lengths | None = Field(default=None, description="Prompt lengths: a number or a distribution.")
    output_tokens: Lengths | None = Field(default=None, description="Output lengths: a number or a distribution.")
    max_tokens: Literal["exact"] | Tokens | None = Field(
        default=None,
        description="The output cap that clients declare: exact (the true length), one number (longer "
        "outputs end there), or null: the file's own column if it has one, else nothing.",
    )
    prefix: Prefix | None = Field(default=None, description="Prefixes that prompts share; not of a file or sessions.")
    tenants: Annotated[dict[str, Weight], Field(min_length=1)] | None = Field(
        default=None, description="Names of tenants and the weight of each; not of a file. A session has one tenant."
    )
    priority: Priority | None = Field(
        default=None, description="Priorities by weight; not of a file. A session has one priority."
    )
    name: str | None = Field(
        default=None, description="A named workload.", json_schema_extra={"enum": [*named.names(), None]}
    )
    rate_per_s: Rate | None = Field(
        default=None,
        description="Mean requests per second (with sessions: starts of them) to stretch a file's or a named "
        "workload's times to.",
    )
    file: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A trace file to replay; a relative path starts at the scenario file's folder.",
    )
    servegen: ServeGen | None = Field(default=None, description="Requests drawn from ServeGen's table of clients.")
    mix: Annotated[dict[str, Workload], Field(min_length=1)] | None = Field(
        default=None, description="Several workloads at once, by name: each with arrivals of its own, and a tenant."
    )
    format: Literal["azure", "burstgpt", "chairlift", "kv_cache_tester", "mooncake", "ragpulse", "vidur"] | None = (
        Field(default=None, description="The file's format; null: told from its header.")
    )
    time_scale: Annotated[float, Field(gt=0, le=1e9)] = Field(
        default=1.0, description="Multiplies a file's arrival times: 0.5 is twice the load."
    )
    limit: Count | None = Field(default=None, description="Read the first so many rows of the file, or sessions.")

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _known_cap(cls, cap: object) -> object:
        if cap is None or cap == "exact" or (isinstance(cap, int) and not isinstance(cap, bool) and cap >= 1):
            return cap
        raise ValueError("must be exact, a whole number of at least 1, or null")

    @field_validator("tenants")
    @classmethod
    def _some_weight(cls, tenants: dict[str, float] | None) -> dict[str, float] | None:
        if tenants is not None and not any(tenants.values()):
            raise ValueError("must have a weight above 0")
        return tenants

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str | None) -> str | None:
        if name is not None and name not in named.names():
            raise ValueError(f"no such workload{did_you_mean(name, named.names())}")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Workload:
        if wrong := [*self._wrong_source(), *self._wrong_times(), *self._wrong_senders()]:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_source(self) -> list[str]:
        """What is wrong with where lengths come from."""
        wrong = []
        synthetic = self.prompt_tokens is not None or self.output_tokens is not None
        sources = ["prompt_tokens or output_tokens"] * synthetic
        sources += [key for key in ("name", "file", "servegen", "mix") if getattr(self, key) is not None]
        if len(sources) != 1:
            rule = (
                "lengths must come from exactly one of prompt_tokens with output_tokens, name, file, servegen, or mix"
            )
            wrong.append(f"{rule}, not {' and '.join(sources) or 'none'}")
        elif synthetic:
            needed = ("requests", "arrivals", "prompt_tokens", "output_tokens")
            missing = [key for key in needed if getattr(self, key) is None]
            if self.clients is not None and "arrivals" in missing:
                missing.remove("arrivals")
            missing = [key if key != "arrivals" else "arrivals (or clients)" for key in missing]
            if missing:
                wrong.append(f"a synthetic workload must have {' and '.join(missing)} as well")
        elif (self.name or self.servegen) and self.requests is None:
            what = "a named workload" if self.name else "servegen"
            wrong.append(f"{what} must have requests, how many to draw")
        elif self.mix is not None:
            only_in = ("arrivals", "clients", "rate_per_s", "max_tokens")
            said = [key for key in only_in if getattr(self, key) is not None]
            wrong += [f"{key} must not be given beside mix: its parts have their own" for key in said]
        if self.file is None:
            only = {"format": self.format, "limit": self.limit}
            wrong += [f"{key} must not be given without a file" for key, value in only.items() if value is not None]
        return wrong

    def _wrong_times(self) -> list[str]:
        """What is wrong with where times come from."""
        wrong = []
        if self.rate_per_s is not None and not (self.name or self.file or self.servegen or self.mix):
            wrong.append("rate_per_s must not be given without a name or a file: arrivals say the rate")
        elif self.rate_per_s is not None and self.arrivals is not None:
            wrong.append("rate_per_s and arrivals must not both be given: each says the rate")
        if self.time_scale != 1:
            if self.file is None:
                wrong.append("time_scale must not be given without a file")
            elif self.arrivals is not None or self.rate_per_s is not None:
                other = "arrivals" if self.arrivals is not None else "rate_per_s"
                wrong.append(f"time_scale and {other} must not both be given")
        if self.clients is not None:
            said = {"arrivals": self.arrivals, "rate_per_s": self.rate_per_s}
            others = [key for key, value in said.items() if value is not None] + ["time_scale"] * (self.time_scale != 1)
            wrong += [f"clients and {key} must not both be given: each says when requests come" for key in others]
        rateless = self.arrivals is None and self.clients is None and self.rate_per_s is None
        if self.name is not None and rateless and named.get(self.name).arrivals is None:
            lacks = "no arrivals of its sessions" if self._sessions() else "lengths only"
            wrong.append(f"{self.name} has {lacks}, so arrivals or rate_per_s must be given")
        return wrong

    def _wrong_senders(self) -> list[str]:
        """What is wrong with who sends the requests."""
        wrong = []
        for source, article in (("file", "a file"), ("servegen", "servegen"), ("mix", "mix")):
            if getattr(self, source) is not None:
                keys = ("sessions", "prefix", "tenants", "priority")
                given = [key for key in keys if getattr(self, key) is not None]
                wrong += [f"{key} must not be given with {article}, which has its own or none" for key in given]
        sessions = self.sessions or self._sessions()
        if sessions is not None and self.clients is not None:
            wrong.append("sessions and clients must not both be given: each says after what a request is sent")
        if sessions is not None and self.prefix is not None:
            wrong.append("sessions and prefix must not both be given: the prompts of a session share what came before")
        return wrong

    def _sessions(self) -> Sessions | None:
        """Those of the named workload, if it has any."""
        return None if self.name is None else named.get(self.name).sessions

    def build(self, seed: int, base: Path | None = None) -> Trace:
        """The trace: the same one for the same ``seed`` (>= 0) and, with a file, the same file.

        Args:
            seed: arrivals, prompt lengths, output lengths and so on are drawn from streams of their own.
            base: the folder that a relative ``file`` starts from; None: the working directory.

        Raises:
            BadInput: the file is wrong, arrivals run past what the clock can say, or sessions past their context.
        """
        if self.mix is not None:
            seeds = {name: int(stream(seed, f"mix {name}").integers(2**62)) for name in self.mix}
            trace = merged({name: part.build(seeds[name], base) for name, part in self.mix.items()})
            return trace if self.requests is None else trace.head(self.requests)
        replays = self.file is not None or self.servegen is not None
        return self._capped(self._replayed(seed, base) if replays else self._drawn(seed))

    def _drawn(self, seed: int) -> Trace:
        prompt, output, arrivals = self.prompt_tokens, self.output_tokens, self.arrivals
        sessions = self.sessions or self._sessions()
        source = "synthetic"
        if self.name is not None:
            known = named.get(self.name)
            prompt, output = known.prompt_tokens, known.output_tokens
            if self.clients is None:
                arrivals = arrivals or known.arrivals_at(self.rate_per_s)
            source = f"named workload {self.name} ({known.source}; {known.licence})"
        n = self.requests
        if n is None or prompt is None or output is None:
            raise AssertionError("let through by _fits_together")
        if sessions is not None and arrivals is not None:
            cap = self.max_tokens if isinstance(self.max_tokens, int) else None
            trace = sessions.draw(n, seed, arrivals, prompt, output, cap)
        else:
            trace = Trace(
                arrival_ps=np.zeros(n, np.int64)
                if arrivals is None
                else arrivals.times_ps(n, stream(seed, "arrivals")),
                prompt_tokens=prompt.sample(n, stream(seed, "prompt_tokens")).astype(np.int32),
                output_tokens=output.sample(n, stream(seed, "output_tokens")).astype(np.int32),
            )
        trace = dataclasses.replace(trace, source=source, **self._labels(trace, seed))
        return trace if self.clients is None else self.clients.loop(trace, seed)

    def _labels(self, trace: Trace, seed: int) -> dict[str, Any]:
        """Columns that say whose a request is; those of one session have the same sender."""
        n = len(trace)
        sender = np.arange(n) if trace.session is None else trace.session
        columns: dict[str, Any] = {}
        if self.prefix is not None:
            columns["prefix_group"] = self.prefix.draw(n, stream(seed, "prefix"))
            columns["prefix_tokens"] = np.minimum(trace.prompt_tokens, self.prefix.tokens)
        if self.tenants is not None:
            columns["tenants"] = tuple(self.tenants)
            columns["tenant"] = weighted(list(self.tenants.values()), n, stream(seed, "tenants"))[sender]
        if self.priority is not None:
            columns["priority"] = weighted(self.priority.weights, n, stream(seed, "priority"))[sender]
        return columns

    def _replayed(self, seed: int, base: Path | None) -> Trace:
        if self.servegen is not None:
            path = (base or Path()) / self.servegen.file
            trace = self.servegen.draw(self.requests or 1, seed, base or Path(), self.rate_per_s)
        else:
            path = (base or Path()) / str(self.file)
            limits = [limit for limit in (self.limit, self.requests) if limit is not None]
            timed = self.arrivals is None and self.clients is None
            trace = formats.load(path, self.format, min(limits, default=None), times=timed)
        notes = list(trace.notes)
        if self.requests is not None:
            trace = trace.head(self.requests)  # of sessions, the limit counts whole ones
            if len(trace) < self.requests:
                notes.append(f"{self.requests} requests wanted, {len(trace)} read")
        times = trace.arrival_ps
        if self.clients is not None:
            notes.append(f"arrival times replaced by {self.clients.concurrency} clients in a closed loop")
            return self.clients.loop(dataclasses.replace(trace, notes=tuple(notes)), seed)
        if self.arrivals is not None:
            notes.append("arrival times replaced")
            trace = restarted(trace, self.arrivals.times_ps(starts(trace), stream(seed, "arrivals")))
            return dataclasses.replace(trace, notes=tuple(notes))
        if self.rate_per_s is not None and self.servegen is None:
            if trace.duration_s == 0:
                rule = "all requests of the file arrive at once, which no stretching makes a rate; give arrivals"
                raise BadInput(Problem(rule, file=str(path), path="rate_per_s", value=self.rate_per_s))
            times = _stretched(times, (starts(trace) - 1) / trace.duration_s / self.rate_per_s, path)
            notes.append(f"arrival times stretched to {self.rate_per_s:g} requests/s")
        elif self.time_scale != 1:
            times = _stretched(times, self.time_scale, path)
            notes.append(f"arrival times multiplied by {self.time_scale:g}")
        return dataclasses.replace(trace, arrival_ps=times, notes=tuple(notes))

    def _capped(self, trace: Trace) -> Trace:
        """The trace with the caps that ``max_tokens`` has clients declare."""
        if self.max_tokens is None:
            return trace
        if self.max_tokens == "exact":
            return dataclasses.replace(trace, max_tokens=trace.output_tokens)
        cap = np.full(len(trace), self.max_tokens, np.int32)
        over = int(np.count_nonzero(trace.output_tokens > cap))
        notes = (*trace.notes, f"{over} outputs end at max_tokens {self.max_tokens}") if over else trace.notes
        outputs = np.minimum(trace.output_tokens, cap)
        return dataclasses.replace(trace, max_tokens=cap, output_tokens=outputs, notes=notes)


def _stretched(times: IntArray, factor: float, path: Path) -> IntArray:
    """Times multiplied by ``factor``, in float64: exact to some picoseconds, and still in order."""
    longest = float(times[-1]) * factor
    if not longest < LATEST_PS:
        rule = "arrivals stretched so far run past what the clock can say (106 days)"
        raise BadInput(Problem(rule, file=str(path), path="time_scale", value=factor))
    stretched: IntArray = np.rint(times * factor).astype(np.int64)
    return stretched
