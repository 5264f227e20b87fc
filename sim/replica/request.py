"""A request on its way through a replica: `policies.base.Request`, and the accounting behind what a policy sees."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from chairlift.policies.base import Request


class Counter(Protocol):
    """The decode steps that a group has done."""

    @property
    def steps(self) -> int:
        """How many."""


class When:
    """The time at which a step brings its tokens, ps; of a step in flight it is set once that time is known.

    A request keeps the holder of its latest token's time, not the time. Two tokens are of one step if their holders
    are one object, and to set ``ps`` dates all tokens of a step at once. In three steps:

    1. Step 1 owns the holder ``w``. A and B get tokens from step 1, so ``A.last is B.last is w``. Step 1 is expected
       to land at 100 ps: ``w.ps == 100``.
    2. Step 2 is planned while step 1 is in flight. Launching step 2 takes so long that step 1 lands at 120 ps:
       ``w.ps = 120``. A decodes in step 2, which begins at ``w``: the gap before A's token is step 2's duration.
    3. B was left out of step 2 and decodes in step 3, which does not begin at ``w``. B is late: the gap before B's
       token is counted from 120 ps, and kept by itself.
    """

    __slots__ = ("ps",)
    ps: int


def at(ps: int) -> When:
    """A holder of a time that is known."""
    when = When()
    when.ps = ps
    return when


NEVER: Final = at(0)  # of a request without a token


class Phase(IntEnum):
    """Where a request stands on its replica.

    AWAY → WAITING → PREFILLING → DECODING ⇄ PARKED, and back to WAITING by a preemption. The last token is planned:
    DRAINING. From there it leaves (AWAY), or is HELD first.
    """

    AWAY = 0  # on no replica
    WAITING = 1  # in the queue
    PREFILLING = 2  # admitted, and lacks known tokens
    DECODING = 3  # gets a token from every step of the decode group
    PARKED = 4  # could, but was left out of the latest decode step
    DRAINING = 5  # its last token is planned; it keeps its blocks until that has come
    HELD = 6  # has its whole answer, and keeps its slot until its batch returns


AWAY: Final = Phase.AWAY
WAITING: Final = Phase.WAITING
PREFILLING: Final = Phase.PREFILLING
DECODING: Final = Phase.DECODING
PARKED: Final = Phase.PARKED
DRAINING: Final = Phase.DRAINING
HELD: Final = Phase.HELD


@mypyc_attr(allow_interpreted_subclasses=True)
class Live(Request):
    """A request and what it has computed, emitted and reserved.

    While a request decodes with a group, a step of the group touches none of its members: ``computed`` is ``offset``
    plus the group's steps. In three steps: a request with a prompt of 10 has ``stored == 10`` and ``produced == 1``
    when its prompt is done, and joins a group that has done 7 steps: ``offset == 3``. After two steps of the group,
    ``computed == 3 + 9 == 12`` and ``emitted == 12 - 10 + 1 == 3``. It leaves, and ``stored == 12``, ``produced == 3``.

    Two things are written elsewhere: what joining and leaving a group changes, by the group (`Decodes`), and ``at``, by
    the replica in its cluster.
    """

    __slots__ = (
        *("_arrival", "_hash_ids", "_ignore_eos", "limit", "_output_tokens", "_predicted_tokens"),
        *("lost", "_priority", "_session", "in_host", "_tenant", "asked", "at", "before", "group", "last"),
        *("loaded", "offset", "padded", "phase", "produced", "prompt", "rank", "reserved", "row"),
        "stored",
    )

    def __init__(
        self,
        id: int,
        arrival: int,
        prompt_tokens: int,
        max_tokens: int,
        output_tokens: int | None = None,
        priority: int = 0,
        tenant: int = 0,
        session: int = -1,
        ignore_eos: bool = False,
        predicted_tokens: int | None = None,
        hash_ids: Sequence[int] = (),
    ) -> None:
        self.row = id  # of the trace
        self._arrival = arrival
        self.prompt = prompt_tokens  # tokens
        self.limit = self.asked = max_tokens  # a replica may allow less than was asked for
        self._output_tokens = output_tokens
        self._priority = priority
        self._tenant = tenant
        self._session = session
        self._ignore_eos = ignore_eos
        self._hash_ids = hash_ids
        self._predicted_tokens = predicted_tokens
        self.lost = 0
        self.in_host = 0
        self.padded = 0  # dead tokens computed with its prompt
        self.phase = WAITING
        self.at = -1  # the replica that it is on
        self.group: Counter | None = None  # that it decodes with
        self.offset = 0  # while it decodes: tokens in KV less the steps of its group
        self.stored = 0  # while it does not: tokens in KV
        self.produced = 0  # while it does not: tokens emitted
        self.reserved = 0  # tokens of KV set aside ahead of need; 0 once they are used up
        self.loaded = 0  # tokens whose KV was computed elsewhere and lies ready to be taken in
        self.rank = 0  # rises with every admission: the order of running
        self.last = NEVER  # its latest token outside the group, or in it before the group's latest step
        self.before = NEVER  # the token before that

    # what a policy sees, and cannot write; the simulator reads what these return, which is faster

    @property
    def id(self) -> int:  # noqa: D102 - documented in the contract, as those below
        return self.row

    @property
    def arrival(self) -> int:  # noqa: D102
        return self._arrival

    @property
    def prompt_tokens(self) -> int:  # noqa: D102
        return self.prompt

    @property
    def max_tokens(self) -> int:  # noqa: D102
        return self.limit

    @property
    def ignore_eos(self) -> bool:  # noqa: D102
        return self._ignore_eos

    @property
    def output_tokens(self) -> int | None:  # noqa: D102
        return self._output_tokens

    @property
    def priority(self) -> int:  # noqa: D102
        return self._priority

    @property
    def tenant(self) -> int:  # noqa: D102
        return self._tenant

    @property
    def session(self) -> int:  # noqa: D102
        return self._session

    @property
    def hash_ids(self) -> Sequence[int]:  # noqa: D102
        return self._hash_ids

    @property
    def predicted_tokens(self) -> int | None:  # noqa: D102
        return self._predicted_tokens

    @property
    def preemptions(self) -> int:  # noqa: D102
        return self.lost

    @property
    def swapped(self) -> int:  # noqa: D102
        return self.in_host

    @property
    def pad(self) -> int:  # noqa: D102
        return self.padded

    @property
    def computed(self) -> int:  # noqa: D102
        group = self.group
        return self.stored if group is None else self.offset + group.steps

    @property
    def emitted(self) -> int:  # noqa: D102
        group = self.group
        return self.produced if group is None else self.offset + group.steps - self.prompt + 1

    @property
    def remaining(self) -> int:  # noqa: D102
        if self.group is not None:
            return 1
        return 0 if self.phase is DRAINING else self.prompt + self.produced - self.stored

    @property
    def decoding(self) -> bool:  # noqa: D102
        return self.group is not None or (self.produced > 0 and self.stored > 0 and self.remaining == 1)

    # what happens to it

    def send(self, now: int) -> None:
        """It is sent now, later than its trace says: it follows another."""
        self._arrival = now

    def cap(self, tokens: int) -> None:
        """Its replica allows it so many tokens of answer."""
        self.limit = tokens

    def queue(self) -> None:
        """It comes to another replica."""
        self.phase = WAITING

    def admit(self, hit: int, rank: int, reserved: int = 0, pad: int = 0) -> None:
        """It starts, or starts again; its first ``hit`` tokens are in KV."""
        self.phase = PREFILLING
        self.stored = hit
        self.rank = rank
        self.reserved = reserved
        self.padded = pad

    def compute(self, tokens: int, when: When) -> bool:
        """A chunk of it is computed by ``when``; whether its next token comes with that."""
        self.stored = stored = self.stored + tokens
        if stored < self.prompt + self.produced:
            return False
        self.produced += 1
        self.before, self.last = self.last, when
        return True

    def expect(self, when: When) -> None:
        """A token of it comes by ``when`` that was counted already, or will be."""
        self.before, self.last = self.last, when

    def know(self, tokens: int) -> None:
        """So many tokens of its answer are what its scheduler counts, from here on."""
        self.produced = tokens
        if self.phase is DRAINING:
            self.phase = WAITING

    def drain(self) -> None:
        """Its last token is planned, and `compute` has said so."""
        self.phase = DRAINING

    def end(self, when: When) -> None:
        """Its last token comes at ``when``, and it stays in its group."""
        self.phase = DRAINING
        self.before, self.last = self.last, when

    def requeue(self) -> int:
        """It is preempted; tokens of KV that it loses. If its last token is in flight it goes on to drain."""
        lost, self.stored = self.stored, 0
        self.loaded = self.reserved = self.padded = 0
        if self.phase is not DRAINING:
            self.phase = WAITING
        self.lost += 1
        return lost

    def unsay(self, last: When) -> None:
        """Its latest token was in flight, and will not come; the one before came at ``last``."""
        self.produced -= 1
        self.last = last
        if self.phase is DRAINING:  # that was its last token
            self.phase = WAITING

    def swap_out(self, tokens: int) -> None:
        """The KV of its first ``tokens`` tokens goes to host memory."""
        self.in_host = self.loaded = tokens

    def swap_in(self) -> None:
        """Its KV in host memory is taken back, or of no more use."""
        self.in_host = 0

    def load(self, tokens: int) -> None:
        """The KV of its first ``tokens`` tokens has come from elsewhere."""
        self.loaded = tokens

    def depart(self) -> None:
        """It leaves its replica, and keeps the tokens that its client has."""
        self.phase = AWAY
        self.group = None
        self.limit = self.asked
        self.stored = self.reserved = self.loaded = self.padded = self.in_host = 0

    def __repr__(self) -> str:
        return f"Request({self.row}, prompt {self.prompt}, computed {self.computed}, emitted {self.emitted})"
