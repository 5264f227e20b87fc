"""The contract between a scheduling policy and a replica.

A policy is one dataclass in one file. Its fields are its settings (their names and types are its YAML schema),
its docstring is its help text, and `Scheduler.schedule` is all it must write::

    @dataclass
    class ShortestPrompt(Scheduler):
        \"\"\"Serve the shortest prompt first.\"\"\"

        budget: Positive = 2048  # tokens a step

        def schedule(self, step: Step) -> int:
            while not step.decode_all():
                step.preempt(next(reversed(step.running)))
            room = self.budget - step.decodes
            for request in step.prefilling:
                tokens = min(request.remaining, room)
                if tokens and step.run(request, tokens):
                    room -= tokens
            for request in sorted(step.waiting, key=lambda r: r.prompt_tokens):
                tokens = min(request.remaining, room)
                if not tokens or not step.admit(request, tokens):
                    break
                room -= tokens
            return 1

There is no prefill phase and no decode phase: a plan is a number of tokens per request, as in vLLM V1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Reversible, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Protocol

from annotated_types import Ge, Gt, Le
from mypy_extensions import mypyc_attr


class Running(Collection["Request"], Reversible["Request"], Protocol):
    """Requests in order of admission: a length, ``in``, and a walk from either end."""


FOREVER: Final = 1 << 60  # "until something changes": more steps than any run has

Positive = Annotated[int, Gt(0)]
NotNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Le(1e9)]
NotNegativeFloat = Annotated[float, Ge(0), Le(1e9)]
Preemption = Literal["recompute", "swap"]


@dataclass(frozen=True)
class Predictor:
    """Guesses of answers' lengths that a policy asks for; the simulator makes them, so that it never sees the truth.

    ``noisy``: the true lengths in an order whose Kendall τ with the true order is ``tau``. ``buckets``: the middle of
    the true length's bucket, of ``buckets`` equally frequent ones, or of another at random but for ``accuracy``.
    """

    kind: Literal["noisy", "buckets"] = "noisy"
    tau: float = 1.0
    buckets: int = 10
    accuracy: float = 1.0


@dataclass(frozen=True)
class RadixCache:
    """Prefixes are kept in a radix tree over whole pages, as SGLang does it: answers too, evicted by whole nodes.

    ``unified``: as `UnifiedRadixCache` does it, which starts a node where an answer starts and counts the tail of a
    prefix as used after its head; as `RadixCache` before it did, if False.
    """

    unified: bool = True


class KvGroups(NamedTuple):
    """How the layers of a model are grouped where some have a window: groups of equally many layers that are alike."""

    windows: tuple[int, ...]  # of each group: tokens that a query looks back on, its own included; 0: all
    chunked: bool = False  # a query looks back to where its chunk of so many tokens begins, no further (Llama 4)


@dataclass(frozen=True)
class HybridCache:
    """Groups of layers have blocks of their own, and what slides out of a window is given back, as vLLM does it.

    ``in_flight``: tokens that may be planned and not processed yet. ``retention``: with windows, the blocks that are
    kept for others to find are those that a request looks back on where its prompt ends, where its prompt and another
    part, and every so many tokens (0: nowhere else). None: all blocks are. ``null_counts``: the longest request may
    need one block more than there are, vLLM's null block.
    """

    in_flight: int
    retention: int | None = None
    null_counts: bool = False

    def most(self, groups: KvGroups, block_size: int, max_model_len: int) -> int:
        """Blocks that one request ever holds in a group with a window: what it looks back on, and what is in flight."""
        window = max(groups.windows)
        tokens = min((window if groups.chunked else window - 1) + self.in_flight, max_model_len)
        return -(-tokens // block_size) + (not groups.chunked)  # a window may begin inside a block

    def room(self, groups: KvGroups, blocks: int, block_size: int, max_model_len: int) -> int:
        """Tokens of the longest request that fits on so many blocks, at most ``max_model_len``."""
        most = self.most(groups, block_size, max_model_len)
        tables, full = len(groups.windows), groups.windows.count(0)
        total = blocks + self.null_counts
        longest = total // tables
        if longest >= most:
            longest = (total - (tables - full) * most) // full if full else max_model_len
        return min(longest * block_size, max_model_len)


class Speculation(NamedTuple):
    """How requests decode whose next tokens are guessed: a step computes the latest token and its drafts, and keeps
    those drafts that the model would have generated itself.

    ``drafts``: guessed for a request and a step. ``lookahead``: tokens of KV that a request is given beyond those that
    a step computes. ``by_batch``: rows of first and last number of requests in a step and the drafts that each gets
    after it; of what no row names, the row before holds; empty: always ``drafts``. ``prefix``: how the prefix cache
    keeps what the drafting layers need of the token behind a block. "lookahead": a block's hash covers that token too.
    "drop": the last block that is found is computed again. "plain": neither. ``skips``: no drafts are guessed after a
    step if none of its requests could use them. ``at_once``: blocks that kept drafts complete can be found once the
    output of their step is in, also where planning is not asynchronous; else not before the request's next step.
    """

    drafts: int
    lookahead: int
    by_batch: tuple[tuple[int, int, int], ...] = ()
    prefix: Literal["lookahead", "drop", "plain"] = "plain"
    skips: bool = True
    at_once: bool = True

    def proposed(self, requests: int) -> int:
        """Drafts that each request gets after a step of so many requests."""
        drafts = self.by_batch[0][2] if self.by_batch else self.drafts
        for first, last, these in self.by_batch:
            if requests < first:
                break
            drafts = these
            if requests <= last:
                break
        return min(self.drafts, drafts)


class PrefixNode(Protocol):
    """A node of the radix tree: tokens that follow those of its parent. Not to be changed."""

    @property
    def parent(self) -> PrefixNode | None:
        """The node before it; None of the root, which has no tokens."""

    @property
    def children(self) -> Mapping[Hashable, PrefixNode]:
        """The nodes that follow it, in the order of their making."""

    @property
    def stop(self) -> int:
        """Tokens from the root to its end."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Request:
    """One request as a policy sees it. A policy reads these properties, and changes nothing of a request.

    A policy never sees how long the answer will be: nothing that it can reach from a `Step` or a request knows that.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def id(self) -> int:
        """Row of the trace."""

    @property
    @abstractmethod
    def arrival(self) -> int:
        """When it was sent, ps."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Output cap that the client declared; what the model has room for if the client declared none."""

    @property
    @abstractmethod
    def ignore_eos(self) -> bool:
        """Whether its client asked for `max_tokens` tokens whatever they are: what benchmarks do."""

    @property
    @abstractmethod
    def output_tokens(self) -> int | None:
        """Its true output length; None, but for policies that say `Scheduler.oracle`."""

    @property
    @abstractmethod
    def predicted_tokens(self) -> int | None:
        """Its output length as the predictor guesses it that `Scheduler.predictor` asks for; else None."""

    @property
    @abstractmethod
    def priority(self) -> int:
        """Smaller is more urgent, as in vLLM."""

    @property
    @abstractmethod
    def tenant(self) -> int:
        """Number of the client that it belongs to."""

    @property
    @abstractmethod
    def session(self) -> int:
        """Number of the conversation that it belongs to; -1: none."""

    @property
    @abstractmethod
    def hash_ids(self) -> Sequence[int]:
        """What the trace says of its prompt's blocks: equal ids, equal prefix."""

    @property
    @abstractmethod
    def preemptions(self) -> int:
        """How often it has lost its blocks."""

    @property
    @abstractmethod
    def swapped(self) -> int:
        """Tokens whose KV lies in host memory; only of a waiting request."""

    @property
    @abstractmethod
    def pad(self) -> int:
        """Dead tokens that its prompt was computed with (static batching)."""

    @property
    @abstractmethod
    def computed(self) -> int:
        """Tokens whose K and V are in the pool."""

    @property
    @abstractmethod
    def emitted(self) -> int:
        """Output tokens that it has, those of a step under way included (asynchronous scheduling)."""

    @property
    @abstractmethod
    def remaining(self) -> int:
        """Known tokens (prompt and emitted) still to compute before the next token comes; 1 for a decode.

        With `Step.speculation`, its drafts too: a decode with 3 drafts has 4.

        0 when its last token is under way (asynchronous scheduling): the request then only waits to leave.
        """

    @property
    @abstractmethod
    def decoding(self) -> bool:
        """Whether its latest token is all that it lacks: a decode, or what a preempted request has left to compute."""


