"""Finds the shipped configs, and what they name, from any folder."""

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import rlhf
from rlhf.errors import UserError

CONFIGS = "configs"  # how the shipped files call their folder
MAIN = ("pipeline.yaml", "study.yaml")  # what the name of a folder stands for


def shipped_configs() -> Path:
    """Returns the folder of the shipped configs: in a wheel a part of the package, in a clone beside it."""
    package = Path(rlhf.__file__).resolve().parent
    inside = package / CONFIGS
    return inside if inside.is_dir() else package.parent / CONFIGS


def find_shipped(path: str) -> str:
    """Returns a path that starts with `configs/` as it is if it exists, else that in the package if it exists there."""
    folder, _, inner = path.partition("/")
    if folder != CONFIGS or "\n" in path or Path(path).exists():
        return path
    found = shipped_configs() / inner
    return str(found) if found.exists() else path


def find_config(name: str) -> str:
    """Returns the file that a config stands for: a file, a folder, or the name of a shipped one such as `quickstart`.

    Raises:
        UserError: there is none, which lists the names.
    """
    inner = name.removeprefix(f"{CONFIGS}/")
    for place in (Path(name), Path(CONFIGS, inner), shipped_configs() / inner):
        for file in (place, *(place / main for main in MAIN)):
            if os.path.isfile(file):  # unlike Path's, without an error in a folder that is closed
                return name if file == Path(name) else str(file)
    if not re.fullmatch(r"[\w./~][\w./~-]*", name):
        return name  # settings in place of a file
    names = sorted(file.parent.name for main in MAIN for file in shipped_configs().glob(f"*/{main}"))
    raise UserError(
        f"config: there is no file {name}; give a file, or one of the shipped configs: {', '.join(names)}, or a file "
        "of them such as quickstart/ppo.yaml."
    )


def with_configs_found(words: list[str]) -> list[str]:
    """Replaces what follows `--config` on a command line by the file that it stands for."""
    found = list(words)
    for place, word in enumerate(words):
        if place and words[place - 1] == "--config":
            found[place] = find_config(word)
        elif word.startswith("--config="):
            found[place] = f"--config={find_config(word.removeprefix('--config='))}"
    return found


def with_shipped_found(value: Any) -> Any:
    """Replaces every path in settings that only the package has, such as `configs/quickstart/base_model`."""
    if isinstance(value, str):
        return find_shipped(value)
    if isinstance(value, list):
        return [with_shipped_found(item) for item in value]
    if isinstance(value, dict | Namespace):
        inside = value if isinstance(value, dict) else vars(value)
        for key, inner in inside.items():
            inside[key] = with_shipped_found(inner)
    return value
