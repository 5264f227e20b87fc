"""What a policy or router of somebody else's raises: told with its file, its line and the step."""

from __future__ import annotations

from chairlift.policies.base import PolicyError, PolicyRaised, Router

_OURS = "chairlift."


def name_of(subject: object) -> str:
    """ "policy Mine" or "router Mine"."""
    return f"{'router' if isinstance(subject, Router) else 'policy'} {type(subject).__name__}"


def blame(error: BaseException, subject: object, step: int | None = None) -> None:
    """Raise `PolicyRaised` if ``error`` came out of the code of ``subject``'s own class; else return.

    A `PolicyError` is told the name of ``subject`` and the ``step``, if it knows none yet. What stays as it is: errors
    of the machine (no memory, no file), an interrupt, an error of Chairlift's own or an exit that Chairlift asks for,
    and whatever a policy of Chairlift's own raises, which is a defect.
    """
    if isinstance(error, PolicyError):
        error.who = error.who or name_of(subject)
        error.step = step if error.step is None else error.step
        return
    if isinstance(error, KeyboardInterrupt | OSError | MemoryError) or type(error).__module__.startswith(_OURS):
        return
    own = {each.__module__ for each in type(subject).__mro__ if not each.__module__.startswith(_OURS)}
    own -= {"abc", "builtins", "typing"}
    place = last = ""
    trace = error.__traceback__
    while trace is not None:
        last = str(trace.tb_frame.f_globals.get("__name__"))
        if last in own:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if place and not (isinstance(error, SystemExit) and last.startswith(_OURS)):
        planned = "" if step is None else f", step {step:,}"
        said = " ".join(str(error).split())
        what = f"{place}: raised {type(error).__name__}: {said} ({name_of(subject)}{planned})"
        raise PolicyRaised(what) from error
