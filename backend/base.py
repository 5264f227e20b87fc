"""The contract between a replica and whatever prices (or executes) its steps.

A replica hands a `Batch` to `Backend.step` and gets a `StepCost`: the price of that step and of the steps after it, for
as long as nothing but context lengths changes. Ten decodes with 1,000 tokens of context in total might cost 5,000,000
ps, and 700 ps more in each later step, for ever; the replica then prices the next thousand steps by one sum. All times
are integer picoseconds, so that such a sum equals the same steps added up one by one, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from chairlift.backend.parallel import Parallel
    from chairlift.backend.shapes import GPU, Model

PS = 10**12  # picoseconds a second
FOREVER: Final = 1 << 60  # steps: more than any run has
new = tuple.__new__  # ``new(StepCost, (first, slope, steps, host))``, for hot paths: half the time of ``StepCost(…)``


class Chunk(NamedTuple):
    """Prompt tokens of one request computed in one step."""

    start: int  # tokens already in KV
    length: int  # tokens computed now


class Prompt(NamedTuple):
    """A chunk of a prompt, as an engine that executes steps needs to know it."""

    request: int
    start: int  # tokens already in KV
    length: int  # tokens computed now
    pad: int  # padding tokens computed in front of it (static batching)
    emits: bool  # whether the step yields the request's next token, because the chunk ends its prompt
    drafts: int = 0  # tokens computed behind it in place of drafts, none of which is kept


class Verified(NamedTuple):
    """A decode that verifies drafts, as an engine that executes steps needs to know it."""

    request: int
    start: int  # tokens in KV before: all that are known but the latest
    drafts: int  # verified, beside the latest token
    kept: int  # of them, as it was drawn; never more than the answer has room for


class Members(Protocol):
    """The requests of a step. A cost model needs only their numbers; a backend that executes steps needs them."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The chunks, in the policy's order."""

    @property
    def decodes(self) -> Sequence[int]:
        """Requests that decode, one token each, in order of admission; none where drafts are verified."""

    @property
    def verified(self) -> Sequence[Verified]:
        """Where drafts are verified: requests that decode, with drafts or without, in the plan's order."""

    @property
    def dead(self) -> Sequence[int]:
        """Finished requests whose slots are still computed, because their batch goes on (static batching)."""

    def table(self, request: int) -> Sequence[int] | None:
        """The numbers of a request's blocks, in order; None if the pool only counts blocks."""

    def tokens(self, request: int) -> Sequence[int] | npt.NDArray[np.int64]:
        """The tokens of a request's prompt: made-up numbers, equal wherever the trace says that prompts are equal.

        Where a prompt repeats an earlier answer, as the turns of a session do: that answer's own tokens.
        """


class Batch(NamedTuple):
    """One engine step as a cost model sees it."""

    prefills: tuple[Chunk, ...]
    decodes: int  # sequences producing one token each
    context: int  # KV tokens that decodes and padded slots read, this step's included, in total
    padded: int = 0  # token slots computed for nothing (static batching): finished sequences, padding of prompts
    members: Members | None = None  # for an `Executor` only
    drafts: int = 0  # tokens of drafts that its decodes verify, beside the one of each
    proposes: int = 0  # drafts that each of its requests is given after it


WHOLE: Final = -1  # a `Host.tail`: the GPU begins once the launch has ended, as with one CUDA graph


class Host(NamedTuple):
    """Host work of one step, ps."""

    schedule: int = 0  # before the launch: deciding what to run
    launch: int = 0  # until the GPU has its work
    update: int = 0  # after it: taking the tokens in, and handing them to the clients
    tail: int = WHOLE  # launched kernel by kernel, the GPU works along; this much of its work waits for the last one
    head: int = 0  # launched so: from the start of the launch until an idle GPU gets its first kernel

    def begin_ps(self, gpu: int) -> int:
        """From the start of the launch to the end of ``gpu`` ps of GPU work, on a GPU that is idle before."""
        return self.launch + gpu if self.tail == WHOLE else max(self.head + gpu, self.launch + self.tail)


NO_HOST: Final = Host()


