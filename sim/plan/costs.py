"""What a system costs as people say it: dollars a million tokens, of prompts, of answers, and of both.

A system is paid for by the hour, whatever it serves; at a load the hour is shared out over that load's tokens. Prefill
replicas are paid for prompts and decode replicas for answers. The hour of a replica that does both is split as the
work is: by the least time that prompts, and answers, take it (`chairlift.sim.plan.bounds`).

Worked example: a system of $3.60 an hour serves 10 requests a second of 1000 tokens in and 100 out. That is 36 million
tokens in and 3.6 million out an hour: $0.0909 a million of both. If prompts take 20 ms of the replica and answers 30,
$1.44 are for prompts, $0.04 a million in, and $2.16 for answers, $0.60 a million out.
"""

from __future__ import annotations

from typing import NamedTuple

from chairlift.sim.plan.bounds import work_of
from chairlift.sim.plan.candidates import Candidate, Prices, price_of
from chairlift.sim.workload.clients import starts


class Cost(NamedTuple):
    """Dollars a million tokens."""

    all: float  # tokens in and out together
    into: float  # of prompts
    out: float  # of answers

    def __str__(self) -> str:
        return f"${self.all:,.3g} per million tokens (${self.into:,.3g} in, ${self.out:,.3g} out)"


class Tokens(NamedTuple):
    """Mean tokens of what one unit of the load asks for: a request, or a session."""

    into: float
    out: float


def tokens_of(candidate: Candidate) -> Tokens:
    """The mean tokens of a request; where requests follow one another, of a session."""
    assert candidate.setup is not None
    trace = candidate.setup.trace
    each = starts(trace)
    return Tokens(float(trace.prompt_tokens.sum()) / each, float(trace.output_tokens.sum()) / each)


def cost_of(candidate: Candidate, rate_per_s: float, prices: Prices, usd_per_hour: float | None = None) -> Cost:
    """What the tokens of a load of ``rate_per_s`` cost on a candidate that has a setup.

    ``usd_per_hour``: what the candidate costs where its replicas come and go; None: its price.
    """
    setup = candidate.setup
    assert setup is not None
    for_prompts = whole = 0.0
    for group in setup.groups:
        price = price_of(prices, group.gpu.name)
        assert price is not None
        usd = group.count * group.parallel.gpus * price.usd_per_gpu_hour
        whole += usd
        if group.role == "mixed":
            prompt_s, decode_s = work_of(setup, group)
            usd *= prompt_s / (prompt_s + decode_s)
        for_prompts += usd * (group.role != "decode")
    each = tokens_of(candidate)
    into, out = (3600 * rate_per_s * count / 1e6 for count in each)  # millions an hour
    usd = candidate.usd_per_hour if usd_per_hour is None else usd_per_hour
    for_prompts *= usd / whole if whole else 0.0
    return Cost(usd / (into + out), for_prompts / into, (usd - for_prompts) / out)
