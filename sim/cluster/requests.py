"""The requests that routers and policies see, made from the rows of a trace as they are sent."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from chairlift.sim.cluster import predicted_lengths
from chairlift.sim.replica.drafted_group import Drafted
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live
from chairlift.sim.study import Setup
from chairlift.sim.workload.trace import Trace

ID_TOKENS = 16  # that an id of a prompt's block stands for where the trace has no ids of its own; vLLM's block size
CHAIN = 1 << 24  # ids that one prefix group or session can have: more than a prompt has blocks


def request_maker(
    setup: Setup, arrivals: Sequence[int], identities: dict[tuple[int, int], Identity] | None
) -> Callable[[int], Live]:
    """A function from a row of the trace to the request that routers and policies see.

    ``arrivals`` are the trace's, ps, as `RequestRecords` keeps them. ``identities`` are those of
    `sim.cluster.build.make_pool`; None where no two prompts have a block in common. The ids of a prompt's leading
    blocks are the trace's own, and after these, or without them, made from its sessions or prefix groups.

    Raises `PolicyError` if the replicas' policies want different predictions.
    """
    trace = setup.trace
    schedulers = [group.make_scheduler() for group in setup.groups]
    told = any(scheduler.oracle for scheduler in schedulers)
    predictor = predicted_lengths.wanted(schedulers)
    # a list would take 40 bytes a row, and a look into a NumPy array's memory twice the time of one into this
    prompts = array("i", trace.prompt_tokens.tobytes())
    outputs: Sequence[int] | None = trace.output_tokens.tolist() if told else None
    guesses = None
    if predictor is not None:
        guesses = predicted_lengths.predictions(trace.output_tokens, predictor, setup.seed).tolist()
    caps = None if trace.max_tokens is None else trace.max_tokens.tolist()
    going_on = None if trace.ignore_eos is None else trace.ignore_eos.tolist()
    priorities = None if trace.priority is None else trace.priority.tolist()
    hashes = trace.hash_ids
    ends = None if hashes is not None or identities is None else _ends(trace, identities)
    tails = None if hashes is None or identities is None else _tails(trace, identities)
    tenants = None if trace.tenant is None else trace.tenant.tolist()
    sessions = None if trace.session is None else trace.session.tolist()
    longest = setup.max_model_len
    kind = Live if setup.speculate is None else Drafted

    def make(i: int) -> Live:
        prompt = prompts[i]
        seen: Sequence[int] = ()
        if hashes is not None:
            seen = hashes.row(i).tolist() if tails is None else [*hashes.row(i).tolist(), *tails[i]]
        elif ends is not None:
            end = ends[i]
            seen = range(end - end % CHAIN, end)
        return kind(
            i,
            arrivals[i],
            prompt,
            (longest - prompt if prompt < longest else 1) if caps is None else caps[i],
            outputs[i] if outputs is not None else None,
            priorities[i] if priorities is not None else 0,
            tenants[i] if tenants is not None else 0,
            sessions[i] if sessions is not None else -1,
            going_on is not None and bool(going_on[i]),
            guesses[i] if guesses is not None else None,
            seen,
        )

    return make


def _ends(trace: Trace, identities: dict[tuple[int, int], Identity]) -> list[int] | None:
    """For each row the end of its ids: a multiple of `CHAIN`, and one for each block. None without groups and sessions.

    An example. Prompts of group 0 have their first 40 tokens in common, two whole blocks: their ids are 0 and 1, their
    end is 2. Two turns of a session, the first to come, have prompts of 50 and 100 tokens, of which the second begins
    with the first: the ids are 0 … 2 and 0 … 5, the ends 3 and 6; those of another session begin at CHAIN.
    """
    if trace.session is not None:
        identity = identities.setdefault((ID_TOKENS, 0), Identity(trace, ID_TOKENS))
        blocks = np.minimum(identity.shareable, trace.prompt_tokens // ID_TOKENS).tolist()
        chains: dict[int, int] = {}  # what all first blocks of a session or group are known by → its number
        return [
            count and chains.setdefault(identity.key(i, 0), len(chains)) * CHAIN + count
            for i, count in enumerate(blocks)
        ]
    if trace.prefix_group is None or trace.prefix_tokens is None:
        return None
    group = trace.prefix_group.astype(np.int64)
    ends: list[int] = np.where(group >= 0, group * CHAIN + trace.prefix_tokens // ID_TOKENS, 0).tolist()
    return ends


def _tails(trace: Trace, identities: dict[tuple[int, int], Identity]) -> list[range] | None:
    """For each row ids of the blocks that come after those of the trace's own ids and are its session's.

    None without sessions. The ids are below all of the trace's own. An example, with a session's prompts of 64 and 128
    tokens whose first 32 the trace names by the id 7: the ids of the first prompt are 7, -3 and -4 (of its blocks 2 and
    3), of the second 7 and -3 … -8; those of another session begin CHAIN below.
    """
    if trace.session is None or trace.hash_ids is None:
        return None
    identity = identities.setdefault((ID_TOKENS, 0), Identity(trace, ID_TOKENS))
    lowest = min(0, int(trace.hash_ids.values.min(initial=0)))
    chains: dict[int, int] = {}
    tails = []
    for i, prompt in enumerate(trace.prompt_tokens.tolist()):
        named = identity.named(i) // ID_TOKENS
        last = min(identity.shareable[i], prompt // ID_TOKENS)
        if last <= named:
            tails.append(range(0))
            continue
        stream = identity.streams(i)[0][-2]  # the last but one; the last is the row's own
        begin = lowest - 1 - chains.setdefault(stream, len(chains)) * CHAIN
        tails.append(range(begin - named, begin - last, -1))
    return tails