@dataclass(frozen=True)
class Deployment:
    """What a policy is to serve with, as far as it is known before anything runs."""

    gpu: str  # its name
    gpu_bytes: int  # memory of one GPU
    max_model_len: int  # tokens, prompt and output, that a request may have
    pool_tokens: int | None = None  # those that the KV pool can hold of one request; None: not known yet
    ranks: int = 1  # of DP-attention; each has a policy of its own
    block_size: int | None = None  # tokens of a block of the KV pool; None: not known yet
    sliding: bool | None = None  # whether layers of the model keep a sliding window; None: not known yet


class PolicyError(Exception):
    """A policy or router did what cannot be; the message names it, the step, the number and the limit.

    ``who`` is as in "policy Mine"; ``step``, from 1 on, is the engine step of a replica that was planned, if known.
    """

    def __init__(self, what: str, who: str = "", step: int | None = None) -> None:
        super().__init__(what)
        self.what, self.who, self.step = what, who, step

    def __str__(self) -> str:
        where = None if self.step is None else f"step {self.step:,}"
        return ": ".join(filter(None, (self.who, where, self.what)))

    def __reduce__(self) -> tuple[type[PolicyError], tuple[str, str, int | None]]:
        return type(self), (self.what, self.who, self.step)


class NoProgress(PolicyError):
    """A policy leaves requests unserved: it plans nothing, or nothing comes of what it plans."""


