"""The error that a user is meant to read, and the numbers that settings may be: never NaN, never infinite."""

import errno
import os
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SEEDS = range(2**32)  # what numpy and Lightning take
Seed = Annotated[int, Field(ge=0, lt=SEEDS.stop)]

ROOM = "Free some space"  # what all messages about a full disk say


class UserError(Exception):
    """A setting, file or record is wrong; the message says what, where, and what to do.

    The command line prints the message alone, without a traceback, and ends with `status`.
    """

    status = 2


class OtherProcessError(UserError):
    """Another process says what is wrong; this one only knows that it is."""


class MissingProcessError(UserError):
    """Another process of the same run is missing; the settings may be right, and the same command may go on."""

    status = 75  # EX_TEMPFAIL


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that it was raised from, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_user_error(error: BaseException) -> UserError | None:
    """Finds the `UserError` that a library has wrapped in an error of its own."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def full_disk(error: BaseException) -> str | None:
    """Returns what an error says of a full disk, in the words of whatever library; None if it is of another kind."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    said = [cause for cause in causes(error) if any(os.strerror(number) in str(cause) for number in full)]
    return " ".join(str(said[0]).split()) if said else None
