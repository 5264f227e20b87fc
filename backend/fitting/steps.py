"""The steps of a recording, and which of them show one term of the cost model alone.

An asynchronous engine hides the shorter of host and GPU. Let E be the end of a step on the GPU, and L the end of the
next step's launch: the processing of the step's output begins at max(E, L), which is recorded as ``done_s``. So the gap
between two ``done_s`` is a GPU time only where the GPU was the later one at both ends, and a launch time only where the
launch was.

For example: step 1 ends on the GPU at 10 ms and step 2's launch at 4 ms, so step 1 is done at 10 ms. Step 2 ends on the
GPU at 18 ms and step 3's launch at 13 ms, so step 2 is done at 18 ms: the gap of 8 ms is step 2's GPU time. Had step
3's launch ended at 21 ms, the gap of 11 ms would tell when a launch ended, and nothing of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.backend.base import PS
from chairlift.backend.calibrated.profile import GpuTime, between
from chairlift.backend.calibrated.warmth import COOL_PS, towards
from chairlift.backend.cuda_graphs import graph_limit, graph_sizes
from chairlift.backend.fitting.recording import Experiment, Table
from chairlift.backend.whole_prompts import dense
from chairlift.backend.whole_prompts import pairs as dense_pairs

CLEAR = 1.15  # a step that takes so many times its launch is taken to show the GPU's time
SURE = 1.75  # after so many times the usual launch of its kind a launch has surely ended
SURE_DRAFTING = 1.25  # likewise that of a graph and the passes that draft after it, behind another: these differ less
SHORTEST_S = 0.0025  # and after no less than this
SHOWN_S = 0.0004  # by so much a launch must outlast the GPU's work to be told from it
OWN = 8  # launches of a run from which its own usual launch is told
WORKERS_S = 0.002  # an eager launch that holds the engine's loop up no longer goes on in worker processes
HEAD_S = 0.004  # within this a launch that goes kernel by kernel has surely reached the GPU
MOST_STEPS = 24  # of a span: what comes later tells little of each
ALIKE = 3  # steps whose median says what is usual for them
SHORT = 0.02  # the share of outputs that come no later than a launch ends, where the GPU mostly is the later one
STALL = 5  # a step that takes so many times as long as those like it did something else: a kernel was compiled, say

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

GRAPH, PIECEWISE, EAGER = 0, 1, 2  # how a step runs
KINDS = ("graph", "piecewise", "eager")
USUAL_LAUNCH = np.array([0.0023, 0.008, 0.018])  # seconds, where a recording shows none: those of vLLM 0.23, 8B, H200


@dataclass(frozen=True)
class Steps:
    """The steps of some experiments, one after the other: a value a step in each column, times in seconds."""

    experiment: npt.NDArray[np.int64]  # its index
    schedule: Floats  # when the step was scheduled
    done: Floats  # when the processing of its output began
    schedule_cpu: Floats  # host time of its scheduling
    turn: Floats  # from the output of the step before last (or the arrival that woke the engine) to its scheduling
    turn_tokens: Floats  # sequences in that output
    added: Floats  # requests taken in within that time
    added_tokens: Floats  # and the tokens of their prompts
    chunks: Floats
    prompt: Floats  # tokens of the chunks
    pairs: Floats  # of a query and a key of the chunks
    whole: Floats  # pairs that another kernel computes instead, of whole prompts that are `dense`; 0 of all others
    decodes: Floats
    drafts: Floats  # tokens that the decodes verify, beside one each
    passes: Floats  # that made drafts of each sequence within the step's time: after the output of the step before
    passed: Floats  # tokens that the first of these passes went over
    context: Floats  # tokens of KV that the decodes read
    computed: Floats  # tokens, padded to a graph's size
    kind: npt.NDArray[np.int64]  # of `KINDS`
    served: Bools  # whether its experiment is a load that was served; else it is a grid, made to measure steps
    first: Bools  # whether it is the first step of its experiment
    last: Bools
    woke: Bools  # whether the engine was idle before it
    rest: Floats  # for how long the GPU was idle then; 0 where the clock of an engine jumps over silence
    stalled: Bools  # whether it took `STALL` times as long as those like it, so that it tells nothing
    warmth: Floats  # how far prompts made the GPU's clock sink, from 0 to 1 (`warmed`)
    gpu: Floats  # GPU time as measured by the engine; NaN if it does not measure
    launch: Floats  # likewise the time of the launch

    @property
    def gpu_known(self) -> bool:
        """Whether the engine measured every step on the GPU."""
        return bool(np.isfinite(self.gpu).all())

    @property
    def launch_known(self) -> bool:
        """Whether it measured every launch."""
        return bool(np.isfinite(self.launch).all())

    def __len__(self) -> int:
        return len(self.done)

    @property
    def sequences(self) -> Floats:
        """Sequences in each step."""
        return self.decodes + self.chunks

    @property
    def tokens(self) -> Floats:
        """Tokens of each step, without those that pad it to a graph's size."""
        return self.prompt + self.decodes + self.drafts

    @property
    def singly(self) -> Bools:
        """Which steps are launched kernel by kernel, so that the GPU works along; the others are one CUDA graph.

        Where decodes verify drafts, their graph is launched first, and then the passes that draft.
        """
        found: Bools = (self.kind != GRAPH) | (self.drafts > 0)
        return found

    @property
    def regime(self) -> npt.NDArray[np.int64]:
        """Each step's place in `backend.calibrated.profile.REGIMES`: 0 decode-only, 1 chunk-only, 2 mixed."""
        found: npt.NDArray[np.int64] = np.where(self.chunks == 0, 0, np.where(self.decodes == 0, 1, 2))
        return found


