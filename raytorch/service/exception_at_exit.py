"""Notes which exception ended a script, in the script's own process.

Python itself imports this file as ``sitecustomize``, from a folder that stands in ``PYTHONPATH`` until then, so that
the script runs as it would alone: as ``__main__``, with no frame, exception hook or argument that is not its own.
Imports nothing else at its top.
"""

import os
import sys

NAME = "sitecustomize.py"
REPORT = "exception.json"
"""Beside it, where an exception ended the script: its class, message and traceback."""
KEYS = ("kind", "module", "message", "traceback")
"""Of the report."""


def _begin(folder: str) -> None:
    """Take the folder out of the environment, which the script's children inherit, and do the user's own after it."""
    import atexit

    before = os.environ.pop("PYTHONPATH")[len(folder + os.pathsep) :]
    if before:
        os.environ["PYTHONPATH"] = before
    sys.path.remove(folder)
    atexit.register(_write, folder, os.getpid())  # the first, thus called last
    del sys.modules["sitecustomize"]
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401 - if there is none, the importer passes over that


def _write(folder: str, process: int) -> None:
    error = getattr(sys, "last_value", None)  # set by the interpreter for what nothing caught, whatever hook printed it
    if error is None or os.getpid() != process or not _has_ended_main(error):  # in a fork; of a library
        return
    if isinstance(error, KeyboardInterrupt):  # the imports below would keep Python from ending by the signal
        return
    try:
        report = _report(error)
        with open(os.path.join(folder, REPORT), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123 - light
            file.write(report)
    except Exception:  # the script's log has the script's own exception as its last, not this one
        return


def _has_ended_main(error: BaseException) -> bool:
    """Tell an exception that reached the script's outermost frame from one that a library, such as pytest, has caught
    on its way and noted as the interpreter does."""
    if error.__traceback__ is None:  # the script could not even begin
        return isinstance(error, SyntaxError)
    frame = error.__traceback__.tb_frame
    return frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__"


def _report(error: BaseException) -> str:
    import json
    import traceback

    from raytorch.errors import message_of
    from raytorch.system.safe_text import cut

    told = (
        type(error).__name__,
        type(error).__module__,
        message_of(error),
        cut("".join(traceback.format_exception(error))),
    )
    return json.dumps(dict(zip(KEYS, told, strict=True)))


if __name__ == "sitecustomize":
    _begin(os.path.dirname(__file__))  # noqa: PTH120 - light
