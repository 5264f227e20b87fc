"""Prompts where steps really run: a turn of a session repeats the answers that its earlier turns were given.

A trace has no tokens. `prefix_identity.Identity` makes up numbers that stand for them, equal where the trace
says that prompts are equal. What an answer says only the engine knows that generates it, and a cached block holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.results.records import Status


class Turns:
    """The prompts of a trace. ``answer(request)`` gives the tokens that a request was given so far.

    By request: ``prompt_tokens``, how long its prompt is; ``status`` and ``emitted`` (`RequestRecords`), which go on.

    A trace may send a turn before the answers that it repeats are complete. Its prompt then has made-up numbers for
    what is missing, and is nobody else's from there on: it shares no block of the prefix cache after that.
    """

    def __init__(
        self,
        identity: Identity,
        prompt_tokens: Sequence[int],
        status: Sequence[int],
        emitted: Sequence[int],
        answer: Callable[[int], Sequence[int]],
    ) -> None:
        self._identity = identity
        self._prompt_tokens = prompt_tokens
        self._status = status
        self._emitted = emitted
        self._answer = answer
        self._earlier = identity.earlier_turns()
        # waiting turn that came too early → blocks that it could share, had it not; made-up numbers of its prompt
        self._early: dict[int, tuple[int, list[int]]] = {}
        self._kept: dict[int, list[int]] = {}  # prompts of those that have started: they stay as they are

    def arrived(self, request: int) -> None:
        """A request has come."""
        if not all(self._done(turn) for turn in self._earlier.get(request, ())):
            self._early[request] = self._identity.shareable[request], self._made_up(request)

    def look(self) -> None:
        """Before a plan: let waiting turns that came too early share what is known of their prompts by now."""
        identity = self._identity
        for request, (whole, _) in list(self._early.items()):
            known = self._known(request)
            blocks = whole if known is None else max(0, known - identity.ahead) // identity.block_size
            identity.share(request, min(whole, blocks))
            if known is None or self._done(request):
                del self._early[request]

    def prompt(self, request: int) -> list[int]:
        """Numbers that stand for the tokens of a request's prompt; it starts now, or again."""
        if request in self._kept:
            return self._kept[request]
        early = self._early.pop(request, None)
        tokens = self._made_up(request) if early is None else early[1]
        named = self._identity.named(request)
        for turn in self._earlier.get(request, ()):
            at = self._prompt_tokens[turn]
            given = self._given(turn)[max(0, named - at) :]
            at = max(at, named)
            tokens[at : at + len(given)] = given
        if early is not None:
            self._kept[request] = tokens
        return tokens

    def _made_up(self, request: int) -> list[int]:
        numbers: list[int] = self._identity.tokens(request, self._prompt_tokens[request]).tolist()
        return numbers

    def _done(self, turn: int) -> bool:
        return self._status[turn] != Status.PENDING

    def _given(self, turn: int) -> Sequence[int]:
        """The answer of a turn, as far as there is one; of one that has ended no token more is its client's."""
        answer = self._answer(turn)
        return answer[: self._emitted[turn]] if self._done(turn) else answer

    def _known(self, request: int) -> int | None:
        """How many leading tokens of a prompt no answer under way can change; None if there is no such answer."""
        for turn in self._earlier[request]:
            if not self._done(turn):
                return self._prompt_tokens[turn] + len(self._answer(turn))
        return None