def steps_of(experiments: list[Experiment], token_s: float = 0.0) -> Steps:
    """The steps of ``experiments``, and what the recorded engine did between them.

    ``token_s``: for how long a token makes the GPU warm, as a profile says (``hot_token_s``); 0: as the steps tell.
    """
    parts = [_columns(i, each) for i, each in enumerate(experiments)]
    steps = Steps(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return warmed(steps, token_s or token_time(steps))


def _columns(index: int, experiment: Experiment) -> dict[str, npt.NDArray[np.generic]]:
    table, requests = experiment.steps, experiment.requests
    schedule, done = table["schedule_s"].astype(np.float64), table["done_s"].astype(np.float64)
    n = len(done)
    chunks, prompt = table["prefill_requests"].astype(float), table["prefill_tokens"].astype(float)
    decodes = table["decode_requests"].astype(float)
    drafts = table["decode_tokens"] - decodes
    limit = graph_limit(experiment.limits)
    sizes = np.array(graph_sizes(limit))
    tokens = prompt + decodes + drafts
    fits = tokens <= sizes[-1]
    if not experiment.limits.get("piecewise_graphs", True):
        fits &= chunks == 0
    computed = np.where(fits, sizes[np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)], tokens)
    kind = np.where(fits, np.where(chunks > 0, PIECEWISE, GRAPH), EAGER)
    unknown = np.full(n, np.nan)
    earlier = np.concatenate([[-np.inf], done[:-1]])
    before = np.concatenate([[-np.inf, -np.inf], done[:-2]])[:n]
    woke = schedule >= earlier
    # A turn of the engine's loop begins when the step before last is processed; after idling, with the last step or
    # with an arrival.
    order = np.argsort(requests["added_s"], kind="stable")
    added = requests["added_s"][order]
    arrivals, prompts = requests["arrival_s"][order], requests["prompt_tokens"][order]
    second = np.concatenate([[False], woke[:-1]]) & ~woke  # an idle engine's first two have nothing between
    turn_start = np.where(woke, earlier, before)
    turn_start[1:] = np.where(second[1:], schedule[:-1], turn_start[1:])
    low = np.searchsorted(added, np.where(np.isfinite(turn_start), turn_start, -1.0), "right")
    high = np.searchsorted(added, schedule, "right")
    total = np.concatenate([[0], np.cumsum(prompts)])
    some = woke & (high > low)
    came = arrivals[np.minimum(low, len(arrivals) - 1)]
    turn_start = np.where(some, np.maximum(turn_start, came), turn_start)
    outputs = np.concatenate([[0.0, 0.0], (decodes + chunks)[:-2]])[:n]
    outputs = np.where(woke, np.concatenate([[0.0], (decodes + chunks)[:-1]]), outputs)
    outputs = np.where(some & (came > earlier), 0.0, outputs)
    turn = np.where(second | ~np.isfinite(turn_start), np.nan, schedule - turn_start)
    turn = np.where(woke & ~some, np.nan, turn)
    # An output is on its way before the passes that draft, so they are of the time until the next one, and of none
    # behind which the engine rested. The GPU's own clock counts them with the graph that they follow.
    passes, passed = table["proposes"].astype(np.float64), computed.astype(np.float64)
    if "gpu_s" not in table:
        passes, passed = (np.where(woke, 0.0, np.concatenate([[0.0], each[:-1]])) for each in (passes, passed))
    edge = np.zeros(n, dtype=bool)
    first, last = edge.copy(), edge.copy()
    first[0] = last[-1] = True
    return {
        "experiment": np.full(n, index),
        "schedule": schedule,
        "done": done,
        "schedule_cpu": table["schedule_cpu_s"].astype(np.float64),
        "turn": turn,
        "turn_tokens": outputs,
        "added": (high - low).astype(np.float64),
        "added_tokens": (total[high] - total[low]).astype(np.float64),
        "chunks": chunks,
        "prompt": prompt,
        "pairs": table["prefill_pairs"].astype(np.float64),
        "whole": _whole(table, kind) if experiment.whole else np.zeros(n),
        "decodes": decodes,
        "drafts": drafts,
        "passes": passes,
        "passed": passed,
        "context": table["decode_context_tokens"].astype(np.float64),
        "computed": computed.astype(np.float64),
        "kind": kind,
        "served": np.full(n, not experiment.is_grid),
        "first": first,
        "last": last,
        "woke": woke,
        "rest": np.where(woke & np.isfinite(earlier) & ~experiment.jumps, schedule - earlier, 0.0),
        "stalled": _stalled(done - schedule, chunks, decodes, computed, woke),
        "warmth": np.zeros(n),
        "gpu": table["gpu_s"].astype(np.float64) if "gpu_s" in table else unknown,
        "launch": table["launch_s"].astype(np.float64) if "launch_s" in table else unknown,
    }


