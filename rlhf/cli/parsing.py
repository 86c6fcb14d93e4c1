"""Parses a command line, and puts what a user can fix into one sentence."""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import rlhf
from rlhf.cli.values import check_values, import_class
from rlhf.errors import ROOM, UserError, causes, find_user_error, full_disk
from rlhf.models.remote_code import trust_remote_code, trusts_remote_code
from rlhf.studies.shipped import with_configs_found, with_shipped_found

_FEW = 10  # keys, which a message can list
_CONFIGS = (".yaml", ".yml")  # other files are data, unless they stand behind --config


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


def parse(parser: Any, words: list[str], command: Any = None) -> Any:
    """Parses a command line.

    Args:
        parser: a parser of jsonargparse.
        words: the command line.
        command: the parser of the subcommand, if there is one.

    Raises:
        UserError: the parser refuses it, or a value that it takes is none that can be used.
    """
    from jsonargparse import ArgumentError, get_loader, set_loader
    from yaml import YAMLError

    words = with_configs_found(words)
    load, set_yaml = get_loader("yaml"), partial(set_loader, "yaml", exceptions=(YAMLError,))
    named = {os.path.abspath(path): path for path in _config_files(words)}
    texts = {Path(path).read_text(errors="replace"): path for path in named.values()}
    configs: list[str] = []  # that were read

    def read(text: str) -> Any:
        if text == "None":  # jsonargparse hands a typed `null` on to the settings of a class as this
            return None
        if (config := texts.get(text)) is None:
            return load(text)
        configs.append(config)
        try:
            check_keys(text)
            return load(text)
        except YAMLError as error:
            raise UserError(f"config: {config} cannot be read: {' '.join(str(error).split())}.") from error

    set_yaml(read)
    try:
        with _whole_lists(), _configs_only(named):
            config = parser.parse_args(words)
    except (ArgumentError, ValueError) as error:
        if broken := next((cause for cause in causes(error) if isinstance(cause, UnicodeDecodeError)), None):
            raise UserError(_not_utf8(broken, named.values())) from error
        if "Unexpected config" in str(error):
            raise UserError(f"config: {' '.join(configs[-1:]) or 'it'} holds no settings (key: value).") from error
        raise UserError(with_hint(explain(error), error, command or parser)) from error
    finally:
        set_yaml(load)
    config = with_shipped_found(config)
    check_values(config[config.subcommand] if "subcommand" in config else config)
    return config


def _config_files(words: list[str]) -> list[str]:
    """Returns the files of a command line that are meant as configs; others hold data, and may be large."""
    split = [word.rpartition("=") for word in words]
    before = [None, *words]
    return [
        value
        for previous, (option, _, value) in zip(before, split, strict=False)
        if ("--config" in (option, previous) or value.endswith(_CONFIGS))
        and os.path.isfile(value)
        and os.access(value, os.R_OK)
    ]