class PolicyRaised(PolicyError):
    """The code of a policy or router raised something, or asked to exit; the message names its file and line too."""

    def __str__(self) -> str:
        return self.what


@mypyc_attr(allow_interpreted_subclasses=True)
class Step:
    """What a policy may see and do at a step boundary, and nothing else.

    Valid during one call of `Scheduler.schedule`; do not keep it, nor any list it returns.
    """

    @property
    @abstractmethod
    def now(self) -> int:
        """The time, ps."""

    @property
    @abstractmethod
    def running(self) -> Running:
        """Admitted and not finished, in order of admission."""

    @property
    @abstractmethod
    def waiting(self) -> Sequence[Request]:
        """In order of arrival, preempted ones first; or by `Scheduler.order`."""

    @property
    @abstractmethod
    def more_arrivals(self) -> bool:
        """False once no request will ever arrive again."""

    @property
    @abstractmethod
    def max_model_len(self) -> int:
        """Tokens, prompt and output, that the model can hold of one request."""

    @property
    def stages(self) -> int:
        """Of a pipeline; with more than one, several steps are in flight at once (`Scheduler.fills_pipelines`)."""
        return 1

    @property
    def windowed(self) -> bool:
        """Whether requests give blocks back while they run: what slides out of windows (`Scheduler.hybrid`)."""
        return False

    @property
    def speculation(self) -> Speculation | None:
        """How drafts are verified, if they are."""
        return None

    @property
    @abstractmethod
    def decodes(self) -> int:
        """How many of the running wait for one token each: what `decode_all` costs of a budget.

        With `Step.speculation`, their tokens, drafts included.
        """

    @property
    @abstractmethod
    def prefilling(self) -> Sequence[Request]:
        """Running requests that lack some of their prompt, or of what a preemption lost; in order of admission."""

    @property
    @abstractmethod
    def decode_steps(self) -> int:
        """Steps with decodes (or dead slots) that the replica has done so far: a clock that leaps with it."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Finished requests that still occupy a slot of their batch (`Scheduler.batch_synchronous`)."""

    @property
    @abstractmethod
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""

    @property
    @abstractmethod
    def free_host_blocks(self) -> int:
        """Blocks of host memory that nobody's swapped KV takes."""

    @property
    @abstractmethod
    def total_blocks(self) -> int:
        """Blocks of the pool."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Tokens a block."""

    def ready(self, request: Request) -> bool:
        """Whether a request may be in this plan: not while what it waits for is in flight (`stages`)."""
        return True

    def ready_running(self) -> Sequence[Request]:
        """Those of `running` that are `ready`, in the same order."""
        return [request for request in self.running if self.ready(request)]

    @abstractmethod
    def cached_tokens(self, request: Request) -> int:
        """Leading tokens of a waiting request that need no computing: in the prefix cache, or swapped out."""

    @abstractmethod
    def need(self, request: Request, tokens: int) -> int:
        """Blocks that a waiting request's first ``tokens`` tokens take out of `free_blocks`.

        Cached blocks that nobody holds are among them: the request then holds them.
        """

    @abstractmethod
    def prefix(self, request: Request) -> PrefixNode:
        """Where a waiting request's known tokens leave the radix tree; the path there is now the latest used."""

    @abstractmethod
    def opening(self, request: Request, tokens: int) -> Hashable:
        """Equal for two requests if their first ``tokens`` tokens are; both know that many."""

    @abstractmethod
    def publish(self, request: Request) -> None:
        """Put what has been computed of a running request's prompt into the radix tree, before all of it is."""

    @abstractmethod
    def evict(self, blocks: int) -> None:
        """Forget the least recently used of the radix tree until ``blocks`` blocks are neither held nor cached."""

    @abstractmethod
    def reorder(self, requests: Sequence[Request]) -> None:
        """Put the waiting requests, all of them, into another order for good."""

    @abstractmethod
    def fits(self, request: Request, tokens: int, spare: int = 0) -> bool:
        """Whether the first ``tokens`` tokens of a waiting request have room now, its cached ones counted.

        They are computed chunk by chunk: what slides out of windows meanwhile counts once. ``spare``: blocks that must
        be free beyond those.
        """

    @abstractmethod
    def price(self, chunks: Sequence[tuple[int, int]] = (), decodes: int | None = None) -> int:
        """Picoseconds that a step of these chunks ``(start, tokens)`` and `decodes` decodes (None: all) would take."""

    @abstractmethod
    def decode_all(self) -> bool:
        """Give one token to every running request that decodes; False (and nothing done) if their KV does not fit.

        With `Step.speculation`, its latest token and its drafts are computed.
        """

    @abstractmethod
    def run(self, request: Request, tokens: int) -> bool:
        """Compute ``tokens`` (1 … `Request.remaining`) of a running request; False if its KV does not fit."""

    @abstractmethod
    def admit(self, request: Request, tokens: int, reserve: int | None = None, pad: int = 0, spare: int = 0) -> bool:
        """Start a waiting request: compute ``tokens`` of its known tokens after those cached. False: no room.

        With `Step.speculation`, tokens beyond those known are drafts that are all rejected: they pad a request that
        lacks one token to the width of the decodes.

        ``reserve``: tokens of KV to set aside now (at least those computed); None grows block by block. A request
        whose reservation is larger than the whole pool is rejected, and the plan is asked for again. ``pad``: dead
        tokens computed and read with it. ``spare``: blocks that must stay free.
        """

    @abstractmethod
    def preempt(self, request: Request, how: Preemption = "recompute") -> None:
        """Take a running request's blocks and put it at the head of the queue; it keeps its emitted tokens.

        At the end of the queue, if `Scheduler.requeues_last`; less the one in flight, if `Scheduler.drops_flight`.

        ``recompute``: all known tokens are computed again. ``swap``: its KV moves to host memory, and back when it is
        admitted again; both moves take time (`overlaps_swaps`). Where host memory has no room it is computed again.
        Where steps really run, it takes those with it that this plan admitted to find in the cache what it was to
        compute.
        """

    @abstractmethod
    def reject(self, request: Request) -> None:
        """Refuse a waiting request for good. A plan that refused somebody and runs nothing is asked for again."""

    @abstractmethod
    def release(self) -> None:
        """Answer all held requests: a static batch returns as a whole (`Scheduler.batch_synchronous`)."""

    @abstractmethod
    def pause(self, ps: int) -> None:
        """Let the replica sleep for ``ps`` before this step starts (a launcher's pause)."""

    @abstractmethod
    def wake_at(self, ps: int) -> None:
        """Ask for another plan at time ``ps`` if the replica is idle until then."""


