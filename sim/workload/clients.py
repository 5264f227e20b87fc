"""Who sends the requests: clients that wait for their answers, sessions of several turns, tenants, priorities.

A request of a client or of a session is sent only after an earlier request has ended: see `Trace.follows` and
`Trace.think_ps`. The distributions of think times are here as well. All are pydantic models that a scenario names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.units import PS_PER_S, picoseconds
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.lengths import MOST_TOKENS, Lengths, Tokens
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.strict import OneOf, Spec, or_number
from chairlift.sim.workload.trace import COLUMNS, LATEST_PS, IntArray, Trace

LONGEST_S = 9e6  # seconds: a little less than the 106 days of int64 picoseconds
MOST_DRAWS = 16  # turns drawn for each turn wanted, before max_context_tokens is called too small

_Weights = TypeVar("_Weights", list[float], dict[str, float])


def _some_weight(weights: _Weights) -> _Weights:
    """``weights`` as they are. Raises ValueError if none is above 0."""
    if not any(weights.values() if isinstance(weights, dict) else weights):
        raise ValueError("must have a weight above 0")
    return weights


Span = Annotated[float, Field(ge=0, le=LONGEST_S)]  # seconds
Weight = Annotated[float, Field(ge=0, le=1e12)]
Weights = Annotated[list[Weight], Field(min_length=1), AfterValidator(_some_weight)]
WeightByName = Annotated[dict[str, Weight], Field(min_length=1), AfterValidator(_some_weight)]


# ---- think times ----


class Constant(Spec):
    """The same time always."""

    seconds: Span = Field(description="The time, in seconds.")

    def sample(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """``n`` times in seconds; draws nothing from ``rng``."""
        return np.full(n, self.seconds)


class Exponential(Spec):
    """Exponential times, whose end does not depend on how long they have lasted."""

    mean_s: Annotated[float, Field(gt=0, le=LONGEST_S)] = Field(description="Mean, in seconds.")

    def sample(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """``n`` times in seconds."""
        return rng.exponential(self.mean_s, n)


class Lognormal(Spec):
    """exp(Normal(mu, sigma)) seconds."""

    mu: float = Field(ge=-40, le=16, description="Mean of the logarithm (natural) of the seconds.")
    sigma: float = Field(ge=0, le=10, description="Standard deviation of the logarithm of the seconds.")

    def sample(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """``n`` times in seconds."""
        return rng.lognormal(self.mu, self.sigma, n)


class Seconds(OneOf):
    """Times: a number of seconds, or one distribution by name."""

    model_config = ConfigDict(json_schema_extra=or_number({"type": "number", "minimum": 0, "maximum": LONGEST_S}))

    constant: Constant | None = Field(default=None, description="The same always.")
    exponential: Exponential | None = Field(default=None, description="Exponential.")
    lognormal: Lognormal | None = Field(default=None, description="Lognormal.")

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"constant": {"seconds": value}}
        if not isinstance(value, Mapping | Seconds):
            raise ValueError("must be a number of seconds, or one distribution by its name")
        return value

    def sample_ps(self, n: int, rng: np.random.Generator) -> IntArray:
        """``n`` times >= 0 in picoseconds, each rounded once. Shape: ``(n,)`` int64.

        Raises:
            BadInput: a draw is beyond what int64 picoseconds can say (about 106 days).
        """
        times: npt.NDArray[np.float64] = np.rint(self.chosen.sample(n, rng) * PS_PER_S)
        if times.size and not times.max() < LATEST_PS:
            rule = "a time drawn is over 106 days, past what the clock can say; make mu or sigma smaller"
            raise BadInput(Problem(rule, value=float(times.max()) / PS_PER_S))
        return times.astype(np.int64)


# ---- clients ----


class Clients(Spec):
    """A closed loop of N clients. A client sends its next request only after its last request has ended.

    Unlike open arrivals, a closed loop never has more than N requests in the system (Schroeder, Wierman,
    Harchol-Balter, *Open Versus Closed: A Cautionary Tale*, NSDI 2006).
    """

    concurrency: Annotated[int, Field(ge=1)] = Field(description="How many clients; each has one request at a time.")
    think_s: Seconds | None = Field(
        default=None,
        description="Time from the end of a client's request to its next: seconds or a distribution; null: none.",
    )
    ramp_s: Span = Field(
        default=0.0,
        description="The clients' first requests are spread evenly over so many seconds: client c of N at c/N of it.",
    )

    def loop(self, trace: Trace, seed: int) -> Trace:
        """``trace`` as the clients send its requests: the columns of times and of ``follows`` are replaced.

        Of N clients, client c sends the requests c, c + N, c + 2N, … of the trace. Rows are then in order of their
        client's first arrival; without a ramp they stay in the order they had.

        Example: two clients and five requests without a ramp. Requests 0 and 1 are sent at time 0; request 2 follows
        0, request 3 follows 1, and request 4 follows 2.
        """
        n = len(trace)
        rows, size = np.arange(n), self.concurrency
        ramp_ps = picoseconds(self.ramp_s)
        firsts = np.array([client * ramp_ps // size for client in range(min(size, n))], np.int64)
        follows = np.where(rows >= size, rows - size, -1)
        think = (self.think_s or Seconds(constant=Constant(seconds=0))).sample_ps(n, stream(seed, "think"))
        return sent(trace, firsts[rows % size], follows, np.where(follows >= 0, think, 0))


def sent(trace: Trace, arrival_ps: IntArray, follows: IntArray, think_ps: IntArray) -> Trace:
    """``trace`` with other times, and its rows in order of these times; rows of the same time keep their order.

    ``follows`` names rows by their place in ``trace``, before they are put in order. All shapes: ``(n,)``.
    """
    order = np.argsort(arrival_ps, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    columns = {name: getattr(trace, name) for name in COLUMNS if getattr(trace, name) is not None}
    columns |= {
        "arrival_ps": arrival_ps,
        "follows": np.where(follows >= 0, place[np.maximum(follows, 0)], -1),
        "think_ps": think_ps,
    }
    moved: dict[str, Any] = {name: column[order] for name, column in columns.items()}
    if trace.hash_ids is not None:
        moved["hash_ids"] = trace.hash_ids.taken(order)
    return dataclasses.replace(trace, **moved)


def restarted(trace: Trace, starts_ps: IntArray) -> Trace:
    """``trace`` with new arrival times for the requests that follow no other, in order of their rows.

    A request that follows another gets the time of the first request of its chain. Shape of ``starts_ps``:
    ``(starts(trace),)``, sorted.
    """
    if trace.follows is None or trace.think_ps is None:
        return dataclasses.replace(trace, arrival_ps=starts_ps)
    first = np.where(trace.follows < 0, np.arange(len(trace)), trace.follows)
    while np.any((before := first[first]) != first):  # each round goes twice as far back along the chains
        first = before
    times = np.zeros(len(trace), np.int64)
    times[trace.follows < 0] = starts_ps
    return sent(trace, times[first], trace.follows, trace.think_ps)


def starts(trace: Trace) -> int:
    """How many requests follow no other, and so have an arrival time of their own."""
    return len(trace) if trace.follows is None else int(np.count_nonzero(trace.follows < 0))


# ---- sessions ----


class Sessions(Spec):
    """Chats of several turns. The prompt of a turn is the prompt before, the answer to it, and some new tokens.

    An agent's turn is several requests: the model calls a tool, and is asked again with the tool's result.
    ``requests_per_turn`` says how many. The first of a turn comes ``think_s`` after the turn before has ended, each
    further one ``tool_s`` after the request before has ended, which is how long the tool runs.
    """

    turns: Lengths = Field(description="Turns of a session: a number or a distribution.")
    think_s: Seconds = Field(description="Time from the end of a turn to the next: seconds or a distribution.")
    first_prompt_tokens: Lengths | None = Field(
        default=None, description="Prompt of a session's first turn, system prompt and all; null: as of any turn."
    )
    requests_per_turn: Lengths | None = Field(
        default=None,
        description="Requests of a turn, each but the last of which ends in a tool call: a number or a distribution; "
        "null: one. Given together with tool_s.",
    )
    tool_s: Seconds | None = Field(
        default=None,
        description="Tool gap: time from the end of a request that called a tool to the arrival of the next, which has "
        "the tool's result: seconds or a distribution.",
    )
    tool_tokens: Lengths | None = Field(
        default=None, description="New tokens of a request with a tool's result; null: as prompt_tokens."
    )
    max_context_tokens: Tokens | None = Field(
        default=None,
        description="A session ends before the turn whose prompt and output together would be more; null: no end.",
    )

    @model_validator(mode="after")
    def _tools_together(self) -> Sessions:
        if (self.requests_per_turn is None) != (self.tool_s is None):
            raise ValueError("requests_per_turn and tool_s must be given together")
        if self.tool_tokens is not None and self.tool_s is None:
            raise ValueError("tool_tokens must not be given without requests_per_turn and tool_s")
        return self

    def draw(
        self, n: int, seed: int, arrivals: Arrivals, prompt: Lengths, output: Lengths, cap: int | None = None
    ) -> Trace:
        """``n`` requests. Rows are in order of their sessions' starts and then of turns; the last session may be cut.

        Args:
            n: requests of all sessions together.
            seed: arrivals, turns, first prompts, new tokens, outputs, think times, requests of a turn, tools' results
                and tool gaps have streams of their own.
            arrivals: when sessions start.
            prompt: new tokens of a turn.
            output: output tokens of a turn; the trace has them as they are drawn.
            cap: the most output tokens of an answer that later prompts hold; None: they hold it whole.

        A request that is too long for ``max_context_tokens`` is drawn, but not sent, and its session ends. A session
        whose first request is too long has no turns, and is left out.

        Example: 10 new tokens a turn, outputs of 3 tokens and three turns give prompts of 10, 23 and 36 tokens. With
        two requests a turn and results of 100 tokens, two turns are four requests, with prompts of 10, 113, 126 and
        229 tokens; the second and fourth come a tool gap after the one before, the third a think time after the second.

        Raises:
            BadInput: prompts grow past 32 bits, hardly a turn fits in ``max_context_tokens``, or times run past
                what the clock can say.
        """
        count = n
        while True:
            new = prompt.sample(count, stream(seed, "prompt_tokens"))
            outputs = output.sample(count, stream(seed, "output_tokens"))
            answers = outputs if cap is None else np.minimum(outputs, cap)
            lasts = self.turns.sample(count, stream(seed, "turns"))
            firsts = None
            if self.first_prompt_tokens is not None:
                firsts = self.first_prompt_tokens.sample(count, stream(seed, "first_prompt_tokens")).tolist()
            each, results = np.ones(count, np.int64), new
            if self.requests_per_turn is not None:
                each = self.requests_per_turn.sample(count, stream(seed, "requests_per_turn"))
            if self.tool_tokens is not None:
                results = self.tool_tokens.sample(count, stream(seed, "tool_tokens"))
            drawn, numbers, prompts, tool, notes = self._play(
                *(n, new.tolist(), results.tolist(), answers.tolist(), lasts.tolist(), each.tolist(), firsts)
            )
            if len(drawn) == n:
                break
            if count >= max(MOST_DRAWS * n, 10_000):
                rule = f"of {count} turns drawn only {len(drawn)} fit: make it larger, or prompts and outputs shorter"
                raise BadInput(Problem(rule, path="sessions.max_context_tokens", value=self.max_context_tokens))
            count *= 2
        if max(prompts) > MOST_TOKENS:
            rule = f"prompts grow past {MOST_TOKENS} tokens: give max_context_tokens, or fewer turns"
            raise BadInput(Problem(rule, path="sessions"))
        session = np.array(numbers, np.int64)
        same = np.concatenate([[False], session[1:] == session[:-1]])
        gaps = self.think_s.sample_ps(n, stream(seed, "think"))
        if self.tool_s is not None:
            gaps = np.where(tool, self.tool_s.sample_ps(n, stream(seed, "tool_gap")), gaps)
        return Trace(
            arrival_ps=arrivals.times_ps(numbers[-1] + 1, stream(seed, "arrivals"))[session],
            prompt_tokens=np.array(prompts, np.int32),
            output_tokens=outputs[drawn].astype(np.int32),
            session=session,
            follows=np.where(same, np.arange(n) - 1, -1),
            think_ps=np.where(same, gaps, 0),
            notes=notes,
        )

    def _play(
        self,
        n: int,
        new: list[int],
        results: list[int],
        answers: list[int],
        lasts: list[int],
        each: list[int],
        firsts: list[int] | None,
    ) -> tuple[list[int], list[int], list[int], list[bool], tuple[str, ...]]:
        """The requests that are sent: of each its number among those drawn, its session, its prompt, and whether it
        has a tool's result; and notes.

        ``new``, ``results`` (new tokens of a request that begins a turn, and of one with a tool's result) and
        ``answers`` have one number for each request drawn, ``lasts`` (the turns of a session) and ``firsts`` (its first
        prompt) one for each session begun, ``each`` (requests of a turn) one for each turn begun.
        """
        limit = self.max_context_tokens
        drawn, sessions, prompts, tool = [], [], [], []
        # `begun` counts sessions, `turn` turns, `number` sessions with a request sent; `left`, `rest` and `context` are
        # of the session at hand: its turns to come, its turn's requests to come, the tokens of its last prompt and
        # answer.
        begun, turn, number, left, rest, context = 0, 0, -1, 0, 0, 0
        cut = empty = 0
        for i, answer in enumerate(answers):
            called = rest > 0
            tokens = results[i] if called else new[i]
            if not called:
                if left == 0:
                    left, context = lasts[begun], 0
                    if firsts is not None:
                        tokens = firsts[begun]
                    begun += 1
                rest, left = each[turn], left - 1
                turn += 1
            prompt = context + tokens
            rest -= 1
            if limit is not None and prompt + answer > limit:
                cut, empty, left, rest = cut + (context > 0), empty + (context == 0), 0, 0
                continue
            number += context == 0
            drawn.append(i)
            sessions.append(number)
            prompts.append(prompt)
            tool.append(called)
            context = prompt + answer
            if len(drawn) == n:
                break
        notes = [f"{cut} sessions end early, at max_context_tokens {limit}"] * (cut > 0)
        notes += [f"{empty} sessions left out: their first turn is over max_context_tokens {limit}"] * (empty > 0)
        return drawn, sessions, prompts, tool, tuple(notes)


# ---- shared prefixes, priorities ----


class Prefix(Spec):
    """Prompts that begin alike: each request belongs to a group, and the prompts of a group share their prefix."""

    groups: Annotated[int, Field(ge=1, le=10**7)] = Field(description="How many different prefixes.")
    tokens: Tokens = Field(description="Tokens of every prefix; a shorter prompt is all prefix.")
    zipf: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0, description="Group k of 1, 2, … is drawn in proportion to k^-zipf; 0: all alike."
    )

    def draw(self, n: int, rng: np.random.Generator) -> IntArray:
        """The group, from 0, of each of ``n`` requests. Shape: ``(n,)``."""
        return weighted(np.arange(1, self.groups + 1, dtype=np.float64) ** -self.zipf, n, rng)


class Priority(Spec):
    """Priorities 0, 1, 2, … by weight; what they mean is the policy's business."""

    weights: Weights = Field(description="Weight of priority 0, of 1, and so on; they need not add up to 1.")


def weighted(weights: Sequence[float] | npt.NDArray[np.float64], n: int, rng: np.random.Generator) -> IntArray:
    """``n`` indices of ``weights``, drawn in proportion to these, with one uniform draw each. Shape: ``(n,)``."""
    edges = np.cumsum(weights)
    drawn: IntArray = np.searchsorted(edges, rng.random(n) * edges[-1], side="right").astype(np.int64)
    return drawn
