"""The one error that a user is meant to read."""


class UserError(Exception):
    """Something in the settings, files or records is wrong; the message says what, where, and what to do.

    The command line prints the message alone, without a traceback. It is no `ValueError`, so that no library that tries
    alternatives swallows it.
    """
