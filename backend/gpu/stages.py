"""One replica as stages of a pipeline: a process a stage, the scheduler's process being the first.

A stage has the weights and the KV of its own layers (`Stage.layers`). Each gets the same integers of every step, in the
same order, and keeps block tables of its own. The hidden states of a step go from stage to stage, [rows, hidden]: the
sum that vLLM hands on as two terms. The last stage chooses the tokens and sends them to the first, which needs them for
the steps after. Nobody waits until what it sends has been received, so while the second stage computes a step the first
computes the next one; the scheduler, whose process the first stage's is, plans meanwhile only what it has time for
between two of its own.

In three steps, two stages: A's prompt passes stage 1, and while stage 2 computes it B's prompt passes stage 1. A's
first decode is planned. The first stage takes in A's token, which stage 2 has sent meanwhile, or waits for it, and
computes the decode while stage 2 computes B's prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from chairlift.backend.gpu.ranks import ALONE, Ranks, Stage
from chairlift.backend.gpu.runner import Runner
from chairlift.backend.gpu.step_graphs import Flat, Ints
from chairlift.backend.gpu.transformer import Tokens


class Coming(NamedTuple):
    """Tokens of a step that the first stage has handed on and the last one has yet to choose."""

    takers: Tensor  # rows of `World.last` that get them
    tokens: Tensor  # filled once they are in: one a taker, and one that nobody gets, for steps without any
    work: Any


class StageRunner(Runner):
    """The share of one stage in a replica. Its steps are no graphs.

    Of the first stage `decodes` and `chunks` give tokens that are to come: `arrive` says when they are in.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._coming: deque[Coming] = deque()  # of the first stage, the oldest first
        self._sent: deque[tuple[Any, Tensor]] = deque()  # what may still be on its way

    def decodes(self, staged: Ints, n: int) -> tuple[Tensor, ...]:  # noqa: D102
        self._await(staged[0, :n])
        return super().decodes(staged, n)

    def chunks(  # noqa: D102
        self,
        flat: Flat,
        cells: Sequence[int],
        blocks: Sequence[int],
        n: int,
        passes: int = 0,
    ) -> tuple[Tensor, ...]:
        self._await(flat.rows[0, :n])
        return super().chunks(flat, cells, blocks, n, passes)

    @torch.inference_mode()
    def arrive(self, left: int) -> None:
        """Take tokens in, waiting for them, until those of at most ``left`` steps are to come."""
        while len(self._coming) > left:
            takers, tokens, work = self._coming.popleft()
            work.wait()
            self._last[takers, 0] = tokens[:-1]

    def _await(self, rows: Ints) -> None:
        """Take in the tokens from which ``rows`` of `World.last` decode."""
        decoding = set(rows.tolist())
        for i, coming in reversed([*enumerate(self._coming)]):
            if not decoding.isdisjoint(coming.takers.tolist()):
                self.arrive(len(self._coming) - i - 1)
                return

    def _next(self, step: Tokens, takers: Tensor) -> Tensor:
        stage = self.stage
        if not stage.first:
            hidden = torch.empty((len(step.tokens), self.net.model.hidden), dtype=self.net.dtype, device=self.device)
            dist.recv(hidden, stage.index - 1)
            step = step._replace(hidden=hidden)
        if stage.last:
            sampled = super()._next(step, takers)
            self._send(torch.cat((sampled, sampled.new_zeros(1))), 0)
            return sampled
        self._send(self.net.passed(step, self._cache), stage.index + 1)
        tokens = torch.zeros(len(takers) + 1, dtype=torch.int32, device=self.device)
        if stage.first:
            self._coming.append(Coming(takers.clone(), tokens, dist.irecv(tokens, stage.count - 1)))
        return tokens[:-1]  # of a stage in between nobody's

    def _send(self, what: Tensor, to: int) -> None:
        """Send this while others compute. What was sent so many steps ago has been received: those steps are done."""
        self._sent.append((dist.isend(what, to), what))
        if len(self._sent) > self.stage.count + 1:
            self._sent.popleft()[0].wait()


def stage_of(*parts: Any) -> StageRunner:
    """The runner of a stage: parts as of `Runner`, but its ranks, which count the stages, before its device."""
    model, options, dtype, *sizes, ranks, device = parts
    assert isinstance(ranks, Ranks)
    return StageRunner(model, options, device, dtype, *sizes, ALONE, Stage(ranks.rank, ranks.count))