def check_keys(text: str) -> None:
    """Refuses a YAML text in which something holds itself, or in which a key stands twice.

    Of such keys a parser would take the last one without a word.
    """
    import yaml

    seen: set[int] = set()  # aliases lead to a node again

    def look(node: Any, *above: Any) -> None:
        if node in above:
            raise yaml.YAMLError(f"what stands in line {node.start_mark.line + 1} holds itself")
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        first: dict[str, int] = {}
        for key, _ in pairs:
            name, line = str(key.value), key.start_mark.line + 1
            if name in first:
                raise yaml.YAMLError(f"the key {name!r} stands in line {first[name]} and again in line {line}")
            first[name] = line
        for inner in (value for _, value in pairs) if pairs else node.value:
            look(inner, *above, node)

    look(yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@contextmanager
def _whole_lists() -> Iterator[None]:
    """Makes a list replace one that was given before, whose items jsonargparse would fill the new ones up from."""
    from jsonargparse import _typehints

    module: Any = _typehints
    adapt = module.adapt_typehints  # private: an upgrade without it, or with another argument, shall fail here
    assert "prev_val" in inspect.signature(adapt).parameters

    def adapt_whole(value: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(value, list) and not settings.get("append"):
            settings["prev_val"] = None
        return adapt(value, *args, **settings)

    module.adapt_typehints = adapt_whole
    try:
        yield
    finally:
        module.adapt_typehints = adapt


@contextmanager
def _configs_only(named: Container[str]) -> Iterator[None]:
    """Keeps jsonargparse from reading any file that a setting names as if it were a config: CSV is YAML, one text."""
    from jsonargparse import Path as ReadPath

    kind: Any = ReadPath
    make = kind.__init__

    def make_config(self: Any, path: Any, *args: Any, **settings: Any) -> None:
        file = os.path.abspath(path)
        if os.path.isfile(file) and not file.endswith(_CONFIGS) and file not in named:
            raise TypeError(f"{path} is no config")
        make(self, path, *args, **settings)

    kind.__init__ = make_config
    try:
        yield
    finally:
        kind.__init__ = make


def with_hint(sentence: str, error: Exception, parser: Any) -> str:
    """Adds the setting that an unknown one in a sentence is near to, or that is meant by a group of settings."""
    from jsonargparse import ArgumentParser

    unknown = re.search(r"(?:unrecognized arguments: --|Option ')([\w.]+)", sentence)
    if missing := re.search("there is no class ([^;]+);", sentence):
        judges = getattr(sys.modules.get("rlhf.evaluation.judges"), "__all__", [])
        near = get_close_matches(missing[1], [*rlhf.__all__, *judges], 1)
        return f"{sentence} Did you mean {near[0]}?" if near else sentence
    group = re.search(r"\A([\w.]+): (?:.* )?(?!null)(\S+) is neither settings", sentence)
    if unknown is None and group is None:
        return sentence
    if classes := re.findall(r"given class_path '(.*?)'", "\n".join(map(str, causes(error)))):
        parser = ArgumentParser()
        parser.add_class_arguments(import_class(classes[-1]), fail_untyped=False)
    keys = [*parser.get_defaults().keys()]
    if group is not None:
        key, value = group.groups()
        name = key.rpartition(".")[2] if classes else key
        inner = next((found.removeprefix(name) for found in keys if found.startswith(f"{name}.")), ".KEY")
        return f"{key} is {value}: it should be a group of settings; write --{key}{inner} {value}."
    assert unknown is not None
    near = get_close_matches(unknown[1], keys, 1)
    own, *others = (name.rpartition(".")[2] for name in (unknown[1], *near))  # a long prefix makes all names near
    if get_close_matches(own, others):
        return f"{sentence} Did you mean {near[0]}?"
    return f"{sentence} There are {', '.join(keys)}." if classes and len(keys) <= _FEW else sentence


def _not_utf8(error: UnicodeDecodeError, named: Iterable[str]) -> str:
    """Names the one of some files that holds what cannot be decoded."""
    name = next((path for path in named if error.object in Path(path).read_bytes()), "a file")
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
    refusal = next(filter(_is_lightnings, causes(error)), None)
    return f"trainer: {' '.join(str(refusal).split())}" if refusal else None


def _is_lightnings(error: BaseException) -> bool:
    """Tells whether Lightning refuses a setting with an error; its callbacks do with a RuntimeError, too."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    in_callback = type(error) is RuntimeError and module.startswith("lightning.pytorch.callbacks.")
    return in_callback or (isinstance(error, ValueError) and module.startswith("lightning."))


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
        if "of type float" in kinds and re.fullmatch(r"[+-]?(nan|inf|infinity)", values[0], re.IGNORECASE):
            kinds = ["a finite number"]
        return f"{key} is {values[0]}: it should be {' or '.join(kinds)}."
    classes = [name for text in said for name in re.findall(r"\AProblem with given class_path '(.*?)'", text)]
    reason = next(text for text in reversed(said) if text in said[0]).removeprefix(f'Parser key "{key}": ')
    reason = re.sub(r'Unable to load config "(.*)"', r"\1 is neither settings (key: value) nor a file of them", reason)
    no_class = "(?:Expected a dot import path string|Unexpected import path format): (.*)"
    reason = re.sub(no_class, r"there is no class \1; give its import path", reason)
    return ": ".join([*filter(None, [key]), *classes[-1:], " ".join(reason.split()).rstrip(".")]) + "."
