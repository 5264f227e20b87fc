"""What a scenario may say of its workload, as a pydantic model. `chairlift.sim.workload.workload` makes the trace."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from chairlift.sim.bad_input import did_you_mean
from chairlift.sim.workload import named
from chairlift.sim.workload.arrivals import Arrivals, Rate
from chairlift.sim.workload.clients import Clients, Prefix, Priority, Sessions, WeightByName
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.lengths import Lengths, Tokens
from chairlift.sim.workload.servegen import ServeGen
from chairlift.sim.workload.strict import Spec

Count = Annotated[int, Field(ge=1)]
LONGEST_LOAD_S = 4e6  # seconds, some 46 days: the draws that show where it ends still fit on the clock


def _names_of_formats(schema: dict[str, Any]) -> None:
    """JSON Schema of ``format``: one of the formats known here, or null."""
    schema["enum"] = [*formats.names(), None]


class Workload(Spec):
    """The workload of a scenario.

    Lengths come from exactly one of: ``prompt_tokens`` and ``output_tokens`` (synthetic), ``name``, ``file``,
    ``servegen``, ``mix``.
    Arrivals come from ``arrivals`` or ``clients``, or else from the named workload or the file.
    """

    requests: Count | None = Field(
        default=None,
        description="How many requests, all turns of sessions counted; with a file or a duration, at most how many.",
    )
    duration_s: Annotated[float, Field(gt=0, le=LONGEST_LOAD_S)] | None = Field(
        default=None,
        description="Only the requests that arrive (of sessions: those whose session starts) within so many seconds.",
    )
    arrivals: Arrivals | None = Field(
        default=None,
        description="When requests arrive; with sessions, when sessions start, at a rate in sessions/s. Replaces the "
        "times of a file or name.",
    )
    clients: Clients | None = Field(
        default=None,
        description="Instead of arrivals: clients that send a request when their last has ended (a closed loop).",
    )
    sessions: Sessions | None = Field(
        default=None,
        description="Chats or agents of several turns: arrivals are their starts, so rates are sessions/s; "
        "prompt_tokens are the new tokens of a turn.",
    )
    prompt_tokens: Lengths | None = Field(default=None, description="Prompt lengths: a number or a distribution.")
    output_tokens: Lengths | None = Field(default=None, description="Output lengths: a number or a distribution.")
    max_tokens: Literal["exact"] | Tokens | None = Field(
        default=None,
        description="The output cap that clients declare: exact (the true length), one number (longer "
        "outputs end there), or null: the file's own column if it has one, else nothing.",
    )
    prefix: Prefix | None = Field(
        default=None,
        description="Prefixes that prompts share; of a session, that of all its turns. Not with a file that says what "
        "its prompts share.",
    )
    tenants: WeightByName | None = Field(
        default=None,
        description="Names of tenants and the weight of each, in place of a file's own. A session has one tenant.",
    )
    priority: Priority | None = Field(
        default=None, description="Priorities by weight, in place of a file's own. A session has one priority."
    )
    name: str | None = Field(
        default=None, description="A named workload.", json_schema_extra={"enum": [*named.names(), None]}
    )
    rate_per_s: Rate | None = Field(
        default=None,
        description="Mean requests/s to stretch a file's or a named workload's times to. Where requests follow one "
        "another (sessions, think times) it is sessions/s: of the requests that follow no other.",
    )
    file: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A trace file to replay; a relative path starts at the scenario file's folder.",
    )
    servegen: ServeGen | None = Field(default=None, description="Requests drawn from ServeGen's table of clients.")
    mix: Annotated[dict[str, Workload], Field(min_length=1)] | None = Field(
        default=None, description="Several workloads at once, by name: each with arrivals of its own, and a tenant."
    )
    format: str | None = Field(
        default=None,
        description="The file's format; null: told from its header.",
        json_schema_extra=_names_of_formats,
    )
    time_scale: Annotated[float, Field(gt=0, le=1e9)] = Field(
        default=1.0, description="Multiplies a file's arrival times: 0.5 is twice the load."
    )
    limit: Count | None = Field(default=None, description="Read the first so many rows of the file, or sessions.")
    time_unit: Literal["s", "ms", "us", "ns"] | None = Field(
        default=None, description="The unit of a file's times, in JSON lines; null: as its format has them."
    )
    hash_block: Count | None = Field(
        default=None, description="Tokens that a hash id of a file covers, in JSON lines; null: as its format has them."
    )
    drop_empty: bool = Field(
        default=False, description="Leave out rows of a file without prompt or output tokens, instead of refusing them."
    )
    part: Count | None = Field(
        default=None, description="Which of several runs in a result file, from 1; null: the only one."
    )

    @field_validator("max_tokens", mode="before")
    @classmethod
    def _known_cap(cls, cap: object) -> object:
        if cap is None or cap == "exact" or (isinstance(cap, int) and not isinstance(cap, bool) and cap >= 1):
            return cap
        raise ValueError("must be exact, a whole number of at least 1, or null")

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str | None) -> str | None:
        if name is not None and name not in named.names():
            raise ValueError(f"no such workload{did_you_mean(name, named.names())}")
        return name

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None and name not in formats.names():
            raise ValueError(f"no such trace format{did_you_mean(name, formats.names())}")
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
            if self.ends() and "requests" in missing:
                missing.remove("requests")
            words = {"arrivals": "arrivals (or clients)", "requests": "requests (or duration_s)"}
            missing = [words.get(key, key) for key in missing]
            if missing:
                wrong.append(f"a synthetic workload must have {' and '.join(missing)} as well")
        elif (self.name or self.servegen) and self.requests is None and not self.ends():
            what = "a named workload" if self.name else "servegen"
            wrong.append(f"{what} must have requests, how many to draw, or duration_s")
        elif self.mix is not None:
            only_in = ("arrivals", "clients", "rate_per_s", "max_tokens")
            said = [key for key in only_in if getattr(self, key) is not None]
            wrong += [f"{key} must not be given beside mix: its parts have their own" for key in said]
        if self.file is None:
            only = {key: getattr(self, key) for key in ("format", "limit", *formats.OPTIONS)}
            only["drop_empty"] = self.drop_empty or None
            wrong += [f"{key} must not be given without a file" for key, value in only.items() if value is not None]
        return wrong

    def _wrong_times(self) -> list[str]:
        """What is wrong with where times come from."""
        wrong = []
        if self.duration_s is not None and self.clients is not None:
            wrong.append("duration_s and clients must not both be given: when clients send depends on the answers")
        if self.duration_s is not None and self.arrivals is not None and self.arrivals.burst is not None:
            wrong.append("duration_s must not be given with a burst, which is over at once")
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
            lacks = "no arrivals of its sessions" if named.get(self.name).sessions else "lengths only"
            wrong.append(f"{self.name} has {lacks}, so arrivals or rate_per_s must be given")
        return wrong

    def _wrong_senders(self) -> list[str]:
        """What is wrong with who sends the requests."""
        wrong = []
        for source, article in (("file", "a file"), ("servegen", "servegen"), ("mix", "mix")):
            if getattr(self, source) is not None:
                keys = ("sessions",) if source == "file" else ("sessions", "prefix", "tenants", "priority")
                given = [key for key in keys if getattr(self, key) is not None]
                wrong += [f"{key} must not be given with {article}, which has its own or none" for key in given]
        sessions = self.sessions_drawn()
        if sessions is not None and self.clients is not None:
            wrong.append("sessions and clients must not both be given: each says after what a request is sent")
        return wrong

    def ends(self) -> bool:
        """Whether the description says when requests end, without saying how many there are."""
        return self.duration_s is not None or (self.arrivals is not None and self.arrivals.length_s is not None)

    def sessions_drawn(self) -> Sessions | None:
        """The sessions given here, or else those of the named workload; None if neither has any."""
        if self.sessions is not None or self.name is None:
            return self.sessions
        return named.get(self.name).sessions
