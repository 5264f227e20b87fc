"""Processes that find torch imported, for tests of what they compute: how they start is the subject of others."""

from __future__ import annotations

from multiprocessing import get_all_start_methods, get_context

import pytest

from chairlift.backend import spawned


def fork_engines(patch: pytest.MonkeyPatch) -> None:
    """Let an engine's processes be forked from a server that has imported it, and torch with it.

    The import takes seconds, several times as long as all that such a test lets a process do. Where there are no such
    servers, processes are spawned as ever.
    """
    if "forkserver" in get_all_start_methods():
        context = get_context("forkserver")
        context.set_forkserver_preload(["chairlift.backend.gpu.engine"])
        patch.setattr(spawned, "SPAWN", context)
