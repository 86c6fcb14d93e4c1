"""Whether Python code in the folder of a model or tokenizer may run."""

from __future__ import annotations

import os

VARIABLE = "RLHF_TRUST_REMOTE_CODE"  # of the environment, so that processes which this one starts share it


def trust_remote_code() -> None:
    """Lets the Python code of models and tokenizers run, in this process and in those that it starts."""
    os.environ[VARIABLE] = "1"


def trusts_remote_code() -> bool:
    """Tells whether the Python code of models and tokenizers may run."""
    return os.environ.get(VARIABLE) == "1"
