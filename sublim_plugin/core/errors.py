"""Errors that a user can act on, and the exit code that each one means."""

from __future__ import annotations


class SublimError(Exception):
    """Base of all errors raised on purpose; its text is the whole message to the user."""

    exit_code = 1


class InputError(SublimError, ValueError):
    """The command, a file or a model is not what was expected; nothing was written."""

    exit_code = 2


class MissingDependencyError(InputError):
    """An optional part is not installed; the message holds the install line."""


class RunError(SublimError, RuntimeError):
    """Work was started and failed; a re-run continues from what is complete."""

    exit_code = 1


class BusyError(SublimError):
    """Another process holds the cell (exit code of sysexits' EX_TEMPFAIL)."""

    exit_code = 75
