"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something in the settings, files or records is wrong; the message says what, where, and what to do.

    The command line prints the message alone, without a traceback.
    """


def find_user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` that an exception comes from, where a library has wrapped it in one of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