def _whole(table: Table, kind: npt.NDArray[np.int64]) -> Floats:
    """Pairs of those steps whose chunks are whole prompts for which there was another kernel; 0 of any other.

    A recording tells the sums of a step's chunks. One chunk has the pairs of a whole prompt only if it is one, and
    several have those of equally long ones only if they are such. Steps in which decodes verify drafts have no such
    kernel.
    """
    found = np.zeros(len(kind))
    chunked = (kind == EAGER) & (table["prefill_requests"] > 0)
    verifies = (table["proposes"] > 0) & (table["decode_requests"] > 0)
    for i in np.flatnonzero(chunked & ~verifies):
        chunks, tokens = int(table["prefill_requests"][i]), int(table["prefill_tokens"][i])
        each = [tokens // chunks] * chunks
        if sum(n * (n + 1) // 2 for n in each) == table["prefill_pairs"][i] and dense(each):
            found[i] = dense_pairs(each)
    return found


def token_time(steps: Steps) -> float:
    """What a token takes in the largest steps with chunks, seconds, of which the fastest but a few tell."""
    chunked = steps.chunks > 0
    if not chunked.any():
        return 0.0
    large = chunked & (steps.computed >= np.quantile(steps.computed[chunked], 0.9))
    return float(np.quantile((_lasted(steps) / steps.computed)[large], 0.25))


def _lasted(steps: Steps) -> Floats:
    """Seconds from each step's start, or its scheduling behind a rest, to its end."""
    start = np.where(steps.woke | steps.first, steps.schedule, np.concatenate([[0.0], steps.done[:-1]]))
    found: Floats = np.maximum(steps.done - start, 0.0)
    return found


def warmed(steps: Steps, token_s: float) -> Steps:
    """``steps`` with the warmth of the GPU over each with chunks, and at the start of each without.

    A step with chunks computes prompts for the share of its time that its tokens take, ``token_s`` each.
    """
    seconds = _lasted(steps)
    rest = np.where(steps.first, np.inf, steps.rest)
    work = np.where(steps.chunks > 0, token_s * steps.tokens, 0.0)
    share = np.divide(work, seconds, out=np.zeros(len(steps)), where=seconds > 0).clip(0.0, 1.0)
    level, rate = np.array([towards(each) for each in share.tolist()]).reshape(-1, 2).T
    change = rate * seconds
    fade, idle = np.exp(-change), np.exp(-rest * PS / COOL_PS)
    average = np.divide(-np.expm1(-change), change, out=np.ones(len(steps)), where=change > 0)
    average = np.where(steps.chunks > 0, average, 1.0)
    mean = np.where(steps.chunks > 0, level, 0.0)
    found = np.zeros(len(steps))
    now = 0.0
    table = zip(*(each.tolist() for each in (level, fade, idle, average, mean)), strict=True)
    for i, (near, left, rested, part, by) in enumerate(table):
        now *= rested
        found[i] = by + (now - by) * part
        now = near + (now - near) * left
    return replace(steps, warmth=found)


def _stalled(seconds: Floats, chunks: Floats, decodes: Floats, computed: Floats, woke: Bools, few: int = 1) -> Bools:
    """Which steps took `STALL` times as long as those like them, and as those like the step whose launch they bore."""
    usual = _usual(seconds, chunks, decodes, computed, few)
    follows = np.where(np.append(woke[1:], True), 0.0, np.append(usual[1:], 0.0))
    found: Bools = seconds > STALL * np.maximum(usual, follows)
    return found


def _usual(seconds: Floats, chunks: Floats, decodes: Floats, computed: Floats, few: int) -> Floats:
    """The median of each step and those like it.

    Alike are steps of one experiment whose tokens round to the same power of two, with chunks or without, and, if there
    are ``few`` of them, also with decodes or without. Where fewer than twice `ALIKE` are, larger ones are taken with
    them, which take no less: a stall makes two steps long from their scheduling on, of a burst's last few.
    """
    chunked = chunks > 0
    size = np.rint(np.log2(np.maximum(computed, 1))) * 2 + chunked
    usual = np.empty(len(seconds))
    for each in np.unique(size):
        mine = size == each
        alike, larger = mine, np.unique(size[(chunked == chunked[mine][0]) & (size > each)])
        for other in larger:
            if alike.sum() < 2 * ALIKE:
                alike = alike | (size == other)
        usual[mine] = np.median(seconds[alike])
    like = size + (decodes > 0) * 1000
    for each in np.unique(like):
        mine = like == each
        if mine.sum() >= few:
            usual[mine] = np.median(seconds[mine])
    return usual


def stalls(experiment: Experiment) -> tuple[Floats, Floats]:
    """When each stall of ``experiment`` ended, and by how much its step took longer than those like it; seconds.

    A stall is a step `STALL` times as long as those like it, counted from its scheduling and also from the output
    before it. What happens there is no step's cost: kernels are compiled on their first use, say.
    """
    columns: dict[str, Any] = _columns(0, experiment)
    chunks, decodes, computed, woke = (columns[name] for name in ("chunks", "decodes", "computed", "woke"))
    done, schedule = columns["done"], columns["schedule"]
    seconds = done - np.maximum(schedule, np.concatenate([[-np.inf], done[:-1]]))
    long = _stalled(done - schedule, chunks, decodes, computed, woke, ALIKE)
    rows = np.flatnonzero(long & _stalled(seconds, chunks, decodes, computed, woke, ALIKE))
    return done[rows], (seconds - _usual(seconds, chunks, decodes, computed, ALIKE))[rows]


def without_stalls(experiment: Experiment) -> Experiment:
    """``experiment`` by a clock that stood still in its `stalls`; the same object if it has none.

    Requests that came within a stall come when it ends. Gaps between tokens are left out then, for nothing says which
    of them hold a stall. For example: an engine stalls from 2 to 5 s. A request that came at 4 s and had its first
    token at 5.1 s comes at 2 s now, and has it at 2.1 s.
    """
    ends, lengths = stalls(experiment)
    if not len(ends):
        return experiment

    def told(at: Floats) -> Floats:
        stood = np.zeros(len(at))
        for end, length in zip(ends, lengths, strict=True):
            stood += np.clip(at - (end - length), 0.0, length)
        return at - stood

    def table(columns: Table) -> Table:
        times = ("arrival_s", "added_s", "first_token_s", "last_token_s", "schedule_s", "done_s")
        return {name: told(each.astype(np.float64)) if name in times else each for name, each in columns.items()}

    return replace(experiment, requests=table(experiment.requests), steps=table(experiment.steps), itl_s=None)


def predicted(gpu: GpuTime, steps: Steps) -> Floats:
    """GPU seconds of each step by the form of `backend.calibrated.profile`."""
    chunked = steps.chunks > 0
    floor = np.array([0.0, gpu.piecewise_floor_s, gpu.eager_floor_s])[steps.kind]
    slower = 1 + gpu.hot_computed * steps.warmth
    matmuls = np.where(
        chunked,
        gpu.chunk_matmuls(steps.computed, steps.tokens, slower),
        gpu.matmuls(steps.computed, gpu.decode_residual, steps.tokens),
    )
    hot_kv = 1 + gpu.hot_kv * steps.warmth
    kv = np.where(chunked, gpu.kv_mixed_s * slower, gpu.kv_s * between(gpu.kv_residual, steps.decodes) * hot_kv)
    pairs = np.where(gpu.whole_pair_s * steps.whole > 0, gpu.whole_pair_s * steps.whole, gpu.pair_s * steps.pairs)
    found: Floats = (
        matmuls
        + gpu.sequence_s * steps.sequences
        + kv * steps.context
        + pairs * slower
        + chunked * gpu.chunk_s
        + gpu.request_s * steps.chunks
    )
    if gpu.drafting is not None:
        each = gpu.drafting
        found += each.pass_s * steps.passes + each.token_s * steps.passed + each.draft_s * steps.drafts
        found += ((steps.drafts > 0) & ~chunked) * (each.verify_s + each.kv_s * hot_kv * steps.context)
    found = np.where(chunked, found * (1 + gpu.hot_chunk * steps.warmth), found)
    return np.maximum(found, np.where(chunked, floor, 0.0))


def without_floors(gpu: GpuTime, steps: Steps) -> Floats:
    """As `predicted`, whatever launches by workers take."""
    return predicted(replace(gpu, piecewise_floor_s=0.0, eager_floor_s=0.0), steps)


def at_floor(gpu: GpuTime, steps: Steps) -> Bools:
    """Which steps' work is no longer than `CLEAR` times the floor of their kind: they tell of launches by workers."""
    floor = np.array([0.0, gpu.piecewise_floor_s, gpu.eager_floor_s])[steps.kind]
    work = without_floors(gpu, steps)
    found: Bools = (steps.chunks > 0) & (CLEAR * floor > work)
    return found


@dataclass(frozen=True)
class Waits:
    """What the host was doing when each step ended: the launch of the step after it."""

    ready: Floats  # when that launch could begin, because that step was scheduled; inf if there is none before the end
    kind: npt.NDArray[np.int64]  # how that step launches
    sure: Bools  # whether the step surely ended on the GPU after that launch, so that ``done`` is the GPU's

    @classmethod
    def of(cls, steps: Steps, launch: Floats) -> Waits:
        """Of each of ``steps``, where ``launch[experiment, kind]`` holds the usual seconds of a launch."""
        follows, ready = _next_launch(steps)
        kind = np.append(steps.kind[1:], GRAPH)
        room = np.where(follows, steps.done - ready, np.inf)
        # After a step of a whole graph the launch of another is hidden, and shorter than any such step.
        hidden = (steps.kind == GRAPH) & (kind == GRAPH) & (steps.drafts == 0)
        # With drafts launches differ little behind decodes; behind prompts a slow spell of the host shows as elsewhere.
        factor = np.where((kind == GRAPH) & (steps.kind == GRAPH) & steps.drafts.any(), SURE_DRAFTING, SURE)
        surely = np.where(hidden, 0.0, factor * launch[steps.experiment, kind])
        return cls(ready, kind, room > np.maximum(surely, SHORTEST_S))


def _next_launch(steps: Steps) -> tuple[Bools, Floats]:
    """Whether a step was followed by another without a rest between them, and from when on that could be launched."""
    follows: Bools = ~steps.last & ~np.append(steps.woke[1:], True)
    return follows, np.where(follows, np.append((steps.schedule + steps.schedule_cpu)[1:], np.inf), np.inf)


def usual_launches(steps: Steps) -> Floats:
    """The usual launch of each kind, seconds, alike for all experiments. Shape: ``(experiments, kinds)``.

    Where the engine was idle, it schedules the next step right after the launch. That of a whole graph is short, and
    hidden. With drafts it is not, for their passes and the sampling between them are launched one by one: no output is
    processed before the launch of the next step has ended, so the shortest times between its start and an output tell
    it.
    """
    begun, ends, idle = _idle(steps)
    usual = USUAL_LAUNCH.copy()
    if steps.drafts.any():
        follows, ready = _next_launch(steps)
        mine = follows & (steps.kind == GRAPH) & np.append(steps.kind[1:] == GRAPH, False)
        if mine.any():
            usual[GRAPH] = np.quantile((steps.done - ready)[mine], SHORT)
    for kind in (PIECEWISE, EAGER):
        mine = idle & (steps.kind == kind)
        if mine.sum() >= 3:
            usual[kind] = np.median((ends - begun)[mine])
    return np.tile(usual, (int(steps.experiment.max()) + 1, 1))


def own_launches(steps: Steps, rows: npt.NDArray[np.int64], seconds: Floats, typical: Floats) -> Floats:
    """The usual launch of each kind in each experiment, seconds. Shape: ``(experiments, kinds)``.

    Those of ``rows`` took ``seconds`` (`launch_times`). They count for their own experiment where they took longer than
    ``typical``, a value a kind: a host has bad days, on which a launch ends later than it surely would have on others.
    """
    found = np.tile(typical, (int(steps.experiment.max()) + 1, 1))
    for experiment, kind in np.unique(np.stack([steps.experiment[rows], steps.kind[rows]]), axis=1).T:
        mine = seconds[(steps.experiment[rows] == experiment) & (steps.kind[rows] == kind)]
        if len(mine) >= OWN:
            found[experiment, kind] = max(typical[kind], float(np.median(mine)))
    return found


def _idle(steps: Steps) -> tuple[Floats, Floats, Bools]:
    """When each launch began and ended, and whether that shows because the engine was idle before."""
    begun = steps.schedule + steps.schedule_cpu
    ends = np.append(steps.schedule[1:], np.inf)
    follows = ~steps.last & ~np.append(steps.woke[1:], True)
    quiet = np.append(steps.added[1:], 1.0) == 0
    shows = steps.woke & follows & quiet & (ends < steps.done) & (steps.chunks > 0) & ~steps.stalled
    return begun, ends, shows


def decode_times(steps: Steps, launch: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Steps of decodes alone that show their GPU time: their indices, and the times in seconds.

    ``launch[experiment, kind]`` holds the usual launches.
    """
    if steps.gpu_known:
        rows = np.flatnonzero(steps.kind == GRAPH)
        return rows, steps.gpu[rows]
    sure = Waits.of(steps, launch).sure & ~steps.stalled
    before = np.concatenate([[False], sure[:-1]]) & ~steps.first & ~steps.woke
    steady = np.concatenate([[False], (steps.chunks == 0)[:-1]])  # what precedes it ends with a kernel, not a copy
    rows = np.flatnonzero((steps.kind == GRAPH) & sure & before & steady)
    return rows, steps.done[rows] - steps.done[rows - 1]


def chunk_times(steps: Steps, decode_s: Floats, launch: Floats) -> tuple[npt.NDArray[np.int64], Floats, Bools]:
    """Steps with chunks that show their GPU time: their indices, and the times in seconds.

    ``decode_s`` holds the GPU time that each step of decodes alone should take, ``launch[experiment, kind]`` the usual
    launches. Last comes whether the time begins with the launch, on an idle GPU that first waits for a kernel.
    """
    launch_s = launch[steps.experiment, steps.kind]
    if steps.gpu_known:
        rows = np.flatnonzero((steps.chunks > 0) & (steps.gpu > CLEAR * launch_s))
        return rows, steps.gpu[rows], steps.woke[rows]
    sure = Waits.of(steps, launch).sure & ~steps.stalled & ~_late(steps, decode_s)
    begun = steps.schedule + steps.schedule_cpu  # its launch
    earlier = np.concatenate([[0.0], steps.done[:-1]])
    two_before = np.concatenate([[0.0, 0.0], steps.done[:-2]])[: len(steps)]
    sure_before = np.concatenate([[False], sure[:-1]])
    sure_two = np.concatenate([[False, False], sure[:-2]])[: len(steps)]
    after_decode = np.concatenate([[False], (steps.kind == GRAPH)[:-1]]) & sure_two
    decode_before = np.concatenate([[0.0], decode_s[:-1]])
    start = np.where(steps.woke, begun, earlier)
    hidden = ~steps.woke & ~sure_before & after_decode
    start = np.where(hidden, np.minimum(earlier, two_before + decode_before), start)
    known = steps.woke | ((sure_before | hidden) & (start - begun > HEAD_S))
    shows = steps.done - begun > CLEAR * launch_s  # else the launch set the time
    rows = np.flatnonzero((steps.chunks > 0) & sure & known & shows & ~(steps.first & ~steps.woke))
    return rows, (steps.done - start)[rows], steps.woke[rows]


def _late(steps: Steps, decode_s: Floats) -> Bools:
    """Which outputs came later than the GPU ended: what is left for the next step, of decodes alone, is too little.

    ``decode_s`` holds the GPU time that each step of decodes alone should take; 0 of any other. For example: the output
    after one that came 26 ms after the one before it comes 17 ms later, where such decodes take 20 ms. So the GPU had
    begun with them 3 ms or more before, and the host was kept from taking in what it had.
    """
    follows, _ = _next_launch(steps)
    gap = np.append(np.diff(steps.done), np.inf)
    found: Bools = follows & (gap * CLEAR < np.append(decode_s[1:], 0.0))
    return found


@dataclass(frozen=True)
class Spans:
    """Stretches of steps between two ends on the GPU that are known: a row each, with a column for each of its steps.

    In a train of steps with chunks ``done`` may tell when a launch ended, so single GPU times do not show. But the GPU
    works off what was launched, and where the train ends that shows. For example: three such steps, launched in 10 ms
    each, are done at 10, 20 and 36 ms. That the GPU needs 12 ms for each, only the last of these times tells.
    """

    rows: npt.NDArray[np.int64]  # (spans, longest): indices of steps; -1 behind a span's last one
    free: Floats  # (spans,): when the GPU had done all before; -inf if it was idle
    origin: Floats  # (spans,): from when on times count: ``free``, or the first launch's start on an idle GPU
    begun: Floats  # (spans, longest): when each launch began
    launched: Floats  # (spans, longest): and when it ended
    done: Floats  # (spans, longest): when the processing of each output began; inf behind the last one
    known: (
        Bools  # (spans,): whether the last ``done`` is the GPU's; else it is no earlier than the GPU's, as the others
    )

    @classmethod
    def of(cls, steps: Steps, launch: Floats) -> Spans:
        """All spans of ``steps``, where ``launch[experiment, kind]`` holds the usual launches."""
        launch_s = launch[steps.experiment, steps.kind]
        sure = (Waits.of(steps, launch).sure & ~steps.stalled).tolist()
        begun = steps.schedule + steps.schedule_cpu
        earlier = np.concatenate([[np.inf], steps.done[:-1]])
        shown = np.concatenate([[True], sure[:-1]])  # the launch may have ended before; else the GPU waited for it
        ends = np.where(shown, np.minimum(earlier, begun + launch_s), np.maximum(earlier, begun))
        ends = np.where(steps.woke | steps.first, begun + launch_s, ends)
        # Behind an idle engine a short step ends with its launch, whose length differs from day to day.
        short = steps.woke & (steps.kind != GRAPH) & (steps.done - begun <= CLEAR * launch_s)
        found: list[list[int]] = []
        open_ = False  # whether the last span of `found` goes on
        for i, (first, woke, stalled) in enumerate(
            zip(steps.first.tolist(), steps.woke.tolist(), steps.stalled.tolist(), strict=True)
        ):
            if stalled or (first and not woke):
                open_ = False
                continue
            if woke or (sure[i - 1] and not first):
                found.append([i])
            elif open_ and len(found[-1]) < MOST_STEPS:
                found[-1].append(i)
            else:
                open_ = False
                continue
            open_ = not sure[i]
        rows = np.full((len(found), max(map(len, found), default=1)), -1)
        for row, span in zip(rows, found, strict=True):
            row[: len(span)] = span
        start, last = rows[:, 0], rows.max(axis=1, initial=-1)
        free = np.where(steps.woke[start], -np.inf, np.concatenate([[-np.inf], steps.done[:-1]])[start])
        return cls(
            rows,
            free,
            np.where(steps.woke[start], begun[start], free),
            begun[rows],
            ends[rows],
            np.where(rows >= 0, steps.done[rows], np.inf),
            np.array(sure, dtype=bool)[last] & ~short[last],
        )

    @classmethod
    def timed(cls, steps: Steps, launch: Floats) -> Spans:
        """All of ``steps``, a span each, where the engine measured their GPU times; ``launch`` as for `of`.

        Such a time counts from the start of the step's launch, or from the end of the step before, where that is later.
        For example: a step is launched in 2 ms, from 1 ms before the end of the step before on. In its GPU time the
        launch ends at 1 ms. On an idle GPU that time holds what passes until the first kernel comes.
        """
        begun = steps.schedule + steps.schedule_cpu
        before = np.where(steps.first | steps.woke, -np.inf, np.concatenate([[-np.inf], steps.done[:-1]]))
        origin = np.maximum(begun, before)
        seconds = launch[steps.experiment, steps.kind]
        if steps.launch_known:  # behind a step with chunks it may have waited for the GPU
            quiet = steps.woke | np.concatenate([[False], (steps.kind == GRAPH)[:-1]])
            seconds = np.where(quiet, steps.launch, np.minimum(steps.launch, seconds))
        return cls(
            np.arange(len(steps))[:, None],
            np.where(begun < before, 0.0, -np.inf),
            np.zeros(len(steps)),
            (begun - origin)[:, None],
            (begun - origin + seconds)[:, None],
            steps.gpu[:, None],
            np.ones(len(steps), dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, kept: npt.NDArray[np.int64]) -> Spans:
        """The spans with these numbers."""
        return Spans(**{name: column[kept] for name, column in vars(self).items()})

    @property
    def at_last(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The row and the column of each span's last step."""
        return np.arange(len(self)), (self.done < np.inf).sum(axis=1) - 1


def launch_times(
    steps: Steps, gpu_s: Floats, launch: Floats, head: float = 0.0
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Launches that show, of steps with chunks and of the graphs after those: the steps' indices, and the seconds.

    A launch shows where the engine was idle, for it then schedules the next step right after the launch; and where it
    outlasted the GPU's work on the steps before it, which take ``gpu_s`` (NaN: unknown). For example: a step is done on
    the GPU 5 ms after the next one's launch began, and its output is processed 20 ms after that: so long took the
    launch. ``launch[experiment, kind]`` holds the usual launches, ``head`` is that of `HostTime`.

    Where worker processes launch, no output waits for that: an idle engine shows how long it takes to hand a step over.

    That of a whole graph is hidden by a step of another. It shows behind a step with chunks that the GPU had done
    before it began, also if that took `CLEAR` times what is foreseen.
    """
    if steps.launch_known:  # behind a long step a launch may wait for the GPU
        quiet = steps.woke | np.concatenate([[False], (steps.kind == GRAPH)[:-1]])
        rows = np.flatnonzero((steps.chunks > 0) & quiet)
        return rows, steps.launch[rows]
    n = len(steps)
    begun, ends, idle = _idle(steps)
    gpu_end = _latest_ends(steps, gpu_s, launch, head)
    follows = ~steps.last & ~np.append(steps.woke[1:], True)
    workers = launch[:, EAGER].max() < WORKERS_S
    of = np.flatnonzero(follows & (steps.done > gpu_end + SHOWN_S) & ~workers) + 1
    shown = np.zeros(n, dtype=bool)
    value = np.full(n, np.nan)
    room = np.full(n, np.inf)  # what the GPU would have hidden anyway
    shown[of] = True
    value[of] = steps.done[of - 1] - begun[of]
    room[of] = gpu_end[of - 1] - begun[of]
    value[idle] = ends[idle] - begun[idle]
    room[idle] = 0
    shown |= idle
    before = np.concatenate([[np.nan], gpu_s[:-1]])  # of the step that ends
    behind = np.concatenate([[False], (steps.chunks > 0)[:-1]]) & (steps.kind == GRAPH) & (steps.drafts == 0)
    behind &= room + (CLEAR - 1) * before < 0
    shown &= ((steps.chunks > 0) | behind) & (value > 0) & ~steps.stalled
    for kind in (GRAPH, PIECEWISE, EAGER):  # keep those that even a fast launch would have shown
        mine = shown & (steps.kind == kind)
        if mine.any():
            shown &= ~(mine & (room > np.quantile(value[mine], 0.05)))
    rows = np.flatnonzero(shown)
    return rows, value[rows]


def _latest_ends(steps: Steps, gpu_s: Floats, launch: Floats, head: float) -> Floats:
    """When each step ended on the GPU at the latest, if it takes ``gpu_s``: no later than its output was processed."""
    sure = Waits.of(steps, launch).sure.tolist()
    begun = steps.schedule + steps.schedule_cpu
    launched = np.minimum(begun + launch[steps.experiment, steps.kind], np.concatenate([[np.inf], steps.done[:-1]]))
    begin = np.where(steps.kind == GRAPH, launched, begun + head)
    fresh = steps.woke | steps.first
    begin = np.where(fresh, begun + launch[steps.experiment, steps.kind], begin)
    found = np.empty(len(steps))
    end = -np.inf
    table = zip(begin.tolist(), gpu_s.tolist(), steps.done.tolist(), fresh.tolist(), sure, strict=True)
    for i, (start, work, done, new, known) in enumerate(table):
        end = max(-np.inf if new else end, start) + work
        found[i] = end = end if end < done else done  # also where the work is unknown
        if known:
            end = done
    return found
