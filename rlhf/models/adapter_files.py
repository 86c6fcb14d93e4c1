"""Folders of adapters as peft writes them, and the bases that they belong to."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

ADAPTER_FILE = "adapter_config.json"
CONFIG_FILE = "adapted_config.json"  # of a model with an adapter; at a config.json transformers expects a whole model
CLASSIFIER = "SEQ_CLS"  # peft's task type of a reward model
SCORE = "score"  # the head of a reward model


def adapter_settings(path: str) -> dict[str, Any] | None:
    """Reads what an adapter says of itself; None for a path that is no adapter but a whole model.

    Args:
        path: a folder, or a name on the hub.
    """
    folder = os.path.expanduser(path)
    file = os.path.join(folder, ADAPTER_FILE) if os.path.isdir(folder) else _on_hub(path)
    if not os.path.isfile(file):
        return None
    try:
        found = json.loads(Path(file).read_text())
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(f"{file} is no JSON object that can be read; write the adapter again.")


def is_classifier_adapter(path: str) -> bool:
    """Tells whether an adapter is a reward model's: by its task type or, if it names none, by the head that it has.

    TRL's `RewardTrainer` leaves `task_type` and `modules_to_save` as the user gave them.
    """
    found = adapter_settings(path) or {}
    task = found.get("task_type")
    return task == CLASSIFIER or (task is None and SCORE in (found.get("modules_to_save") or ()))


@cache
def _on_hub(path: str) -> str:
    """Returns where the description of an adapter on the hub is in the cache, if that name is one's."""
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(path) or ""


def base_of(path: str, setting: str) -> str:
    """Returns the path of the base that an adapter belongs to; that of a whole model is its own."""
    found = adapter_settings(path)
    if found is None:
        return path
    base = found.get("base_model_name_or_path")
    where = f"{setting}: the adapter {path}"
    if not isinstance(base, str) or not base:
        raise UserError(f"{where} does not say what its base is; set base_model_name_or_path in its {ADAPTER_FILE}.")
    folder = os.path.expanduser(base)
    if (os.path.isabs(folder) or base.count("/") != 1) and not os.path.isdir(folder):
        raise UserError(
            f"{where} belongs to the base {base}, which is not there; bring it back, or set base_model_name_or_path in "
            f"its {ADAPTER_FILE}."
        )
    if adapter_settings(base) is not None:
        raise UserError(f"{where} belongs to {base}, which is an adapter too; merge that one into its own base first.")
    return base


def base_path(base: str) -> str:
    """Returns how an adapter names its base: a folder by its absolute path, so that it is found from everywhere."""
    folder = os.path.expanduser(base)
    return os.path.abspath(folder) if os.path.isdir(folder) else base


def base_name(path: str, setting: str) -> str:
    """Returns the one name of a base, whether a path leads to it or to an adapter of it."""
    base = base_path(base_of(path, setting))
    return os.path.realpath(base) if os.path.isdir(base) else base


def holder(path: str, setting: str, *names: str) -> str:
    """Returns where the files of some names are: in the folder of an adapter, or else with its base."""
    folder = Path(path).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in names):
        return path
    return base_of(path, setting)
