"""Parsing a command line, with what the parser complains about in one sentence."""

from __future__ import annotations

import re
from typing import Any

from rlhf.errors import UserError


def parse(parser: Any, words: list[str]) -> Any:
    """Parse, and turn what the parser complains about into one sentence."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(words)
    except (ArgumentError, ValueError) as error:
        raise UserError(explain(str(error))) from error


NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value",
)


def explain(message: str) -> str:
    """A parser's message in one sentence: which setting, and what is wrong with it, without the parser's noise."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(NOISE))
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1; give its import path", text)
    return text.rstrip(".") + "."
