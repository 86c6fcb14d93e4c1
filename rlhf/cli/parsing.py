"""Parses a command line, and puts what is wrong with it into one sentence."""

import re
from typing import Any

from rlhf.errors import UserError

NOISE = (
    "Does not validate", "Subtypes:", "Errors:", "Given value type", "Expected a path but", "For further information",
    "Expected a <class 'NoneType'>", "Not a valid subclass", "Subclass types expect", "a class path", "a dict with",
)  # fmt: skip


def parse(parser: Any, words: list[str]) -> Any:
    """Parses a command line.

    Raises:
        UserError: the parser refuses it.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(words)
    except (ArgumentError, ValueError) as error:
        raise UserError(explain(str(error))) from error


def explain(message: str) -> str:
    """Puts an error of jsonargparse or pydantic into one sentence, such as `a.b is 0: it should be greater than 0.`"""
    keys: list[tuple[int, str]] = []  # the setting, level by level, with the indentation of each
    title = named = ""
    values: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    complaints: list[str] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        if found := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            indent = len(line) - len(text)
            keys = [*(level for level in keys if level[0] < indent), (indent, found[1])]
            text = found[2]
        key = ".".join(name for _, name in keys)
        if found := re.search(r"G(?:ot|iven) value: (.*)", text):
            values.setdefault(key, found[1])
            text = text[: found.start()].rstrip(". ")
        if found := re.match(r"Expected a path but (\S+\.yaml) ", text):
            complaints.append(f"there is no file {found[1]}")
        elif not text or text.startswith(NOISE):
            continue
        elif found := re.match(r"\d+ validation errors? for (.*)", text):
            title = found[1] if re.fullmatch(r"[a-z_.]+", found[1]) else key  # the prefix of settings, or a mere type
        elif title and re.fullmatch(r"[\w.\[\]-]+", text):
            keys = [(0, f"{title}.{text}")]
        elif found := re.match(r"(?:\w+ should )?(.*?)(?:, unable .*)? \[type=\w+, input_value=(.*), input_type", text):
            value = values.setdefault(key, found[2].strip("'"))
            limit = (
                f" {value}" if found[1].endswith((" than", " to")) else ""
            )  # lost by jsonargparse if it is the value
            wanted.setdefault(key, []).append(found[1] + limit)
        elif found := re.match(r"Expected a (?:<class '(?:\w+\.)*(\w+)'>|typing.Literal\[(.*)\])", text):
            kind = f"of type {found[1]}" if found[1] else found[2].replace(", ", " or ")
            wanted.setdefault(key, []).append(f"be {kind}")
        elif found := re.match(r"Problem with given class_path '(.*)':", text):
            named = f"{found[1]}: "
        else:
            said = re.sub(
                r"Expected a dot import path string: (.*)", r"there is no class \1; give its import path", text
            )
            complaints.append(named + said)
    if complaints or not wanted:
        return ": ".join([*(name for _, name in keys[:1]), " ".join(complaints) or message]).rstrip(".") + "."
    innermost = [key for key in wanted if not any(other.startswith(f"{key}.") for other in wanted)]
    sentences = [f"{key} is {values[key]}: it should {' or '.join(wanted[key])}" for key in innermost]
    return "; ".join(sentences).replace(" or be ", " or ") + "."