@mypyc_attr(native_class=False)
class Scheduler(ABC):
    """Decides, at a step boundary, what one replica runs next. Subclasses are dataclasses.

    One object serves one replica; state between calls is its own (``field(init=False)``).
    """

    not_modelled: ClassVar[dict[str, str]] = {}  # settings of the engine that are refused → what they would ask for
    oracle: bool = False  # it may read `Request.output_tokens`; reports carry the word
    overlaps_swaps: ClassVar[bool] = False  # swapped KV moves beside the steps, not between them
    batch_synchronous: ClassVar[bool] = False  # finished requests keep their slot until `Step.release`
    block_tokens: ClassVar[int | None] = None  # tokens a block if the policy fixes it (1: KV by the slot)
    requeues_last: ClassVar[bool] = False  # a preempted request goes to the end of the queue
    fills_pipelines: ClassVar[bool] = False  # with several `Step.stages` it plans, by `Step.run`, who is `Step.ready`
    ranks_in_turn: ClassVar[bool] = False  # ranks of DP-attention get requests in turn, not by how many they have
    verifies_drafts: ClassVar[bool] = False  # it plans with `Step.speculation`
    drops_flight: ClassVar[bool] = False  # a preempted request loses its token in flight, and generates it again

    @property
    def overtakes_flight(self) -> bool:
        """Of a pipeline: whether a preempted request may join again while tokens of it are in flight."""
        return False

    @property
    def asynchronous(self) -> bool:
        """Whether step n+1 is planned before step n's output is in; then arrivals and finishes show a step late."""
        return False

    @property
    def overshoots(self) -> Literal["never", "eos", "always"]:
        """Who decodes once more before its end is seen, for nothing, where steps are planned ahead.

        ``eos``: those that end before `Request.max_tokens`; whoever reaches that is known to end.
        """
        return "never"

    @property
    def prefix_caching(self) -> bool:
        """Whether blocks of equal prefixes are shared and kept for reuse."""
        return False

    @property
    def uncached_first(self) -> bool:
        """With prefix caching: whether freed blocks whose content is not kept are the first to be reused."""
        return False

    @property
    def radix(self) -> RadixCache | None:
        """The radix tree that keeps the prefixes, if `prefix_caching` is by one; None: block by block."""
        return None

    @property
    def hybrid(self) -> HybridCache | None:
        """How layers with windows keep KV; None: as all others, every token as long as its request."""
        return None

    @property
    def predictor(self) -> Predictor | None:
        """What `Request.predicted_tokens` is to be; None: nothing."""
        return None

    @property
    def token_limit(self) -> int | None:
        """Tokens that a step may hold, checked by the engine; a field called ``budget`` by default."""
        budget: int | None = getattr(self, "budget", None)
        return budget

    @property
    def sequence_limit(self) -> int | None:
        """Requests that a step may hold, checked after the run; None: as many as memory allows.

        Memory is kept for so many, and plans bound a policy's throughput by it.
        """
        return None

    def static_share(self, gpu_bytes: int, gpus: int, latent: bool) -> float | None:
        """Share of a GPU's memory that the engine by default gives to weights and KV, whatever it needs besides.

        ``gpu_bytes``: of each of the ``gpus`` that share the model; ``latent``: it has latent attention. None: the
        engine measures what it needs besides weights and KV, and KV gets the rest of the scenario's share.
        """
        return None

    @property
    def swaps(self) -> bool:
        """Whether preempted requests' KV may go to host memory; a field ``preemption: swap`` says so by default."""
        return getattr(self, "preemption", "") == "swap"

    @property
    def pool_blocks(self) -> int | None:
        """Usable blocks of the KV pool, where a setting fixes that number; None: the scenario's ``kv`` says it."""
        return None

    @property
    def pool_block_size(self) -> int | None:
        """Tokens a block, where a setting fixes that number; None: the scenario's ``kv`` says it."""
        return None

    @abstractmethod
    def schedule(self, step: Step) -> int:
        """Say what runs next through the verbs of ``step``.

        Returns for how many steps the same answer stays right if nothing arrives, finishes or fails; 1 if unsure.
        `FOREVER` is for an answer that only such an event can change. Steps with a chunk count as one anyhow.
        0: nothing runs in this turn, but ask again at once.
        """

    def speculation(self, method: str, drafts: int) -> Speculation:
        """How so many ``drafts`` by a ``method`` (eagle3, mtp, draft_model, ngram) are planned (`verifies_drafts`)."""
        return Speculation(drafts, drafts)

    def allowed(self, request: Request, max_model_len: int, blocks: int, block_size: int) -> int:
        """Output tokens that a request which comes may have: at most those that it asks for; 0 refuses it."""
        return request.max_tokens

    def ended(self, request: Request) -> None:  # noqa: B027 - a hook; most policies look at `Step.running`
        """An admitted request has left for good: it has its answer, or its client has given up."""

    def landing(self, requests: list[Request]) -> list[Request]:
        """The order in which requests that got a token from one step give back or keep what they hold."""
        return requests

    @classmethod
    def refused(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Of the settings ``given``, those that are known and not taken, and why."""
        return {key: f"not modelled: {cls.not_modelled[key]}" for key in given if key in cls.not_modelled}

    @classmethod
    def sized(cls, given: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
        """The settings ``given``, and those that follow from the deployment. Raises ValueError, one sentence."""
        return dict(given)

    def misfits(self, deployment: Deployment) -> Iterable[tuple[str, str]]:
        """What is wrong with these settings there: the setting (or ``max_model_len``), and the rule that it breaks."""
        return ()

    def assumptions(self) -> dict[str, str]:
        """What results rest on with this policy: a word or two → one line. Reports print it."""
        return {}

    @property
    def limits_arrivals(self) -> bool:
        """Whether `turns_away` is to be asked."""
        return False

    def turns_away(self, unfinished: int, prompt_tokens: int) -> bool:
        """Whether a request that arrives now is refused for good, as by HTTP 503.

        ``unfinished``: requests here, waiting or running. ``prompt_tokens``: of those without a first token.
        """
        return False

    def heeds_arrival(self, step: Step) -> bool:
        """Whether an arrival now could change the plan under way. True is always right, False is faster.

        Asked before the arrival joins ``step.waiting``; it may read ``step`` but not act.
        """
        return True

    def order(self, request: Request) -> Any:
        """A sort key for `Step.waiting`. None (the default): first come, first served."""
        return None

    def sorts(self) -> bool:
        """Whether `Step.waiting` is to be kept by `order`; so it is if a subclass brings its own."""
        return type(self).order is not Scheduler.order


class Replicas(Protocol):
    """What a router may see of the replicas that take requests now, by position; never empty, not to be changed.

    Positions shift when a replica fails, drains or comes up; ``indices`` says which replica stands where.
    """

    @property
    def now(self) -> int:
        """The time, ps."""

    @property
    def indices(self) -> Sequence[int]:
        """Which replica stands at each position."""

    @property
    def outstanding(self) -> Sequence[int]:
        """Requests waiting or running there."""

    @property
    def outstanding_tokens(self) -> Sequence[int]:
        """Prompt tokens of those."""

    @property
    def waiting(self) -> Sequence[int]:
        """Requests waiting there, not running yet."""


@mypyc_attr(native_class=False)
class Router(ABC):
    """Chooses a replica for each request. Subclasses are dataclasses; their fields are their settings.

    ``random`` is set before the first request; use no other source of chance.
    """

    random: Random

    @abstractmethod
    def route(self, request: Request, replicas: Replicas) -> int:
        """Position in ``replicas`` of the replica that serves ``request``."""