class StepCost(NamedTuple):
    """The next ``steps`` steps cost ``first``, ``first + slope``, ``first + 2·slope`` … ps on the GPU.

    The series holds for as long as the batch keeps its members: each step then adds a token of context for each decode
    and padded slot. A cost model vouches up to its next breakpoint, a real GPU for one step.
    """

    first: int
    slope: int = 0
    steps: int = FOREVER
    host: Host = NO_HOST  # the same for each of them

    def spacing(self, ahead: bool) -> tuple[int, int]:
        """Time from one step boundary to the next: of the first step, and by how much each further one is longer.

        In a synchronous engine host and GPU take turns, so their times add up. In an engine that plans ``ahead`` both
        work at once, and the slower one sets the pace: with 3 ms of host work and 5 ms of GPU work a step takes 5 ms,
        not 8.
        """
        host = self.host
        if host is NO_HOST:
            return self.first, self.slope
        work = host.schedule + host.launch + host.update
        if ahead:
            return (work, 0) if work > self.first else (self.first, self.slope)
        # whether the launch outlasts the GPU's work
        bound = host.tail != WHOLE and host.launch + host.tail > host.head + self.first
        return host.schedule + host.begin_ps(self.first) + host.update, 0 if bound else self.slope

    def steps_alike(self, ahead: bool) -> int:
        """For how many steps the series of `spacing` holds: until the slower of host and GPU is the other one."""
        host = self.host
        if host is NO_HOST:
            return self.steps
        if ahead:
            wait = host.schedule + host.launch + host.update - self.first
        elif host.tail == WHOLE:
            return self.steps
        else:
            wait = host.launch + host.tail - host.head - self.first
        if wait <= 0 or self.slope == 0:
            return self.steps
        return min(self.steps, wait // self.slope + 1)  # then the GPU is the slower


def slowest(costs: Sequence[StepCost]) -> StepCost:
    """The cost of steps that end when the last of ``costs`` does, for as long as that stays the last one.

    Of each kind of host work the longest counts, whosever it is.

    Example: of 100 ps and 3 more each step, and 94 ps and 5 more, the first is the slower for 4 steps (100 and 94, 103
    and 99, 106 and 104, 109 and 109); then the other one is.
    """
    first, slope, steps, host = max(costs)
    if any(cost.host is not NO_HOST for cost in costs):
        host = Host(*map(max, zip(*(cost.host for cost in costs), strict=True)))
    for cost in costs:
        steps = min(steps, cost.steps)
        if cost.slope > slope:
            steps = min(steps, (first - cost.first) // (cost.slope - slope) + 1)
    return StepCost(first, slope, steps, host)


class Backend(ABC):
    """Prices the steps of one replica; a GPU engine also executes them."""

    name: str = "backend"
    prices_drafts: bool = False  # it looks at `Batch.drafts`
    remembers: bool = False  # prices depend on the steps before: it wants to hear what `ran`
    arrival: int = 0  # ps of host time to take in a request, before the engine plans the next step
    arrival_token: int = 0  # ps more for each token of that request's prompt

    @abstractmethod
    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``, and of the steps after it for as long as nothing but context lengths changes."""

    def together(self, batches: Sequence[Batch]) -> StepCost:
        """The cost of a step of all ranks of DP-attention, each with a batch of its own: some are empty, not all.

        It ends with the slowest. As if each rank were alone here; a cost model whose ranks share experts knows better.
        """
        return slowest([self.step(batch) for batch in batches if batch.prefills or batch.decodes or batch.padded])

    def ran(self, tokens: int, gpu: int, slope: int, count: int) -> None:  # noqa: B027 - a hook, if it `remembers`
        """Remember ``count`` steps that took ``gpu``, ``gpu + slope`` … ps, each of so many ``tokens``.

        ``tokens``: 0 of steps of decodes alone, and while nothing ran. How steps are grouped must make no difference.
        """

    def release(self, request_id: int) -> None:  # noqa: B027 - a hook; cost models hold nothing
        """Drop what is kept for a request whose KV is gone: the request has left the replica, or was preempted."""

    def drop(self, request_id: int) -> None:  # noqa: B027 - likewise
        """Keep no token of a request that is under way: it is to be generated again, or nobody's."""

    def retable(self, request_id: int, table: Sequence[int]) -> None:  # noqa: B027 - likewise
        """Use other blocks for a running request from here on, those of ``table``; they hold the same."""

    def close(self) -> None:  # noqa: B027 - likewise
        """Give back what the run needed: it is over."""

    def assumptions(self) -> dict[str, str]:
        """What a reader of the results must know about the prices: a name, and one line each."""
        return {}


class DeviceError(RuntimeError):
    """A device cannot go on in the midst of a run: a process of it has died, or its memory is full. One sentence."""


class Executor(Backend):
    """Executes steps, one after the other, and measures them. Its `step` is an estimate, for policies that ask."""

    @abstractmethod
    def prepare(self, blocks: int, block_size: int, max_model_len: int, named: bool) -> None:
        """Get ready to serve a KV pool of this size, whose blocks are ``named`` by the pool, or else only counted.

        Raises ValueError, one sentence, if that does not fit the device, and MemoryError if it does not fit the host.
        """

    @abstractmethod
    def launch(self, batch: Batch) -> None:
        """Queue a step, which has its members, behind the steps launched before.

        At most two are ever under way; with stages of a pipeline at most one more than there are stages.
        """

    @abstractmethod
    def wait(self) -> int:
        """Wait for the oldest step under way: ps from its first to its last operation on the GPU."""

    def answer(self, request_id: int) -> Sequence[int]:
        """The tokens generated so far for a request, as of the last `wait`; none from an engine that makes none."""
        return ()

    def facts(self) -> dict[str, str]:
        """What a recording says about the engine: ``gpu``, versions, ``graph_tokens`` (of its largest CUDA graph)."""
        return {}


class Settings(Protocol):
    """A backend's settings as a scenario gives them: a frozen dataclass whose fields are the keys of the YAML.

    Settings of a backend that executes steps have ``executes = True``.
    """

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """A fresh backend for one replica, whose GPUs share the model so.

        Raises ValueError, one sentence, where it cannot serve that.
        """
