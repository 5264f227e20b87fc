"""The requests that routers and policies see, made from the rows of a trace as they are sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chairlift.policies.base import Request
from chairlift.sim.cluster import predicted_lengths
from chairlift.sim.study import Setup


def request_maker(setup: Setup) -> Callable[[int], Request]:
    """A function from a row of the trace to the request that policies see.

    Raises `PolicyError` if the replicas' policies want different predictions.
    """
    trace = setup.trace
    schedulers = [group.make_scheduler() for group in setup.groups]
    told = any(scheduler.oracle for scheduler in schedulers)
    predictor = predicted_lengths.wanted(schedulers)
    arrivals = trace.arrival_ps.tolist()
    prompts = trace.prompt_tokens.tolist()
    outputs: Sequence[int] | None = trace.output_tokens.tolist() if told else None
    guesses = None
    if predictor is not None:
        guesses = predicted_lengths.predictions(trace.output_tokens, predictor, setup.seed).tolist()
    caps = None if trace.max_tokens is None else trace.max_tokens.tolist()
    priorities = None if trace.priority is None else trace.priority.tolist()
    hashes = trace.hash_ids
    tenants = None if trace.tenant is None else trace.tenant.tolist()
    sessions = None if trace.session is None else trace.session.tolist()
    longest = setup.max_model_len

    def make(i: int) -> Request:
        prompt = prompts[i]
        request = Request(
            i,
            arrivals[i],
            prompt,
            max(1, longest - prompt) if caps is None else caps[i],
            outputs[i] if outputs is not None else None,
            priorities[i] if priorities is not None else 0,
            tenants[i] if tenants is not None else 0,
            sessions[i] if sessions is not None else -1,
        )
        if guesses is not None:
            request.predicted_tokens = guesses[i]
        if hashes is not None:
            request.hash_ids = hashes.row(i).tolist()
        return request

    return make
