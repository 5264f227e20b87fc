"""The life of one request in words: when it queued and why, its chunks, what preempted it, how it decoded.

Everything told follows from the journal, the runs of engine steps and the limits of the policy. The reason why a
request waits at a boundary is the first of these that holds: the KV pool has no room for the request; a batch must
return first; the pool has no room for a request that the policy asked for earlier; the batch is full; the tokens of the
step are spent; the plan has just preempted a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.report.timeline import TIMES
from chairlift.sim.results.catalogue import LATENCY, text
from chairlift.sim.results.metrics import ends_ps
from chairlift.sim.results.reader import Columns, Replica, RunResults
from chairlift.sim.results.records import Kind, Status
from chairlift.sim.results.refusals import why_refused
from chairlift.sim.units import PS_PER_MS, PS_PER_S

STEP_COLUMNS = (
    *("start_ps", "first_ps", "slope_ps", "steps", "chunks", "prefill_tokens", "decodes", "running", "waiting"),
    "preempted",
)
FACTS = (
    *("arrival_ps", "prompt_tokens", "output_tokens", "status", "admitted_ps", "first_token_ps", "finished_ps"),
    *("emitted_tokens", "preemptions", *(f"{name}_ms" for name in TIMES)),
)
CHUNKS = 6  # told one by one


@dataclass
class Moment:
    """One line of a life."""

    time_ps: int
    words: str


@dataclass
class Life:
    """One request: its row of ``requests.parquet``, and what happened to it in order."""

    request: int
    facts: dict[str, Any]
    moments: list[Moment] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """Lengths, end and latencies of the request, in one line."""
        f = self.facts
        parts = [
            f"prompt {f['prompt_tokens']:,}, answer {f['output_tokens']:,} tokens",
            Status(f["status"]).name.lower(),
        ]
        for name in TIMES:
            if not np.isnan(f[f"{name}_ms"]):
                parts.append(f"{LATENCY[name].label} {_span(f[f'{name}_ms'] * PS_PER_MS)}")
        if f["preemptions"]:
            parts.append(f"preempted {_times(f['preemptions'])}")
        return " · ".join(parts)


def slowest(run: RunResults, count: int, by: str) -> list[int]:
    """The ``count`` finished requests with the largest ``by`` (one of `TIMES`), the slowest first."""
    values = run.requests(f"{by}_ms")[f"{by}_ms"]
    values = np.where(np.isnan(values), -1.0, values)
    order = np.argsort(-values, kind="stable")[:count]
    return [int(i) for i in order if values[i] >= 0]


def explain(run: RunResults, requests: list[int]) -> list[Life]:
    """The lives of ``requests`` (rows of the trace), in that order.

    Raises `BadInput` where the run kept no journal, or has no such row.
    """
    if not run.has_events:
        raise BadInput(
            Problem("kept no journal of its requests: run it again with --events", file=run.label or "the run")
        )
    columns = run.requests(*FACTS, *(name for name in ("accepted_tokens",) if run.has_column(name)))
    total = len(columns["status"])
    lives = {}
    for i in requests:
        if not 0 <= i < total:
            raise BadInput(Problem(f"requests are numbered from 0 to {total - 1:,}", file="REQUEST_ID", value=i))
        lives[i] = Life(i, {name: column[i].item() for name, column in columns.items()})
    for replica, steps, events in zip(run.replicas, run.steps(*STEP_COLUMNS), run.events(), strict=True):
        teller = None
        for i, life in lives.items():
            if (events["request"] == i).any():
                teller = teller or _Teller(replica, steps, events)
                life.moments += teller.tell(life)
    for life in lives.values():
        life.moments.sort(key=lambda m: m.time_ps)  # stable: one replica's lines stay in order
        _end(life, run)
    return [lives[i] for i in requests]


def _end(life: Life, run: RunResults) -> None:
    facts = life.facts
    if not life.moments or life.moments[0].time_ps > facts["arrival_ps"]:
        life.moments.insert(0, Moment(facts["arrival_ps"], "arrives; no replica takes it yet"))
    status, at = Status(facts["status"]), facts["finished_ps"]
    if status is Status.FINISHED:
        words = f"finished: {_tokens(facts['emitted_tokens'])} in {_span(at - facts['arrival_ps'])}"
    else:
        got = facts["emitted_tokens"]
        had = f", with {got:,} of {facts['output_tokens']:,} tokens" if got else ""
        words = {
            Status.REJECTED: f"refused: {_why_refused(facts, run)}",
            Status.TIMED_OUT: f"its client gives up{had}",
            Status.FAILED: f"failed with its replica{had}",
        }.get(status, "it has not ended")
    life.moments.append(Moment(at, words))


def _why_refused(facts: dict[str, Any], run: RunResults) -> str:
    pool = max(replica.kv_room or replica.kv_tokens for replica in run.replicas)
    return why_refused(facts["prompt_tokens"], facts["output_tokens"], run.max_model_len, pool)


class _Teller:
    """Tells what happened to requests on one replica."""

    def __init__(self, replica: Replica, steps: Columns, events: Columns) -> None:
        self.replica = replica
        self.steps = steps
        self.events = events
        self.start = steps["start_ps"]
        self.end = ends_ps(steps)
        self._drafted = False  # the request at hand has got tokens several at a time
        denied = np.flatnonzero(events["kind"] == Kind.DENY)
        self._denied = dict(zip(events["run"][denied][::-1].tolist(), denied[::-1].tolist(), strict=True))  # the first

    def tell(self, life: Life) -> Iterator[Moment]:
        """The lines of one request's stay on the replica."""
        events = self.events
        self._drafted = life.facts.get("accepted_tokens", 0) > 0
        mine = np.flatnonzero(events["request"] == life.request)
        mine = mine[np.argsort(events["run"][mine], kind="stable")]
        rows = [tuple(int(events[name][i]) for name in ("time_ps", "run", "kind", "other", "value")) for i in mine]
        waits: tuple[int, int] | None = None  # since when and from which row on it queues
        denials: dict[int, tuple[int, int]] = {}
        chunks: list[tuple[int, int]] = []
        left = 0  # tokens to compute before it decodes
        ready = -1  # row from which on it decodes
        parked: list[tuple[int, bool]] = []  # (row, whether it is left out from there on)
        for time, run, kind, other, value in rows:
            if kind in (Kind.PREEMPT, Kind.DONE, Kind.END, Kind.HANDOVER, Kind.LOST):
                yield from self._prefill(life, chunks, left)
                if ready >= 0:
                    yield from self._decode(ready, run, parked)
                chunks, ready, parked = [], -1, []
            if kind == Kind.ARRIVE:
                before = f", {value:,} waiting there before it" if value else ""
                yield Moment(time, f"arrives at replica {self.replica.index}{before}")
                waits, denials = (time, run), {}
            elif kind == Kind.DENY:
                denials[run] = (other, value)
            elif kind == Kind.ADMIT:
                if waits is not None:
                    yield from self._queued(time, run, *waits, denials, life.request)
                waits, left = None, other
                found = f": {value:,} tokens of KV are there already, {other:,} to compute" if value else ""
                yield Moment(time, f"admitted{found}")
            elif kind == Kind.CHUNK:
                chunks.append((run, value))
                left -= value
                if left <= 0:
                    ready = run + 1
            elif kind in (Kind.PARK, Kind.JOIN):
                parked.append((run, kind == Kind.PARK))
            elif kind == Kind.PREEMPT:
                whom = f"request {other}" if other >= 0 and other != life.request else "the running requests"
                whom = "itself" if other == life.request else whom
                lost = f"; {value:,} tokens of KV are lost and computed again" if value else ""
                yield Moment(time, f"preempted: the pool has no block left for the next tokens of {whom}{lost}")
                waits, denials = (time, run), {}
            elif kind == Kind.DONE:
                yield Moment(time, "has its answer; its slot is held, and paid for, until the batch returns")
            elif kind == Kind.HANDOVER:
                yield Moment(time, "its prompt is done; its KV goes to a decode replica")
            elif kind == Kind.LOST:
                yield Moment(time, f"replica {self.replica.index} fails, and what was computed here is lost")

    def _queued(
        self, now: int, row: int, since: int, first: int, denials: dict[int, tuple[int, int]], request: int
    ) -> Iterator[Moment]:
        """Why it waited from ``since``, planned with row ``first``, until it was admitted with ``row``."""
        if now <= since:
            return
        reasons: dict[str, int] = {}
        covered = 0
        if 0 < first <= len(self.end):
            begun = min(int(self.end[first - 1]), now) - since
            if begun > 0:
                reasons["until what was under way had ended"] = begun
                covered += begun
        for i in range(first, min(row, len(self.start))):
            held = min(int(self.end[i]), now) - max(int(self.start[i]), since)
            if held > 0:
                why = self._why(i, denials, request)
                reasons[why] = reasons.get(why, 0) + held
                covered += held
        if now - since - covered > 0:
            why = "while the replica had nothing to run and its policy waited"
            reasons[why] = now - since - covered
        ranked = sorted(reasons.items(), key=lambda each: -each[1])
        if len(ranked) == 1:
            yield Moment(since, f"queued for {_span(now - since)} {ranked[0][0]}")
        else:
            told = "; ".join(f"{_span(time)} {why}" for why, time in ranked)
            yield Moment(since, f"queued for {_span(now - since)}: {told}")

    def _why(self, i: int, denials: dict[int, tuple[int, int]], request: int) -> str:
        replica, steps = self.replica, self.steps
        if i in denials:
            return "because the KV pool had too few free blocks for it"
        if replica.batch_synchronous:
            return "because a batch was under way, which returns as a whole"
        if i in self._denied:
            other = int(self.events["request"][self._denied[i]])
            if other != request:
                return "behind requests whose KV did not fit"
        limit = replica.sequence_limit
        if limit is not None and steps["running"][i] >= limit:
            return f"because the batch was full ({limit:,} requests)"
        tokens = replica.token_limit
        if tokens is not None and steps["prefill_tokens"][i] + steps["decodes"][i] >= tokens:
            return f"because the steps' {tokens:,} tokens were spent on others"
        if steps["preempted"][i]:
            return "because others had just been preempted"
        return "because the policy ran others first"

    def _prefill(self, life: Life, chunks: list[tuple[int, int]], left: int) -> Iterator[Moment]:
        if not chunks:
            return
        if len(chunks) <= CHUNKS:
            for k, (row, tokens) in enumerate(chunks):
                name = f"chunk {k + 1} of {len(chunks)}" if len(chunks) > 1 else "prefill"
                beside = self._beside(row)
                time = int(self.end[row] - self.start[row])
                yield Moment(int(self.start[row]), f"{name}: {_tokens(tokens)} in a step of {_span(time)}{beside}")
        else:
            first, last = chunks[0][0], chunks[-1][0]
            total = sum(tokens for _, tokens in chunks)
            span = _span(int(self.end[last] - self.start[first]))
            yield Moment(int(self.start[first]), f"prefill: {total:,} tokens in {len(chunks)} chunks over {span}")
        end = int(self.end[chunks[-1][0]])
        if left <= 0 and life.facts["first_token_ps"] == end:
            yield Moment(end, f"first token, {_span(end - life.facts['arrival_ps'])} after its arrival")

    def _beside(self, row: int) -> str:
        others, decodes = int(self.steps["chunks"][row]) - 1, int(self.steps["decodes"][row])
        parts = [f"{others:,} other prompt{'s' * (others > 1)}"] * (others > 0)
        parts += [f"{decodes:,} decode{'s' * (decodes > 1)}"] * (decodes > 0)
        return f", beside {' and '.join(parts)}" if parts else ""

    def _decode(self, first: int, end: int, parked: list[tuple[int, bool]]) -> Iterator[Moment]:
        """The line that tells of decoding in the rows ``first`` … ``end``."""
        end = min(end, len(self.start))
        if end <= first:
            return
        active = self.steps["decodes"][first:end] > 0
        for k, (row, out) in enumerate(parked):
            until = parked[k + 1][0] if k + 1 < len(parked) else end
            if out:
                active[max(0, row - first) : max(0, until - first)] = False
        if not active.any():
            return
        begin, finish = self.start[first:end], self.end[first:end]
        tokens = int(self.steps["steps"][first:end][active].sum())
        at = np.flatnonzero(active)
        # a run's longest step is its last; a wait for others' steps belongs to the step that ends it
        count, ps, slope = (self.steps[name][first:end][at] for name in ("steps", "first_ps", "slope_ps"))
        before = np.concatenate(([int(self.end[first - 1]) if first else int(begin[0])], finish[at[:-1]]))
        gaps = np.maximum(begin[at] - before + ps, ps + slope * (count - 1))
        longest = int(np.argmax(gaps))
        total = int(finish[at[-1]] - before[0])
        what = f"in {tokens:,} steps, with drafts kept," if self._drafted else _tokens(tokens)
        words = f"decodes {what} in {_span(total)}, one every {_span(total / tokens)}"
        if gaps[longest] > 1.5 * total / tokens:
            row = first + int(at[longest])
            fill = int(self.steps["prefill_tokens"][row])
            cause = f" beside {fill:,} prompt tokens" if fill else ""
            if begin[at[longest]] - before[longest] > 0:
                cause = ", for steps without it came between"
            words += (
                f"; the longest gap is {_span(int(gaps[longest]))}{cause}, at {begin[at[longest]] / PS_PER_S:.3f} s"
            )
        yield Moment(int(before[0]), words)


def _span(ps: float) -> str:
    return text(ps / PS_PER_S, "s") if ps >= PS_PER_S else text(ps / PS_PER_MS, "ms")


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
