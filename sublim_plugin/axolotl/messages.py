"""How the plugin speaks in an axolotl run: a refusal is one message and an exit code, no traceback
of the host."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sublim_plugin.axolotl.process_group import is_first
from sublim_plugin.core.errors import SublimError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def one_message(hook: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """End the process with the error's message and exit code instead of a host's traceback."""

    @functools.wraps(hook)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return hook(*args, **kwargs)
        except SublimError as error:
            # A progress bar leaves its line open.
            print(f"\nsublim: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from error

    return wrapped


def warn(text: str) -> None:
    """One line that does not end the run; where there are several processes, from the first."""
    if is_first():
        print(f"\nsublim: warning: {text}", file=sys.stderr, flush=True)
