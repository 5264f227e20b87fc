"""Requests that verify drafts, and the group of those that do so together.

A step of the group costs a few vector operations, however many they are.

A request whose next steps are all alike joins: each computes its latest token and all of its drafts, none ends its
answer, none reaches what the model can hold. How many drafts each of those steps keeps is drawn when it joins
(`Paths`); so what any step brings, holds and reads is a sum over the members, each at its own place of its own path.
Before the first step that is not like that it leaves, and `sim.replica.verifying` takes it from there.

In three steps, with 3 drafts: A joins with 10 tokens in KV and draws 2, 0, 3 kept drafts; B joins one step later with
20 and draws 1, 1. The group's steps read 14, then 17 + 24 and then 18 + 26 tokens: those in KV and 4 more of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.replica.request import DRAINING, NEVER, PARKED, WAITING, Live, When

Ints = npt.NDArray[np.int64]
LONGEST = 1024  # steps that a path is drawn ahead
LEAST = 4  # steps for which joining is worth it
FEWEST = 4  # requests for which a group is: fewer take less time one by one


class Drafted(Live):
    """A request whose decodes verify drafts.

    ``stored`` counts the tokens that are in KV if all drafts in flight are kept; what is rejected is taken back once a
    step's output is in (`reject`). ``produced`` counts only tokens that are known. ``ahead`` stands for the tokens in
    flight, asynchronous: one and its drafts for each step. In three steps, with 3 drafts, synchronous: a prompt of 10
    is computed, its first token comes: ``stored == 10``, ``produced == 1``, ``drafts == 3``, so ``remaining == 4``. A
    step computes those 4: ``stored == 14``. Its output keeps one draft of the 3 and brings two tokens:
    ``stored == 12``, ``produced == 3``, and 12 tokens of 13 are computed.

    While it verifies them ``within`` a group, at ``slot`` since the group's step ``since``, the group knows better.
    """

    __slots__ = ("ahead", "alone", "drafts", "since", "slot", "within")

    def __init__(self, *columns: Any, **more: Any) -> None:
        super().__init__(*columns, **more)
        self.drafts = 0  # proposed, to be verified by its next step
        self.ahead = 0  # tokens in flight, drafts included; 0 where planning is synchronous
        self.within: DraftedGroup | None = None
        self.slot, self.since = -1, 0
        self.alone = False  # it joins no group any more: its answer ends soon

    @property
    def known(self) -> int:
        """Tokens of its prompt and its answer, those in flight included."""
        return self.prompt + self.produced + self.ahead

    @property
    def computed(self) -> int:  # noqa: D102 - documented in the contract, as those below
        return self.stored if self.within is None else int(self.within.stored[self.slot])

    @property
    def emitted(self) -> int:  # noqa: D102
        return self.produced if self.within is None else int(self.within.produced[self.slot])

    @property
    def remaining(self) -> int:  # noqa: D102
        if self.within is not None:
            return self.within.width
        return 0 if self.phase is DRAINING else self.known + self.drafts - self.stored

    @property
    def decoding(self) -> bool:  # noqa: D102
        alike = self.produced > 0 and self.stored > 0 and self.known - self.stored == 1
        return alike or self.within is not None

    def launch(self, tokens: int, when: When) -> bool:
        """So many tokens of it, drafts included, are computed by ``when``; whether its next token comes with that."""
        self.stored += tokens
        if self.stored < self.known:
            return False
        self.before, self.last = self.last, when
        self.phase = PARKED
        return True

    def reject(self, tokens: int) -> None:
        """So many of the tokens that it has computed are none of its answer."""
        self.stored -= tokens
        self.ahead = max(0, self.ahead - tokens)

    def unsay(self, last: When) -> None:  # noqa: D102 - of a token in flight nothing is counted yet
        self.last = last
        if self.phase is DRAINING:
            self.phase = WAITING

    def requeue(self) -> int:  # noqa: D102
        self.drafts = self.ahead = 0
        self.alone = False
        return super().requeue()

    def depart(self) -> None:  # noqa: D102
        self.drafts = self.ahead = 0
        self.alone = False
        super().depart()


class DraftedGroup:
    """What the members have computed and emitted so far, in vectors by ``slot``: nothing in it tells what will be kept.

    ``width``: tokens of a member that a step computes, its latest and its drafts. ``steps`` counts the steps that are
    planned. Where planning is ahead the latest of them is in flight (``flying``): ``stored`` counts its drafts as kept,
    as `Drafted.stored` does; of ``fresh`` members, the last ones, a step is in flight that was none of the group's.
    """

    __slots__ = ("before", "blocks", "flying", "fresh", "last", "members", "produced", "steps", "stored", "width")

    def __init__(self, width: int) -> None:
        self.width = width
        self.members: list[Drafted] = []
        self.produced, self.stored, self.blocks = (np.zeros(8, np.int64) for _ in range(3))
        self.steps = 0
        self.flying = False
        self.fresh = 0
        self.last = self.before = NEVER  # when the latest planned step brings its tokens, and the one before

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: Drafted, blocks: int) -> None:
        """Add a request, which holds so many blocks."""
        slot = len(self.members)
        if slot == len(self.stored):
            for name in ("produced", "stored", "blocks"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(slot, np.int64)]))
        if not slot:
            self.flying = False
        self.members.append(request)
        self.stored[slot], self.produced[slot], self.blocks[slot] = request.stored, request.produced, blocks
        request.slot, request.since, request.within = slot, self.steps, self
        self.fresh += 1

    def leave(self, request: Drafted) -> int:
        """Take a member out, whose fields say from here on what the vectors said; the slot of who has its slot now."""
        slot, last = request.slot, len(self.members) - 1
        own = self.steps - request.since  # steps
        if own:
            request.produced, request.stored = int(self.produced[slot]), int(self.stored[slot])
            request.before, request.last = self.before if own > 1 else request.last, self.last
        else:
            self.fresh -= 1
        request.slot, request.within = -1, None
        moved = self.members.pop()
        if slot != last:
            moved.slot = slot
            self.members[slot] = moved
            for vector in (self.produced, self.stored, self.blocks):
                vector[slot] = vector[last]
        return last

    def growth(self, ahead: int, longest: int, block_size: int) -> tuple[Ints, int]:
        """Blocks that each member holds in the next step, and how many those are more than now.

        ``ahead``: tokens of KV that a member is given beyond those that it computes, at most ``longest`` in all.
        """
        blocks = self.held_after(0, ahead, longest, block_size)
        return blocks, int(blocks.sum() - self.blocks[: len(self.members)].sum())

    def held_after(self, more: Ints | int, ahead: int, longest: int, block_size: int) -> Ints:
        """Blocks that each member holds in a step before which it has ``more`` tokens stored; as `growth`.

        Shape ``(steps, members)`` where ``more`` has it.
        """
        n = len(self.members)
        slots = np.minimum(self.stored[:n] + (more + (self.width + ahead)), longest)
        found: Ints = np.maximum(-(-slots // block_size), self.blocks[:n])
        return found

    def plan(self, when: When) -> None:
        """A step is planned, and brings its tokens at ``when``."""
        self.stored[: len(self.members)] += self.width
        self.before, self.last = self.last, when
        self.steps += 1
        self.flying, self.fresh = True, 0

    def land(self, given: Ints) -> int:
        """The step in flight brings so many tokens to each member; all tokens that it brings. Fresh ones get none."""
        n = len(self.members) - self.fresh
        self.flying = False
        given = given[:n]
        self.produced[:n] += given
        self.stored[:n] += given
        self.stored[:n] -= self.width
        return int(given.sum())


class Paths:
    """Tokens that each step to come brings each member: nothing that a policy can reach refers to it.

    Row ``step % LONGEST`` of ``given`` is of the group's step of that number, by slot.
    """

    __slots__ = ("given", "leaving", "starts")

    def __init__(self) -> None:
        self.given = np.zeros((LONGEST, 8), np.int64)
        self.leaving: dict[int, dict[int, Drafted]] = {}  # by step, by row: members whose path ends before it
        self.starts: dict[int, int] = {}  # member → tokens that it has when its first step begins

    def add(self, request: Drafted, start: int, path: Sequence[int], now: int) -> None:
        """A request has joined before step ``request.since``, with ``start`` tokens by then.

        ``now``: tokens that the step in flight brings it, so many fewer than it computes drafts are rejected there.
        """
        slot, first = request.slot, request.since
        if slot == self.given.shape[1]:
            self.given = np.concatenate([self.given, np.zeros_like(self.given)], axis=1)
        column = self.given[:, slot]
        at, steps = first % LONGEST, len(path)
        head = min(steps, LONGEST - at)
        column[at : at + head] = path[:head]
        column[: steps - head] = path[head:]
        column[(first - 1) % LONGEST] = now
        self.starts[request.row] = start
        self.leaving.setdefault(first + steps, {})[request.row] = request

    def remove(self, request: Drafted, slot: int, last: int) -> None:
        """A member has left; who had slot ``last`` has its ``slot`` now."""
        del self.starts[request.row]
        if slot != last:
            self.given[:, slot] = self.given[:, last]

    def due(self, step: int) -> list[Drafted]:
        """Members whose path ends before a step, which are to leave."""
        return [r for r in self.leaving.pop(step, {}).values() if r.within is not None]

    def until(self, step: int) -> int:
        """Steps from this one on before which no member's path ends."""
        return min((due for due in self.leaving if due > step), default=step + LONGEST - 1) - step

    def between(self, first: int, behind: int) -> Any:
        """Tokens that each step from ``first`` to the one before ``behind`` brings, by slot."""
        return self.given[np.arange(first, behind) % LONGEST]

    def of(self, step: int) -> Any:
        """Tokens that a step brings, by slot."""
        return self.given[step % LONGEST]
