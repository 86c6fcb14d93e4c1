"""Calls of libraries at files that others wrote: their errors as one sentence, their chatter hidden."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pickle import UnpicklingError

from safetensors import SafetensorError

from rlhf.errors import UserError


@contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Turns whatever a library raises, in the block, at files that others wrote into one sentence.

    Python code among them is refused, unless the user trusts it: transformers would ask on the terminal.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = first_line(error) or type(error).__name__
        if "trust_remote_code=True" in str(error):
            why = "it needs Python code that comes with it; read that code, and add --trust_remote_code to run it."
        elif isinstance(error, UnpicklingError):
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it would run {unsafe[1]}, so it is not read." if unsafe else "it is broken, or holds no weights."
        elif isinstance(error, SafetensorError):
            why = f"a file of its weights is broken, or cut off: {why}"
        elif isinstance(error, JSONDecodeError):
            why = f"a JSON file of it is broken: {why}"
        elif not isinstance(error, OSError | ValueError | RuntimeError):  # the message is not meant for users
            why = f"a file of it is not of the expected form ({type(error).__name__}: {why})"
        raise UserError(f"{sentence}: {why.rstrip('.')}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and warnings of transformers, among them reports of heads that are meant to be new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, and the next one if that says what it is."""
    first, *others = str(error).strip().split("\n")
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
