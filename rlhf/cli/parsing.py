"""Parses a command line, and puts what a user can fix into one sentence."""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.errors import ROOM, UserError, causes, find_user_error, full_disk
from rlhf.models.remote_code import trust_remote_code, trusts_remote_code


def split_words(words: list[str], sections: Iterable[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Takes the settings of sections out of a command line, `--ppo.KEY VALUE` or `--ppo.KEY=VALUE`.

    Returns:
        The other words, and section -> key -> value.
    """
    others: list[str] = []
    found: dict[str, dict[str, str]] = {}
    left = iter(words)
    for word in left:
        key, equals, value = word.removeprefix("--").partition("=")
        section, dot, inner = key.partition(".")
        if not (word.startswith("--") and dot and section in sections):
            others.append(word)
            continue
        value = value if equals else next(left, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"{word} needs a value.")
        found.setdefault(section, {})[inner] = value
    return others, found


def add_trust(parser: Any) -> None:
    """Adds the setting `--trust_remote_code`, which the processes that this one starts share."""
    parser.add_argument(
        "--trust_remote_code", type=bool, nargs="?", const=True, default=trusts_remote_code(),
        help="run the Python code that comes with models and tokenizers, which are refused otherwise",
    )  # fmt: skip


def take_trust(settings: Any) -> None:
    """Follows that setting."""
    if settings.trust_remote_code:
        trust_remote_code()


def parse(parser: Any, words: list[str]) -> Any:
    """Parses a command line.

    Raises:
        UserError: the parser refuses it.
    """
    from jsonargparse import ArgumentError, get_loader, set_loader
    from yaml import YAMLError

    load, set_yaml = get_loader("yaml"), partial(set_loader, "yaml", exceptions=(YAMLError,))
    # jsonargparse hands a typed `null` on to the settings of a class as the text None.
    set_yaml(lambda text: None if text == "None" else load(text))
    try:
        return parser.parse_args(words)
    except (ArgumentError, ValueError) as error:
        broken = next((cause for cause in causes(error) if isinstance(cause, UnicodeDecodeError)), None)
        raise UserError(_not_utf8(broken, words) if broken else explain(error)) from error
    finally:
        set_yaml(load)


def _not_utf8(error: UnicodeDecodeError, words: list[str]) -> str:
    """Names the file of a command line that holds what cannot be decoded."""
    files = [path for word in words if (path := Path(word.rpartition("=")[2])).is_file()]
    name = next((str(path) for path in files if error.object in path.read_bytes()), "a file of the command line")
    return (
        f"config: {name} is no text in UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); is it a config?"
    )


def message_of(error: Exception) -> str | None:
    """Returns the message of an error that the user can fix; None for any other error."""
    known, full = find_user_error(error), full_disk(error)
    if full and ROOM not in str(known):
        return f"{known or f'{full}.'} {ROOM}; the same command goes on, a training run with --ckpt_path last."
    if known:
        return str(known)
    if any(type(cause).__name__ == "ValidationError" for cause in causes(error)):
        return explain(error)
    return str(error) if type(error).__name__ == "MisconfigurationException" else None


def explain(error: Exception) -> str:
    """Puts an error of jsonargparse or pydantic into one sentence, such as `a.b is 0: it should be greater than 0.`

    Each level of settings raises its error from that of the level below, and so does a list of alternatives from that
    of the first; the message of the outermost level lists them all.
    """
    from pydantic import ValidationError
    from yaml import YAMLError

    levels = [level for level in causes(error) if not isinstance(level, YAMLError)]
    said = [str(level) for level in levels]
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "(.*?)"', said[0])))
    if missing := re.search(r"Expected a path but (\S+\.yaml) ", said[0]):
        return f"{key}: there is no file {missing[1]}."
    expected, *values = re.split(r"G(?:ot|iven) value: (.*)", said[0].rpartition("Parser key")[2])
    allowed = re.findall(r"Expected a (?:<class '(?:\w+\.)*(?!NoneType)(\w+)'>|typing.Literal\[(.*?)\])", expected)
    kinds = [f"of type {name}" if name else literals.replace(", ", " or ") for name, literals in allowed]
    if invalid := next((level for level in levels if isinstance(level, ValidationError)), None):
        setting = invalid.title if re.fullmatch(r"[a-z_.]+", invalid.title) else key  # a prefix, or a mere type
        sentences = []
        for problem in invalid.errors():
            wanted = [re.sub(r"^\w+ should |, unable .*", "", problem["msg"]), *kinds]
            name = ".".join(map(str, [setting, *problem["loc"]]))
            sentences.append(f"{name} is {problem['input']}: it should {' or '.join(wanted)}")
        return "; ".join(sentences) + "."
    if kinds and values:
        return f"{key} is {values[0]}: it should be {' or '.join(kinds)}."
    classes = [name for text in said for name in re.findall(r"\AProblem with given class_path '(.*?)'", text)]
    reason = next(text for text in reversed(said) if text in said[0]).removeprefix(f'Parser key "{key}": ')
    reason = re.sub("Expected a dot import path string: (.*)", r"there is no class \1; give its import path", reason)
    return ": ".join([*filter(None, [key]), *classes[-1:], " ".join(reason.split()).rstrip(".")]) + "."
