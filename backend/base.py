"""The contract between a replica and whatever prices (or executes) its steps.

All times are integer picoseconds, so that a run of steps summed in closed form equals the same steps summed one
by one, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from backend.shapes import GPU, Model

FOREVER = 1 << 60  # steps: "to the end of any run"


class Chunk(NamedTuple):
    """Prompt tokens of one request computed in one step."""

    start: int  # tokens already in KV
    length: int  # tokens computed now


class Batch(NamedTuple):
    """One engine step as a cost model sees it."""

    prefills: tuple[Chunk, ...]
    decodes: int  # sequences producing one token each
    context: int  # KV tokens that decodes and padded slots read, this step's included, in total
    padded: int = 0  # token slots computed for nothing (static batching): dead sequences, prompt padding
    members: object = None  # lazy; only real hardware walks it (request ids, block tables)


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
        """A request has left the replica; drop what is kept for it."""

    def assumptions(self) -> dict[str, str]:
        """What a reader of the results must know of the prices: name → one line."""
        return {}


class Settings(Protocol):
    """A backend's settings as a scenario gives them: a frozen dataclass, its fields the YAML's keys."""

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Backend:
        """A fresh backend for one replica. Raises ValueError, one sentence, where it cannot serve that."""
