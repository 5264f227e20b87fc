"""The contract between a replica and whatever prices (or executes) its steps.

All times are integer picoseconds, so that a run of steps summed in closed form equals the same steps summed one
by one, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from chairlift.backend.shapes import GPU, Model

PS = 10**12  # picoseconds a second
FOREVER = 1 << 60  # steps: "to the end of any run"
new = tuple.__new__  # ``new(StepCost, (first, slope, steps, host))``, for hot paths: half the time of ``StepCost(…)``


class Chunk(NamedTuple):
    """Prompt tokens of one request computed in one step."""

    start: int  # tokens already in KV
    length: int  # tokens computed now


class Prompt(NamedTuple):
    """A chunk as an engine that executes it needs it."""

    request: int
    start: int  # tokens already in KV
    length: int  # tokens computed now
    pad: int  # dead tokens computed before it (static batching)
    emits: bool  # whether the request's next token comes with it


class Members(Protocol):
    """Who is in a step; only real hardware asks."""

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The chunks, in the policy's order."""

    @property
    def decodes(self) -> Sequence[int]:
        """Requests that produce one token from earlier ones, in order of admission."""

    @property
    def dead(self) -> Sequence[int]:
        """Finished requests that are computed for nothing (static batching)."""

    def table(self, request: int) -> Sequence[int] | None:
        """The pool's blocks of a request, in order; None if the pool counts blocks and does not name them."""

    def tokens(self, request: int) -> Sequence[int] | npt.NDArray[np.int64]:
        """Numbers that stand for the tokens of its prompt; equal where the trace says that prompts are equal.

        Where it repeats an earlier answer: the tokens of that.
        """


class Batch(NamedTuple):
    """One engine step as a cost model sees it."""

    prefills: tuple[Chunk, ...]
    decodes: int  # sequences producing one token each
    context: int  # KV tokens that decodes and padded slots read, this step's included, in total
    padded: int = 0  # token slots computed for nothing (static batching): dead sequences, prompt padding
    members: Members | None = None  # given to a backend that executes, see `Executor`


WHOLE = -1  # `Host.tail`: the GPU begins once the launch has ended, as with one CUDA graph


class Host(NamedTuple):
    """Host work of one step, ps."""

    schedule: int = 0  # before the launch: deciding what to run
    launch: int = 0  # until the GPU has its work
    update: int = 0  # after it: taking the tokens in, and handing them to the clients
    tail: int = WHOLE  # kernel by kernel the GPU works along with the launch, but for this much once that has ended

    def begin_ps(self, gpu: int) -> int:
        """From the launch's start to the end of ``gpu`` ps of work, on a GPU that has nothing else to do."""
        return self.launch + gpu if self.tail == WHOLE else max(gpu, self.launch + self.tail)


NO_HOST = Host()


class StepCost(NamedTuple):
    """The next ``steps`` steps cost ``first``, ``first + slope``, ``first + 2·slope`` … ps on the GPU.

    For as long as the batch keeps its members, so that ``context`` grows by ``decodes`` (and dead slots) a step.
    A fitted model vouches for many steps (to its next breakpoint), a real GPU for one.
    """

    first: int
    slope: int = 0
    steps: int = FOREVER
    host: Host = NO_HOST  # the same for each of them

    def spacing(self, ahead: bool) -> tuple[int, int]:
        """Time from one step boundary to the next, of the first step, and by how much each further one is longer.

        A synchronous engine takes turns with the GPU. In one that plans ``ahead`` the host works while the GPU does,
        and the slower of the two sets the pace of steps that are all alike.
        """
        host = self.host
        if host is NO_HOST:
            return self.first, self.slope
        work = host.schedule + host.launch + host.update
        if ahead:
            return (work, 0) if work > self.first else (self.first, self.slope)
        bound = host.tail != WHOLE and host.launch + host.tail > self.first  # the launch outlasts the GPU's work
        return host.schedule + host.begin_ps(self.first) + host.update, 0 if bound else self.slope

    def steps_alike(self, ahead: bool) -> int:
        """For how many steps `spacing` holds."""
        host = self.host
        if host is NO_HOST:
            return self.steps
        if ahead:
            wait = host.schedule + host.launch + host.update - self.first
        elif host.tail == WHOLE:
            return self.steps
        else:
            wait = host.launch + host.tail - self.first
        if wait <= 0 or self.slope == 0:
            return self.steps
        return min(self.steps, wait // self.slope + 1)  # then the GPU is the slower


class Backend(ABC):
    """Prices the steps of one replica; a GPU engine also executes them."""

    name: str = "backend"
    arrival: int = 0  # ps of host time that an engine spends on each request it takes in, before it plans
    arrival_token: int = 0  # ps more for each token of its prompt

    @abstractmethod
    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``, and of the steps after it while nothing but context lengths changes."""

    def release(self, request_id: int) -> None:  # noqa: B027 - a hook; cost models hold nothing
        """A request has lost its KV: it has left the replica or was preempted; drop what is kept for it."""

    def close(self) -> None:  # noqa: B027 - likewise
        """The run is over; give back what it needed."""

    def assumptions(self) -> dict[str, str]:
        """What a reader of the results must know of the prices: name → one line."""
        return {}


class Measured(NamedTuple):
    """How long an executed step took, ps."""

    gpu: int  # from its first to its last operation on the GPU
    host: int  # preparing and launching it


class Executor(Backend):
    """Runs steps for real, one behind the other; `Backend.step` is an estimate, for policies that ask for a price."""

    @abstractmethod
    def prepare(self, blocks: int, block_size: int, max_model_len: int, named: bool) -> None:
        """Get ready to serve a KV pool of this size, its blocks ``named`` by the pool or only counted.

        Raises ValueError, one sentence, if that does not fit the device.
        """

    @abstractmethod
    def launch(self, batch: Batch) -> None:
        """Put a step (with its members) behind those launched before; at most two are ever under way."""

    @abstractmethod
    def wait(self) -> Measured:
        """Wait for the oldest step under way."""

    def answer(self, request_id: int) -> Sequence[int]:
        """The tokens that a request was given so far, by `wait`; none from one that only takes time."""
        return ()

    def facts(self) -> dict[str, str]:
        """What a recording says of the engine: ``gpu``, versions."""
        return {}


class Settings(Protocol):
    """A backend's settings as a scenario gives them: a frozen dataclass, its fields the YAML's keys.

    One that executes steps says so: ``executes = True``.
    """

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Backend:
        """A fresh backend for one replica. Raises ValueError, one sentence, where it cannot serve that."""
